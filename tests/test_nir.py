"""NIR: nothing of ours is lost, others' words mean what they say, the unclear is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import nir
import numpy as np
import pytest
from graphs import GRAPHS, chain, neuron_graph, normal, recurrent_graph, residual, spikes

from ranvier.export.graph import Graph
from ranvier.export.neurons import IF, LI, LIF, CubaLI, CubaLIF, Threshold
from ranvier.export.nir_fields import Context
from ranvier.export.nir_file import main, read_nir, write_nir
from ranvier.export.nir_raw import RawNode
from ranvier.export.nir_read import decode
from ranvier.export.nir_write import encode
from ranvier.export.nodes import Delay, Dense, Input, Neuron, Opaque, Output
from ranvier.train.errors import (
    FormatError,
    RangeError,
    RanvierError,
    ShapeError,
    UnsupportedError,
)

# What nir 1.0.8 cannot read of what we write, and why: its own slips, or a type it does not have.
NIR_FAILS = {
    "layer conv_oblong": "takes every kernel for square",
    "layer conv_groups": "takes weight.shape[1] for the input channels",
    "layer conv_depthwise": "the same",
    "layer avg1d": "the same: a depthwise convolution",
    "layer sum1d": "the same: a depthwise convolution",
    "layer dense_shaped": "Unflatten: no such type",
    "layer max": "MaxPool2d of real values: no such type",
    "layer max1d": "MaxPool1d: no such type",
    "layer upsample": "Upsample: no such type",
}


@pytest.mark.parametrize("name", GRAPHS)
def test_round_trip_loses_nothing(name, tmp_path):
    graph = GRAPHS[name]
    write_nir(graph, tmp_path / "a.nir")
    back = read_nir(tmp_path / "a.nir")
    assert graph.diff(back) == []
    assert "nir" not in back.meta  # it came back through our metadata, not as another tool's file


def test_round_trip_check_can_fail(tmp_path):
    graph = GRAPHS["recurrent"]
    write_nir(graph, tmp_path / "a.nir")
    other = graph.with_nodes(
        [*list(graph)[:-1], Output(name="out", inputs=("read",), reduce="max")]
    )
    assert other.diff(read_nir(tmp_path / "a.nir"))


@pytest.mark.parametrize("name", GRAPHS)
def test_other_tools_get_the_same_network(name):
    """Read without our metadata, as any tool reads it, the file computes the same: or a note says
    not.
    """
    graph = GRAPHS[name]
    raw, notes = encode(graph)
    if notes:
        pytest.skip("; ".join(notes))
    decay = "exponential" if name in ("model li_exponential", "model dt") else "euler"
    context = Context(dt=graph.dt or 1e-4, decay=decay)
    foreign = decode(without_metadata(raw), context, graph.steps)
    x = 2 * spikes(3, 12, 3, *graph.inputs[0].shape)
    # time constants are float32, so that a decay is off by up to 1e-7 of 1 - beta
    np.testing.assert_allclose(foreign.run(x), graph.run(x), atol=1e-4)


def test_notes_name_what_others_read_differently():
    assert encode(neuron_graph(IF(reset="subtract")))[1] == [
        "'pop': reset subtract (immediate); other tools reset to v_reset"
    ]
    assert encode(neuron_graph(IF(reset="zero", timing="delayed")))[1] == []
    assert encode(neuron_graph(IF(reset="none")))[1] == []
    assert "other tools will refuse" in encode(GRAPHS["layer upsample"])[1][0]


def without_metadata(raw: RawNode) -> RawNode:
    nodes = {k: without_metadata(n) for k, n in raw.nodes.items()}
    return replace(raw, meta={}, nodes=nodes)


@pytest.mark.parametrize("name", GRAPHS)
def test_nir_reads_what_we_write(name, tmp_path):
    write_nir(GRAPHS[name], tmp_path / "a.nir")
    if name in NIR_FAILS:
        with pytest.raises((ValueError, AssertionError)):
            nir.read(tmp_path / "a.nir")
    else:
        assert isinstance(nir.read(tmp_path / "a.nir"), nir.NIRGraph)


@pytest.mark.parametrize("name", ["a/b", "..", "%2F", "münze", "a b", "x.y", "0"])
def test_any_name_survives(name, tmp_path):
    graph = Graph.of(
        [
            Input(name="in", shape=(3,)),
            Neuron(name=name, inputs=("in",), model=IF()),
            Output(name="out", inputs=(name,)),
        ]
    )
    write_nir(graph, tmp_path / "a.nir")
    assert graph.diff(read_nir(tmp_path / "a.nir")) == []


def test_an_opaque_node_survives_and_others_refuse_it(tmp_path):
    odd = Opaque(name="a", kind="softmax", reason="over time", shape=(4,), inputs=("x",))
    graph = chain((4,), odd)
    write_nir(graph, tmp_path / "a.nir")
    assert graph.diff(read_nir(tmp_path / "a.nir")) == []
    with pytest.raises(AssertionError):
        nir.read(tmp_path / "a.nir")


def test_source_and_meta_travel(tmp_path):
    graph = chain((4,), Dense(name="a", weight=normal(1, 3, 4), source="net.py:7", meta={"k": [1]}))
    write_nir(graph, tmp_path / "a.nir")
    back = read_nir(tmp_path / "a.nir")["a"]
    assert (back.source, back.meta) == ("net.py:7", {"k": [1]})


def test_two_writes_are_equal(tmp_path):
    for name in ("a", "b"):
        write_nir(residual(), tmp_path / f"{name}.nir")
    assert (tmp_path / "a.nir").read_bytes() == (tmp_path / "b.nir").read_bytes()


def test_steps_can_be_given(tmp_path):
    write_nir(neuron_graph(IF()), tmp_path / "a.nir")
    assert read_nir(tmp_path / "a.nir").steps == 7
    assert read_nir(tmp_path / "a.nir", steps=3).steps == 3


# files that another tool changed


def changed(graph: Graph, path: Path, change: Any) -> Graph:
    """The graph written by us, read, changed and written by nir, and read by us."""
    write_nir(graph, path)
    theirs = nir.read(path)
    change(theirs.nodes)
    nir.write(path, theirs)
    return read_nir(path, dt=graph.dt or 1e-4)


def test_unchanged_through_nir_is_still_exact(tmp_path):
    graph = residual()
    assert graph.diff(changed(graph, tmp_path / "a.nir", lambda nodes: None)) == []


def test_changed_weight_wins_over_metadata(tmp_path):
    graph = neuron_graph(LIF(beta=0.9, reset="subtract"))

    def double(nodes):
        nodes["fc"].weight = nodes["fc"].weight * 2

    back = changed(graph, tmp_path / "a.nir", double)
    np.testing.assert_array_equal(back["fc"].weight, graph["fc"].weight * 2)
    assert back["pop"].model.reset == "subtract"


@pytest.mark.parametrize("strict", [True, False])
def test_changed_time_constant_wins_and_the_reset_rule_stays(strict, tmp_path):
    model = LIF(beta=0.9, reset="subtract", timing="delayed", strict=strict, v_threshold=0.5)
    graph = neuron_graph(model)

    def slower(nodes):
        nodes["pop"].tau = nodes["pop"].tau * 2
        nodes["pop"].r = nodes["pop"].r * 2

    found = changed(graph, tmp_path / "a.nir", slower)["pop"].model
    assert found.beta == pytest.approx(0.95, abs=1e-6)
    assert (found.reset, found.timing, found.strict) == ("subtract", "delayed", strict)
    assert found.v_threshold == 0.5


def test_metadata_of_another_version_are_refused(tmp_path):
    write_nir(neuron_graph(IF()), tmp_path / "a.nir")
    with h5py.File(tmp_path / "a.nir", "r+") as file:
        del file["node/metadata/ranvier"]
        file["node/metadata"].create_dataset("ranvier", data='{"version": 99}')
    with pytest.raises(FormatError, match="version 99.*version 1"):
        read_nir(tmp_path / "a.nir")


# other tools' files, written by nir itself


def theirs(path: Path, edges: Any = None, **nodes: Any) -> Path:
    """A NIR graph of `nodes` (in a row unless `edges` are given), written by nir, unchecked."""
    names = list(nodes)
    wires = edges or list(zip(names[:-1], names[1:], strict=True))
    nir.write(path, nir.NIRGraph(nodes=nodes, edges=wires, type_check=False))
    return path


def ends(n: int, m: int | None = None) -> tuple[nir.Input, nir.Output]:
    return nir.Input({"input": np.array([n])}), nir.Output({"output": np.array([m or n])})


def of(n: int, *values: float) -> list[np.ndarray]:
    return [np.full(n, v, np.float32) for v in values]


DT = 1e-4
NEURONS = {
    "IF": (nir.IF(*of(3, 2.0, 1.0, -0.5)), IF(r=2.0, v_threshold=1.0, v_reset=-0.5)),
    "I": (nir.I(*of(3, 2.0)), LI(beta=1.0, r=2.0)),
    "LI": (nir.LI(*of(3, 1e-3, 2.0, 0.5)), LI(beta=0.9, r=0.2, v_leak=0.5)),
    "LIF": (
        nir.LIF(*of(3, 1e-3, 2.0, 0.5, 0.75, -0.25)),
        LIF(beta=0.9, r=0.2, v_leak=0.5, v_threshold=0.75, v_reset=-0.25),
    ),
    "CubaLI": (
        nir.CubaLI(*of(3, 2e-4, 1e-3, 2.0, 0.5), w_in=np.float32(4.0)),
        CubaLI(alpha=0.5, beta=0.9, r=0.2, w_in=2.0, v_leak=0.5),
    ),
    "CubaLIF": (
        nir.CubaLIF(*of(3, 2e-4, 1e-3, 2.0, 0.5, 0.75, 0.0), w_in=np.float32(4.0)),
        CubaLIF(alpha=0.5, beta=0.9, r=0.2, w_in=2.0, v_leak=0.5, v_threshold=0.75),
    ),
    "Threshold": (nir.Threshold(*of(3, 0.25)), Threshold(v_threshold=0.25)),
}


@pytest.mark.parametrize("kind", NEURONS)
def test_neurons_of_other_tools(kind, tmp_path):
    node, expected = NEURONS[kind]
    entry, out = ends(3)
    graph = read_nir(theirs(tmp_path / "a.nir", x=entry, n=node, y=out), dt=DT)
    x = 2 * spikes(1, 40, 2, 3)
    plain = Graph.of([Input(name="x", shape=(3,)), Neuron(name="n", inputs=("x",), model=expected)])
    whole = plain.with_nodes([*plain, Output(name="y", inputs=("n",))])
    assert type(graph["n"].model) is type(expected)
    # decays come from float32 time constants
    np.testing.assert_allclose(graph.run(x), whole.run(x), atol=1e-5)


def test_exponential_decay_is_the_exact_solution(tmp_path):
    """A constant input for one time constant brings LI to 1 - 1/e of it, whatever the step."""
    entry, out = ends(1)
    path = theirs(tmp_path / "a.nir", x=entry, n=nir.LI(*of(1, 1e-2, 3.0, 0.0)), y=out)
    for steps in (1, 10, 1000):
        graph = read_nir(path, dt=1e-2 / steps, decay="exponential")
        v = graph.run(np.ones((steps, 1, 1), np.float64))[-1, 0, 0]
        assert v == pytest.approx(3 * (1 - np.exp(-1)), rel=1e-4)  # beta is kept as float32


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.99])
def test_decays_written_by_snntorch_come_back(beta, tmp_path):
    """snntorch's exporter writes tau = dt / (1 - beta), r = tau / dt, dt = 1e-4, in float32."""
    b = np.full(3, beta, np.float32)
    tau = np.float32(1e-4) / (1 - b)
    lif = nir.LIF(tau=tau, r=tau / np.float32(1e-4), v_leak=b * 0, v_threshold=b * 0 + 1)
    entry, out = ends(3)
    model = read_nir(theirs(tmp_path / "a.nir", x=entry, n=lif, y=out))["n"].model
    assert model.beta == pytest.approx(beta, abs=2e-7)
    assert model.r == 1.0


