"""The fast engines against the reference: spikes, u, v, readout and ledger, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from random_programs import random_input, random_program

from ranvier.sim.runner import Result, run

STATES = ("spikes", "u", "v")
KINDS = {"plain": {}, "hot": {"hot": True}, "cyclic": {"cyclic": True}}


def first_difference(a: Result, b: Result) -> str | None:
    """The first population, in order, and index at which two results differ; None if nowhere."""
    for name in a.trace:
        for key in STATES:
            one, two = getattr(a.trace[name], key), getattr(b.trace[name], key)
            if one.shape != two.shape:
                return f"{name}.{key}: shape {one.shape} against {two.shape}"
            where = np.argwhere(one != two)
            if len(where):
                at = tuple(where[0])
                return f"{name}.{key}{list(map(int, at))}: {one[at]} against {two[at]}"
    return None


def assert_equal(a: Result, b: Result) -> None:
    assert first_difference(a, b) is None
    assert_array_equal(a.output_spikes, b.output_spikes)
    assert_array_equal(a.output, b.output)
    assert a.ledger.to_dict() == b.ledger.to_dict()


@pytest.mark.parametrize("engine", ["dense", "events", "auto"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("seed", range(12))
def test_engine_equals_reference(
    engine: str, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = random_program(seed, **KINDS[kind])
    x = random_input(program, seed)
    if engine == "auto":
        monkeypatch.setattr("ranvier.sim.auto.SMALL", 0 if seed % 2 else 10**9)
    want = run(program, x, "reference", STATES)
    assert_equal(want, run(program, x, engine, STATES))
