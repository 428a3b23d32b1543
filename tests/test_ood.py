"""Colored MNIST and its three objectives: proportions, closed forms, a shortcut taken or not."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from ranvier.train.colored_mnist import Environments, color, colored_mnist
from ranvier.train.data import Dataset
from ranvier.train.errors import RangeError, UnsupportedError
from ranvier.train.ood import (
    METHODS,
    OodSettings,
    SpikingMlp,
    in_parts,
    irm_penalty,
    make_mlp,
    ood_table,
    paired_indices,
    select,
    similarity_weight,
    spike_cosine,
    split_penalty,
    train_ood,
)
from ranvier.train.ood_study import (
    color_line,
    grid,
    main,
    parse_gap,
    published_row,
    run_grid,
    shape_table,
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("flip", [0.0, 0.1, 0.9])
def test_labels_and_colors_have_their_proportions(flip):
    """0.25 of the labels and `flip` of the colors differ; 40,000 draws leave 0.01 (4 sigma)."""
    digit = torch.arange(40_000) % 10
    x = torch.rand(40_000, 1, 28, 28) + 0.1
    images, y = color(x, digit, flip, torch.Generator().manual_seed(0))
    assert images.shape == (40_000, 2, 14, 14)
    assert abs((y != (digit < 5).long()).double().mean() - 0.25) < 0.01
    z = (images[:, 1].sum((1, 2)) > 0).long()  # the channel that is not black
    assert_array_equal(images.sum((2, 3)).ne(0).sum(1), 1)
    assert abs((z != y).double().mean() - flip) < 0.01
    assert_array_equal(images.sum(1), x[:, 0, ::2, ::2])


def test_environments_share_no_digit(data_file):
    data_file("mnist.npz")
    e = colored_mnist(limit=3000)
    sizes = [len(d) for d in (*e.train, e.validation, e.test)]
    assert sizes == [960, 960, 480, 600]
    seen = [{x.sum(0).numpy().tobytes() for x in d.x} for d in (*e.train, e.validation, e.test)]
    assert len(set.union(*seen)) >= sum(sizes) - 3  # a few digits look alike at 14x14
    assert_array_equal(colored_mnist(limit=3000).test.x, e.test.x)
    with pytest.raises(RangeError, match="color flip of 2"):
        colored_mnist(flips=(0.1, 2))


def test_irm_penalty_is_the_analytic_square():
    torch.manual_seed(0)
    logits = torch.randn(40, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 2, (40,))
    each = logits * (torch.sigmoid(logits) - y)
    assert_allclose(irm_penalty(logits, y).detach(), each.mean().detach() ** 2, rtol=1e-12)
    halves = each[0::2].mean() * each[1::2].mean()
    assert_allclose(split_penalty(logits, y).detach(), halves.detach(), rtol=1e-12)
    irm_penalty(logits, y).backward()
    assert logits.grad.abs().sum() > 0


def test_cosine_of_spike_trains():
    torch.manual_seed(0)
    a = (torch.rand(8, 5, 2) < 0.5).float()
    assert_allclose(spike_cosine(a, a), 1, rtol=1e-6)
    assert_allclose(spike_cosine(a, a.flip(0), "rates"), 1, rtol=1e-6)
    assert spike_cosine(a, a.flip(0)) < 1
    assert spike_cosine(torch.zeros(8, 5, 2), torch.zeros(8, 5, 2)) == 1
    assert spike_cosine(a, torch.zeros(8, 5, 2)) == 0
    by_hand = [
        np.dot(u, v) / (np.linalg.norm(u) * np.linalg.norm(v))
        for u, v in zip(*(s.transpose(0, 1).flatten(1).numpy() for s in (a, 1 - a)), strict=True)
    ]
    assert_allclose(spike_cosine(a, 1 - a), np.mean(by_hand), atol=1e-6)


def test_similarity_weight_rises_from_zero():
    s = OodSettings("similarity-trains", epochs=11, similarity_max=2.0)
    assert [similarity_weight(s, i) for i in (0, 5, 10)] == [0.0, 1.0, 2.0]


def test_pairs_have_equal_labels():
    y1, y2 = torch.randint(0, 2, (100,)), torch.randint(0, 2, (80,))
    i, j = paired_indices(y1, y2, torch.Generator().manual_seed(0))
    assert_array_equal(y1[i], y2[j])
    assert len(set(i.tolist())) == len(i) and len(set(j.tolist())) == len(j) >= 60


def test_the_networks():
    assert sum(p.numel() for p in make_mlp(390).parameters()) == 392 * 390 + 390 + 390 * 391 + 391
    net = SpikingMlp(16, 8)
    x = torch.rand(5, 2, 14, 14)
    spikes = net.spikes(x)
    assert spikes.shape == (8, 5, 2) and set(spikes.unique().tolist()) <= {0.0, 1.0}
    assert_array_equal(net(x).detach(), (spikes[..., 1] - spikes[..., 0]).sum(0).detach())


def _toy(n: int = 800) -> Environments:
    """Label by a weak shape (75 %) and a strong color; the color turns around in the test."""
    generator = torch.Generator().manual_seed(0)

    def environment(flip: float) -> Dataset:
        shape = (torch.rand(n, generator=generator) < 0.5).long()
        digit = torch.where(shape == 1, 0, 9)
        x = torch.zeros(n, 1, 28, 28)
        x[shape == 1, :, :14] = 1
        x[shape == 0, :, 14:] = 1
        return Dataset(*color(x, digit, flip, generator), 2, "toy")

    return Environments((environment(0.1), environment(0.2)), environment(0.5), environment(0.9))


def test_erm_takes_the_shortcut_and_irm_does_not():
    """The point of the data set, on a toy of it: colors mislead ERM, not IRM."""
    toy = _toy()
    options = {"network": "mlp", "hidden": 32, "batch_size": 0, "epochs": 120, "lr": 5e-3}
    erm = train_ood(toy, OodSettings("erm", **options)).selected["last"]
    irm = train_ood(toy, OodSettings("irm", penalty=1e4, anneal_epochs=40, **options)).selected[
        "last"
    ]
    assert erm["env1"] > 0.85 and erm["test"] < 0.3
    assert irm["test"] > 0.6


@pytest.mark.parametrize("method", ["erm", "irm", "similarity-trains", "similarity-rates"])
def test_spiking_networks_learn_the_training_environments(method):
    settings = OodSettings(
        method, epochs=8, hidden=32, lr=5e-3, batch_size=100, l2=1e-4, anneal_epochs=6, steps=6
    )
    result = train_ood(_toy(), settings)
    assert max(row["env1"] for row in result.history) > 0.75
    assert 0 <= result.history[-1]["similarity"] <= 1
    assert train_ood(_toy(), settings).history == result.history  # seeded


def test_selection_rules():
    rows = [
        {"epoch": 1, "env1": 0.6, "env2": 0.6, "validation": 0.5, "test": 0.9},
        {"epoch": 2, "env1": 0.8, "env2": 0.7, "validation": 0.7, "test": 0.4},
        {"epoch": 3, "env1": 0.9, "env2": 0.8, "validation": 0.6, "test": 0.5},
    ]
    chosen = select(rows)
    assert [chosen[k]["epoch"] for k in ("last", "validation", "oracle")] == [3, 2, 3]
    assert "oracle" not in select(rows[:1])


def test_the_table_has_mean_and_spread():
    settings = OodSettings("erm", epochs=1, hidden=8, network="mlp")
    results = [train_ood(_toy(200), settings) for _ in range(2)]
    row = ood_table(results)[0]
    assert row["method"] == "erm" and row["n_seeds"] == 2 and row["test_spread"] == 0.0
    assert row["test"] == pytest.approx(100 * results[0].selected["last"]["test"])


# ---- the grid


SMALL = OodSettings(epochs=3, batch_size=100, hidden=8, steps=2)


def records(tmp_path, methods=("erm", "similarity-trains"), gaps=((0.1, 0.2),), seeds=(0, 1)):
    said = []
    runs = grid(methods, gaps, seeds, SMALL, 1500)
    return run_grid(runs, tmp_path, say=said.append), said


def test_a_grid_goes_on_where_it_was_cut_off(tmp_path, data_file):
    data_file("mnist.npz")
    first, said = records(tmp_path)
    assert len(first) == len(said) == 4
    (tmp_path / "erm-10-20-s1.json").write_text("{", encoding="utf-8")  # cut off in the writing
    again, said = records(tmp_path)
    assert len(said) == 1 and "erm-10-20-s1" in said[0]
    assert [r["result"] for r in again] == [r["result"] for r in first]
    other = run_grid(grid(["erm"], [(0.1, 0.2)], [0], replace(SMALL, lr=0.1), 1500), tmp_path)
    assert other[0]["result"] != first[0]["result"]  # a run of other settings is not taken


def test_reports_of_a_grid(tmp_path, data_file):
    data_file("mnist.npz")
    found, _ = records(tmp_path, gaps=((0.1, 0.2), (0.0, 0.3)), seeds=(0,))
    rows = csv.DictReader(io.StringIO((tmp_path / "curves.csv").read_text()))
    assert len([r for r in rows if r["run"] == "erm-0-30-s0"]) == SMALL.epochs
    html = (tmp_path / "curves.html").read_text()
    assert html.count("<svg") == 6 and html.count("<polyline") == 12
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert json.loads((tmp_path / "ood.json").read_text())["n_runs"] == len(found) == 4


def test_the_color_line_joins_guessing_and_color_alone():
    for flips in ((0.1, 0.2), (0.0, 0.3)):
        assert color_line(flips, 0.5) == 0.5
        assert color_line(flips, 0.85) == pytest.approx(0.1)
    row = {"env1": 0.75, "env2": 0.75, "test": 0.75, "validation": 0.75}  # shape alone
    record = {"gap": "10-20", "method": "erm", "result": {"history": [row]}}
    assert "| 10/20 | erm | 1 | +53.6 | +53.6 | 75.0 |" in shape_table([record])


def test_what_does_not_concern_a_method_does_not_tell_its_runs_apart():
    runs = [
        grid(METHODS, [(0.1, 0.2)], [0], replace(SMALL, penalty=p, similarity_max=s))
        for p, s in ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0))
    ]
    same = [[a == b for a, b in zip(runs[0], other, strict=True)] for other in runs[1:]]
    assert same == [[True, False, True, True], [True, True, False, False]]


def test_gaps_and_published_figures():
    assert [parse_gap(g) for g in ("10/20", "2.5-27.5", "0/30")] == [
        (0.1, 0.2), (0.025, 0.275), (0.0, 0.3)
    ]  # fmt: skip
    assert published_row("erm", (0.1, 0.2)) == (89.1, 80.1, 10.2)
    assert published_row("similarity-trains", (0.0, 0.3)) == (77.4, 64.5, 33.6)
    assert published_row("erm", (0.0, 0.3)) is None
    with pytest.raises(RangeError, match="not two percentages"):
        parse_gap("10")
    with pytest.raises(UnsupportedError, match="irm-mlp"):
        grid(["magic"], [(0.1, 0.2)], [0], SMALL)


def test_the_command(tmp_path, data_file, capsys):
    data_file("mnist.npz")
    options = "--methods erm --seeds 0 --epochs 1 --hidden 4 --steps 2 --digits 1000"
    assert main(["--out", str(tmp_path), *options.split()]) == 0
    assert "| 10/20 | erm | last | 1 |" in capsys.readouterr().out
    assert main(["--gaps", "x"]) == 2
    assert capsys.readouterr().out.startswith("ood: gap 'x'")


def test_history_rows_come_every_so_many_epochs():
    options = {"network": "mlp", "hidden": 4, "batch_size": 0}
    result = train_ood(_toy(100), OodSettings("erm", epochs=7, eval_every=3, **options))
    assert [row["epoch"] for row in result.history] == [3, 6, 7]
    with pytest.raises(RangeError, match="eval_every"):
        OodSettings(eval_every=0)


def test_parts_are_the_whole():
    net = make_mlp(8)
    x = torch.rand(7, 2, 14, 14)
    torch.testing.assert_close(in_parts(net, x, 3), net(x))


def test_wrong_settings():
    with pytest.raises(UnsupportedError, match="method 'magic' is unknown; known: erm"):
        OodSettings("magic")
    with pytest.raises(UnsupportedError, match="compares spikes; use network='snn'"):
        OodSettings("similarity-trains", "mlp")
