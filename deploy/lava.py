"""A Program as Lava Processes: run there, sample after sample, and told which parts are stock.

The Processes run in a guarded process of their own (`lava_guard`), in Lava's fixed-point simulation
of Loihi 2. What they sent and held comes back cut into samples, in algorithmic time, as any engine
gives it.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ranvier.deploy.lava_guard import run_guarded
from ranvier.deploy.lava_plan import (
    Plan,
    Stream,
    make_plan,
    why_custom,
    why_custom_projection,
)
from ranvier.deploy.program import ConvMap, Program
from ranvier.train.errors import ShapeError, UnsupportedError

_TARGET = "ranvier.deploy.lava_build:execute_all"
_LOOK_S = 0.2  # how often the progress is looked at

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LavaRun:
    """What happened in Lava: name -> `[time, sample, *shape]`, int64.

    sent    what every population sent, the input's included
    states  "u" and "v" -> name -> series, where they were asked for
    """

    sent: dict[str, np.ndarray]
    states: dict[str, dict[str, np.ndarray]]


def describe(program: Program) -> list[tuple[str, Literal["stock", "custom"], str]]:
    """(name, "stock" or "custom", why) of every population and projection.

    stock   a Process of Lava's library computes it exactly; on Loihi 2 it is there already
    custom  a Process of ours; why says what the stock ones cannot. A neuron of ours is microcode on
            Loihi 2. A delay is there in the chip's synapses: only Lava's convolution has none
    """
    rows: list[tuple[str, Literal["stock", "custom"], str]] = []
    reasons = {p.name: why_custom(program, p) for p in program}
    reasons |= {p.name: why_custom_projection(p) for p in program.projections.values()}
    for name, why in reasons.items():
        rows.append((name, "stock", "") if why is None else (name, "custom", why))
    return rows


def run_lava(
    program: Program,
    x: np.ndarray,
    states: Sequence[str] = (),
    *,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> LavaRun:
    """The LavaRun of whole-number x `[time, sample, *shape]`; samples go through back to back.

    states     of "u" and "v": what is kept of every population besides what it sent
    timeout_s  wall time in seconds; by default ten times what the network should take
    progress   called now and then with (Lava steps done, steps in all), from another thread
    Raises UnsupportedError for a Program that Lava would compute differently; LavaError where Lava
    is missing, fails or takes too long.
    """
    return run_lava_many([(program, x)], states, timeout_s=timeout_s, progress=progress)[0]


def run_lava_many(
    jobs: Sequence[tuple[Program, np.ndarray]],
    states: Sequence[str] = (),
    *,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> list[LavaRun]:
    """`run_lava` of several (program, x), one network after the other in one guarded process."""
    plans = [_plan(program, x, tuple(states)) for program, x in jobs]
    needed = [expected_seconds(p, plan) for (p, _), plan in zip(jobs, plans, strict=True)]
    with _watched(progress, sum(plan.steps for plan in plans)) as file:
        payload = {"plans": [plan.to_data() for plan in plans], "progress": file}
        answer = run_guarded(_TARGET, payload, timeout_s=timeout_s or 60 + sum(needed))
    return [_collect(p, x, rows) for (p, x), rows in zip(jobs, answer["runs"], strict=True)]


@contextlib.contextmanager
def _watched(progress: Progress | None, total: int) -> Iterator[str | None]:
    """A file that grows by a byte each step, watched by a thread that calls `progress`."""
    if progress is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="ranvier-lava-") as folder:
        file, over = Path(folder, "steps"), threading.Event()
        file.touch()

        def watch() -> None:
            while not over.wait(_LOOK_S):
                progress(min(total, file.stat().st_size), total)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield str(file)
        finally:
            over.set()
            thread.join()
    progress(total, total)


def _plan(program: Program, x: np.ndarray, states: tuple[str, ...]) -> Plan:
    if x.ndim != 2 + len(program.input.shape) or x.shape[2:] != program.input.shape:
        raise ShapeError(f"lava: x is {x.shape}; it must be [time, sample, *{program.input.shape}]")
    if 0 in x.shape[:2]:
        raise ShapeError(f"lava: x is {x.shape}; at least one step and one sample are needed")
    return make_plan(program, x, states, program.readout.kind == "membrane")


def expected_seconds(program: Program, plan: Plan) -> float:
    """Ten times what the plan took when it was measured, for machines that are slower or busy.

    Measured on two shared cores: 0.3 ms a Process and step, 20 us a pair of channels of a
    convolution and step (lava.md, section 4), 0.1 s a Process to start.
    """
    pairs = sum(
        p.map.weight.shape[0] * p.map.weight.shape[1]
        for p in program.projections.values()
        if isinstance(p.map, ConvMap)
    )
    step = 3e-4 * len(plan.nodes) + 2e-5 * pairs
    return 10 * (step * plan.steps + 0.1 * len(plan.nodes) + 1)


def _collect(program: Program, x: np.ndarray, rows: dict[str, dict[str, np.ndarray]]) -> LavaRun:
    stream = Stream.of(program, *x.shape[:2])
    sent = {program.input.name: x.astype(np.int64)}
    states: dict[str, dict[str, np.ndarray]] = {"u": {}, "v": {}}
    for population in program:
        for what, series in rows.get(population.name, {}).items():
            part = stream.cut(series, population.depth).astype(np.int64)
            (sent if what == "sent" else states[what])[population.name] = part
    _check_sums(program, sent)
    for name, population in program.populations.items():
        if population.cell is not None and population.cell.kind != "cuba":
            for kept in states.values():
                if kept:
                    kept[name] = np.zeros_like(sent[name])
    return LavaRun(sent, states)


def _check_sums(program: Program, sent: dict[str, np.ndarray]) -> None:
    """Lava's Conv adds in float64 and casts to int32, which has no meaning beyond 32 bits."""
    for p in program.projections.values():
        if not isinstance(p.map, ConvMap):
            continue
        largest = int(np.abs(sent[p.source]).max(initial=0))
        weight = np.abs(p.map.weight.astype(np.int64)).sum((1, 2, 3)).max(initial=0)
        if (largest * int(weight)) << p.exponent >= 2**31:
            raise UnsupportedError(
                f"lava: projection '{p.name}' takes messages up to {largest}; its sums can pass 32 "
                "bits, where Lava's convolution is undefined. Use smaller messages or weights"
            )
