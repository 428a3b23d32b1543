"""ONNX: what ONNX Runtime computes is what the interpreter or the engine computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import GRAPHS, chain, neuron_graph, normal, recurrent_graph, residual, spikes
from hypothesis import given, settings
from hypothesis import strategies as st
from random_programs import random_input, random_program

from ranvier.deploy.cells import Cell
from ranvier.deploy.onnx_program import planes
from ranvier.deploy.program import (
    ConvMap,
    DenseMap,
    OneToOne,
    Population,
    Program,
    Projection,
    Readout,
)
from ranvier.export.graph import Graph
from ranvier.export.neurons import IF, LIF, SlidingWindow
from ranvier.export.nodes import Conv, Input, Neuron, Opaque, Output
from ranvier.export.onnx_file import initial_states, run_onnx, write_onnx
from ranvier.sim.reference import run_reference
from ranvier.train.errors import FormatError, RangeError, ShapeError, UnsupportedError

STEPS = 9


def sample(graph: Graph, seed: int) -> np.ndarray:
    """Spikes for one seed, real values for another: `[STEPS, 3, *shape]`."""
    shape = (STEPS, 3, *graph.inputs[0].shape)
    return 2 * spikes(3, *shape) if seed == 0 else normal(4, *shape)


def emits_spikes(graph: Graph) -> bool:
    source = graph[graph.outputs[0].inputs[0]]
    return isinstance(source, Neuron) and source.model.binary and graph.outputs[0].observe == "out"


def same(graph: Graph, found: np.ndarray, expected: np.ndarray) -> None:
    """Spikes exactly; real values to float32 rounding of sums of a few hundred terms of size 1."""
    if emits_spikes(graph):
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GRAPHS)
def test_equals_the_interpreter(name, tmp_path):
    """As a sequence, as single steps with states handed on, and with an input held in time."""
    graph, path = GRAPHS[name], tmp_path / "a.onnx"
    for seed in (0, 1):
        x = sample(graph, seed)
        expected = graph.run(x)
        write_onnx(graph, path, steps=STEPS)
        same(graph, run_onnx(path, x), expected)
        write_onnx(graph, path)
        same(graph, run_onnx(path, x), expected)
        write_onnx(graph, path, steps=STEPS, static=True)
        same(graph, run_onnx(path, x[0]), graph.run(np.repeat(x[:1], STEPS, axis=0)))


def test_a_wrong_threshold_is_noticed(tmp_path):
    graph = neuron_graph(LIF(beta=0.9))
    write_onnx(neuron_graph(LIF(beta=0.9, v_threshold=1.1)), tmp_path / "a.onnx", steps=STEPS)
    x = normal(8, STEPS, 200, 5)
    assert not np.array_equal(run_onnx(tmp_path / "a.onnx", x), graph.run(x))


@pytest.mark.parametrize("reduce", ["mean", "sum", "last", "max"])
def test_readout(reduce, tmp_path):
    graph = recurrent_graph()
    end = Output(name="out", inputs=("read",), reduce=reduce)
    graph = graph.with_nodes([*list(graph)[:-1], end])
    write_onnx(graph, tmp_path / "a.onnx", steps=STEPS)
    x = sample(graph, 1)
    found = run_onnx(tmp_path / "a.onnx", x, output="readout")
    np.testing.assert_allclose(found, graph.readout(graph.run(x)), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 17])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_batch_and_threads(batch, threads, tmp_path):
    graph = residual()
    write_onnx(graph, tmp_path / "a.onnx", steps=4)
    x = normal(batch, 4, batch, 2, 8, 8)
    found = run_onnx(tmp_path / "a.onnx", x, threads=threads)
    np.testing.assert_allclose(found, graph.run(x), atol=5e-5)


def test_two_outputs(tmp_path):
    graph = residual()
    nodes = [*graph, Output(name="early", inputs=("n1",))]
    graph = graph.with_nodes(nodes)
    write_onnx(graph, tmp_path / "a.onnx", steps=STEPS)
    x = sample(graph, 1)
    _, kept = graph.run(x, record=("n1",))
    found = run_onnx(tmp_path / "a.onnx", x, output="output.early")
    np.testing.assert_array_equal(found, kept["n1"])


def test_initial_states_are_zero_and_named(tmp_path):
    write_onnx(recurrent_graph(3, cuba=True), tmp_path / "a.onnx")
    states = initial_states(tmp_path / "a.onnx", 5)
    shapes = {name: s.shape for name, s in states.items()}
    assert shapes == {
        "back.0": (5, 6),
        "back.1": (5, 6),
        "back.2": (5, 6),
        "pop.u": (5, 6),
        "pop.v": (5, 6),
        "read.v": (5, 3),
    }
    assert not any(s.any() for s in states.values())
    with pytest.raises(RangeError):
        initial_states(tmp_path / "a.onnx", 0)


def subgraphs(graph: onnx.GraphProto):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from subgraphs(attribute.g)


def untyped(model: onnx.ModelProto) -> list[str]:
    """The values, in the graph or in a loop's body, whose type and shape no viewer could show."""
    known = {init.name for g in subgraphs(model.graph) for init in g.initializer}
    for graph in subgraphs(model.graph):
        for info in [*graph.input, *graph.output, *graph.value_info]:
            kind = info.type.tensor_type
            if kind.elem_type and kind.HasField("shape"):
                known.add(info.name)
    used = [v for g in subgraphs(model.graph) for n in g.node for v in [*n.input, *n.output] if v]
    return sorted({v for v in used if v not in known})


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("name", ["residual add", "residual iand", "recurrent cuba", "two loops"])
def test_a_viewer_finds_every_value_typed(name, steps, tmp_path):
    write_onnx(GRAPHS[name], tmp_path / "a.onnx", steps=steps)
    model = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert untyped(model) == []
    names = [n.name for g in subgraphs(model.graph) for n in g.node]
    assert len(set(names)) == len(names) and all(names)
    assert model.opset_import[0].version >= 17


