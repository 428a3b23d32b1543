"""Random Programs: Lava, the fast engines and chip time against the reference, value for value."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from tests.conformance.random_programs import programs, random_program
from tests.conformance.suite import ALL, Job, check, drawn, fails, keep, kept, shrunk

from ranvier.deploy.program import Program
from ranvier.sim.difference import first_difference
from ranvier.sim.lava_engine import run_on_lava
from ranvier.sim.runner import engines

FIXED = (*range(6), 23, 79)  # seeds of the short run; together they use every feature
FEATURES = {
    "binary input", "graded input", "conv", "groups", "pool", "nested join", "recurrence", "delay",
    "join or", "join and", "join iand", "join graded", "join linear", "join vanilla", "join ms",
    "join ms relay", "zero immediate", "zero delayed", "subtract immediate", "subtract delayed",
    "subtract carry", "zero discard", "none immediate", "relay shift", "not strict", "v_reset",
    "parameter arrays", "odd weights of mixed sign", "logic",
}  # fmt: skip


def job(seed: int) -> tuple[str, Program, np.ndarray]:
    program, x, _ = random_program(seed)
    return f"seed{seed}", program, x


def test_fixed_seeds_use_every_feature():
    used = set().union(*(random_program(seed)[2] for seed in FIXED))
    assert used == FEATURES


@pytest.mark.lava
def test_fixed_seeds_and_new_ones():
    seed = int(time.time())
    new = drawn(6, seed)
    tally = check([*map(job, FIXED), *new])
    assert sum(tally.mismatches.values()) == 0, f"drawn with {seed}:\n{tally}"
    assert tally.nets["lava"] == len(FIXED) + len(new)


def test_engines_on_more_seeds():
    tally = check(map(job, range(1000, 1060)), lava=False)
    assert sum(tally.mismatches.values()) == 0, str(tally)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_engines_on_drawn_programs(case: tuple[Program, np.ndarray]) -> None:
    """Chip time and the fast engines; hypothesis makes what fails small."""
    tally = check([("drawn", *case)], lava=False)
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
    """RANVIER_CONFORMANCE nets (200), drawn anew; failures are made small and kept."""
    n, seed = int(os.environ.get("RANVIER_CONFORMANCE", "200")), int(time.time())
    before = time.monotonic()
    jobs: dict[str, Job] = {name: (name, p, x) for name, p, x in drawn(n, seed)}
    tally = check(jobs.values())
    with capsys.disabled():
        print(f"\ndrawn with {seed}, {time.monotonic() - before:.0f} s\n{tally}")
    for name in {note.partition(":")[0] for note in tally.notes}:
        fast = fails(jobs[name], lava=False)
        with capsys.disabled():
            print("kept:", keep(shrunk(jobs[name], lava=not fast)))
    assert sum(tally.mismatches.values()) == 0
