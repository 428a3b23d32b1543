"""Quantization, alignment and the compiler: exact where it must be, close to float where it can be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import snntorch as snn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.residual_graphs import JOINS, images, residual_graph
from torch import nn

from ranvier.deploy import LOIHI1, LOIHI2, Program, compile
from ranvier.deploy.align import align
from ranvier.deploy.bounds import A_LIMIT, arriving_range, prove
from ranvier.deploy.cells import Cell, decay, fold, wrap
from ranvier.deploy.program import DenseMap, OneToOne, Population, Projection, Readout
from ranvier.deploy.quantize import grid, round_weight
from ranvier.export import trace
from ranvier.export.graph import Graph
from ranvier.export.neurons import LIF, CubaLIF
from ranvier.export.nodes import Dense, Input, Neuron, Output
from ranvier.sim import run
from ranvier.sim.reference import run_chip_time, run_reference
from ranvier.train.errors import (
    CapacityError,
    FormatError,
    RangeError,
    RanvierError,
    ShapeError,
    UnsupportedError,
)


def streamed_equal(program: Program, x: np.ndarray) -> None:
    """Samples streamed back to back in chip time, each equal to its lone algorithmic run."""
    whole = program.encode(x)
    samples = [whole[:, i : i + 1] for i in range(whole.shape[1])]
    lone = run_reference(program, whole)
    for i, series in enumerate(run_chip_time(program, samples)):
        for name in program.populations:
            for part in ("sent", "u", "v"):
                np.testing.assert_array_equal(
                    getattr(series, part)[name][:, 0], getattr(lone, part)[name][:, i], err_msg=name
                )


@pytest.mark.parametrize("joins", ["linear", "graded"])
@pytest.mark.parametrize("join", JOINS)
def test_every_join_compiles_close_to_float_and_aligned(join: str, joins: str) -> None:
    graph, x = residual_graph(join, 1), images(1, 48)
    program = compile(graph, calibration=x, joins=joins)
    wanted = graph.readout(graph.run(x))
    found = run(program, x, engine="reference").output
    assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.97
    streamed_equal(program, x[:3])


@pytest.mark.parametrize("join", ["or", "sew-and", "sew-iand"])
def test_joins_as_logic_send_what_stock_compartments_send(join: str) -> None:
    graph, x = residual_graph(join), images(0, 8)
    stock, custom = (compile(graph, calibration=x, joins=j) for j in ("auto", "logic"))
    gates = [p for p in custom if p.cell is not None and p.cell.kind == "logic"]
    assert {p.name for p in gates} == {"b0.join", "b1.join"}
    assert all(p.cell is not None and p.cell.why_custom() for p in gates)
    assert not any(p.cell is not None and p.cell.kind == "logic" for p in stock)
    mine, theirs = (run(p, x, engine="reference", record=("spikes", "v")) for p in (custom, stock))
    for name in stock.populations:
        np.testing.assert_array_equal(mine.trace[name].spikes, theirs.trace[name].spikes)
    assert not mine.trace["b0.join"].v.any()  # no membrane
    for engine in ("dense", "events"):
        other = run(custom, x, engine=engine, record=("spikes", "v"))
        for name in custom.populations:
            np.testing.assert_array_equal(mine.trace[name].spikes, other.trace[name].spikes)


def test_logic_asks_for_microcode_and_has_no_bias() -> None:
    with pytest.raises(UnsupportedError, match="loihi1 has one fixed compartment"):
        compile(residual_graph("or"), LOIHI1, images(0, 4), joins="logic")
    with pytest.raises(RangeError, match="neither bias nor reset"):
        Cell(kind="logic", bias_mant=1)


def test_a_threshold_a_channel_absorbs_the_weights_scale() -> None:
    """Channels a thousand times apart: at 4 bits one scale loses the small ones, a scale each none."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 20)) * np.array([[1.0], [0.1], [0.01], [0.001]])
    theta = np.array([1.0, 0.1, 0.01, 0.001])
    nodes = [
        Input(name="x", shape=(20,), lo=0.0, hi=1.0),
        Dense(name="fc", inputs=("x",), weight=weight),
        Neuron(name="n", inputs=("fc",), model=LIF(beta=0.5, v_threshold=theta)),
        Output(name="y", inputs=("n",)),
    ]
    graph = Graph.of(nodes, steps=4)
    x = (rng.random((4, 200, 20)) < 0.3).astype(np.float32)
    exact = np.asarray(graph.run(x, record=("n",))[1]["n"])
    wrong = {}
    for thresholds in ("channel", "population"):
        program = compile(graph, calibration=x, weight_bits=4, thresholds=thresholds)
        assert not any(b.wraps for b in prove(program).values())
        sent = run(program, x, engine="reference", record=("spikes",)).trace["n"].spikes
        wrong[thresholds] = (sent != exact).mean((0, 1))
    assert np.unique(program.populations["n"].scale).size == 1
    assert wrong["channel"].max() < 0.1 < wrong["population"][3]


