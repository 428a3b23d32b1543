"""Maxima of small whole numbers on the chip: thresholds and ORs, exact for every input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ranvier.deploy import LOIHI1, Program, compile
from ranvier.deploy.linter import lint
from ranvier.export.domains import infer_domains
from ranvier.export.graph import Graph
from ranvier.export.maxima import MAX_LEVELS
from ranvier.export.neurons import LIF
from ranvier.export.nodes import (
    Conv,
    Dense,
    Input,
    Join,
    Neuron,
    Node,
    Output,
    Pool,
    Scale,
)
from ranvier.sim import run
from ranvier.sim.difference import n_different
from ranvier.sim.runner import Result, engines
from ranvier.train.errors import UnsupportedError

QUICK = (Phase.explicit, Phase.reuse, Phase.generate)  # no shrinking: a case is a second
STATES = ("spikes", "u", "v")


def summed(
    n_spikes: int,
    seed: int = 0,
    *,
    side: int = 6,
    pool: Pool | None = None,
    scale: float = 1.0,
    shift: float = 0.0,
) -> Graph:
    """A sum of `n_spikes` populations of different rates, then a max pool `p`, then a conv and a neuron.

    scale, shift  of the sum in front of the pool
    """
    rng = np.random.default_rng(seed)

    def conv(name: str, source: str, c_in: int, c_out: int) -> Conv:
        weight = rng.normal(size=(c_out, c_in, 3, 3)).astype(np.float32)
        return Conv(name=name, inputs=(source,), weight=weight, padding=(1, 1))

    nodes: list[Node] = [Input(name="x", shape=(1, side, side), lo=0.0, hi=1.0, integer=True)]
    last = "x"
    for i in range(n_spikes):
        model = LIF(beta=0.5, v_threshold=0.3 + 0.4 * rng.random())
        nodes += [
            conv(f"c{i}", last, 1 if i == 0 else 2, 2),
            Neuron(name=f"n{i}", inputs=(f"c{i}",), model=model),
        ]
        if i == 0:
            last = "n0"
            continue
        nodes.append(Join(name=f"j{i}", inputs=(last, f"n{i}"), op="add"))
        last = f"j{i}"
    if scale != 1.0 or shift:
        nodes.append(
            Scale(name="s", inputs=(last,), scale=np.asarray(scale), shift=np.asarray(shift))
        )
        last = "s"
    pool = pool or Pool(name="p", inputs=(last,), op="max", kernel=(2, 2), stride=(2, 2))
    nodes += [
        Pool(name="p", inputs=(last,), op="max", kernel=pool.kernel, stride=pool.stride,
             padding=pool.padding),
        conv("after", "p", 2, 3),
        Neuron(name="m", inputs=("after",), model=LIF(beta=0.5, v_threshold=0.6)),
        Output(name="o", inputs=("m",), reduce="sum"),
    ]  # fmt: skip
    return Graph.of(nodes, steps=3)


def inputs(seed: int, n: int = 4, side: int = 6) -> np.ndarray:
    return (np.random.default_rng(seed).random((3, n, 1, side, side)) < 0.4).astype(np.float32)


def pooled(graph: Graph, x: np.ndarray) -> np.ndarray:
    """What the pool says in float, from torch's own max pooling of what it takes."""
    node = graph["p"]
    series = graph.run(x, record=(node.inputs[0],))[1][node.inputs[0]]
    flat = torch.as_tensor(np.asarray(series)).flatten(0, 1)
    found = F.max_pool2d(flat, node.kernel, node.stride, node.padding)
    return found.unflatten(0, series.shape[:2]).numpy()


def counted(program: Program, result: Result, lowest: float) -> np.ndarray:
    """The pool's whole numbers on the chip: the lowest there is, and one for each threshold reached.

    A relay sends their sum; the lowest is a constant, which goes into what follows as a bias.
    """
    names = [n for n in program.populations if n.startswith("p>=") and "/" not in n] or ["p"]
    levels = lowest + sum(result.trace[n].spikes.astype(np.int64) for n in names)
    if "p" in program.populations and program.populations["p"].graded:
        np.testing.assert_array_equal(result.trace["p"].spikes, levels - lowest)
    return levels