def layer(path: Path, node: Any, shape: tuple[int, ...], **options: Any) -> Graph:
    entry = nir.Input({"input": np.array(shape)})
    out = nir.Output({"output": None})
    nodes = {"x": entry, "n": node, "y": out}
    graph = nir.NIRGraph(nodes=nodes, edges=[("x", "n"), ("n", "y")], type_check=False)
    raw = RawNode("NIRGraph", edges=[("x", "n"), ("n", "y")])
    for name, part in graph.nodes.items():
        data = {k: v for k, v in part.to_dict().items() if k not in ("type", "metadata")}
        kept = {k: v for k, v in data.items() if v is not None}
        raw.nodes[name] = RawNode(type(part).__name__, kept)
    return decode(raw, Context(dt=DT, decay="euler"), None)


def test_layers_of_other_tools(tmp_path):
    import torch
    from torch.nn import functional as F

    def same(node, shape, expected):
        x = normal(9, 1, 2, *shape)
        found = layer(tmp_path, node, shape).run(x)[0]
        np.testing.assert_allclose(found, expected(torch.from_numpy(x[0])).numpy(), atol=1e-5)

    w, b = normal(1, 3, 4), normal(2, 3)
    same(nir.Linear(w), (4,), lambda x: F.linear(x, torch.from_numpy(w)))
    same(nir.Affine(w, b), (4,), lambda x: F.linear(x, torch.from_numpy(w), torch.from_numpy(b)))
    same(nir.Scale(normal(3, 4)), (4,), lambda x: x * torch.from_numpy(normal(3, 4)))
    k, c = normal(4, 6, 2, 3, 2), normal(5, 6)

    def conv(padding, stride, dilation, groups):
        node = nir.Conv2d((7, 8), k, stride, padding, dilation, groups, c)
        args = (torch.from_numpy(k), torch.from_numpy(c), stride, padding, dilation, groups)
        same(node, (2 * groups, 7, 8), lambda x: F.conv2d(x, *args))

    conv((1, 2), (2, 1), (1, 2), 1)
    conv(1, 2, 1, 2)
    conv("valid", (1, 1), (1, 1), 1)
    conv("same", 1, 1, 1)  # an even kernel axis: torch pads one more behind
    conv("same", 1, (2, 1), 1)
    k1 = normal(6, 3, 2, 4)
    node = nir.Conv1d(9, k1, 2, 1, 1, 1, normal(7, 3))
    same(
        node,
        (2, 9),
        lambda x: F.conv1d(x, torch.from_numpy(k1), torch.from_numpy(normal(7, 3)), 2, 1),
    )
    pool = (np.array([2, 3]), np.array([2, 1]), np.array([1, 0]))
    args = [tuple(p.tolist()) for p in pool]
    same(nir.AvgPool2d(*pool), (2, 6, 6), lambda x: F.avg_pool2d(x, *args))
    same(nir.SumPool2d(*pool), (2, 6, 6), lambda x: F.avg_pool2d(x, *args) * 6)
    flat = nir.Flatten({"input": np.array([2, 3, 4])}, 1, 2)
    same(flat, (2, 3, 4), lambda x: x.flatten(2, 3))