def test_without_alignment_a_skip_adds_spikes_of_different_steps() -> None:
    """The control of the test above: delays set to zero give another result."""
    graph, x = residual_graph("vanilla", 1), images(1, 3)
    program = compile(graph, calibration=x)
    assert any(p.delay for p in program.projections.values())
    hasty = program.with_parts(
        projections={n: replace(p, delay=0) for n, p in program.projections.items()}
    )
    with pytest.raises(AssertionError):
        streamed_equal(hasty, x)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    join=st.sampled_from(JOINS),
    bits=st.integers(3, 8),
    reset=st.sampled_from(["zero", "subtract", "none"]),
)
def test_nothing_that_compiles_can_wrap(seed: int, join: str, bits: int, reset: str) -> None:
    graph, x = residual_graph(join, seed, blocks=1, reset=reset), images(seed, 4)
    program = compile(graph, calibration=x, weight_bits=bits)
    assert not any(bound.wraps for bound in prove(program).values())
    for p in program.projections.values():
        assert p.bits in (bits, 8)
        if p.sign == "mixed":
            assert not (p.map.weight % 2 ** (9 - p.bits)).any()


def test_four_bits_do_not_silence_a_relay() -> None:
    """A shortcut's wire carries a value, not a weight: at few bits it must not round to nothing."""
    graph, x = residual_graph("ms", 2, blocks=3), images(2, 48)
    wanted = graph.readout(graph.run(x))
    for joins in ("linear", "graded"):
        program = compile(graph, calibration=x, weight_bits=4, joins=joins)
        assert all(p.map.weight.any() for p in program.projections.values())
        found = run(program, x, engine="reference").output
        assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.8


def test_bounds_hold_for_the_worst_input_and_are_reached() -> None:
    w = np.array([[100, -200, 30], [-256, -256, -256]], np.int16)
    program = Program(
        populations={
            "i": Population(name="i", shape=(3,)),
            "o": Population(name="o", shape=(2,), cell=Cell(vth=10)),
        },
        projections={"p": Projection(name="p", source="i", target="o", map=DenseMap(weight=w))},
        readout=Readout(population="o"),
    )
    assert arriving_range(program, program.populations["o"]) == (-768, 130)
    every = np.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    sums = DenseMap(weight=w).apply(every)
    assert (sums.min(), sums.max()) == (-768, 130)


def test_a_program_that_wraps_is_found() -> None:
    w = np.full((1, 600), 254, np.int16)
    program = Program(
        populations={
            "i": Population(name="i", shape=(600,)),
            "o": Population(name="o", shape=(1,), cell=Cell(vth=10)),
        },
        projections={"p": Projection(name="p", source="i", target="o", map=DenseMap(weight=w))},
        readout=Readout(population="o"),
    )
    assert prove(program)["o"].a_hi > A_LIMIT and prove(program)["o"].wraps


def test_weights_keep_to_the_chips_grid() -> None:
    w = np.random.default_rng(0).normal(size=(8, 8))
    for bits in range(1, 9):
        low, high, step = grid(w, bits)
        whole = round_weight(w, 100.0, bits)
        assert not (whole % step).any() and low <= whole.min() and whole.max() <= high
        assert len(np.unique(np.arange(low, high + 1, step))) == 2**bits
    assert grid(np.abs(w), 8) == (0, 255, 1) and grid(-np.abs(w), 8) == (-255, 0, 1)


def dense_graph(model: LIF | CubaLIF, seed: int = 0, observe: str = "out") -> Graph:
    rng = np.random.default_rng(seed)
    return Graph.of([
        Input(name="x", shape=(20,), lo=0.0, hi=1.0),
        Dense(name="d", inputs=("x",), weight=rng.normal(size=(8, 20)).astype("f") * 0.6,
              bias=rng.normal(size=8).astype("f") * 0.2),
        Neuron(name="n", inputs=("d",), model=model),
        Output(name="o", inputs=("n",), reduce="sum", observe=observe),
    ], steps=12)  # fmt: skip


