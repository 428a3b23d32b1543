"""The study: runs that go on where they stopped, its table and page; measures of the literature."""

from __future__ import annotations

import json
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
from ranvier.train.errors import RangeError

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


def test_another_setup_is_run_anew(made):
    study, _, out = made
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


def test_published_operations_come_out_to_the_digit():
    rows = published_figures()
    assert [r.flops for r in rows] == [72_500_608, 72_205_696, 316_955_904, 315_776_256]
    assert all(r.flops_agree for r in rows)
    assert [round(r.parameters / 1e6, 2) for r in rows[:2]] == [0.47, 0.46]