def test_delays_of_other_tools(tmp_path):
    entry, out = ends(3)
    node = nir.Delay(np.array([0.0, 1e-3, 3e-3]))
    graph = read_nir(theirs(tmp_path / "a.nir", x=entry, n=node, y=out), dt=1e-3)
    x = normal(1, 6, 2, 3)
    expected = np.zeros_like(x)
    for i, late in enumerate((0, 1, 3)):
        expected[late:, :, i] = x[: len(x) - late, :, i]
    np.testing.assert_array_equal(graph.run(x), expected)
    with pytest.raises(RangeError, match="no whole number of steps"):
        read_nir(tmp_path / "a.nir", dt=7e-4)


def test_several_edges_into_a_node_add(tmp_path):
    entry, out = ends(3)
    edges = [("x", "a"), ("x", "b"), ("a", "y"), ("b", "y")]
    nodes = {"x": entry, "a": nir.Scale(*of(3, 2.0)), "b": nir.Scale(*of(3, 3.0)), "y": out}
    graph = read_nir(theirs(tmp_path / "a.nir", edges, **nodes))
    x = normal(1, 2, 2, 3)
    np.testing.assert_allclose(graph.run(x), 5 * x, rtol=1e-6)


def recurrent_reference(x, w, b, beta, gain):
    """A LIF population with its own spikes of the step before fed back through w and b."""
    v, s, out = np.zeros_like(x[0]), np.zeros_like(x[0]), []
    for now in x:
        v = beta * v + gain * (now + s @ w.T + b)
        s = (v > 1.0).astype(x.dtype)
        v = v * (1 - s)
        out.append(s)
    return np.stack(out)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("delayed", [False, True])
