"""Placement: nothing over a limit, every neuron exactly once, and clear words where it does not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.residual_graphs import images, residual_graph

from ranvier.deploy import LOIHI1, LOIHI2, compile, place
from ranvier.deploy.cells import Cell
from ranvier.deploy.chip import Limit
from ranvier.deploy.placement import Placement, first_fit
from ranvier.deploy.program import ConvMap, DenseMap, Population, Program, Projection, Readout
from ranvier.deploy.resources import Need, axon_bits, cut, need
from ranvier.train.errors import CapacityError, RangeError, UnsupportedError


def conv_program(channels: int, side: int, c_in: int = 8) -> Program:
    weight = np.random.default_rng(0).integers(-100, 100, (channels, c_in, 3, 3)) * 2
    conv = ConvMap(
        weight=weight, in_shape=(c_in, side, side), out_shape=(channels, side, side), padding=(1, 1)
    )
    return Program(
        populations={
            "i": Population(name="i", shape=(c_in, side, side)),
            "o": Population(name="o", shape=(channels, side, side), cell=Cell(vth=10)),
        },
        projections={"p": Projection(name="p", source="i", target="o", map=conv)},
        readout=Readout(population="o"),
    )


def check(placement: Placement) -> None:
    for core in placement.per_core:
        assert core.over(placement.chip) is None
    for p in placement.program:
        if not p.is_input:
            parts = [s.part for s in placement.slices if s.part.population == p.name]
            assert sum(part.neurons for part in parts) == p.size
            cores = np.bincount(placement.core_of(p.name).ravel(), minlength=placement.n_cores)
            held = np.zeros(placement.n_cores, int)
            for s in placement.slices:
                if s.part.population == p.name:
                    held[s.core] += s.part.neurons
            np.testing.assert_array_equal(cores, held)


@pytest.mark.parametrize("chip", [LOIHI1, LOIHI2])
@pytest.mark.parametrize(("channels", "side"), [(16, 16), (64, 32), (3, 5)])
def test_populations_are_cut_until_they_fit(chip, channels: int, side: int) -> None:
    placement = place(conv_program(channels, side), chip)
    check(placement)
    least = -(-channels * side * side // int(chip.neurons_per_core.value))
    assert placement.n_cores >= least


def test_counts_of_a_slice_equal_the_synapses_counted_one_by_one() -> None:
    program = conv_program(4, 6, c_in=2)
    conv = program.projections["p"].map
    for part in cut(program.populations["o"], 2, 3):
        box = np.zeros((4, 6, 6))
        box[part.c0 : part.c1, part.r0 : part.r1] = 1
        ones = replace(conv, weight=np.ones_like(conv.weight))
        eye = np.eye(conv.in_shape[0] * 36, dtype=np.int64).reshape(-1, *conv.in_shape)
        drives = (ones.apply(eye) * box).reshape(len(eye), -1).sum(1)
        axons, synapses = int((drives > 0).sum()), int(drives.sum())
        found = need(program, part, LOIHI1)
        assert found.in_axons == axons
        assert found.synapse_bits == axons * axon_bits(synapses / axons, 8)


def test_what_cannot_fit_says_what_and_by_how_much() -> None:
    tiny = replace(LOIHI2, synapse_bits=Limit(400, "a test"))
    with pytest.raises(
        CapacityError, match=r"'o' \(16, 8, 8\) needs .* synapse bits on one core; loihi2 has 400"
    ):
        place(conv_program(16, 8), tiny)
    with pytest.raises(CapacityError, match="chips; 1 are allowed"):
        place(conv_program(64, 64), LOIHI1, max_chips=1)


def test_loihi1_refuses_graded_messages_and_custom_neurons() -> None:
    program = compile(residual_graph("ms"), calibration=images(0, 4))
    with pytest.raises(UnsupportedError, match="sends graded messages"):
        place(program, LOIHI1)
    soft = conv_program(2, 4)
    cell = Cell(vth=10, reset="subtract")
    soft = soft.with_parts(
        populations={**soft.populations, "o": replace(soft.populations["o"], cell=cell)}
    )
    with pytest.raises(UnsupportedError, match="subtractive reset"):
        place(soft, LOIHI1)
    with pytest.raises(RangeError, match="solver 'magic'"):
        place(soft, LOIHI2, solver="magic")  # type: ignore[arg-type]


def test_first_fit_beats_one_core_each_and_the_solver_beats_first_fit() -> None:
    sizes = [0.5, 0.7, 0.5, 0.2, 0.4, 0.2, 0.5, 0.1, 0.6]  # 3.7 cores; greedy needs 5? at least 4
    needs = [Need(neurons=int(s * 1024)) for s in sizes]
    cores = first_fit(needs, LOIHI1)
    assert max(cores) + 1 < len(sizes)
    pytest.importorskip("highspy", reason="the solver is the optional extra ranvier[solver]")
    from ranvier.deploy.placement import _solve

    hard = [Need(neurons=n) for n in (400, 400, 330, 330, 290, 290)]  # 2040 of 2 x 1024
    assert max(first_fit(hard, LOIHI1)) + 1 == 3
    better = _solve(hard, LOIHI1, 3, "highspy")
    assert better is not None and max(better) + 1 == 2


def test_the_table_and_the_picture_name_every_population() -> None:
    placement = place(compile(residual_graph("sew"), calibration=images(0, 4)), LOIHI2)
    check(placement)
    table = placement.table()
    assert all(p.name in table for p in placement.program if not p.is_input)
    assert "modelled" in table and placement.to_svg().startswith("<svg")
    data = placement.to_dict()
    assert data["n_cores"] == placement.n_cores == len(data["cores"])
    assert 0 < placement.utilization["neurons"]["max"] <= 1


def test_dense_layers_count_every_weight() -> None:
    w = np.ones((10, 64), np.int16)
    program = Program(
        populations={
            "i": Population(name="i", shape=(64,)),
            "o": Population(name="o", shape=(10,), cell=Cell(vth=10)),
        },
        projections={"p": Projection(name="p", source="i", target="o", map=DenseMap(weight=w))},
        readout=Readout(population="o"),
    )
    (part,) = cut(program.populations["o"], 1, 1)
    assert need(program, part, LOIHI2) == Need(10, 640 * 8 + 64 * 64, 64)