def holds(graph: Graph, x: np.ndarray, joins: str, **options: object) -> np.ndarray:
    """Reference, dense and events agree on all states, and on torch's integers wherever the populations
    summed are the float graph's own; returns these. What is pooled must not be the same everywhere."""
    program = compile(graph, calibration=x, joins=joins, **options)
    reference = run(program, x, engine="reference", record=STATES)
    for engine in ("dense", "events"):
        assert n_different(reference, run(program, x, engine=engine, record=STATES))[1] == 0
    # on the chip's own spikes, which may differ from the float graph's by rounding
    parts = [n for n in graph if isinstance(n, Neuron) and n.name.startswith("n")]
    total = sum(reference.trace[n.name].spikes.astype(np.float32) for n in parts)
    if "s" in graph.nodes:
        total = total * float(graph["s"].scale) + float(graph["s"].shift)
    node = graph["p"]
    wanted = F.max_pool2d(
        torch.as_tensor(total).flatten(0, 1), node.kernel, node.stride, node.padding
    )
    wanted = wanted.unflatten(0, total.shape[:2]).numpy()
    found = counted(program, reference, infer_domains(graph)[node.inputs[0]].lo)
    np.testing.assert_array_equal(found, wanted)
    assert np.ptp(total) >= 1
    return np.asarray(wanted)


@pytest.mark.parametrize("joins", ["linear", "graded"])
@pytest.mark.parametrize("n_spikes", [1, 2, 3, 5])
def test_a_max_pool_of_sums_is_exact(n_spikes: int, joins: str) -> None:
    graph = summed(n_spikes, n_spikes)
    x = inputs(n_spikes)
    lowered = graph.lower(joins)
    np.testing.assert_allclose(lowered.run(x.astype(float)), graph.run(x.astype(float)), atol=1e-6)
    assert np.ptp(holds(graph, x, joins)) >= 1 or n_spikes == 1