def test_a_cycle_is_one_step_late(nested, delayed, tmp_path):
    """Without a Delay a cycle takes one step; a Delay of one step says the same; nesting changes
    nothing.
    """
    w, b = normal(1, 4, 4), normal(2, 4)
    lif = nir.LIF(*of(4, 1e-3, 10.0, 0.0, 1.0, 0.0))
    entry, out = ends(4)
    parts = {"lif": lif, "rec": nir.Affine(w, b)}
    loop = [("lif", "rec"), ("rec", "lif")]
    if delayed:
        parts["late"] = nir.Delay(*of(4, DT))
        loop = [("lif", "late"), ("late", "rec"), ("rec", "lif")]
    if nested:
        inner = {"input": entry, "output": out, **parts}
        wires = [("input", "lif"), ("lif", "output"), *loop]
        sub = nir.NIRGraph(nodes=inner, edges=wires, type_check=False)
        path = theirs(tmp_path / "a.nir", x=entry, net=sub, y=out)
    else:
        path = theirs(
            tmp_path / "a.nir", [("x", "lif"), ("lif", "y"), *loop], x=entry, y=out, **parts
        )
    graph = read_nir(path, dt=DT)
    x = 2 * spikes(3, 30, 5, 4)
    expected = recurrent_reference(x, w, b, np.float32(0.9), np.float32(1.0))
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(graph.run(x), expected)