def test_typing_check_can_fail(tmp_path):
    write_onnx(residual(), tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    del model.graph.value_info[0]
    assert untyped(model)


def test_two_writes_are_equal(tmp_path):
    for name in ("a", "b"):
        write_onnx(residual(), tmp_path / f"{name}.onnx", steps=4)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_refusals(tmp_path):
    path = tmp_path / "a.onnx"
    odd = chain((4,), Opaque(name="a", kind="softmax", reason="over time", shape=(4,)))
    with pytest.raises(UnsupportedError, match="'a' .softmax.*over time"):
        write_onnx(odd, path, steps=2)
    graph = residual()
    with pytest.raises(RangeError):
        write_onnx(graph, path, steps=0)
    with pytest.raises(UnsupportedError, match="steps=T"):
        write_onnx(graph, path, static=True)
    assert not path.exists()
    write_onnx(graph, path, steps=4)
    for shape in ((4, 3, 2, 8, 7), (3, 3, 2, 8, 8), (4, 0, 2, 8, 8), (4, 2, 8, 8)):
        with pytest.raises(ShapeError, match="the model takes"):
            run_onnx(path, np.zeros(shape, np.float32))


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.onnx"
    write_onnx(recurrent_graph(), path)
    whole = path.read_bytes()
    x = np.zeros((2, 1, 4), np.float32)
    for cut in (0, 1, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError):
            run_onnx(path, x)
    with pytest.raises(FormatError):
        run_onnx(tmp_path / "none.onnx", x)
    other = onnx.load_from_string(whole)
    del other.metadata_props[:]
    onnx.save(other, path)
    with pytest.raises(FormatError, match="not written by ranvier"):
        run_onnx(path, x)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    reset=st.sampled_from(["zero", "subtract", "none"]),
    timing=st.sampled_from(["immediate", "delayed", "carry", "discard"]),
    strict=st.booleans(),
    beta=st.floats(0, 1),
    v_leak=st.floats(-1, 1),
)
def test_any_neuron_spikes_alike(seed, reset, timing, strict, beta, v_leak, tmp_path_factory):
    """Without a convolution or a sum before it a population's spikes are equal to the last bit."""
    fire = {"reset": reset, "timing": timing, "strict": strict, "v_leak": v_leak}
    model = LIF(beta=beta, v_threshold=0.5 + normal(seed, 7) ** 2, **fire)
    graph = Graph.of(
        [
            Input(name="x", shape=(7,)),
            Neuron(name="n", inputs=("x",), model=model),
            Output(name="out", inputs=("n",)),
        ]
    )
    x = normal(seed, 30, 2, 7)
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    write_onnx(graph, path, steps=30)
    np.testing.assert_array_equal(run_onnx(path, x), graph.run(x))


