"""Interval arithmetic on what an edge carries: bounds for each channel, and the values' grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ranvier.export.nodes import Conv, Dense, Shape


def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a * b with 0 * infinity = 0, as bounds want it."""
    with np.errstate(invalid="ignore"):
        return np.where((a == 0) | (b == 0), 0.0, np.multiply(a, b))


def whole(x: np.ndarray | None) -> bool:
    return x is None or bool(np.all(np.isfinite(x)) and np.all(x == np.rint(x)))


@dataclass(frozen=True, eq=False)
class Interval:
    """lo, hi: arrays that broadcast to a node's shape; grid: what all values are multiples of."""

    lo: np.ndarray
    hi: np.ndarray
    grid: float | None = None

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return self.lo, self.hi

    def same(self, other: Interval) -> bool:
        equal = (np.array_equal(a, b) for a, b in zip(self.bounds, other.bounds, strict=True))
        return self.grid == other.grid and all(equal)

    def widened(self, later: Interval) -> Interval:
        """`later`, with bounds infinite where they moved away from this one's."""
        lo = np.where(later.lo < self.lo, -np.inf, later.lo)
        hi = np.where(later.hi > self.hi, np.inf, later.hi)
        return Interval(lo, hi, later.grid if later.grid == self.grid else None)

    def with_zero(self) -> Interval:
        return Interval(np.minimum(self.lo, 0.0), np.maximum(self.hi, 0.0), self.grid)

    def by_channel(self, shape: Shape) -> Interval:
        """The same with bounds of shape [C, 1, ...] at most: the widest over all places."""
        if self.lo.ndim == self.hi.ndim == 0 or len(shape) < 2:
            return self
        full = (1,) * len(shape)
        axes = tuple(range(1, len(shape)))
        lo, hi = (np.broadcast_to(b, np.broadcast_shapes(b.shape, full)) for b in self.bounds)
        lo, hi = lo.min(axes, keepdims=True), hi.max(axes, keepdims=True)
        return Interval(lo, hi, self.grid)

    def reshaped(self, shape: Shape, new: Shape) -> Interval:
        if self.lo.ndim == self.hi.ndim == 0:
            return self
        lo, hi = (np.broadcast_to(b, shape).reshape(new) for b in self.bounds)
        return Interval(lo, hi, self.grid)

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.lo + other.lo, self.hi + other.hi, common(self, other))

    def __mul__(self, other: Interval) -> Interval:
        corners = [times(a, b) for a in self.bounds for b in other.bounds]
        grid = None if self.grid is None or other.grid is None else self.grid * other.grid
        lo, hi = corners[0], corners[0]
        for c in corners[1:]:
            lo, hi = np.minimum(lo, c), np.maximum(hi, c)
        return Interval(lo, hi, grid)

    def larger(self, other: Interval) -> Interval:
        lo, hi = np.maximum(self.lo, other.lo), np.maximum(self.hi, other.hi)
        return Interval(lo, hi, common(self, other))

    @staticmethod
    def concatenated(values: list[Interval], shapes: list[Shape], axis: int) -> Interval:
        thin = [tuple(n if i == axis else 1 for i, n in enumerate(s)) for s in shapes]
        ends = [(b, t) for v, t in zip(values, thin, strict=True) for b in v.bounds]
        if all(np.broadcast_shapes(b.shape, t) == t for b, t in ends):
            shapes = thin
        grid = values[0].grid
        for v in values[1:]:
            grid = grid if grid == v.grid else None
        pairs = list(zip(values, shapes, strict=True))
        lo = np.concatenate([np.broadcast_to(v.lo, s) for v, s in pairs], axis)
        hi = np.concatenate([np.broadcast_to(v.hi, s) for v, s in pairs], axis)
        return Interval(lo, hi, grid)


def common(a: Interval, b: Interval) -> float | None:
    """The grid of a sum or a choice: the finer one where the other is a multiple of it."""
    if a.grid is None or b.grid is None:
        return None
    fine, coarse = sorted((a.grid, b.grid))
    return fine if abs(coarse / fine - round(coarse / fine)) < 1e-9 else None


def between(lo: float, hi: float, grid: float | None = None) -> Interval:
    """One range for the whole node."""
    return Interval(np.asarray(lo, float), np.asarray(hi, float), grid)


def hull(a: Interval, b: Interval) -> Interval:
    """The smallest interval that holds both."""
    return Interval(np.minimum(a.lo, b.lo), np.maximum(a.hi, b.hi), common(a, b))


def scaled(x: Interval, scale: np.ndarray, shift: np.ndarray | None) -> Interval:
    """scale * x + shift."""
    scale = np.asarray(scale, float)
    ends = times(x.lo, scale), times(x.hi, scale)
    add = 0.0 if shift is None else np.asarray(shift, float)
    lo, hi = np.minimum(*ends) + add, np.maximum(*ends) + add
    grid = x.grid if x.grid == 1.0 and whole(scale) and whole(shift) else None
    size = np.abs(scale)
    if grid is None and x.grid is not None and shift is None and np.ptp(size) == 0 and size.any():
        grid = x.grid * float(size.flat[0])
    return Interval(lo, hi, grid)


def through_weights(node: Conv | Dense, x: Interval, shape: Shape) -> Interval:
    """What a convolution or linear layer can make of x, for each of its outputs."""
    grid = x.grid if x.grid == 1.0 and whole(node.weight) and whole(node.bias) else None
    lo, hi = _convolved(node, x, shape) if isinstance(node, Conv) else _mapped(node, x, shape)
    if node.bias is not None:
        bias = np.asarray(node.bias, float)
        bias = bias.reshape(-1, *[1] * (len(shape) - 1)) if isinstance(node, Conv) else bias
        lo, hi = lo + bias, hi + bias
    return Interval(lo, hi, grid)


Bounds: TypeAlias = "tuple[np.ndarray, np.ndarray]"


def _ends(up: np.ndarray, down: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> Bounds:
    """(lowest, highest) sum over the last axis, for weights up >= 0 and down <= 0."""
    least = (times(up, lo) + times(down, hi)).sum(-1)
    return least, (times(up, hi) + times(down, lo)).sum(-1)


def _convolved(node: Conv, x: Interval, shape: Shape) -> Bounds:
    x = x.by_channel(shape)
    weight = np.asarray(node.weight, float)
    taps = tuple(range(2, weight.ndim))
    if any(node.padding):
        x = x.with_zero()
    up, down = weight.clip(0, None).sum(taps), weight.clip(None, 0).sum(taps)
    per = weight.shape[0] // node.groups
    ones = [1] * (len(shape) - 1)
    ends = (np.broadcast_to(b, (shape[0], *ones)).reshape(node.groups, 1, -1) for b in x.bounds)
    groups = (node.groups, per, -1)
    lo, hi = _ends(up.reshape(groups), down.reshape(groups), *ends)
    tail = (weight.shape[0], *ones)
    return lo.reshape(tail), hi.reshape(tail)


def _mapped(node: Dense, x: Interval, shape: Shape) -> Bounds:
    weight = np.asarray(node.weight, float)
    n_in = weight.shape[1]
    full = tuple(np.broadcast_shapes(x.lo.shape, x.hi.shape, (n_in,)))
    lo, hi = np.broadcast_to(x.lo, full), np.broadcast_to(x.hi, full)
    if len(full) > 1:  # tokens: the widest over all places is enough
        axes = tuple(range(len(full) - 1))
        lo, hi = lo.min(axes), hi.max(axes)
    return _ends(weight.clip(0, None), weight.clip(None, 0), lo, hi)
