"""Where two runs of one Program part: the first value that differs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ranvier.sim.runner import Result
from ranvier.train.errors import ShapeError


@dataclass(frozen=True)
class Difference:
    """One value of two runs; indices count from 0, step in algorithmic time.

    neuron  its index in the population's shape
    what    "spikes", "u", "v"; "output" for the readout in floats, whose step is None where it was
            reduced over time; the population is "output" where only the readout was kept
    """

    population: str
    step: int | None
    sample: int
    neuron: tuple[int, ...]
    what: str
    values: tuple[float, float]

    def __str__(self) -> str:
        a, b = (f"{v:g}" for v in self.values)
        when = "" if self.step is None else f" step {self.step},"
        return (
            f"{self.what} of '{self.population}':{when} sample {self.sample}, "
            f"neuron {self.neuron}: {a} and {b}"
        )


def first_difference(a: Result, b: Result) -> Difference | None:
    """The earliest value that differs between two Results of one Program; None where all are equal.

    Compares everything that both recorded - spikes, u, v of every population - and the readout. The
    earliest step wins, and in it the population that stands first: there the fault is.
    Raises ShapeError for runs of different sizes or Programs.
    """
    if list(a.trace) != list(b.trace):
        raise ShapeError("first_difference: the two runs recorded different populations")
    found = []
    for name in a.trace:
        for what in ("spikes", "u", "v"):
            left, right = getattr(a.trace[name], what), getattr(b.trace[name], what)
            if left is not None and right is not None:
                found.append(_first(name, what, left, right))
    found.append(_first("output", "spikes", a.output_spikes, b.output_spikes))
    known = [d for d in found if d is not None]
    if known:
        return min(known, key=lambda d: d.step or 0)
    series = _first("output", "output", a.output_series, b.output_series)
    if series is not None:
        return series
    last = _first("output", "output", a.output[None], b.output[None])
    return last and replace(last, step=None)


def n_different(a: Result, b: Result) -> tuple[int, int]:
    """(values compared, values that differ) over everything that both recorded."""
    compared = different = 0
    for name in a.trace:
        for what in ("spikes", "u", "v"):
            left, right = getattr(a.trace[name], what), getattr(b.trace[name], what)
            if left is not None and right is not None:
                compared += left.size
                different += int((left != right).sum())
    return compared, different


def _first(name: str, what: str, left: Any, right: Any) -> Difference | None:
    if left.shape != right.shape:
        raise ShapeError(
            f"first_difference: {what} of '{name}' is {left.shape} in one run and {right.shape} in "
            "the other"
        )
    where = np.argwhere(left != right)
    if not len(where):
        return None
    step, sample, *neuron = (int(i) for i in where[0])
    at = tuple(int(i) for i in where[0])
    values = (float(left[at]), float(right[at]))
    return Difference(name, step, sample, tuple(neuron), what, values)
