"""Channels last: how the fast engines lay populations out, and the way back.

A population of shape (C, H, W) is kept as rows of C neurons side by side, since that is what one
spike's kernel row adds to. `Frame` is that shape, or None where neurons stay in their own order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ranvier.deploy.program import ConvMap, DenseMap, OneToOne, Program, Projection

Frame: TypeAlias = "tuple[int, int, int] | None"


def order(frame: Frame, n: int) -> np.ndarray:
    """The neuron that stands at each inner place: inner = flat[order]."""
    if frame is None:
        return np.arange(n)
    return np.arange(n).reshape(frame).transpose(1, 2, 0).reshape(-1)


def inner(a: np.ndarray, frame: Frame) -> np.ndarray:
    """`[..., n]` in the neurons' order -> `[..., n]` channels last, contiguous."""
    if frame is None:
        return np.ascontiguousarray(a)
    moved = np.moveaxis(a.reshape(*a.shape[:-1], *frame), -3, -1)
    return np.ascontiguousarray(moved).reshape(a.shape)


def outer(a: np.ndarray, frame: Frame) -> np.ndarray:
    """The inverse of `inner`."""
    if frame is None:
        return a
    c, h, w = frame
    moved = np.moveaxis(a.reshape(*a.shape[:-1], h, w, c), -1, -3)
    return np.ascontiguousarray(moved).reshape(a.shape)


def frames(program: Program) -> dict[str, Frame]:
    """name -> the frame of its first convolution, or its own shape."""
    found: dict[str, Frame] = {}
    for population in program:
        seen = [
            p.map.out_shape for p in program.into(population.name) if isinstance(p.map, ConvMap)
        ]
        seen += [
            p.map.in_shape for p in program.out_of(population.name) if isinstance(p.map, ConvMap)
        ]
        if len(population.shape) == 3:
            c, h, w = population.shape
            seen.append((c, h, w))
        found[population.name] = seen[0] if seen else None
    return found


@dataclass(frozen=True, eq=False)
class Wiring:
    """A projection between inner layouts.

    gather   message[..., gather] is what the map takes (None: as it is)
    scatter  result[..., scatter] is what the target takes (None: as it is)
    weight   DenseMap `[out, in]`, OneToOne `[n]`, both inner; ConvMap as it stands
    """

    projection: Projection
    gather: np.ndarray | None
    scatter: np.ndarray | None
    weight: np.ndarray


def wire(projection: Projection, source: Frame, target: Frame) -> Wiring:
    """The Wiring of a projection whose ends are laid out in these frames."""
    match projection.map:
        case ConvMap() as conv:
            gather = _between(source, conv.in_shape, int(np.prod(conv.in_shape)))
            scatter = _between(conv.out_shape, target, int(np.prod(conv.out_shape)))
            return Wiring(projection, gather, scatter, conv.weight)
        case DenseMap(weight=weight):
            rows, columns = order(target, len(weight)), order(source, weight.shape[1])
            return Wiring(projection, None, None, np.ascontiguousarray(weight[rows][:, columns]))
        case OneToOne(weight=weight, shape=shape):
            n = int(np.prod(shape))
            flat = np.broadcast_to(weight, shape).reshape(-1)
            return Wiring(projection, _between(source, target, n), None, flat[order(target, n)])


def _between(have: Frame, want: Frame, n: int) -> np.ndarray | None:
    """Indices that turn one inner order into another; None where both are the same."""
    back = np.argsort(order(have, n))
    index = back[order(want, n)]
    return None if np.array_equal(index, np.arange(n)) else index
