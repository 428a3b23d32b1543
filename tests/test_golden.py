"""Stored digests of small Programs and of what they do: nothing changes their meaning unseen.

`make golden` writes the file anew; the difference is then read in git.
"""

from __future__ import annotations

import hashlib

import numpy as np
from random_programs import random_case

from ranvier.deploy.program import Program
from ranvier.sim.reference import Series, run_reference

SEEDS = range(12)


def trace_digest(series: Series) -> str:
    """SHA-256 of every message, u and v, in order."""
    sha = hashlib.sha256()
    for part in (series.sent, series.u, series.v):
        for name, values in part.items():
            sha.update(name.encode() + np.ascontiguousarray(values, "<i8").tobytes())
    return sha.hexdigest()[:16]


def line(name: str, program: Program, x: np.ndarray) -> str:
    """One Program: digest, populations, projections, latency, messages, digest of its trace."""
    series = run_reference(program, x)
    messages = sum(int((values != 0).sum()) for values in series.sent.values())
    return (
        f"{name} {program.digest()[:16]} populations={len(program.populations)} "
        f"projections={len(program.projections)} latency={program.latency} messages={messages} "
        f"trace={trace_digest(series)}"
    )


def test_golden_programs(golden) -> None:
    cases = ((f"seed{seed}", *random_case(seed)[:2]) for seed in SEEDS)
    golden("programs.txt", "\n".join(line(*case) for case in cases) + "\n")


def test_golden_digest_sees_a_change() -> None:
    """The control: one value of the input, and the trace is another."""
    program, x, _ = random_case(0)
    other = x.copy()
    entry = program.input
    other.flat[0] = entry.lo if x.flat[0] != entry.lo else entry.hi
    assert trace_digest(run_reference(program, x)) != trace_digest(run_reference(program, other))
