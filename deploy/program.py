"""The Program: integers only. Populations, projections, a readout; saved as HDF5, with a digest."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from ranvier.deploy.cells import Cell, Ints
from ranvier.train.errors import FormatError, RangeError, ShapeError

Shape: TypeAlias = "tuple[int, ...]"
VERSION = 1


@dataclass(frozen=True, eq=False, kw_only=True)
class ConvMap:
    """Cross-correlation as in torch, weight `[C_out, C_in/groups, kH, kW]`; shapes are (C, H, W)."""

    weight: Ints
    in_shape: tuple[int, int, int]
    out_shape: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def apply(self, x: Ints) -> Ints:
        """`[batch, *in_shape]` -> `[batch, *out_shape]`, int64; a short loop over the kernel."""
        (py, px), (sy, sx), (dy, dx) = self.padding, self.stride, self.dilation
        x = x.reshape(x.shape[0], *self.in_shape).astype(np.int64)  # a row of samples has no height
        x = np.pad(x, [(0, 0), (0, 0), (py, py), (px, px)])
        c_out, per_group, k_y, k_x = self.weight.shape
        _, height, width = self.out_shape
        weight = self.weight.astype(np.int64).reshape(self.groups, -1, per_group, k_y, k_x)
        grouped = x.reshape(x.shape[0], self.groups, per_group, *x.shape[2:])
        out = np.zeros((x.shape[0], self.groups, c_out // self.groups, height, width), np.int64)
        for i in range(k_y):
            for j in range(k_x):
                rows = slice(i * dy, i * dy + (height - 1) * sy + 1, sy)
                cols = slice(j * dx, j * dx + (width - 1) * sx + 1, sx)
                seen = grouped[..., rows, cols]
                out += np.einsum("goi,ngihw->ngohw", weight[..., i, j], seen, optimize=True)
        return out.reshape(x.shape[0], *self.out_shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class DenseMap:
    """weight `[out, in]`, on the flattened source."""

    weight: Ints

    @property
    def in_shape(self) -> Shape:
        return (self.weight.shape[1],)

    @property
    def out_shape(self) -> Shape:
        return (self.weight.shape[0],)

    def apply(self, x: Ints) -> Ints:
        return x.reshape(x.shape[0], -1).astype(np.int64) @ self.weight.T.astype(np.int64)


@dataclass(frozen=True, eq=False, kw_only=True)
class OneToOne:
    """Neuron i to neuron i; weight broadcasts to `shape`."""

    weight: Ints
    shape: Shape

    @property
    def in_shape(self) -> Shape:
        return self.shape

    @property
    def out_shape(self) -> Shape:
        return self.shape

    def apply(self, x: Ints) -> Ints:
        return x.reshape(x.shape[0], *self.shape).astype(np.int64) * self.weight


LinearMap: TypeAlias = ConvMap | DenseMap | OneToOne
MAPS: dict[str, type[Any]] = {m.__name__: m for m in (ConvMap, DenseMap, OneToOne)}


@dataclass(frozen=True, eq=False, kw_only=True)
class Population:
    """Neurons of one kind.

    cell   the integer neuron; None for an input
    scale  integer units of the arriving sum (and of vth) that make 1.0 in the float network, broadcast
           to the shape; for an input: levels per 1.0
    lo, hi what its messages can hold; 0..1 is a plain spike
    depth  the chip steps by which it runs behind the input, set by alignment
    """

    name: str
    shape: Shape
    cell: Cell | None = None
    scale: np.ndarray = field(default_factory=lambda: np.ones(()))
    lo: int = 0
    hi: int = 1
    depth: int = 0
    origin: str = ""  # the graph node it came from

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_input(self) -> bool:
        return self.cell is None

    @property
    def message_scale(self) -> np.ndarray:
        """Units of a message that make 1.0: spikes are 1.0 each, graded values count in `scale`."""
        if self.cell is None or self.cell.kind == "relay":
            return np.asarray(self.scale / 2 ** (0 if self.cell is None else self.cell.shift))
        return np.ones(())

    @property
    def graded(self) -> bool:
        """Whether its messages carry more than a spike."""
        return self.lo < 0 or self.hi > 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Projection:
    """Synapses from one population to another.

    map       the linear map, with the weights that the chip applies (mantissas: already on the grid)
    exponent  the arriving sum is shifted left by this
    lag       algorithmic steps from source to target (0 in a feed-forward network)
    delay     extra chip steps after the one that every synapse takes, 0..62, set by alignment
    bits      weight bits; with mixed signs weights are multiples of 2**(9 - bits)
    """

    name: str
    source: str
    target: str
    map: LinearMap
    exponent: int = 0
    lag: int = 0
    delay: int = 0
    bits: int = 8
    origin: str = ""

    @property
    def sign(self) -> Literal["mixed", "excitatory", "inhibitory"]:
        w = self.map.weight
        if not (w < 0).any():
            return "excitatory"
        return "mixed" if (w > 0).any() else "inhibitory"


@dataclass(frozen=True, eq=False, kw_only=True)
class Readout:
    """How the output population becomes floats: y[t] = value[t] * scale + offset, then `reduce` over t.

    kind  spikes: what the population fired; current: the payload of a relay; membrane: its v
    """

    population: str
    kind: Literal["spikes", "current", "membrane"] = "spikes"
    reduce: Literal["none", "mean", "sum", "last", "max"] = "mean"
    scale: np.ndarray = field(default_factory=lambda: np.ones(()))
    offset: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def series(self, values: Ints) -> np.ndarray:
        """Integer values `[time, batch, *shape]` -> floats `[time, batch, *shape]`."""
        return values * self.scale + self.offset

    def reduced(self, series: np.ndarray) -> np.ndarray:
        from ranvier.export.interpret import reduce_time

        out = reduce_time(series, self.reduce)
        return out.reshape(*out.shape[: 2 if self.reduce == "none" else 1], -1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Program:
    """An integer network for one chip.

    populations  name -> Population; a feed-forward projection goes from an earlier to a later one
    projections  name -> Projection
    steps        the number of time steps it was compiled for (None: any)
    meta         where it came from: chip, bits, joins, versions, notes; JSON values only
    """

    populations: Mapping[str, Population]
    projections: Mapping[str, Projection]
    readout: Readout
    steps: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "populations", dict(self.populations))
        object.__setattr__(self, "projections", dict(self.projections))
        check(self)

    @property
    def input(self) -> Population:
        return next(p for p in self.populations.values() if p.is_input)

    @property
    def output(self) -> Population:
        return self.populations[self.readout.population]

    @property
    def latency(self) -> int:
        """Chip steps by which the output runs behind the input."""
        return self.output.depth

    @property
    def max_lag(self) -> int:
        return max((p.lag for p in self.projections.values()), default=0)

    def into(self, name: str) -> list[Projection]:
        return [p for p in self.projections.values() if p.target == name]

    def out_of(self, name: str) -> list[Projection]:
        return [p for p in self.projections.values() if p.source == name]

    def __iter__(self) -> Iterator[Population]:
        return iter(self.populations.values())

    def encode(self, x: Any, steps: int | None = None) -> Ints:
        """Floats `[time, batch, *shape]` or `[batch, *shape]` -> the input's integers, int32.

        Raises ShapeError for a wrong shape, RangeError for values that the input cannot send.
        """
        from ranvier.export.interpret import with_time

        x = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
        series = with_time(x, self.input.shape, steps or self.steps, "run")
        return quantize_input(self.input, series)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the program as HDF5, atomically."""
        from ranvier.deploy.program_file import save

        save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Program:
        """The program in `path`. Raises FormatError where it holds none."""
        from ranvier.deploy.program_file import load

        return load(path)

    def onnx_network(self) -> Any:
        """The program as a step of integer ONNX operators; `ranvier.export.write_onnx` takes it."""
        from ranvier.deploy.onnx_program import program_network

        return program_network(self)

    def digest(self) -> str:
        """SHA-256 (hex) of all that determines its behaviour; equal programs, equal digests."""
        return digest(self)

    def with_parts(self, **changes: Any) -> Program:
        return replace(self, **changes)