@pytest.mark.parametrize("timing", ["immediate", "delayed", "carry", "discard"])
@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
def test_resets_follow_the_float_model(reset: str, timing: str) -> None:
    x = (np.random.default_rng(1).random((12, 64, 20)) < 0.4).astype(np.float32)
    graph = dense_graph(LIF(beta=0.75, v_threshold=1.1, reset=reset, timing=timing))
    program = compile(graph, calibration=x)
    floats, whole = graph.run(x), run(program, x, engine="reference").output_spikes
    assert (floats == whole).mean() > 0.985
    streamed_equal(program, x[:, :3])


@pytest.mark.parametrize("field", ["v_leak", "v_reset"])
def test_leak_and_reset_potentials_follow_the_float_model(field: str) -> None:
    x = (np.random.default_rng(2).random((12, 64, 20)) < 0.4).astype(np.float32)
    graph = dense_graph(LIF(beta=0.5, v_threshold=1.1, **{field: 0.3}))
    whole = run(compile(graph, calibration=x), x, engine="reference").output_spikes
    assert (graph.run(x) == whole).mean() > 0.985


def test_membranes_come_back_in_float_units() -> None:
    x = (np.random.default_rng(3).random((12, 16, 20)) < 0.4).astype(np.float32)
    graph = dense_graph(LIF(beta=0.5, reset="none"), observe="v")
    found = run(compile(graph, calibration=x), x, engine="reference")
    np.testing.assert_allclose(found.output_series, graph.run(x), atol=0.05)


def test_synaptic_currents_decay_as_in_float() -> None:
    x = (np.random.default_rng(4).random((12, 64, 20)) < 0.2).astype(np.float32)
    graph = dense_graph(CubaLIF(alpha=0.6, beta=0.8, v_threshold=2.0))
    graph = graph.with_nodes([replace(n, bias=None) if isinstance(n, Dense) else n for n in graph])
    whole = run(compile(graph, calibration=x), x, engine="reference").output_spikes
    assert (graph.run(x) == whole).mean() > 0.985


def test_analog_input_lies_on_its_own_grid() -> None:
    graph = residual_graph("vanilla")
    program = compile(graph, calibration=images(0, 8))
    assert float(program.input.scale) == 16.0 and (program.input.lo, program.input.hi) == (0, 16)
    whole = program.encode(images(0, 8))
    np.testing.assert_array_equal(whole[0] / 16, images(0, 8))


def test_loihi1_reads_out_through_a_membrane_and_refuses_analog_input() -> None:
    graph = residual_graph("or")
    with pytest.raises(UnsupportedError, match="input 'x' is analog"):
        compile(graph, chip=LOIHI1, calibration=images(0, 8))
    x = (images(0, 8) > 0.5).astype(np.float32)
    program = compile(graph, chip=LOIHI1, calibration=x)
    assert not any(p.graded for p in program)
    found = run(program, x, engine="reference").output
    assert np.corrcoef(found.ravel(), graph.readout(graph.run(x)).ravel())[0, 1] > 0.97


