"""Random Programs: Lava, the fast engines and chip time against the reference, value for value."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np
import pytest
from tests.conformance.random_programs import random_program
from tests.conformance.suite import ALL, check, fails, keep, kept, shrunk

from ranvier.deploy.program import Program
from ranvier.sim.difference import first_difference
from ranvier.sim.lava_engine import run_on_lava
from ranvier.sim.runner import engines

FIXED = (*range(7), 325, 371)  # seeds of the short run; together they use every feature
FEATURES = {
    "binary input", "graded input", "conv", "groups", "pool", "nested join", "recurrence", "delay",
    "join or", "join and", "join iand", "join graded", "join linear", "join vanilla", "join ms",
    "join ms relay", "zero immediate", "zero delayed", "subtract immediate", "subtract delayed",
    "subtract carry", "zero discard", "none immediate", "relay shift", "not strict", "v_reset",
    "parameter arrays", "odd weights of mixed sign",
}  # fmt: skip


def job(seed: int) -> tuple[str, Program, np.ndarray]:
    program, x, _ = random_program(seed)
    return f"seed{seed}", program, x


def test_fixed_seeds_use_every_feature():
    used = set().union(*(random_program(seed)[2] for seed in FIXED))
    assert used == FEATURES


@pytest.mark.lava
def test_fixed_seeds_and_new_ones():
    new = int(time.time()) % 10**6
    tally = check(map(job, [*FIXED, new, new + 1]))
    assert sum(tally.mismatches.values()) == 0, f"from seed {new}:\n{tally}"
    assert tally.nets["lava"] == len(FIXED) + 2


def test_engines_on_more_seeds():
    tally = check(map(job, range(1000, 1025)), lava=False)
    assert sum(tally.mismatches.values()) == 0, str(tally)


@pytest.mark.lava
def test_kept_cases():
    tally = check(kept())
    assert sum(tally.mismatches.values()) == 0, str(tally)


@pytest.mark.lava
def test_a_changed_bias_is_found():
    """The control: Lava runs a Program in which one neuron's bias is one higher."""
    name, program, x = job(0)
    last = [p for p in program if p.cell is not None and p.cell.kind == "cuba"][-1]
    assert last.cell is not None
    bias = np.zeros(last.shape, np.int64) + last.cell.bias_mant
    bias[(-1,) * bias.ndim] += 1
    changed = replace(last, cell=replace(last.cell, bias_mant=bias))
    other = replace(program, populations={**program.populations, last.name: changed})
    found, expected = run_on_lava(other, x, ALL), engines()["reference"](program, x, ALL)
    difference = first_difference(found, expected)
    assert difference is not None and difference.population == last.name
    assert difference.what == "v" and difference.neuron == tuple(n - 1 for n in last.shape)


def test_shrinking_keeps_a_failure(monkeypatch):
    """A fault planted in the third population survives while all else is taken away."""
    from tests.conformance import suite

    case = next(c for c in map(job, range(50)) if len(c[1].populations) > 4)
    third = list(case[1].populations)[2]
    monkeypatch.setattr(suite, "fails", lambda c, lava: third in c[1].populations)
    name, program, x = shrunk(case)
    assert x.shape[:2] == (1, 1) and not program.projections
    assert third in program.populations and len(program.populations) <= 3


@pytest.mark.lava
@pytest.mark.slow
def test_long_run(capsys):
    """RANVIER_CONFORMANCE nets (200) from new seeds; failures are made small and kept."""
    n, start = int(os.environ.get("RANVIER_CONFORMANCE", "200")), int(time.time()) % 10**8
    before = time.monotonic()
    tally = check(map(job, range(start, start + n)))
    with capsys.disabled():
        print(f"\nseeds {start}..{start + n - 1}, {time.monotonic() - before:.0f} s\n{tally}")
    for seed in {int(note.partition(":")[0][4:]) for note in tally.notes}:
        fast = fails(job(seed), lava=False)
        with capsys.disabled():
            print("kept:", keep(shrunk(job(seed), lava=not fast)))
    assert sum(tally.mismatches.values()) == 0