@settings(max_examples=12, deadline=None, phases=QUICK)
@given(
    seed=st.integers(0, 10**6),
    n_spikes=st.integers(1, 4),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padded=st.booleans(),
    joins=st.sampled_from(["linear", "graded"]),
    signed=st.sampled_from([(1.0, 0.0), (-1.0, 0.0), (2.0, 0.0), (1.0, -2.0), (-1.0, 1.0)]),
)
def test_any_window_and_any_range_of_whole_numbers(
    seed: int, n_spikes: int, kernel: int, stride: int, padded: bool, joins: str, signed: tuple
) -> None:
    """Values below zero count from the lowest one on; torch pads with minus infinity, and so does this."""
    pool = Pool(
        name="p", op="max", kernel=(kernel, 2), stride=(stride, 1),
        padding=(kernel // 2 * padded, 1 * padded),
    )  # fmt: skip
    graph = summed(n_spikes, seed, pool=pool, scale=signed[0], shift=signed[1])
    x = inputs(seed, 2)
    wide = x.astype(float)
    np.testing.assert_allclose(graph.lower(joins).run(wide), graph.run(wide), atol=1e-6)
    holds(graph, x, joins)


def test_maxima_that_are_the_same_everywhere() -> None:
    """Spikes counted from above, in windows that all have a silent place: drawn once."""
    pool = Pool(name="p", op="max", kernel=(3, 2), stride=(2, 1), padding=(1, 1))
    graph = summed(2, 369018, pool=pool, scale=-1.0, shift=1.0)
    assert np.ptp(holds(graph, inputs(369018, 2), "graded")) == 0


def test_the_first_threshold_of_a_sum_costs_no_population() -> None:
    lowered = summed(2).lower()
    names = [p.name for p in lowered.populations]
    assert names == ["n0", "n1", "p>=1", "p>=2/j1", "p>=2", "m"]
    assert [p.name for p in summed(1).lower().populations] == ["n0", "p", "m"]


def test_without_the_thresholds_the_maximum_is_wrong() -> None:
    """The control: an OR of the sum, which is what a pool of spikes becomes, is no maximum."""
    graph, x = summed(2), inputs(0)
    wanted = pooled(graph, x)
    assert (np.minimum(wanted, 1) != wanted).any() and wanted.max() == 2


def test_logic_neurons_and_loihi1_compute_the_same() -> None:
    graph, x = summed(3, 1), inputs(1)
    holds(graph, x, "linear+logic")
    holds(graph, x, "linear", chip=LOIHI1)
    kinds = {
        p.name: p.cell.kind for p in compile(graph, calibration=x, joins="linear+logic") if p.cell
    }
    assert kinds["p>=3"] == kinds["p>=3/j2"] == "logic"


def test_a_maximum_of_two_sums() -> None:
    rng = np.random.default_rng(0)
    nodes: list[Node] = [Input(name="x", shape=(5,), lo=0.0, hi=1.0, integer=True)]
    for k in "abcd":
        nodes += [
            Dense(name=f"w{k}", inputs=("x",), weight=rng.normal(size=(7, 5)).astype("f")),
            Neuron(name=k, inputs=(f"w{k}",), model=LIF(beta=0.5, v_threshold=0.2)),
        ]
    nodes += [
        Join(name="ab", inputs=("a", "b"), op="add"),
        Join(name="cd", inputs=("c", "d"), op="add"),
        Join(name="most", inputs=("ab", "cd", "a"), op="max"),
        Dense(name="fc", inputs=("most",), weight=rng.normal(size=(3, 7)).astype("f")),
        Output(name="o", inputs=("fc",)),
    ]
    graph = Graph.of(nodes, steps=4)
    x = (rng.random((4, 6, 5)) < 0.5).astype(np.float32)
    for joins in ("linear", "graded"):
        wide = x.astype(float)
        np.testing.assert_allclose(graph.lower(joins).run(wide), graph.run(wide), atol=1e-6)
        trace = run(compile(graph, calibration=x, joins=joins), x, record=("spikes",)).trace
        a, b, c, d = (trace[k].spikes.astype(int) for k in "abcd")
        levels = trace["most>=1"].spikes.astype(int) + trace["most>=2"].spikes
        np.testing.assert_array_equal(levels, np.maximum(a + b, c + d))


def test_what_has_no_maximum_is_refused_with_a_way_out() -> None:
    graph = summed(MAX_LEVELS + 1)
    with pytest.raises(
        UnsupportedError, match=r"'p' .* integer 0..9: 9 thresholds .* 8 are allowed. Join"
    ):
        graph.lower()
    assert summed(MAX_LEVELS).lower()
    real = summed(2, scale=0.3, shift=0.1)
    with pytest.raises(UnsupportedError, match="real; the chip has no maximum of such values"):
        real.lower()
    mixed = summed(2)
    weight = np.array([[[[1.0]], [[-1.0]]], [[[1.0]], [[1.0]]]], np.float32)
    nodes = [n for n in mixed if n.name != "p"]
    at = next(i for i, n in enumerate(nodes) if n.name == "after")
    nodes[at:at] = [
        Conv(name="whole", inputs=("j1",), weight=weight),
        Pool(name="p", inputs=("whole",), op="max", kernel=(2, 2), stride=(2, 2)),
    ]
    with pytest.raises(UnsupportedError, match="is no whole number of one sign up to 255"):
        Graph.of(nodes, steps=3).lower()


def test_lint_tells_the_price_and_flags_what_is_refused() -> None:
    def codes(graph: Graph) -> set[str]:
        return {f.code for f in lint(graph) if f.node == "p"}

    assert "RV205" in codes(summed(2)) and "RV103" not in codes(summed(2))
    assert "RV103" in codes(summed(MAX_LEVELS + 1)) and "RV103" in codes(summed(2, scale=0.3))
    (found,) = [f for f in lint(summed(3)) if f.code == "RV205" and f.node == "p"]
    assert "3 populations of logic neurons and 2 of thresholds" in found.message


@pytest.mark.lava
def test_lava_computes_the_same_maximum() -> None:
    for seed, joins in ((3, "linear"), (4, "graded")):
        graph, x = summed(3, seed, side=4), inputs(seed, 1, 4)
        program = compile(graph, calibration=x, joins=joins)
        encoded = program.encode(x)
        reference = engines()["reference"](program, encoded, STATES)
        compared, different = n_different(reference, engines()["lava"](program, encoded, STATES))
        assert compared > 1000 and different == 0