def quantize_input(population: Population, x: np.ndarray) -> Ints:
    """round(x * scale), held against the population's range; a series held in time stays a view."""
    if len(x) > 1 and x.strides[0] == 0:
        return np.broadcast_to(quantize_input(population, x[:1]), x.shape)
    if not np.isfinite(x).all():
        raise RangeError("run: x holds values that are not finite")
    whole = np.rint(x * population.scale)
    slack = 0 if population.graded else 1e-6
    if not population.graded and np.abs(whole - x * population.scale).max(initial=0) > slack:
        raise RangeError(
            f"run: input '{population.name}' is declared binary, and x is not 0 or 1 everywhere; "
            "encode it first, or compile with graded input"
        )
    if whole.min(initial=0) < population.lo or whole.max(initial=0) > population.hi:
        raise RangeError(
            f"run: x is {x.min():g}..{x.max():g}, that is {whole.min():g}..{whole.max():g} levels; "
            f"input '{population.name}' sends {population.lo}..{population.hi}"
        )
    return whole.astype(np.int32)


def check(program: Program) -> None:
    """Raises FormatError, ShapeError or RangeError naming the first part that does not fit."""
    inputs = [p for p in program if p.is_input]
    if len(inputs) != 1:
        raise FormatError(f"program: it has {len(inputs)} inputs; exactly one is supported")
    if program.readout.population not in program.populations:
        raise FormatError(
            f"program: readout of '{program.readout.population}', which is no population"
        )
    for name, population in program.populations.items():
        if name != population.name:
            raise FormatError(f"program: population '{population.name}' stands under '{name}'")
        _check_population(population)
    place = {name: i for i, name in enumerate(program.populations)}
    for name, projection in program.projections.items():
        if name != projection.name:
            raise FormatError(f"program: projection '{projection.name}' stands under '{name}'")
        for end in (projection.source, projection.target):
            if end not in place:
                raise FormatError(
                    f"program: projection '{name}' names '{end}', which is no population"
                )
        if projection.lag < 1 and place[projection.source] >= place[projection.target]:
            raise FormatError(
                f"program: projection '{name}' goes back from '{projection.source}' to "
                f"'{projection.target}' without a lag"
            )
        _check_projection(program, projection)