def test_convolutional_spikes_over_many_neurons(tmp_path):
    """ONNX Runtime sums a convolution in another order than torch: how many of 1.5 million spikes
    differ.

    A spike differs only where v is within rounding (1e-6) of the threshold; a handful is allowed.
    """
    graph = chain(
        (3, 16, 16),
        Conv(name="c1", weight=normal(1, 16, 3, 3, 3, scale=0.3), padding=(1, 1)),
        Neuron(name="n1", model=LIF(beta=0.9)),
        Conv(name="c2", weight=normal(2, 16, 16, 3, 3, scale=0.1), padding=(1, 1)),
        Neuron(name="n2", model=IF(reset="subtract")),
    )
    write_onnx(graph, tmp_path / "a.onnx", steps=23)
    x = normal(3, 23, 16, 3, 16, 16)
    found, expected = run_onnx(tmp_path / "a.onnx", x), graph.run(x)
    assert 0.01 < expected.mean() < 0.6
    assert (found != expected).mean() < 1e-4


def test_sliding_window_of_many_taps(tmp_path):
    graph = neuron_graph(SlidingWindow(taps=normal(1, 5), v_threshold=0.2))
    write_onnx(graph, tmp_path / "a.onnx")
    x = sample(graph, 1)
    np.testing.assert_array_equal(run_onnx(tmp_path / "a.onnx", x), graph.run(x))


# integer Programs


def watched(program, x):
    series = run_reference(program, x)
    part = series.v if program.readout.kind == "membrane" else series.sent
    return part[program.output.name]


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_programs_are_equal_bit_for_bit(seed, cyclic, hot, tmp_path):
    """Random programs of every map, cell, lag and graded input; hot ones wrap and saturate."""
    program = random_program(seed, cyclic=cyclic, hot=hot)
    x = np.ascontiguousarray(random_input(program, seed))
    expected = watched(program, x)
    assert np.abs(expected).max() < 2**31
    for steps in (len(x), None):
        write_onnx(program, tmp_path / "a.onnx", steps=steps)
        found = run_onnx(tmp_path / "a.onnx", x)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)


def logic_program(rng):
    """OR, AND and IAND of spikes; logic behind a convolution and a matrix, with its own thresholds."""
    size = (2, 3, 2)
    one, minus = (OneToOne(weight=np.array(w, np.int16), shape=size) for w in (1, -1))
    weight = 2 * rng.integers(-20, 20, (2, 2, 1, 1))
    conv = ConvMap(weight=weight.astype(np.int16), in_shape=size, out_shape=size)
    dense = DenseMap(weight=(2 * rng.integers(-20, 20, (5, 12))).astype(np.int16))
    vth, gate = rng.integers(0, 60, size), {"kind": "logic"}
    cells = {
        "a": Cell(**gate, vth=vth), "b": Cell(**gate, vth=vth[:, :1, :1], strict=False),
        "or": Cell(**gate), "and": Cell(**gate, vth=1), "iand": Cell(**gate),
        "out": Cell(**gate, vth=9, strict=False),
    }  # fmt: skip
    wires = [
        ("in", "a", conv, 0), ("in", "b", conv, 1), ("a", "or", one, 0), ("b", "or", one, 0),
        ("a", "and", one, 0), ("b", "and", one, 2), ("or", "iand", one, 0),
        ("and", "iand", minus, 0), ("iand", "out", dense, 0),
    ]  # fmt: skip
    populations = [Population(name="in", shape=size, lo=-3, hi=9)]
    for name, cell in cells.items():
        shape = (5,) if name == "out" else size
        populations.append(Population(name=name, shape=shape, cell=cell))
    projections = [
        Projection(name=f"p{k}", source=source, target=target, map=linear, lag=lag)
        for k, (source, target, linear, lag) in enumerate(wires)
    ]
    return Program(
        populations={p.name: p for p in populations},
        projections={p.name: p for p in projections},
        readout=Readout(population="out", reduce="none"),
        steps=8,
    )


