"""Random Programs: Lava, the fast engines and chip time against the reference, value for value."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conformance import suite
from conformance.suite import ALL, Job, check, check_apart, fails, keep, kept, shrunk
from hypothesis import HealthCheck, given, settings
from random_programs import drawn, programs, random_case

from ranvier.deploy.program import Program
from ranvier.sim.difference import first_difference
from ranvier.sim.lava_engine import run_on_lava
from ranvier.sim.runner import engines
from ranvier.train.errors import LavaError

FIXED = (*range(5), 11, 98)  # seeds of the short run; together they use every feature
FEATURES = {
    "binary input", "graded input", "conv", "groups", "pool", "nested join", "recurrence", "delay",
    "join or", "join and", "join iand", "join graded", "join linear", "join vanilla", "join ms",
    "join ms relay", "zero immediate", "zero delayed", "subtract immediate", "subtract delayed",
    "subtract carry", "zero discard", "none immediate", "relay shift", "not strict", "v_reset",
    "parameter arrays", "odd weights of mixed sign", "logic", "logic thresholds", "4 bits",
    "subtract discard",
}  # fmt: skip


def job(seed: int) -> tuple[str, Program, np.ndarray]:
    program, x, _ = random_case(seed)
    return f"seed{seed}", program, x


def test_fixed_seeds_use_every_feature():
    used = set().union(*(random_case(seed)[2] for seed in FIXED))
    assert used == FEATURES


@pytest.mark.lava
def test_fixed_seeds_and_new_ones():
    seed = 1 if "CI" in os.environ else int(time.time())
    new = drawn(6, seed)
    tally = check([*map(job, FIXED), *new])
    assert tally.failures == 0, f"drawn with {seed}:\n{tally}"
    assert tally.nets["lava"] == len(FIXED) + len(new)


def test_engines_on_more_seeds():
    tally = check(map(job, range(1000, 1060)), lava=False)
    assert tally.failures == 0, str(tally)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_engines_on_drawn_programs(case: tuple[Program, np.ndarray]) -> None:
    """Chip time and the fast engines; hypothesis makes what fails small."""
    tally = check([("drawn", *case)], lava=False)
    assert tally.failures == 0, str(tally)


@pytest.mark.lava
def test_kept_cases():
    tally = check(kept())
    assert tally.failures == 0, str(tally)


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
    case = next(c for c in map(job, range(50)) if len(c[1].populations) > 4)
    third = list(case[1].populations)[2]
    monkeypatch.setattr(suite, "fails", lambda c, lava: third in c[1].populations)
    name, program, x = shrunk(case)
    assert x.shape[:2] == (1, 1) and not program.projections
    assert third in program.populations and len(program.populations) <= 3


CRASHING = """
import ctypes, sys
sys.path.insert(0, {folder!r})
import suite, worker
made = suite.engines()
dense = made["dense"]
def crashing(program, x, record):
    if program.digest() == {digest!r}:
        ctypes.string_at(0)
    return dense(program, x, record)
suite.engines = lambda: {{**made, "dense": crashing}}
worker.main(worker.Path(sys.argv[1]), False)
"""


def test_a_crash_of_an_engine_is_counted_and_the_rest_is_run(tmp_path):
    """A segmentation fault in compiled code; it once ended a whole long run, with its seed."""
    jobs = [job(seed) for seed in range(3)]
    script = tmp_path / "crashing.py"
    folder, digest = str(Path(suite.__file__).parent), jobs[1][1].digest()
    script.write_text(CRASHING.format(folder=folder, digest=digest))
    tally = check_apart(jobs, lava=False, worker=script)
    assert tally.crashes == {"dense": 1} and tally.failures == 1
    rest = check([jobs[0], jobs[2]], lava=False)
    assert (tally.nets, tally.values) == (rest.nets, rest.values), "as in this process"
    assert tally.notes[0].startswith("seed1: dense ended by SIGSEGV\n")
    assert "Fatal Python error: Segmentation fault" in tally.notes[0]


@pytest.mark.parametrize("again", [True, False])
def test_an_error_of_lava_is_counted_with_its_job(again, monkeypatch):
    """Of two networks one makes Lava fail, each time or once; both are compared if they can be."""
    jobs, failed = [job(seed) for seed in (0, 1)], []
    bad = jobs[1][1].digest()

    def failing(runs, record):
        if any(program.digest() == bad for program, _ in runs) and (again or not failed):
            failed.append(len(runs))
            raise LavaError("lava: ended by SIGSEGV")
        return [engines()["reference"](program, x, record) for program, x in runs]

    monkeypatch.setattr(suite, "run_all_on_lava", failing)
    monkeypatch.setattr(suite, "available", lambda: None)
    tally = check(jobs)
    assert tally.crashes == {"lava": 1} and tally.nets["lava"] == (1 if again else 2)
    lone, together = "seed1: lava: ended by SIGSEGV", "seed0: lava: ended by SIGSEGV\nwith seed1"
    assert tally.notes == [lone if again else together]


@pytest.mark.parametrize("n", [1, 25])
def test_as_many_programs_are_drawn_as_are_asked_for(n):
    jobs = drawn(n, seed=n)
    assert len({program.digest() for _, program, _ in jobs}) == len(jobs) == n


@pytest.mark.lava
@pytest.mark.slow
@pytest.mark.timeout(0)  # every part of it has a limit of its own
def test_long_run(capsys):
    """RANVIER_CONFORMANCE nets (200), drawn anew; failures are made small and kept."""
    n, seed = int(os.environ.get("RANVIER_CONFORMANCE", "200")), int(time.time())
    before = time.monotonic()
    jobs: dict[str, Job] = {name: (name, p, x) for name, p, x in drawn(n, seed)}
    tally = check_apart(list(jobs.values()))
    with capsys.disabled():
        print(f"\ndrawn with {seed}, {time.monotonic() - before:.0f} s\n{tally}")
    for name in {note.partition(":")[0] for note in tally.notes}:
        found = keep(jobs[name])  # first as it is: what comes now takes long
        here = fails(jobs[name], lava=False)
        if here or fails(jobs[name]):
            found = keep(shrunk(jobs[name], lava=not here))
        with capsys.disabled():
            print("kept:", found)
    assert tally.failures == 0