def _check_population(p: Population) -> None:
    if not all(n >= 1 for n in p.shape):
        raise ShapeError(f"program: population '{p.name}' {p.shape} has no neurons")
    if p.lo > p.hi or p.depth < 0:
        raise RangeError(
            f"program: population '{p.name}' sends {p.lo}..{p.hi} at depth {p.depth}; messages go "
            "from lo up to hi, and depth from 0 on"
        )


def _check_projection(program: Program, p: Projection) -> None:
    source, target = program.populations[p.source], program.populations[p.target]
    n_in, n_out = int(np.prod(p.map.in_shape)), int(np.prod(p.map.out_shape))
    if n_in != source.size or n_out != target.size:
        raise ShapeError(
            f"program: projection '{p.name}' maps {p.map.in_shape} to {p.map.out_shape}; its ends are "
            f"'{source.name}' {source.shape} and '{target.name}' {target.shape}"
        )
    weight = p.map.weight
    if weight.dtype.kind != "i":
        raise RangeError(f"program: weights of '{p.name}' are {weight.dtype}, not whole numbers")
    if weight.size and (weight.min() < -256 or weight.max() > 255):
        raise RangeError(
            f"program: weights of '{p.name}' reach {weight.min()}..{weight.max()}; -256..255"
        )
    if not 0 <= p.exponent <= 15 or not 0 <= p.delay or not 0 <= p.lag or not 1 <= p.bits <= 8:
        raise RangeError(
            f"program: projection '{p.name}' has exponent {p.exponent}, delay {p.delay}, lag {p.lag}, "
            f"bits {p.bits}"
        )


def digest(program: Program) -> str:
    """See `Program.digest`: names, integers, shapes and the readout; not `meta`."""
    sha = hashlib.sha256(f"ranvier program {VERSION}".encode())
    parts = [*program.populations.values(), *program.projections.values(), program.readout]
    for part in parts:
        _feed(sha, part)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if hasattr(value, "__dataclass_fields__"):
        sha.update(type(value).__name__.encode())
        for f in fields(value):
            if f.name != "origin":
                sha.update(f.name.encode())
                _feed(sha, getattr(value, f.name))
    elif isinstance(value, (int, float, np.generic, np.ndarray)):  # a number is an array of no axes
        array = np.asarray(value)
        wide = np.ascontiguousarray(array, np.int64 if array.dtype.kind in "iub" else np.float64)
        sha.update(json.dumps(array.shape).encode() + wide.tobytes())
    else:
        sha.update(json.dumps(value).encode())
