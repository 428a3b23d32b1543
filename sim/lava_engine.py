"""The engine "lava": a Program as Lava Processes, its Result in the same form as every engine's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ranvier.deploy.lava import LavaRun, Progress, run_lava_many
from ranvier.deploy.program import Program
from ranvier.sim.ledger import Counter
from ranvier.sim.runner import Result, finish


def run_on_lava(
    program: Program,
    x: np.ndarray,
    record: tuple[str, ...] = (),
    *,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> Result:
    """The Result of whole-number x `[time, batch, *shape]` in Lava, samples streamed back to back.

    timeout_s  wall time in seconds; by default ten times what the network should take
    progress   called now and then with (Lava steps done, steps in all), from another thread
    Raises LavaError where Lava is missing, fails or takes too long; UnsupportedError for a Program
    that Lava would compute differently.
    """
    return run_all_on_lava([(program, x)], record, timeout_s=timeout_s, progress=progress)[0]


def run_all_on_lava(
    jobs: Sequence[tuple[Program, np.ndarray]],
    record: tuple[str, ...] = (),
    *,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """`run_on_lava` of several (program, x) with one start of Lava."""
    states = tuple(s for s in record if s != "spikes")
    runs = run_lava_many(jobs, states, timeout_s=timeout_s, progress=progress)
    return [_result(program, x, record, run) for (program, x), run in zip(jobs, runs, strict=True)]


def _result(program: Program, x: np.ndarray, record: tuple[str, ...], run: LavaRun) -> Result:
    counter = Counter(program, *x.shape[:2])
    for name in program.populations:
        counter.add(name, run.sent[name])
    return finish(program, run.sent, run.states, record, counter.ledger(), "lava")
