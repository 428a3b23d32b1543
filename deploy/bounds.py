"""Interval analysis: what no input can exceed, so that no accumulator of the chip ever wraps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranvier.deploy.cells import SHIFT, V_MAX, Cell
from ranvier.deploy.program import ConvMap, DenseMap, LinearMap, OneToOne, Population, Program

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


def sum_range(linear: LinearMap, lo: int, hi: int, exponent: int = 0) -> tuple[int, int]:
    """The smallest and largest sum that one map can make of messages in lo..hi (0 among them)."""
    w = linear.weight.astype(np.int64)
    match linear:
        case ConvMap():
            axes: tuple[int, ...] = (1, 2, 3)
        case DenseMap():
            axes = (1,)
        case OneToOne():
            axes = ()
    up = np.where(w > 0, w * max(hi, 0), w * min(lo, 0))
    down = np.where(w > 0, w * min(lo, 0), w * max(hi, 0))
    top, bottom = (part.sum(axes) if axes else part for part in (up, down))
    return int(bottom.min(initial=0)) << exponent, int(top.max(initial=0)) << exponent


def arriving_range(program: Program, population: Population) -> tuple[int, int]:
    """a_lo..a_hi: the sum over all projections into the population."""
    lo = hi = 0
    for p in program.into(population.name):
        source = program.populations[p.source]
        low, high = sum_range(p.map, source.lo, source.hi, p.exponent)
        lo, hi = lo + low, hi + high
    return lo, hi


def prove(program: Program) -> dict[str, Bound]:
    """name -> Bound, for every population but the input; holds for any input and any length."""
    return {
        p.name: _bound(p, p.cell, *arriving_range(program, p))
        for p in program
        if p.cell is not None
    }


def _bound(population: Population, cell: Cell, lo: int, hi: int) -> Bound:
    a = max(-lo, hi)
    if cell.kind == "relay":
        return Bound(population.name, lo, hi, 0.0, 0.0, a > RELAY_LIMIT, False)
    u = (a << SHIFT) / _leak((np.asarray(cell.du) + 1) / 4096)
    bias = float(np.abs(cell.bias).max(initial=0))
    v = (u + bias) / _leak(np.asarray(cell.dv) / 4096)
    return Bound(population.name, lo, hi, u, v, a > A_LIMIT or u > V_MAX, v > V_MAX)


def _leak(share: np.ndarray) -> float:
    """The part that leaks away a step; a tiny number where nothing leaks: no bound exists."""
    return max(float(share.min()), 1e-300)