def test_auto_takes_the_cheaper_mapping() -> None:
    graph, x = residual_graph("ms", blocks=3, down=False), images(0, 16)
    cost = {j: compile(graph, calibration=x, joins=j).meta["cost_pj"] for j in ("linear", "graded")}
    auto = compile(graph, calibration=x)
    assert auto.meta["cost_pj"] == min(cost.values()) and cost["linear"] != cost["graded"]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"weight_bits": 9}, RangeError, "weight_bits 9"),
        ({"joins": "best"}, RangeError, "joins 'best' is none of"),
        ({"calibration": None}, RangeError, "give calibration data"),
        (
            {"calibration": np.zeros((2, 1, 5, 5), "f")},
            ShapeError,
            r"it takes \[time, batch, 1, 6, 6\]",
        ),
        ({"calibration": np.full((2, 1, 6, 6), np.nan, "f")}, RangeError, "not finite"),
        ({"chip": LOIHI1, "joins": "graded"}, UnsupportedError, "no graded spikes"),
    ],
)
def test_wrong_options_are_refused(options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        compile(residual_graph("ms"), **{"calibration": images(0, 4), "chip": LOIHI2, **options})


def spiking(name: str, n: int = 3) -> Population:
    return Population(name=name, shape=(n,), cell=Cell(du=4095, dv=2048, vth=50))


def one(source: str, target: str, n: int = 3, **fields: int) -> Projection:
    name = f"{source}>{target}" + (f"@{fields['lag']}" if "lag" in fields else "")
    return Projection(
        name=name,
        source=source,
        target=target,
        map=OneToOne(weight=np.full((), 60), shape=(n,)),
        **fields,
    )


def chain(length: int, *extra: Projection) -> Program:
    pops = [Population(name="p0", shape=(3,)), *(spiking(f"p{i}") for i in range(1, length))]
    links = [one(f"p{i}", f"p{i + 1}") for i in range(length - 1)]
    return Program(
        populations={p.name: p for p in pops},
        projections={p.name: p for p in [*links, *extra]},
        readout=Readout(population=f"p{length - 1}"),
        steps=6,
    )


def test_depth_is_the_longest_path_and_latency_the_outputs_depth() -> None:
    program = align(chain(6, one("p0", "p4")))
    assert [p.depth for p in program] == [0, 1, 2, 3, 4, 5]
    assert program.projections["p0>p4"].delay == 3 and program.latency == 5


def test_delays_beyond_the_chips_go_through_relays() -> None:
    program = align(chain(9, one("p0", "p8")), max_delay=2)
    assert (
        len(program.populations) == 11 and max(p.delay for p in program.projections.values()) <= 2
    )
    x = (np.random.default_rng(0).random((6, 2, 3)) < 0.5).astype(np.float32)
    streamed_equal(program, x)
    plain = run(align(chain(9, one("p0", "p8"))), x, engine="reference")
    np.testing.assert_array_equal(
        plain.output_spikes, run(program, x, engine="reference").output_spikes
    )


def test_recurrence_of_one_population_fits_and_of_two_in_one_step_does_not() -> None:
    x = (np.random.default_rng(0).random((6, 3, 3)) < 0.5).astype(np.float32)
    streamed_equal(align(chain(3, one("p1", "p1", lag=1))), x)
    streamed_equal(align(chain(3, one("p2", "p1", lag=2))), x)
    with pytest.raises(UnsupportedError, match="more synapses than algorithmic steps"):
        align(chain(3, one("p2", "p1", lag=1)))


@given(st.integers(-(2**23), 2**23), st.integers(0, 4096))
def test_decay_rounds_towards_zero(x: int, d: int) -> None:
    found = int(decay(np.array([x]), d)[0])
    assert found == int(np.sign(x)) * (abs(x) * (4096 - d) // 4096)


@given(st.integers(-(2**40), 2**40))
def test_wrap_is_twos_complement(x: int) -> None:
    assert int(wrap(np.array([x]), 24)[0]) == (x + 2**23) % 2**24 - 2**23
    assert -(2**23) < int(fold(np.array([max(min(x, 2**24), -(2**24))]))[0]) <= 2**23 + 2**23


def test_programs_survive_their_file(tmp_path) -> None:
    program = compile(residual_graph("ms"), calibration=images(0, 8))
    program.save(tmp_path / "p.h5")
    again = Program.load(tmp_path / "p.h5")
    assert again.digest() == program.digest() and again.meta == program.meta
    assert again.latency == program.latency and list(again.populations) == list(program.populations)
    first = next(iter(program.projections))
    weight = program.projections[first].map.weight.copy()
    weight.flat[0] += 2
    changed = replace(
        program.projections[first], map=replace(program.projections[first].map, weight=weight)
    )
    other = program.with_parts(projections={**program.projections, first: changed})
    assert other.digest() != program.digest()
    data = bytearray((tmp_path / "p.h5").read_bytes())
    held = program.projections[first].map.weight.tobytes()
    data[data.index(held) + len(held) // 2] ^= 0xFF
    (tmp_path / "bad.h5").write_bytes(data)
    with pytest.raises(FormatError, match="bad.h5"):
        Program.load(tmp_path / "bad.h5")


def test_programs_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(FormatError, match="which is no population"):
        chain(3, one("p0", "p9"))
    with pytest.raises(FormatError, match="without a lag"):
        chain(3, one("p2", "p1"))
    whole = chain(2, one("p0", "p1"))
    for name, change, error, reason in (
        ("p1", {"depth": -1}, RangeError, "'p1' sends 0..1 at depth -1"),
        ("p0", {"lo": 2}, RangeError, "'p0' sends 2..1 at depth 0"),
        ("p0", {"shape": (0,)}, ShapeError, "has no neurons"),
        ("p0", {"name": "p7"}, FormatError, "'p7' stands under 'p0'"),
    ):
        changed = replace(whole.populations[name], **change)
        with pytest.raises(error, match=reason):
            whole.with_parts(populations={**whole.populations, name: changed})
    with pytest.raises(RangeError, match="the chip holds 0..4096"):
        Cell(dv=5000)
    with pytest.raises(RangeError, match="must be a whole number"):
        Cell(vth=np.array(1.5))


@pytest.mark.parametrize("failing", ["linear", "graded"])
def test_auto_keeps_the_mapping_that_fits(failing: str, monkeypatch) -> None:
    """Where one mapping of the joins fits nowhere the other is taken; both refused is an error."""
    from ranvier.deploy import compiler

    graph, x = residual_graph("ms"), images(0, 8)
    (other,) = {"linear", "graded"} - {failing}
    wanted = compile(graph, calibration=x, joins=other).digest()
    plain = compiler.Mapper.program

    def refusing(self, names=(failing,)):
        if self.joins in names:
            raise CapacityError(f"compile: {self.joins} does not fit")
        return plain(self)

    monkeypatch.setattr(compiler.Mapper, "program", refusing)
    assert compile(graph, calibration=x).digest() == wanted
    both = ("linear", "graded")
    monkeypatch.setattr(compiler.Mapper, "program", lambda self: refusing(self, both))
    with pytest.raises(CapacityError, match="linear does not fit"):
        compile(graph, calibration=x)


class TwoConvolutionsBeside(nn.Module):
    """A membrane that a convolution and two in a row reach, which no one convolution equals."""

    def __init__(self) -> None:
        super().__init__()
        self.neurons = nn.ModuleList(
            snn.Leaky(beta=0.5, init_hidden=True, reset_mechanism="zero") for _ in range(4)
        )
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(5))
        self.out = nn.Linear(48, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, other, *rest = self.layers
        y = first(self.neurons[0](x)) + rest[0](other(x))
        for neuron, layer in zip(list(self.neurons)[1:], rest[1:], strict=False):
            y = y + layer(neuron(y))
        return self.out(self.neurons[3](y).flatten(1))


def test_a_relay_behind_rows_of_neurons_and_of_channels() -> None:
    torch.manual_seed(0)
    net, x = TwoConvolutionsBeside().eval(), torch.rand(8, 3, 4, 4) * 3
    program = compile(trace(net, x[:2], steps=3), calibration=x.numpy(), joins="graded")
    maps = {type(p.map).__name__ for p in program.projections.values()}
    assert {"ConvMap", "DenseMap"} <= maps and any(p.graded for p in program)
    found = run(program, x.numpy(), "reference").output
    np.testing.assert_array_equal(found, run(program, x.numpy(), "events").output)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"graph": None}, "NoneType is no Graph; make one with ranvier.export.trace"),
        ({"graph": nn.Linear(2, 2)}, "Linear is no Graph"),
        ({"chip": 3}, "int is no Chip"),
        ({"chip": "loihi3"}, "chip: 'loihi3' is none of loihi1, loihi2"),
    ],
)
def test_what_is_no_graph_and_no_chip(wrong: dict[str, Any], said: str) -> None:
    graph = residual_graph("vanilla")
    with pytest.raises(RanvierError, match=said):
        compile(**{"graph": graph, **wrong})


def test_a_chip_by_its_name() -> None:
    graph, x = residual_graph("vanilla"), images(0, 4)
    assert compile(graph, "loihi2", x).digest() == compile(graph, LOIHI2, x).digest()


def test_weights_that_have_outgrown_a_template() -> None:
    """Training for few bits can make sums larger than its scales were chosen for."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.5, 1.0, (4, 200)).astype(np.float32)
    x = rng.random((8, 200), np.float32)

    def graph(factor: float) -> Graph:
        return Graph.of(
            [
                Input(name="x", shape=(200,)),
                Dense(name="dense", inputs=("x",), weight=weight * factor),
                Neuron(name="neuron", inputs=("dense",), model=LIF(beta=0.5, v_threshold=90.0)),
                Output(name="out", inputs=("neuron",)),
            ],
            steps=2,
        )

    template = compile(graph(1.0), calibration=x, input_bits=4)
    kept, anew = (compile(graph(f), calibration=x, input_bits=4, like=template) for f in (0.9, 1.5))
    scale = template.populations["neuron"].scale
    assert kept.populations["neuron"].scale == scale > anew.populations["neuron"].scale
    assert not any(bound.wraps for bound in prove(anew).values())
