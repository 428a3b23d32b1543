"""Alignment of long lags: the relays that carry them begin with the sample."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from ranvier.deploy.align import align
from ranvier.deploy.cells import Cell
from ranvier.deploy.program import OneToOne, Population, Program, Projection, Readout
from ranvier.sim.reference import run_chip_time, run_reference


def network(*links: tuple[str, str, int]) -> Program:
    """in -> a -> b of three neurons each, and one-to-one projections (source, target, lag) besides."""
    one = OneToOne(weight=np.full((), 60, np.int16), shape=(3,))
    cell = Cell(du=4095, dv=2048, vth=50)
    wires = [("in", "a", 0), ("a", "b", 0), *links]
    return Program(
        populations={"in": Population(name="in", shape=(3,))}
        | {name: Population(name=name, shape=(3,), cell=cell) for name in ("a", "b")},
        projections={
            f"p{k}": Projection(name=f"p{k}", source=source, target=target, map=one, lag=lag)
            for k, (source, target, lag) in enumerate(wires)
        },
        readout=Readout(population="b"),
    )


@pytest.mark.parametrize(
    "link", [("in", "a", 7), ("in", "b", 13), ("a", "b", 5), ("a", "a", 8), ("b", "a", 9)]
)
def test_relays_of_a_long_lag_begin_with_the_sample(link: tuple[str, str, int]) -> None:
    """Each carries no more of the lag than that; forward and in a cycle. 7 once made depth -3."""
    plain, program = network(link), align(network(link), max_delay=2)
    relays = [p for p in program if "/relay" in p.name]
    assert relays and min(p.depth for p in relays) >= 1
    assert all(0 <= p.delay <= 2 for p in program.projections.values())
    x = np.random.default_rng(0).integers(0, 2, (16, 3, 3))
    alone, expected = run_reference(program, x), run_reference(plain, x)
    assert expected.sent["b"].any()
    for name in plain.populations:
        assert_array_equal(alone.sent[name], expected.sent[name])
    for k, series in enumerate(run_chip_time(program, [x[:, k : k + 1] for k in range(3)])):
        for name in program.populations:
            assert_array_equal(series.sent[name][:, 0], alone.sent[name][:, k])
            assert_array_equal(series.v[name][:, 0], alone.v[name][:, k])