def test_our_recurrent_layer_is_a_plain_cycle_to_others():
    raw, _ = encode(recurrent_graph())
    assert "Delay" not in {n.type for n in raw.nodes.values()}
    assert ("pop", "rec") in raw.edges and ("rec", "pop") in raw.edges


def test_missing_ends_are_added(tmp_path):
    path = theirs(
        tmp_path / "a.nir", [("a", "n")], a=nir.Linear(normal(1, 3, 4)), n=NEURONS["IF"][0]
    )
    graph = read_nir(path)
    assert graph.inputs[0].shape == (4,) and graph.outputs[0].inputs == ("n",)


# refusals: a reason and the node's name


def raw_of(**nodes: RawNode) -> RawNode:
    names = list(nodes)
    return RawNode("NIRGraph", nodes=nodes, edges=list(zip(names[:-1], names[1:], strict=True)))


def entry_of(*shape: int) -> RawNode:
    return RawNode("Input", {"shape": np.array(shape)})


def conv_of(**changes: Any) -> RawNode:
    data = {
        "weight": normal(1, 2, 2, 3, 3),
        "bias": normal(2, 2),
        "stride": np.array([1, 1]),
        "padding": np.array([0, 0]),
        "dilation": np.array([1, 1]),
        "groups": 1,
        "input_shape": np.array([6, 6]),
    }
    return RawNode("Conv2d", {**data, **changes})


