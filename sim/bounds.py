"""What can arrive at most: the proof that a narrower number type computes the same integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ranvier.deploy.bounds import row_sums
from ranvier.deploy.program import ConvMap, Population, Program, Projection

FLOAT32_EXACT = 2**24  # whole numbers below it, and their sums below it, are exact in float32
FLOAT64_EXACT = 2**53
WRAP_CONV = 2**23  # a convolution's sum wraps beyond it
NARROW = 2**18  # arriving sums up to this keep u and v of a compartment within 32 bits
INT32 = 2**31


@dataclass(frozen=True)
class Arrival:
    """What one population can receive.

    raw    projection name -> bound on |sum| before the shift by its exponent
    total  bound on the |sum| over all projections, after shifts and wraps
    wraps  whether any convolution can pass 24 bits, or the total 32
    """

    raw: dict[str, int]
    total: int
    wraps: bool

    @property
    def float32(self) -> bool:
        """Whether float32 holds every partial sum, however it is ordered."""
        return not self.wraps and self.total < FLOAT32_EXACT


def largest_row(projection: Projection, shape: tuple[int, ...]) -> int:
    """The largest sum of |weight| over the inputs of one neuron of the target, of that shape."""
    up, down = row_sums(projection.map, shape)
    return int((up - down).max(initial=0))


def trailing_zeros(weight: np.ndarray) -> int:
    """The power of two that divides every weight; 8 where all are zero."""
    bits = int(np.bitwise_or.reduce(weight.astype(np.int64), axis=None))
    return (bits & -bits).bit_length() - 1 if bits else 8


def sent_at_most(program: Program) -> dict[str, int]:
    """name -> bound on |message|. A relay's is what it can receive, not what it declares."""
    found = {p.name: _declared(p) for p in program}
    for population in program:
        if _is_relay(population):
            into = program.into(population.name)
            bounds = [_shifted(p, population.shape, found) for p in into]
            cyclic = any(found[p.source] < 0 for p in program.into(population.name))
            found[population.name] = INT32 if cyclic else min(INT32, sum(bounds))
    return found


def _declared(population: Population) -> int:
    if population.is_input:
        return max(abs(population.lo), abs(population.hi))
    return -1 if _is_relay(population) else 1


def _shifted(projection: Projection, shape: tuple[int, ...], sent: dict[str, int]) -> int:
    bound = largest_row(projection, shape) * sent[projection.source] << projection.exponent
    return min(bound, WRAP_CONV) if isinstance(projection.map, ConvMap) else bound


def arrival(program: Program, name: str, sent: dict[str, int]) -> Arrival:
    """The Arrival of one population; `sent` from `sent_at_most`."""
    into = program.into(name)
    shape = program.populations[name].shape
    raw = {p.name: largest_row(p, shape) * sent[p.source] for p in into}
    over = [isinstance(p.map, ConvMap) and raw[p.name] << p.exponent >= WRAP_CONV for p in into]
    total = sum(_shifted(p, shape, sent) for p in into)
    return Arrival(raw, min(total, INT32), any(over) or total >= INT32)


def _is_relay(population: Population) -> bool:
    return population.cell is not None and population.cell.graded
