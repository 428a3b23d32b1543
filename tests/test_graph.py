"""The Graph: its shape rules, what it refuses, what it means (the interpreter), and its neurons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from graphs import GRAPHS, MODELS, neuron_graph, recurrent_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from ranvier.export.graph import Graph
from ranvier.export.neurons import IF, LI, LIF, CubaLIF, NeuronModel, SlidingWindow, Threshold
from ranvier.export.nodes import (
    Conv,
    Delay,
    Dense,
    Flatten,
    Input,
    Join,
    Neuron,
    Node,
    Norm,
    Opaque,
    Output,
    Pool,
    Scale,
    Subsample,
    Upsample,
)
from ranvier.train.errors import (
    FormatError,
    RangeError,
    ShapeError,
    UnsupportedError,
)


def of(shape: tuple[int, ...], *nodes: Node, **kwargs: Any) -> Graph:
    """An Input "x", the nodes one after the other, an Output."""
    made: list[Node] = [Input(name="x", shape=shape)]
    for node in nodes:
        made.append(replace(node, inputs=node.inputs or (made[-1].name,)))
    return Graph.of([*made, Output(name="out", inputs=(made[-1].name,))], **kwargs)


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# shapes


@pytest.mark.parametrize(
    ("shape", "node", "expected"),
    [
        ((3, 8, 9), Conv(name="n", weight=weight(4, 3, 3, 5)), (4, 6, 5)),
        ((3, 8, 9), Conv(name="n", weight=weight(4, 3, 3, 3), stride=(2, 3)), (4, 3, 3)),
        ((3, 8, 8), Conv(name="n", weight=weight(4, 3, 3, 3), dilation=(2, 2)), (4, 4, 4)),
        (
            (4, 8),
            Conv(
                name="n",
                weight=weight(4, 1, 3),
                stride=(1,),
                padding=(1,),
                dilation=(1,),
                groups=4,
            ),
            (4, 8),
        ),
        ((5,), Dense(name="n", weight=weight(2, 5)), (2,)),
        ((7, 5), Dense(name="n", weight=weight(2, 5)), (7, 2)),
        ((2, 7, 7), Pool(name="n", op="max", kernel=(2, 2), stride=(2, 2)), (2, 3, 3)),
        ((2, 3, 4), Flatten(name="n"), (24,)),
        ((2, 3, 4), Flatten(name="n", start=1), (2, 12)),
        ((2, 5, 6), Subsample(name="n", stride=(2, 2), pad_channels=(1, 2)), (5, 3, 3)),
        ((2, 5, 6), Upsample(name="n", factor=(2, 3)), (2, 10, 18)),
        ((2, 3), Scale(name="n", scale=weight(2, 1)), (2, 3)),
        ((4,), Neuron(name="n", model=LIF(beta=weight(4))), (4,)),
    ],
)
def test_shape_rules_are_torchs(
    shape: tuple[int, ...], node: Node, expected: tuple[int, ...]
) -> None:
    graph = of(shape, node)
    assert graph.shapes["n"] == expected
    assert graph.run(np.zeros((1, 1, *shape), np.float32)).shape == (1, 1, *expected)


def _norm(n: int) -> Norm:
    ones = np.ones(n)
    return Norm(name="n", mean=ones, var=ones, gamma=ones, beta=ones)


@pytest.mark.parametrize(
    ("shape", "node", "message"),
    [
        ((2, 8, 8), Conv(name="n", weight=weight(4, 3, 3, 3)), r"it takes \(3, H, W\)"),
        ((3, 2, 2), Conv(name="n", weight=weight(4, 3, 3, 3)), "holds its kernel"),
        ((3, 8, 8), Conv(name="n", weight=weight(4, 3, 3, 3), stride=(0, 1)), "at least 1"),
        ((3, 8, 8), Conv(name="n", weight=weight(4, 3, 3, 3), bias=weight(3)), "a bias of shape"),
        ((4, 8, 8), Conv(name="n", weight=weight(3, 2, 3, 3), groups=2), "2 groups divide"),
        ((4,), Dense(name="n", weight=weight(2, 5)), "a last axis of 5"),
        ((4,), _norm(3), "3 channels first"),
        ((4,), Pool(name="n", op="avg", kernel=(2, 2), stride=(2, 2)), "channels and 2 axes"),
        ((1, 2, 2), Pool(name="n", op="avg", kernel=(3, 3), stride=(1, 1)), "holds its window"),
        ((4,), Scale(name="n", scale=weight(3)), "broadcasts"),
        ((4,), Scale(name="n", scale=weight(2, 4)), "broadcasts"),
        ((4,), Neuron(name="n", model=LIF(v_threshold=weight(3))), "broadcasts"),
        ((4,), Subsample(name="n", stride=(2, 2)), "channels and 2 axes"),
    ],
)
def test_shapes_that_do_not_fit_name_the_node(
    shape: tuple[int, ...], node: Node, message: str
) -> None:
    with pytest.raises(ShapeError, match=f"'n' got .*{message}"):
        of(shape, node)


def two(op: Any, a: tuple[int, ...], b: tuple[int, ...], axis: int = 0) -> Graph:
    return Graph.of(
        [
            Input(name="x", shape=(6,)),
            Opaque(name="a", inputs=("x",), kind="a", reason="test", shape=a),
            Opaque(name="b", inputs=("x",), kind="b", reason="test", shape=b),
            Join(name="j", inputs=("a", "b"), op=op, axis=axis),
            Output(name="out", inputs=("j",)),
        ]
    )


def test_join_shapes() -> None:
    assert two("add", (2, 3), (2, 3)).shapes["j"] == (2, 3)
    assert two("cat", (2, 3), (5, 3)).shapes["j"] == (7, 3)
    assert two("cat", (2, 3), (2, 1), axis=1).shapes["j"] == (2, 4)
    with pytest.raises(ShapeError, match="inputs of one shape"):
        two("add", (2, 3), (3, 2))
    with pytest.raises(ShapeError, match="differ along axis 0 only"):
        two("cat", (2, 3), (2, 4))


# wiring


def test_wiring_that_is_refused() -> None:
    x, out = Input(name="x", shape=(2,)), Output(name="out", inputs=("n",))
    neuron = Neuron(name="n", inputs=("x",), model=IF())
    with pytest.raises(FormatError, match="two nodes are named 'x'"):
        Graph.of([x, x])
    with pytest.raises(FormatError, match="takes 'n', which is no node"):
        Graph.of([x, out])
    with pytest.raises(FormatError, match="takes 'n', which comes later.*Delay"):
        Graph.of([x, out, neuron])
    with pytest.raises(FormatError, match="has 2 inputs; it takes 1"):
        Graph.of([x, replace(neuron, inputs=("x", "x")), out])
    with pytest.raises(FormatError, match="stands under the name"):
        Graph({"y": x})
    with pytest.raises(FormatError, match="at least 1 is needed"):
        Graph.of([x, Delay(name="n", inputs=("x",), steps=0, shape=(2,)), out])
    with pytest.raises(ShapeError, match="Delay 'n' has shape"):
        Graph.of([x, Delay(name="n", inputs=("x",), steps=1, shape=(3,)), out])


def test_a_cycle_through_a_delay_is_fine() -> None:
    assert recurrent_graph().recurrent
    assert not neuron_graph(IF()).recurrent


def test_consumers_count_every_place() -> None:
    graph = of((2,), Neuron(name="h", model=IF()), Join(name="j", inputs=("h", "h"), op="add"))
    assert graph.consumers["h"] == ["j", "j"]
    x = np.ones((1, 1, 2), np.float32) * 2
    assert_array_equal(graph.run(x), x)  # h + h is 2 h


def test_the_table_lists_every_node() -> None:
    for graph in GRAPHS.values():
        lines = str(graph).splitlines()
        assert len(lines) == 1 + len(graph.nodes)
        assert all(n.name in line for n, line in zip(graph, lines[1:], strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.with_nodes([replace(n, source="elsewhere") for n in g], steps=99),
        lambda g: g.with_nodes(
            [replace(n, name=n.name + "_", inputs=tuple(i + "_" for i in n.inputs)) for n in g]
        ),
        lambda g: g.with_nodes(
            [replace(n, model=LIF(beta=0.123)) if isinstance(n, Neuron) else n for n in g]
        ),
    ],
)
def test_diff_finds_what_was_changed(change: Any) -> None:
    graph = neuron_graph(IF())
    assert graph.diff(graph) == []
    assert graph.diff(change(graph)) != []


# running


def test_numpy_and_torch_give_the_same() -> None:
    for name, graph in GRAPHS.items():
        x = np.random.default_rng(1).standard_normal((4, 2, *graph.inputs[0].shape))
        out = graph.run(x.astype(np.float32))
        assert isinstance(out, np.ndarray), name
        assert_array_equal(out, graph.run(torch.from_numpy(x).float()).numpy())


def test_models_step_alike_in_numpy_and_torch() -> None:
    x = np.random.default_rng(2).standard_normal((8, 3, 6))
    for name, model in MODELS.items():
        a, b = model.initial(x[0]), model.initial(torch.from_numpy(x[0]))
        for x_t in x:
            out, a = model.step(a, x_t)
            other, b = model.step(b, torch.from_numpy(x_t))
            assert_array_equal(out, other.numpy(), err_msg=name)
            for key in a:
                assert_array_equal(a[key], b[key].numpy(), err_msg=name)


def test_a_static_sample_is_held() -> None:
    graph = neuron_graph(LIF(beta=0.5))
    x = np.random.default_rng(0).random((2, 5)).astype(np.float32)
    assert_array_equal(graph.run(x), graph.run(np.stack([x] * graph.steps)))
    with pytest.raises(ShapeError, match="no number of steps"):
        replace(graph, steps=None).run(x)


def test_samples_that_do_not_fit() -> None:
    graph = neuron_graph(IF())
    with pytest.raises(ShapeError, match=r"it takes \[time, batch, 5\]"):
        graph.run(np.zeros((2, 3, 4), np.float32))
    with pytest.raises(RangeError, match="0 steps"):
        graph.run(np.zeros((0, 3, 5), np.float32))
    with pytest.raises(ShapeError, match="no node is named 'nobody'"):
        graph.run(np.zeros((2, 3, 5), np.float32), record=("nobody",))


def test_record_gives_series_of_nodes() -> None:
    graph = neuron_graph(IF())
    x = np.random.default_rng(0).random((4, 2, 5)).astype(np.float32)
    out, kept = graph.run(x, record=("x", "fc", "pop"))
    assert_array_equal(kept["x"], x)
    assert_array_equal(kept["pop"], out)
    assert kept["fc"].shape == (4, 2, 6)


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("none", [[1, 5], [3, 1]]),
        ("mean", [2, 3]),
        ("sum", [4, 6]),
        ("last", [3, 1]),
        ("max", [3, 5]),
    ],
)
def test_readouts(reduce: Any, expected: Any) -> None:
    nodes = [Input(name="x", shape=(2,)), Output(name="out", inputs=("x",), reduce=reduce)]
    series = np.array([[[1.0, 5.0]], [[3.0, 1.0]]])
    got = Graph.of(nodes).readout(series)
    assert_array_equal(np.squeeze(got), expected)
    assert_array_equal(got, Graph.of(nodes).readout(torch.from_numpy(series)).numpy())


def test_an_opaque_node_without_a_function_cannot_run() -> None:
    with pytest.raises(UnsupportedError, match="'a' \\(a\\) cannot be run: test"):
        two("add", (2,), (2,)).run(np.zeros((1, 1, 6), np.float32))


def test_a_graph_with_a_cycle_equals_one_unrolled_by_hand() -> None:
    graph = recurrent_graph()
    x = torch.randn(7, 2, 4, generator=torch.Generator().manual_seed(0))
    fc, rec, fc2 = (torch.as_tensor(graph[n].weight) for n in ("fc", "rec", "fc2"))  # type: ignore[union-attr]
    bias = torch.as_tensor(graph["rec"].bias)  # type: ignore[union-attr]
    v, spk, read, out = torch.zeros(2, 6), torch.zeros(2, 6), torch.zeros(2, 3), []
    for x_t in x:
        v = 0.9 * v + (x_t @ fc.T + spk @ rec.T + bias)
        spk = (v > 1).float()
        v = v - spk
        read = 0.9 * read + spk @ fc2.T
        out.append(read)
    assert torch.allclose(graph.run(x), torch.stack(out), atol=1e-6)


# neurons by hand


def trace_of(
    model: NeuronModel, x: list[float], state: str = "v"
) -> tuple[list[float], list[float]]:
    """(outputs, states) of one neuron."""
    s, sent, seen = model.initial(np.zeros(1)), [], []
    for value in x:
        out, s = model.step(s, np.array([value]))
        sent.append(float(out[0]))
        seen.append(float(s[state][0]) if state in s else 0.0)
    return sent, seen


def test_resets_by_hand() -> None:
    """beta 0.5, threshold 1, x = 0.6 0.8 0.9: h = 0.6, 1.1, then 0.95 (subtract) or 0.9 (zero)."""
    x = [0.6, 0.8, 0.9]
    for reset, last in (("subtract", 0.95), ("zero", 0.9), ("none", 1.45)):
        spikes, v = trace_of(LIF(beta=0.5, reset=reset), x)  # type: ignore[arg-type]
        assert spikes == [0.0, 1.0, float(last > 1)]
        assert v[-1] == pytest.approx(last)


def test_v_reset_and_v_leak_by_hand() -> None:
    spikes, v = trace_of(LIF(beta=0.5, v_leak=0.2, v_reset=-1.0), [2.0, 0.0])
    assert spikes == [1.0, 0.0]
    assert v == pytest.approx([-1.0, 0.2 + 0.5 * -1.2])


def test_strictness_at_the_threshold() -> None:
    assert trace_of(IF(strict=True), [1.0])[0] == [0.0]
    assert trace_of(IF(strict=False), [1.0])[0] == [1.0]
    assert trace_of(Threshold(v_threshold=1.0), [1.0, 1.5])[0] == [0.0, 1.0]
    assert trace_of(Threshold(v_threshold=1.0, strict=False), [1.0, 0.5])[0] == [1.0, 0.0]


def test_timings_by_hand() -> None:
    """x = 2.5 then 0, threshold 1, no leak, subtract: what stays of the membrane."""
    x = [2.5, 0.0, 0.0, 0.0]
    spikes = {t: trace_of(IF(reset="subtract", timing=t), x)[0] for t in ("immediate", "delayed")}
    assert spikes["immediate"] == [1, 1, 0, 0]
    assert spikes["delayed"] == [1, 1, 0, 0]
    assert trace_of(IF(reset="subtract", timing="delayed"), x)[1] == [2.5, 1.5, 0.5, 0.5]
    assert trace_of(IF(reset="subtract", timing="immediate"), x)[1] == [1.5, 0.5, 0.5, 0.5]
    carried = trace_of(IF(reset="subtract", timing="carry"), x)
    assert carried == ([1, 0, 0, 0], [1.5] * 4)  # lowered to compare, and put back: it stays silent


def test_discard_loses_the_input_after_a_spike() -> None:
    x = [1.5, 0.9, 0.9]
    assert trace_of(LIF(beta=0.5, timing="delayed"), x)[1] == pytest.approx([1.5, 0.9, 1.35])
    assert trace_of(LIF(beta=0.5, timing="discard"), x)[1] == pytest.approx([1.5, 0.0, 0.9])


def test_current_based_and_readout_neurons_by_hand() -> None:
    spikes, u = trace_of(CubaLIF(alpha=0.5, beta=1.0, w_in=2.0), [0.4, 0.0], state="u")
    assert u == pytest.approx([0.8, 0.4])
    assert spikes == [0.0, 1.0]  # v = 0.8, then 1.2
    assert trace_of(LI(beta=0.5, r=2.0), [1.0, 1.0])[0] == [2.0, 3.0]
    window = SlidingWindow(taps=np.array([0.5, 1.0]), v_threshold=1.2)
    assert trace_of(window, [1.0, 1.0, 0.0])[0] == [0.0, 1.0, 0.0]


def test_models_check_their_fields() -> None:
    with pytest.raises(RangeError, match="beta must be 1"):
        IF(beta=0.5)
    with pytest.raises(RangeError, match="reset 'soft'"):
        LIF(reset="soft")  # type: ignore[arg-type]
    with pytest.raises(RangeError, match="timing 'now'"):
        LIF(timing="now")  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(
    beta=st.floats(0, 1),
    threshold=st.floats(0.1, 2),
    x=st.lists(st.floats(-2, 2), min_size=1, max_size=12),
)
def test_delayed_zero_fires_as_immediate_zero(
    beta: float, threshold: float, x: list[float]
) -> None:
    """Only the membrane that one sees differs."""
    spikes = [
        trace_of(LIF(beta=beta, v_threshold=threshold, timing=t), x)[0]  # type: ignore[arg-type]
        for t in ("immediate", "delayed", "carry")
    ]
    assert spikes[0] == spikes[1] == spikes[2]