def lif_of(**changes: Any) -> RawNode:
    tau, r, leak, level = of(3, 1e-2, 1.0, 0.0, 1.0)
    data = {"tau": tau, "r": r, "v_leak": leak, "v_threshold": level}
    return RawNode("LIF", {k: v for k, v in {**data, **changes}.items() if v is not None})


OUT = RawNode("Output")
REFUSED: dict[str, tuple[RawNode, type[RanvierError], str]] = {
    "unknown type": (
        raw_of(x=entry_of(3), n=RawNode("Sigmoid"), y=OUT),
        UnsupportedError,
        "'n' has type 'Sigmoid'",
    ),
    "missing field": (raw_of(x=entry_of(3), n=lif_of(tau=None), y=OUT), FormatError, "'n'.*'tau'"),
    "negative tau": (
        raw_of(x=entry_of(3), n=lif_of(tau=-np.ones(3)), y=OUT),
        RangeError,
        "'n'.*-1.*above 0",
    ),
    "short tau": (
        raw_of(x=entry_of(3), n=lif_of(tau=np.full(3, 5e-5)), y=OUT),
        RangeError,
        "less than a step.*exponential",
    ),
    "nan": (raw_of(x=entry_of(3), n=lif_of(r=np.full(3, np.nan)), y=OUT), RangeError, "not finite"),
    "neuron shape": (
        raw_of(x=entry_of(3), n=lif_of(tau=np.ones(4)), y=OUT),
        ShapeError,
        r"'n'.*\(4,\).*\(3,\)",
    ),
    "linear shape": (
        raw_of(x=entry_of(3), n=RawNode("Linear", {"weight": normal(1, 5, 4)}), y=OUT),
        ShapeError,
        r"'n'.*\(5, 4\).*\(3,\)",
    ),
    "output shape": (
        raw_of(x=entry_of(3), n=lif_of(), y=RawNode("Output", {"shape": np.array([4])})),
        ShapeError,
        r"'y' declares shape \(4,\)",
    ),
    "conv input_shape": (
        raw_of(x=entry_of(2, 6, 6), n=conv_of(input_shape=np.array([5, 5])), y=OUT),
        ShapeError,
        r"'n' declares input_shape \(5, 5\).*\(6, 6\)",
    ),
    "same with stride": (
        raw_of(x=entry_of(2, 6, 6), n=conv_of(padding="same", stride=np.array([2, 2])), y=OUT),
        UnsupportedError,
        "'same' with stride",
    ),
    "odd padding word": (
        raw_of(x=entry_of(2, 6, 6), n=conv_of(padding="reflect"), y=OUT),
        FormatError,
        "'reflect'",
    ),
    "no groups": (raw_of(x=entry_of(2, 6, 6), n=conv_of(groups=0), y=OUT), RangeError, "'groups'"),
    "stride 0": (
        raw_of(x=entry_of(2, 6, 6), n=conv_of(stride=np.array([0, 1])), y=OUT),
        RangeError,
        "'stride'",
    ),
    "huge shape": (
        raw_of(x=entry_of(2**20, 2**20), n=RawNode("Scale", {"scale": 1.0}), y=OUT),
        ShapeError,
        "more than 2",
    ),
    "edge to nowhere": (
        RawNode("NIRGraph", nodes={"x": entry_of(3)}, edges=[("x", "q")]),
        FormatError,
        "'q', which is no node",
    ),
    "double edge": (
        RawNode("NIRGraph", nodes={"x": entry_of(3), "y": OUT}, edges=[("x", "y")] * 2),
        FormatError,
        "stands twice",
    ),
    "nothing": (RawNode("NIRGraph"), FormatError, "no nodes"),
    "no way in": (
        RawNode("NIRGraph", nodes={"a": RawNode("Flatten"), "y": OUT}, edges=[("a", "y")]),
        FormatError,
        "'a'",
    ),
    "flatten axes": (
        raw_of(x=entry_of(3), n=RawNode("Flatten", {"start_dim": 2, "end_dim": -1}), y=OUT),
        ShapeError,
        "'n' flattens",
    ),
    "two inner inputs": (
        raw_of(
            x=entry_of(3),
            n=RawNode("NIRGraph", nodes={"a": entry_of(3), "b": entry_of(3), "o": OUT}),
            y=OUT,
        ),
        UnsupportedError,
        "2 Input nodes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    raw, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        decode(raw, Context(dt=1e-4, decay="euler"), None)


def test_what_is_refused_when_one_thing_is_wrong_loads_when_it_is_right():
    for raw in (
        raw_of(x=entry_of(2, 6, 6), n=conv_of(), y=OUT),
        raw_of(x=entry_of(3), n=lif_of(), y=RawNode("Output", {"shape": np.array([3])})),
    ):
        decode(raw, Context(dt=1e-4, decay="euler"), None)


@pytest.mark.parametrize("options", [{"dt": 0.0}, {"dt": float("nan")}, {"decay": "linear"}])
def test_bad_options(options, tmp_path):
    with pytest.raises(RangeError):
        read_nir(tmp_path / "a.nir", **options)


def test_not_a_nir_file(tmp_path):
    path = tmp_path / "a.nir"
    with pytest.raises(FormatError, match="cannot read"):
        read_nir(path)
    path.write_bytes(b"PK\x03\x04data.pkl")
    with pytest.raises(FormatError, match="not unpickled"):
        read_nir(path)
    path.write_bytes(b"hello")
    with pytest.raises(FormatError, match="not HDF5"):
        read_nir(path)
    with h5py.File(path, "w") as file:
        file["other"] = 1
    with pytest.raises(FormatError, match="no group 'node'"):
        read_nir(path)


def test_hostile_files_are_refused_before_they_are_loaded(tmp_path):
    def refuse(error, text, change):
        path = tmp_path / "a.nir"
        write_nir(neuron_graph(IF()), path)
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(error, match=text):
            read_nir(path)

    def huge(file):
        del file["node/nodes/fc/weight"]
        shape = (2**20, 2**20)  # no chunk is stored: a small file that decodes to 4 TiB
        file["node/nodes/fc"].create_dataset(
            "weight", shape, "f4", chunks=(1024, 1024), fillvalue=1
        )

    def outside(file):
        del file["node/nodes/fc/weight"]
        file["node/nodes/fc/weight"] = h5py.ExternalLink("/etc/other.h5", "/x")

    def soft(file):
        file["node/nodes/again"] = h5py.SoftLink("/node/nodes/fc")

    def knot(file):
        file["node/nodes/knot"] = file["node"]

    def stored_elsewhere(file):
        del file["node/nodes/fc/weight"]
        external = [("/etc/hostname", 0, 8)]
        file["node/nodes/fc"].create_dataset("weight", (2,), "f4", external=external)

    refuse(RangeError, "takes the file past", huge)
    refuse(UnsupportedError, "links are not followed", outside)
    refuse(UnsupportedError, "links are not followed", soft)
    refuse(FormatError, "deeper", knot)
    refuse(UnsupportedError, "another file", stored_elsewhere)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.nir"
    write_nir(neuron_graph(IF()), path)
    before = path.read_bytes()
    odd = neuron_graph(IF())
    object.__setattr__(odd["pop"], "model", object())
    with pytest.raises((UnsupportedError, AttributeError)):
        write_nir(odd, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# the files of other tools

STORED = {
    "kmheckel_spyx__spyx_shd__8764a759.nir": "old Spyx",
    "neuromorphs_NIRTorch__feedback_graph__67750031.nir": "",
    "neuromorphs_NIR__Braille_snntorch__3049cfa1.nir": "not unpickled",
    "neuromorphs_NIR__lif_norse__2b0feb3d.nir": "",
    "neuromorphs_NIR__lif_norse__ce5f8e1c.nir": "",
    "neuromorphs_NIR__lif_rockpool__d70a32c1.nir": "leading axes of 1",
    "neuromorphs_NIR__scnn_mnist__669fbfad.nir": "batch axis",
    "neuromorphs_NIR__two_lif_neurons__b23438d4.nir": "",
    "open-neuromorphic_nirviz__srnn__001edf55.nir": "above 0 s",
    "open-neuromorphic_nirviz__srnn__6e91c5ce.nir": "above 0 s",
}
REFUSED_FILES = ("Braille", "srnn")


@pytest.mark.parametrize("name", STORED)
def test_stored_files(name, data_file, tmp_path):
    path = data_file("nir", name)
    if any(word in name for word in REFUSED_FILES):
        with pytest.raises((FormatError, RangeError), match=STORED[name]):
            read_nir(path)
        return
    graph = read_nir(path)
    assert STORED[name] in "; ".join(graph.meta["nir"]["notes"])
    write_nir(graph, tmp_path / "again.nir")
    assert graph.diff(read_nir(tmp_path / "again.nir")) == []


def test_survey_prints_a_line_for_each_file(tmp_path, capsys):
    write_nir(neuron_graph(IF()), tmp_path / "a.nir")
    (tmp_path / "b.nir").write_bytes(b"no")
    assert main([str(tmp_path / "a.nir"), str(tmp_path / "b.nir")]) == 0
    text = capsys.readouterr().out
    assert "loads: 4 nodes, 1 populations" in text and "1 of 2 load" in text


@pytest.mark.parametrize("tool", ["norse__2b0feb3d", "norse__ce5f8e1c", "rockpool__d70a32c1"])
@pytest.mark.parametrize("decay", ["euler", "exponential"])
def test_single_neurons_of_the_nir_paper(tool, decay, data_file):
    """The two files describe one experiment: tau 2.5 ms, threshold 0.1, unit input spikes."""
    graph = read_nir(data_file("nir", f"neuromorphs_NIR__lif_{tool}.nir"), decay=decay)
    share = 0.04 if decay == "euler" else -np.expm1(-0.04)
    weight, r = (0.04, 24.019737) if "rockpool" in tool else (1.0, 1.0)
    x = spikes(1, 200, 1, 1, rate=0.3).astype(np.float64)
    v, expected = 0.0, []
    for now in x[:, 0, 0]:
        v = (1 - share) * v + share * r * weight * now
        expected.append(float(v > 0.1))
        v = 0.0 if v > 0.1 else v
    assert 5 < sum(expected) < 100
    np.testing.assert_array_equal(graph.run(x)[:, 0, 0], expected)


def test_the_convolutional_network_of_the_nir_paper_reads_digits(data_file):
    """Ten N-MNIST test samples, one each digit, at 1 ms; all hundred give 100 % (and take a
    minute).
    """
    graph = read_nir(data_file("nir", "neuromorphs_NIR__scnn_mnist__669fbfad.nir"))
    stored = np.load(data_file("nmnist", "nmnist.npz"))
    raw, offsets, label = stored["raw"], stored["offsets"], stored["label"]
    test = np.flatnonzero(stored["is_test"])
    chosen = [int(test[label[test] == digit][0]) for digit in range(10)]
    x = np.stack([frames(raw[offsets[i] : offsets[i + 1]]) for i in chosen], axis=1)
    guess = graph.run(x).sum(axis=0).argmax(axis=-1)
    assert (guess == label[chosen]).sum() >= 9


def frames(events: np.ndarray, steps: int = 120) -> np.ndarray:
    """Event counts [steps, polarity, y, x] in bins of 1 ms; the first saccade takes 100 ms."""
    e = events.astype(np.int64)
    time = ((e[:, 2] & 127) << 16 | e[:, 3] << 8 | e[:, 4]) // 1000
    kept = time < steps
    found = np.zeros((steps, 2, 34, 34), np.float32)
    np.add.at(found, (time[kept], e[kept, 2] >> 7, e[kept, 1], e[kept, 0]), 1)
    return found


def test_delays_that_close_a_cycle_keep_their_steps(tmp_path):
    for steps in (1, 2, 5):
        graph = recurrent_graph(steps)
        write_nir(graph, tmp_path / "a.nir")
        found = [n for n in read_nir(tmp_path / "a.nir") if isinstance(n, Delay)]
        assert [n.steps for n in found] == [steps]