@pytest.mark.parametrize("name", ["a", "b", "or", "and", "iand", "out"])
def test_logic_cells_are_equal_bit_for_bit(name, tmp_path):
    rng = np.random.default_rng(3)
    program = logic_program(rng)
    program = replace(program, readout=Readout(population=name, reduce="none"))
    x = rng.integers(-3, 10, (8, 4, *program.input.shape))
    expected = watched(program, x)
    assert 0 < expected.mean() < 1
    for steps in (8, None):
        write_onnx(program, tmp_path / "a.onnx", steps=steps)
        np.testing.assert_array_equal(run_onnx(tmp_path / "a.onnx", x), expected)
    cells = dict(program.populations)
    cells[name] = replace(cells[name], cell=replace(cells[name].cell, vth=2))
    write_onnx(replace(program, populations=cells), tmp_path / "b.onnx", steps=8)
    assert (run_onnx(tmp_path / "b.onnx", x) != expected).any()  # the control


def test_programs_store_int8_weights_and_int32_states(tmp_path):
    program = random_program(2)
    write_onnx(program, tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert untyped(model) == []
    kinds = {i.data_type for i in model.graph.initializer}
    assert onnx.TensorProto.INT8 in kinds and onnx.TensorProto.FLOAT not in kinds
    states = [i.type.tensor_type.elem_type for i in model.graph.input]
    assert set(states) == {onnx.TensorProto.INT32}


@pytest.mark.parametrize("reduce", ["none", "mean", "sum", "last", "max"])
def test_program_readout_is_in_float_units(reduce, tmp_path):
    program = random_program(3)
    shape = program.output.shape
    scale, offset = np.abs(normal(1, *shape)) + 0.5, normal(2, *shape)
    readout = replace(program.readout, reduce=reduce, scale=scale, offset=offset)
    program = replace(program, readout=readout)
    x = np.ascontiguousarray(random_input(program, 3))
    write_onnx(program, tmp_path / "a.onnx", steps=len(x))
    found = run_onnx(tmp_path / "a.onnx", x, output="readout")
    expected = readout.reduced(readout.series(watched(program, x)))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("lo, hi", [(-128, 127), (-256, 254), (0, 255), (-255, 0), (-256, 255)])
def test_planes_add_up_to_the_weights(lo, hi):
    w = np.random.default_rng(0).integers(lo, hi + 1, (50, 40))
    for weight in (w, w & ~1):
        parts = planes(weight)
        assert all(p.mantissa.dtype == np.int8 for p in parts)
        np.testing.assert_array_equal(
            sum(p.factor * p.mantissa.astype(np.int64) for p in parts), weight
        )
    with pytest.raises(UnsupportedError):
        planes(np.array([256]))


# networks of the repository, traced from torch


def traced(name, **config):
    """A network whose norms have seen data, so that its layers spike, and its Graph."""
    import torch

    from ranvier.export import trace
    from ranvier.train import create_model

    torch.manual_seed(0)
    net = create_model(name, num_classes=10, steps=4, **config)
    size = config["image_size"]
    x = torch.rand(4, config["in_channels"], size, size)
    with torch.no_grad():
        for _ in range(5):
            net.train()(x)
    return net.eval(), trace(net.eval(), x[:2]), x


@pytest.mark.parametrize("join", ["vanilla", "sew", "sew-and", "sew-iand", "ms", "or"])
def test_residual_networks_spike_as_in_torch(join, tmp_path):
    """torch -> Graph -> NIR -> Graph -> ONNX: every population's spikes, counted."""
    from ranvier.export.nir_file import read_nir, write_nir

    _, graph, x = traced("resnet8", join=join, in_channels=2, image_size=16)
    write_nir(graph, tmp_path / "a.nir")
    assert graph.diff(back := read_nir(tmp_path / "a.nir")) == []
    series = np.repeat(x.numpy()[None], 4, axis=0)
    names = tuple(n.name for n in back.populations if n.model.binary)
    _, kept = back.run(series, record=names)
    last = [n for n in names if kept[n].mean() > 0.001][-1]
    watching = back.with_nodes([*back, Output(name="watch", inputs=(last,))])
    write_onnx(watching, tmp_path / "a.onnx", steps=4)
    found = run_onnx(tmp_path / "a.onnx", series, output="output.watch")
    # sums are taken in another order: a v within rounding of its threshold may fall on either side
    assert (found != kept[last]).mean() < 1e-3
