"""The reference engine: short, plain numpy, slow, and the definition of what a Program means.

`run_reference` counts in algorithmic time: in one step a message passes through every population; a
projection with a lag hands it over that many steps later. `run_chip_time` counts as the chip does:
every projection takes one step and its delay; population p works on algorithmic step s of a sample in
chip step `s + depth` of that sample's window and is silent, and at rest, outside its windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranvier.deploy.cells import wrap
from ranvier.deploy.program import ConvMap, Program, Projection


@dataclass
class Series:
    """All that happened in a run: name -> `[time, batch, *shape]`, int64."""

    sent: dict[str, np.ndarray]
    u: dict[str, np.ndarray]
    v: dict[str, np.ndarray]


def arriving(projection: Projection, message: np.ndarray) -> np.ndarray:
    """What one projection adds to its target for one step's messages; a convolution wraps at 24 bit."""
    moved = projection.map.apply(message) << projection.exponent
    return wrap(moved, 24) if isinstance(projection.map, ConvMap) else moved


def _blank(program: Program, steps: int, batch: int) -> Series:
    def zeros() -> dict[str, np.ndarray]:
        return {p.name: np.zeros((steps, batch, *p.shape), np.int64) for p in program}

    return Series(zeros(), zeros(), zeros())


def run_reference(program: Program, x: np.ndarray) -> Series:
    """The run of x `[time, batch, *shape]` (whole numbers) in algorithmic time."""
    steps, batch = x.shape[:2]
    series = _blank(program, steps, batch)
    state = {p.name: p.cell.initial((batch, *p.shape)) for p in program if p.cell is not None}
    for t in range(steps):
        for population in program:
            name = population.name
            if population.cell is None:
                series.sent[name][t] = x[t]
                continue
            total = np.zeros((batch, *population.shape), np.int64)
            for p in program.into(name):
                if t >= p.lag:
                    total += arriving(p, series.sent[p.source][t - p.lag]).reshape(total.shape)
            sent, u, v = population.cell.step(*state[name], wrap(total, 32))
            state[name] = (u, v)
            series.sent[name][t], series.u[name][t], series.v[name][t] = sent, u, v
    return series


def run_chip_time(program: Program, samples: list[np.ndarray]) -> list[Series]:
    """The samples, each `[time, batch, *shape]`, streamed back to back in chip time; a Series each.

    The Series are cut out of the stream at each population's own depth, so that they can be held
    against `run_reference`. Samples start every `time + max_lag` steps.
    """
    steps, batch = samples[0].shape[:2]
    interval = steps + program.max_lag
    last = max(p.depth for p in program)
    stream = _blank(program, interval * len(samples) + last, batch)
    state = {p.name: p.cell.initial((batch, *p.shape)) for p in program if p.cell is not None}
    for tau in range(interval * len(samples) + last):
        for population in program:
            name = population.name
            n, s = divmod(tau - population.depth, interval)
            if not (0 <= n < len(samples) and s < steps):
                continue
            if population.cell is None:
                stream.sent[name][tau] = samples[n][s]
                continue
            if s == 0:
                state[name] = population.cell.initial((batch, *population.shape))
            total = np.zeros((batch, *population.shape), np.int64)
            for p in program.into(name):
                sent_at = tau - 1 - p.delay
                if sent_at >= 0:
                    total += arriving(p, stream.sent[p.source][sent_at]).reshape(total.shape)
            sent, u, v = population.cell.step(*state[name], wrap(total, 32))
            state[name] = (u, v)
            stream.sent[name][tau], stream.u[name][tau], stream.v[name][tau] = sent, u, v
    return [_cut(program, stream, n * interval, steps) for n in range(len(samples))]


def _cut(program: Program, stream: Series, start: int, steps: int) -> Series:
    def windows(part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {p.name: part[p.name][start + p.depth : start + p.depth + steps] for p in program}

    return Series(windows(stream.sent), windows(stream.u), windows(stream.v))
