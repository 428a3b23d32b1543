"""`compare`: engines side by side, the ladder, first divergence, advice; and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ranvier.deploy import compile
from ranvier.deploy.currents import message_units
from ranvier.deploy.program import Program
from ranvier.export import trace
from ranvier.export.graph import Graph
from ranvier.sim import compare, run
from ranvier.sim.accuracy import Score, confusion, wilson
from ranvier.sim.comparison import Report
from ranvier.sim.ladder import RUNGS, Ladder, read_back, with_integers
from ranvier.train import create_model
from ranvier.train.data import Dataset
from ranvier.train.errors import RangeError, ShapeError, UnsupportedError

N = 24
ENGINES = ("torch", "graph", "onnx", "dense")


def network(join: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    shape = {
        "blocks": (1, 1),
        "widths": (4, 8),
        "strides": (1, 2),
        "image_size": 6,
        "in_channels": 1,
    }
    net = create_model("resnet", join=join, steps=3, num_classes=4, **shape)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2.0)
                module.bias.uniform_(0.2, 1.0)
    return net.eval()


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = (rng.integers(0, 16, (N, 1, 6, 6)) / 16).astype(np.float32)
    return x, rng.integers(0, 4, N)


@pytest.fixture(scope="module", params=["vanilla", "sew", "ms", "or"])
def made(request) -> tuple[torch.nn.Module, Graph, Program, Report]:
    net, (x, y) = network(request.param), data()
    graph = trace(net, torch.from_numpy(x[:2]))
    program = compile(graph, calibration=x)
    return net, graph, program, compare(net, program, (x, y), ENGINES, graph=graph, advice_limit=8)


def test_engines_run_on_the_same_samples(made):
    net, _, _, report = made
    assert list(report.accuracy) == list(ENGINES)
    x, y = data()
    with torch.no_grad():
        right = int((net(torch.from_numpy(x)).argmax(1).numpy() == y).sum())
    assert report.scores["torch"] == Score(right, N)
    assert {s.n for s in report.scores.values()} == {N}
    assert report.parity["graph"] < 1e-5 and report.parity["onnx"] < 1e-5
    assert report.ledger is not None and report.ledger.n_samples == N


def test_a_label_a_step() -> None:
    """Every labelled step is an answer; the first labels are -1, as before a recording starts."""
    torch.manual_seed(0)
    net = create_model("mlp", steps=7, hidden=(16,), num_classes=3, in_channels=1, image_size=3)
    rng = np.random.default_rng(0)
    x = (rng.random((7, 10, 1, 3, 3)) < 0.5).astype(np.float32)
    y = rng.integers(0, 3, (10, 7))
    y[:, :2] = -1
    graph = trace(net.eval(), torch.from_numpy(x))
    program = compile(graph, calibration=x)
    report = compare(net, program, (x, y), ENGINES, graph=graph, limit=8, onnx_limit=5)
    each = run(program.with_parts(readout=replace(program.readout, reduce="none")), x[:, :8])
    right = (each.output.argmax(-1).T == y[:8])[:, 2:]
    assert report.scores["dense"] == Score(int(right.sum()), right.size, "steps")
    assert report.scores["onnx"].n == 5 * 5 and report.parity["onnx"] < 1e-5
    assert report.scores["torch"] == report.scores["graph"]
    assert report.program.digest() == program.digest() and report.advice[0].n == right.size
    whole = Dataset(torch.from_numpy(x).transpose(0, 1), torch.from_numpy(y), 3, "toy", timed=True)
    same = compare(net, program, whole, ("dense",), graph=graph, limit=8, advice_limit=0)
    assert same.scores["dense"] == report.scores["dense"]
    assert any("too narrow" in line for line in report.data()["summary"])
    still = np.full_like(y, -1)
    still[:, -1] = y[:, -1]
    last = compare(net, program, (x, still), ("graph", "dense"), graph=graph, advice_limit=0)
    assert {s.n for s in last.scores.values()} == {10}
    with pytest.raises(ShapeError, match=r"one a sample and step \[10, 7\]"):
        compare(net, program, (x, y[:, :6]), ("dense",), graph=graph)
    with pytest.raises(RangeError, match="none of its steps has a label"):
        compare(net, program, (x, np.full_like(y, -1)), ("dense",), graph=graph)
    piled = replace(program.readout, kind="membrane", reduce="last")
    with pytest.raises(UnsupportedError, match="sum over all steps"):
        compare(net, program.with_parts(readout=piled), (x, y), ("dense",), graph=graph)


def test_rungs_agree_where_they_must(made):
    _, _, _, report = made
    assert set(report.agreement) == set(RUNGS)
    for name in report.ladder.names:
        assert report.agreement["float"][name].same == 1.0
        # equal but for ties of rounding: normalization is folded, single against double precision
        assert report.agreement["lowered"][name].overlap > 0.999
        assert report.agreement["integer weights"][name].same > 0.7


def test_float_states_are_close_to_integer_states(made):
    """The two last rungs differ by the rounding of states alone."""
    _, _, _, report = made
    sent = report.ladder.sent
    for name in report.ladder.names:
        differ = (sent["integer weights"][name] != sent["integer states"][name]).mean()
        assert differ < 0.02, name


def test_first_divergence_is_the_first(made):
    _, _, _, report = made
    found = report.first_divergence
    assert found is not None
    sent = report.ladder.sent
    for name in report.ladder.names:
        differs = np.flatnonzero((sent["float"][name] != sent[RUNGS[-1]][name]).any((1, 2, 3, 4)))
        assert not len(differs) or differs[0] >= found.step
    at = (found.step, found.sample, *found.neuron)
    assert sent["float"][found.population][at] == found.values[0]
    assert sent[RUNGS[-1]][found.population][at] == found.values[1]
    before = RUNGS[RUNGS.index(found.stage) - 1]
    assert sent[before][found.population][at] == found.values[0]
    assert sent[found.stage][found.population][at] != found.values[0]
    assert found.population in str(found) and found.stage in str(found)


def test_membranes_stand_on_the_side_that_they_say(made):
    """Each membrane is above its threshold just where that network fired."""
    found = made[3].first_divergence
    assert found.membranes is not None and found.threshold is not None
    for membrane, threshold, sent in zip(
        found.membranes, found.threshold, found.values, strict=True
    ):
        assert (membrane > threshold) == bool(sent)


def test_weights_read_back_within_half_a_step(made):
    _, _, program, report = made
    for name, p in program.projections.items():
        node = report.ladder.lowered.nodes[name]
        weight = getattr(node, "weight", getattr(node, "scale", None))
        back = read_back(program, name)
        scale = np.asarray(program.populations[p.target].scale)
        scale = scale.reshape(-1, *[1] * (back.ndim - 1)) if scale.size > 1 else scale
        step = 2.0 ** (9 - p.bits + p.exponent) / scale
        step = step * message_units(p.map, back, program.populations[p.source])
        kept = np.broadcast_to(np.abs(p.map.weight) < 254, back.shape)
        weight = np.asarray(weight)
        weight = weight.reshape(back.shape) if weight.size == back.size else weight
        off = np.abs(back - weight)
        assert (off <= step / 2 * 1.001)[kept].all()


def test_advice_measures_each_layer(made):
    _, _, program, report = made
    assert {a.population for a in report.advice} == {p.name for p in program if not p.is_input}
    assert all(a.n == 8 for a in report.advice)
    assert all(a.gain == pytest.approx((a.won - a.lost) / a.n) for a in report.advice)
    bases = {round(a.accuracy - a.gain, 9) for a in report.advice}
    assert len(bases) == 1


def test_keeping_every_layer_gives_the_lowered_graph(made):
    _, _, program, report = made
    ladder = report.ladder
    every = tuple(p.name for p in program)
    assert ladder.lowered.diff(with_integers(ladder.lowered, program, keep=every)) == []
    assert ladder.lowered.diff(with_integers(ladder.lowered, program)) != []


def test_json_and_html(made, tmp_path):
    _, _, program, report = made
    found = json.loads(report.to_json(tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == found
    assert found["engines"]["torch"]["n"] == N and found["program"]["digest"] == program.digest()
    assert found["first_divergence"]["population"] == report.first_divergence.population
    report.to_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "Accuracy on every engine" in page and program.digest() in page


def test_a_wrong_weight_is_found_where_it_is():
    """The control: the weights of a deep layer are spoilt, and that population alone changes."""
    net, (x, _) = network("vanilla"), data()
    graph = trace(net, torch.from_numpy(x[:2]))
    program = compile(graph, calibration=x)
    clean = Ladder(graph, program, x).sent
    name = "stage2.0.neuron2"
    (bad,) = [p for p in program.into(name) if "conv2" in p.name]
    weight = bad.map.weight.copy()
    weight[:] = -weight[::-1]
    spoilt = replace(bad, map=replace(bad.map, weight=weight))
    broken = program.with_parts(projections={**program.projections, bad.name: spoilt})
    dirty = Ladder(graph, broken, x).sent
    for other in Ladder(graph, program, x).names:
        changed = not np.array_equal(clean["integer states"][other], dirty["integer states"][other])
        assert changed == (other == name)


def test_a_graph_alone_can_be_compared():
    net, (x, y) = network("ms"), data()
    graph = trace(net, torch.from_numpy(x[:2]))
    report = compare(graph, compile(graph, calibration=x), (x, y), ("graph", "dense"), limit=5,
                     advice_limit=0)  # fmt: skip
    assert report.scores["dense"].n == 5 and report.advice == []
    assert report.ladder.series.shape[1] == 5


def test_refusals():
    net, (x, y) = network("ms"), data()
    graph = trace(net, torch.from_numpy(x[:2]))
    program = compile(graph, calibration=x)
    with pytest.raises(RangeError, match="'gpu' is none of torch, graph, onnx, reference"):
        compare(net, program, (x, y), ("gpu",))
    with pytest.raises(RangeError, match="needs the torch module"):
        compare(graph, program, (x, y), ("torch",))
    with pytest.raises(RangeError, match="no engine"):
        compare(net, program, (x, y), ())
    with pytest.raises(ShapeError, match="program takes"):
        compare(net, program, (x[:, :, :5], y), ("dense",))
    with pytest.raises(ShapeError, match="labels"):
        compare(net, program, (x, y[:3]), ("dense",))


@pytest.mark.lava
def test_lava_equals_the_engine():
    net, (x, y) = network("or"), data()
    graph = trace(net, torch.from_numpy(x[:2]))
    report = compare(net, compile(graph, calibration=x), (x, y), ("torch", "dense", "lava"),
                     graph=graph, lava_limit=2, advice_limit=0)  # fmt: skip
    assert report.lava["samples"] == 2 and report.lava["different"] == 0
    assert report.lava["values"] > 1000


def test_wilson():
    """The interval holds the rate in about 95 % of repetitions; at 99 of 100 in 92 %."""
    rng = np.random.default_rng(0)
    for p, n in ((0.95, 360), (0.5, 40), (0.99, 100)):
        drawn = rng.binomial(n, p, 4000)
        inside = np.mean([low <= p <= high for low, high in (wilson(int(k), n) for k in drawn)])
        assert 0.90 < inside < 0.985
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(0, 0) == (0.0, 1.0)


def test_confusion_counts_pairs():
    a, b = np.eye(3)[[0, 1, 2, 2]], np.eye(3)[[0, 1, 1, 2]]
    np.testing.assert_array_equal(confusion(a, b, 3), [[1, 0, 0], [0, 1, 0], [0, 1, 1]])


def test_advice_is_worth_it_beyond_chance_alone():
    """Five of five samples won: chance does it in 3 %. Five won and two lost: in 23 %."""
    from ranvier.sim.comparison import Advice

    def advice(won: int, lost: int) -> Advice:
        return Advice("n", 8, 0.9, (won - lost) / 128, 128, (0.1, 0.1), won, lost)

    assert advice(5, 0).worth_it
    assert not advice(5, 2).worth_it and not advice(4, 0).worth_it and not advice(0, 0).worth_it
    assert "5 won, 2 lost of 128" in str(advice(5, 2))
