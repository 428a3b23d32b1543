"""The study: runs that go on where they stopped, its table and page; measures of the literature."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_domains import residual

from ranvier.export.graph import Graph
from ranvier.export.nodes import Node, Norm
from ranvier.sim.measures import (
    gradient_norms,
    identity_at_init,
    isometry,
    message_bits,
    natural_pruning,
    pattern_ssim,
    ssim,
)
from ranvier.sim.published import published_figures
from ranvier.sim.report import render
from ranvier.sim.study import Study, study_residual
from ranvier.sim.study_setup import parts_of
from ranvier.train import create_model
from ranvier.train.errors import FormatError, RangeError

TINY = {
    "model": "resnet", "options": {"blocks": [1, 1], "widths": [4, 8], "strides": [1, 2]},
    "epochs": 1, "train": {"batch_size": 32}, "train_limit": 64, "limit": 24, "ladder_limit": 4,
    "steps": 2, "measures": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Study, list[str], str]:
    out, said = tmp_path_factory.mktemp("study"), []
    joins = ("sew", "ms", "ms-conv", "or")
    study = study_residual("digits", joins, seeds=[3], out=out, say=said.append, **TINY)
    return study, said, str(out)


def test_every_run_is_there(made):
    study, said, _ = made
    assert [(r["variant"], r["seed"]) for r in study.runs] == [
        (v, 3) for v in ("sew", "ms", "ms-conv", "or")
    ]
    assert len(said) == 4
    rows = {r["variant"]: r for r in study.rows()}
    assert not rows["sew"]["binary_only"] and "integer 0..2" in rows["sew"]["breaks"]
    assert rows["ms"]["binary_only"] and rows["or"]["binary_only"]
    assert not rows["ms-conv"]["binary_only"] and "real" in rows["ms-conv"]["breaks"]
    assert rows["ms-conv"]["n_parameters"] > rows["ms"]["n_parameters"]
    assert all(r["float"] == r["onnx"] for r in rows.values())


def test_both_mappings_give_one_network(made):
    study, _, _ = made
    for variant in ("sew", "ms-conv"):
        (run,) = study.of(variant)
        assert set(run["mappings"]) == {"linear", "graded"}
        linear, graded = run["mappings"]["linear"], run["mappings"]["graded"]
        assert linear["message_bits"] == 1 and graded["message_bits"] > 1
        assert linear["populations"] < graded["populations"]
    assert set(study.of("or")[0]["mappings"]) == {"linear"}


def test_a_second_call_takes_all_from_disk(made):
    study, _, out = made
    said: list[str] = []
    joins = ("sew", "ms", "ms-conv", "or")
    again = study_residual("digits", joins, seeds=[3], out=out, say=said.append, **TINY)
    assert said == ["4 of 4 runs are there already"]
    assert again.runs == study.runs
    assert again.rows() == study.rows()


def test_a_lost_result_is_measured_again_without_training(made):
    study, _, out = made
    from pathlib import Path

    folder = Path(out) / "or-s3"
    weights = (folder / "train" / "weights.safetensors").read_bytes()
    (folder / "run.json").write_text("{ torn")
    again = study_residual("digits", ("or",), seeds=[3], out=out, **TINY)
    assert again.runs[0]["digest"] == study.of("or")[0]["digest"]
    assert (folder / "train" / "weights.safetensors").read_bytes() == weights


def test_another_setup_is_run_anew(made, tmp_path):
    study, _, out = made
    shutil.copytree(f"{out}/or-s3", tmp_path / "or-s3")  # what other tests look at stays
    out = str(tmp_path)
    said: list[str] = []
    other = study_residual(
        "digits", ("or",), seeds=[3], out=out, say=said.append, **{**TINY, "steps": 1}
    )
    assert len(said) == 1 and other.runs[0]["setup"]["steps"] == 1
    assert other.runs[0]["digest"] != study.of("or")[0]["digest"]


def test_processes_give_the_same(made, tmp_path):
    study, _, _ = made
    both = study_residual("digits", ("sew", "ms"), seeds=[3], out=tmp_path, processes=2, **TINY)
    for run in both.runs:
        (single,) = study.of(run["variant"])
        # torch's sums on the CPU may differ in the last bit from process to process
        assert run["accuracy"]["float"] == pytest.approx(single["accuracy"]["float"], abs=2 / 24)
        assert run["setup"] == single["setup"] and list(run) == list(single)


def test_table_json_and_page(made):
    study, _, out = made
    lines = study.table().splitlines()
    assert len(lines) == 5 and lines[0].startswith("join") and lines[1].startswith("sew")
    found = json.loads(study.to_json())
    assert [r["variant"] for r in found["rows"]] == ["sew", "ms", "ms-conv", "or"]
    page = render(study.data())
    assert "Two ways to map a join" in page and "unrolled" in page and "relay" in page
    assert json.loads((open(f"{out}/study.json")).read())["setup"]["model"] == "resnet"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joins": ("sew", "add")}, "'add' is none of vanilla"),
        ({"joins": ()}, "at least one join"),
        ({"seeds": 0}, "at least one join and one seed"),
        ({"colour": 1}, "option 'colour'"),
    ],
)
def test_refusals(change, message, tmp_path):
    with pytest.raises(RangeError, match=message):
        study_residual(**{"joins": ("ms",), "out": tmp_path, **change})


def test_names_of_variants():
    assert parts_of("sew-iand") == ("sew-iand", "A") and parts_of("sew-iand-conv")[1] == "conv"


@pytest.mark.parametrize("join", ["sew", "sew-and", "sew-iand", "ms", "or"])
def test_zero_init_makes_the_identity(join):
    torch.manual_seed(0)
    net = create_model("resnet-digits", join=join, zero_init=True, steps=2)
    x = torch.rand(2, 1, 8, 8) * 4
    assert set(identity_at_init(net, x).values()) == {1.0}


def test_vanilla_is_no_identity_even_so():
    """The control: the neuron behind the sum turns its input into something else."""
    torch.manual_seed(0)
    net = create_model("resnet-digits", join="vanilla", zero_init=True, steps=2)
    assert min(identity_at_init(net, torch.rand(2, 1, 8, 8) * 4).values()) < 0.5
    plain = create_model("resnet-digits", join="ms", zero_init=False, steps=2)
    assert min(identity_at_init(plain, torch.rand(2, 1, 8, 8) * 40).values()) < 0.9


def test_gradient_norms_of_identities_are_equal():
    for join in ("ms", "or"):
        r = gradient_norms(join, depth=4, width=4, size=4, batch=2)
        np.testing.assert_allclose(r, 1.0, rtol=1e-5)
    vanilla = gradient_norms("vanilla", depth=4, width=4, size=4, batch=2, zero_init=False)
    assert isometry(vanilla)["max_abs_log"] > 0.1


def test_isometry_of_known_profiles():
    assert isometry(np.ones(5)) == {"max_abs_log": 0.0, "slope": pytest.approx(0.0)}
    back = np.arange(5, 0, -1)
    assert isometry(np.exp(0.3 * back))["slope"] == pytest.approx(0.3)


def test_ssim_of_known_maps():
    """Equal: 1. Opposite, of equal mean and variance: (c2 - 2 v)/(c2 + 2 v) with v = 0.25."""
    a = np.indices((2, 4, 4)).sum(0) % 2.0
    assert ssim(a, a) == pytest.approx(1.0)
    c2 = 0.03**2
    assert ssim(a, 1 - a) == pytest.approx((c2 - 0.5) / (c2 + 0.5))
    assert ssim(a, np.zeros_like(a)) < 0.01


def test_a_block_that_does_nothing_has_ssim_one():
    graph, x = silenced("or", "b1.norm"), np.random.default_rng(0).uniform(0, 1, (4, 3, 2, 6, 6))
    found = pattern_ssim(graph, x)
    assert found["b0.join -> b1.join"] == pytest.approx(1.0)
    assert pattern_ssim(residual("or", 3), x)["b0.join -> b1.join"] < 0.999


def silenced(join: str, norm: str) -> Graph:
    graph = residual(join, 3)
    zero = np.zeros(4)
    nodes: list[Node] = [
        replace(n, gamma=zero, beta=zero) if isinstance(n, Norm) and n.name == norm else n
        for n in graph
    ]
    return graph.with_nodes(nodes)


def test_natural_pruning_drops_silent_branches_alone():
    x = np.random.default_rng(0).uniform(0, 1, (4, 3, 2, 6, 6))
    found = natural_pruning(silenced("or", "b1.norm"), x)
    assert found.dropped == ("b1.join: b1.neuron",) and found.identical
    assert found.nodes[1] == found.nodes[0] - 3  # its convolution, normalization and neuron
    kept = natural_pruning(residual("or", 3), x)
    assert kept.dropped == () and kept.identical and min(kept.rates.values()) > 0
    with pytest.raises(RangeError, match="no OR join"):
        natural_pruning(residual("sew", 2), x)


def test_dropping_a_branch_that_fires_is_noticed():
    """The control: the comparison of outputs can fail."""
    from ranvier.sim.measures import without

    x = np.random.default_rng(0).uniform(0, 1, (4, 3, 2, 6, 6))
    graph = residual("or", 3)
    assert not np.array_equal(graph.run(x), without(graph, {"b1.neuron"}).run(x))


def test_message_bits():
    from ranvier.deploy import compile

    for join, bits in (("or", 1), ("sew", 2)):
        graph = residual(join, 2)
        program = compile(graph, calibration=np.ones((4, 1, 2, 6, 6)), joins="graded")
        assert message_bits(program) == bits


@pytest.fixture(scope="module")
def published():
    return {(r.network, r.dataset): r for r in published_figures()}


def test_published_operations_come_out_to_the_digit(published):
    flops = [r.flops for r in published.values()]
    assert flops[:4] == [72_500_608, 72_205_696, 316_955_904, 315_776_256]
    assert [n for (n, _), r in published.items() if not r.flops_agree] == ["ghostnet-mlp"]


def test_published_parameters_come_out(published):
    assert published["ghostnet", "CIFAR-10"].parameters == 3_914_318
    assert published["ghostnet-dfc", "CIFAR-10"].parameters == 4_888_718
    assert [round(r.parameters / 1e6, 2) for r in list(published.values())[:3]] == [
        0.47,
        0.46,
        14.79,
    ]
    assert all(r.parameters_agree for (_, d), r in published.items() if d == "CIFAR-10")


def test_published_energies_follow_from_their_rates(published):
    """0.9 pJ x rate x FLOPs; the control: at another rate they would not."""
    from dataclasses import replace

    for name in ("ghostnet", "ghostnet-dfc"):
        row = published[name, "CIFAR-10"]
        assert row.energy_agrees and not replace(row, rate=0.2).energy_agrees
    assert published["vgg16", "MNIST"].energy_agrees is None


def test_a_depth_study_has_a_row_a_join_and_depth(tmp_path):
    from ranvier.sim.study_depth import study_depth

    tiny = {"train_limit": 64, "limit": 24, "ladder_limit": 4, "steps": 2, "epochs": 1}
    options = {"widths": (4, 4, 8)}
    found = study_depth("digits", (8, 14), ("ms", "or"), [0], out=tmp_path, options=options,
                        measures=False, **tiny)  # fmt: skip
    assert [(r["variant"], r["depth"]) for r in found.rows()] == [
        ("ms", 8), ("ms", 14), ("or", 8), ("or", 14)]  # fmt: skip
    last = found.rows()[-1]
    assert last["pairs"] == 3 and last["pruned"] is not None and last["identical"]
    assert len(found.table().splitlines()) == 6
    assert "Chip accuracy over depth" in (tmp_path / "depth.html").read_text()
    with pytest.raises(RangeError, match="depth 9 is none of 8"):
        study_depth("digits", (9,), out=tmp_path)


def test_what_untrained_networks_measure_at_a_depth():
    from ranvier.sim.study_depth import untrained
    from ranvier.sim.study_setup import Setup

    ms, vanilla = (
        untrained(j, 8, {"widths": (8, 8, 16)}, Setup(steps=4)) for j in ("ms", "vanilla")
    )
    assert ms["identity"] == {"default": 1.0, "zero": 1.0} and vanilla["identity"]["zero"] < 0.5
    assert len(ms["gradient"]["plain"]["r"]) == 3
    assert (
        ms["gradient"]["zero"]["max_abs_log"] < 1e-4 < vanilla["gradient"]["plain"]["max_abs_log"]
    )


def test_weights_from_run_folders(made, tmp_path):
    """A trained network of the same family is loaded and gives the same Program; another is refused."""
    study, _, out = made
    again = study_residual("digits", ("or",), seeds=[3], out=tmp_path, weights=out, **TINY)
    assert again.runs[0]["digest"] == study.of("or")[0]["digest"]
    wider = {**TINY, "options": {**TINY["options"], "widths": [8, 8]}}
    with pytest.raises(FormatError, match=r"trained with widths=\(4, 8\)"):
        study_residual("digits", ("or",), seeds=[3], out=tmp_path / "b", weights=out, **wider)


def test_a_run_folder_can_be_compared_and_a_failed_run_leaves_the_others(made, tmp_path):
    from ranvier.train.recipe import load_run

    study, _, out = made
    net, recipe, _ = load_run(f"{out}/ms-s3/train")
    assert net.config.join == "ms" and recipe is not None and recipe.train.seed == 3
    there = {**TINY, "weights": str(tmp_path)}
    shutil.copytree(f"{out}/ms-s3", tmp_path / "ms-s3")
    some = study_residual("digits", ("ms", "or"), seeds=[3], out=tmp_path / "out", **there)
    assert some.variants == ["ms"] and list(some.failed) == ["or-s3"]
    assert "model.json" in some.failed["or-s3"]


def test_settings_come_from_a_recipe_and_the_command_line():
    from ranvier.sim.study_setup import make_setup, recipe_of

    made = make_setup("mnist", "mnist-resnet8", ["epochs=3", "widths=[16,32,64]"], None, None, {})
    assert made.train["epochs"] == 3 and "seed" not in made.train
    assert made.options["widths"] == [16, 32, 64] and made.model == "resnet8"
    recipe = recipe_of(made, "ms-conv", 7)
    assert recipe.model["shortcut"] == "conv" and recipe.train.seed == 7
    with pytest.raises(FormatError, match="did you mean 'epochs'"):
        make_setup("digits", None, ["epocs=3"], None, None, {})
