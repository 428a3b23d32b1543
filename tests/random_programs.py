"""Random integer Programs for the tests of the engines: every map, cell and wiring, small."""

from __future__ import annotations

from typing import Any

import numpy as np

from ranvier.deploy.cells import Cell
from ranvier.deploy.program import (
    ConvMap,
    DenseMap,
    LinearMap,
    OneToOne,
    Population,
    Program,
    Projection,
    Readout,
)

RESETS = ("zero", "subtract", "none")
TIMINGS = ("immediate", "delayed", "carry")


def pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def random_cell(rng: np.random.Generator, shape: tuple[int, ...], vth: int, hot: bool) -> Cell:
    """A compartment; `hot` cells have values that wrap and saturate."""
    per = (shape[0], *[1] * (len(shape) - 1))
    reset = pick(rng, RESETS)
    return Cell(
        du=pick(rng, (4095, 4095, 0, -1, 1000)),
        dv=pick(rng, (0, 4096, 4095, 700)),
        vth=rng.integers(0, vth + 1, per) if rng.random() < 0.5 else vth,
        bias_mant=rng.integers(-200, 200, per) if rng.random() < 0.5 else 0,
        bias_exp=7 if hot else int(rng.integers(0, 3)),
        reset=reset,
        timing=pick(rng, TIMINGS) if reset == "subtract" else pick(rng, TIMINGS[:2]),
        v_reset=pick(rng, (0, -70)) if reset == "zero" else 0,
        strict=bool(rng.random() < 0.7),
    )


def weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    w = rng.integers(-128, 128, shape) * 2
    return np.where(rng.random(shape) < 0.2, 0, w).astype(pick(rng, (np.int16, np.int64)))


def conv(rng: np.random.Generator, shape: tuple[int, int, int]) -> ConvMap | None:
    """A convolution of a random geometry from `shape`; None where the kernel does not fit."""
    c, h, w = shape
    groups = pick(rng, [g for g in (1, 1, 2, c) if c % g == 0])
    c_out = groups * int(rng.integers(1, 4))
    k, stride, pad, dil = (
        (int(rng.integers(lo, hi)), int(rng.integers(lo, hi)))
        for lo, hi in ((1, 4), (1, 3), (0, 3), (1, 3))
    )
    out = tuple(
        (n + 2 * p - d * (m - 1) - 1) // s + 1
        for n, p, d, m, s in zip((h, w), pad, dil, k, stride, strict=True)
    )
    if min(out) < 1:
        return None
    weight = weights(rng, c_out, c // groups, *k)
    return ConvMap(
        weight=weight, in_shape=shape, out_shape=(c_out, *out), stride=stride, padding=pad,
        dilation=dil, groups=groups,
    )  # fmt: skip


def random_map(rng: np.random.Generator, source: tuple[int, ...]) -> LinearMap:
    made: LinearMap | None = None
    kind = rng.random()
    if len(source) == 3 and kind < 0.65:
        made = conv(rng, source)  # type: ignore[arg-type]
    if made is None and kind < 0.8:
        made = OneToOne(weight=weights(rng, *source), shape=source)
    return made or DenseMap(weight=weights(rng, int(rng.integers(1, 20)), int(np.prod(source))))


def random_program(seed: int, *, cyclic: bool = False, hot: bool = False) -> Program:
    """Up to seven populations behind an input; `cyclic` adds projections that go back."""
    rng = np.random.default_rng(seed)
    graded = bool(rng.random() < 0.4)
    lo, hi = pick(rng, ((0, 255), (-3, 9))) if graded else (0, 1)
    shape = (int(rng.integers(1, 5)), int(rng.integers(1, 9)), int(rng.integers(1, 9)))
    populations = [Population(name="in", shape=shape, lo=lo, hi=hi)]
    projections: list[Projection] = []
    for i in range(int(rng.integers(2, 7))):
        source = populations[-1] if rng.random() < 0.7 else pick(rng, populations)
        linear = random_map(rng, source.shape)
        name = f"p{i}"
        projections.append(_from(rng, source.name, name, linear, hot))
        target = _population(rng, name, linear.out_shape, hot)
        for other in populations:
            if other is not source and rng.random() < 0.3:
                dense = DenseMap(weight=weights(rng, target.size, other.size))
                projections.append(_from(rng, other.name, name, dense, hot))
        populations.append(target)
    if cyclic:
        projections += [_back(rng, populations, i) for i in range(2)]
    kind = "current" if populations[-1].cell.graded else pick(rng, ("spikes", "membrane"))  # type: ignore[union-attr]
    return Program(
        populations={p.name: p for p in populations},
        projections={p.name: p for p in projections},
        readout=Readout(population=populations[-1].name, kind=kind),
        steps=5,
    )


def _from(rng: Any, source: str, target: str, linear: LinearMap, hot: bool) -> Projection:
    exponent = int(rng.integers(8, 16)) if hot else int(rng.integers(0, 4))
    lag = int(rng.random() < 0.2) * int(rng.integers(1, 4))
    name = f"{source}->{target}"
    return Projection(
        name=name, source=source, target=target, map=linear, exponent=exponent, lag=lag
    )


def _population(rng: Any, name: str, shape: tuple[int, ...], hot: bool) -> Population:
    if rng.random() < 0.2:
        return Population(name=name, shape=shape, cell=Cell(kind="relay"), lo=-(2**23), hi=2**23)
    if rng.random() < 0.1:
        cell = Cell(kind="logic", vth=int(rng.integers(0, 800)), strict=bool(rng.random() < 0.5))
        return Population(name=name, shape=shape, cell=cell)
    cell = random_cell(rng, shape, vth=int(rng.integers(0, 800)), hot=hot)
    return Population(name=name, shape=shape, cell=cell)


def _back(rng: Any, populations: list[Population], i: int) -> Projection:
    target = int(rng.integers(1, len(populations)))
    source = int(rng.integers(target, len(populations)))
    s, t = populations[source], populations[target]
    dense = DenseMap(weight=weights(rng, t.size, s.size))
    return Projection(name=f"back{i}", source=s.name, target=t.name, map=dense, lag=1 + i)


def random_input(program: Program, seed: int, steps: int = 5, batch: int = 3) -> np.ndarray:
    """Whole numbers in the input's range, `[steps, batch, *shape]`; some seeds hold in time."""
    rng = np.random.default_rng(seed)
    entry = program.input
    x = rng.integers(entry.lo, entry.hi + 1, (steps, batch, *entry.shape))
    x = np.where(rng.random(x.shape) < 0.3, x, 0)
    return np.broadcast_to(x[0], x.shape) if seed % 3 == 0 else x
