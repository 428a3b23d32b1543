"""Interval analysis: what no input can exceed, so that no accumulator of the chip ever wraps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ranvier.deploy.cells import SHIFT, V_MAX, Cell, Ints
from ranvier.deploy.program import (
    ConvMap,
    DenseMap,
    LinearMap,
    OneToOne,
    Population,
    Program,
    Projection,
    Shape,
)

A_LIMIT = 2**17 - 1  # of the sum that arrives at a compartment: u = a << 6 has 24 bits
RELAY_LIMIT = 2**23 - 1  # of a payload, and of one convolution's sum


@dataclass(frozen=True)
class Bound:
    """Of one population: the arriving sum lies in a_lo..a_hi, |u| and |v| stay at or below u and v.

    wraps      whether the sum or u could leave its register (never, for a compiled program)
    saturates  whether v could reach its rail before it would fire or decay
    """

    population: str
    a_lo: int
    a_hi: int
    u: float
    v: float
    wraps: bool
    saturates: bool


def row_sums(linear: LinearMap, shape: Shape) -> tuple[Ints, Ints]:
    """(sum of the positive weights, sum of the negative ones) of each target neuron.

    As arrays that broadcast to `shape`, the target's; borders, which see fewer weights, count as inside.
    """
    w = linear.weight.astype(np.int64)
    match linear:
        case ConvMap():
            form: Shape = (-1, 1, 1) if len(shape) == 3 else shape
            axes: tuple[int, ...] = (1, 2, 3)
        case DenseMap():
            form, axes = shape, (1,)
        case OneToOne():
            return np.broadcast_to(np.maximum(w, 0), shape), np.broadcast_to(
                np.minimum(w, 0), shape
            )
    sums = np.maximum(w, 0).sum(axes), np.minimum(w, 0).sum(axes)
    if isinstance(linear, ConvMap) and len(shape) != 3:  # a vector out of an image
        sums = tuple(np.broadcast_to(s[:, None, None], linear.out_shape) for s in sums)  # type: ignore[assignment]
    return sums[0].reshape(form), sums[1].reshape(form)


def arriving(
    into: Iterable[Projection], populations: Mapping[str, Population], shape: Shape
) -> tuple[int, int]:
    """a_lo..a_hi: the smallest and largest sum over some projections into one population."""
    low = high = np.zeros((), np.int64)
    for p in into:
        source = populations[p.source]
        up, down = row_sums(p.map, shape)
        lo, hi = min(source.lo, 0), max(source.hi, 0)
        low = low + ((up * lo + down * hi) << p.exponent)
        high = high + ((up * hi + down * lo) << p.exponent)
    return int(low.min(initial=0)), int(high.max(initial=0))


def arriving_range(program: Program, population: Population) -> tuple[int, int]:
    """a_lo..a_hi: the sum over all projections into the population."""
    return arriving(program.into(population.name), program.populations, population.shape)


def prove(program: Program) -> dict[str, Bound]:
    """name -> Bound, for every population but the input; holds for any input and any length."""
    return {
        p.name: _bound(p, p.cell, *arriving_range(program, p))
        for p in program
        if p.cell is not None
    }


def _bound(population: Population, cell: Cell, lo: int, hi: int) -> Bound:
    a = max(-lo, hi)
    if cell.kind != "cuba":  # no register of 24 bits on the way
        return Bound(population.name, lo, hi, 0.0, 0.0, a > RELAY_LIMIT, False)
    u = (a << SHIFT) / _leak((np.asarray(cell.du) + 1) / 4096)
    bias = float(np.abs(cell.bias).max(initial=0))
    v = (u + bias) / _leak(np.asarray(cell.dv) / 4096)
    return Bound(population.name, lo, hi, u, v, a > A_LIMIT or u > V_MAX, v > V_MAX)


def _leak(share: np.ndarray) -> float:
    """The part that leaks away a step; a tiny number where nothing leaks: no bound exists."""
    return max(float(share.min()), 1e-300)
