"""The event engine: the cost follows the spikes.

The sums of a population are built spike by spike in the smallest proved integer type; powers of two
that all its weights share are taken out first and put back by the scan. Where sums could wrap, the
dense engine's exact path computes them.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ranvier.deploy.program import ConvMap, DenseMap, OneToOne, Program
from ranvier.sim import events_kernels
from ranvier.sim.bounds import trailing_zeros
from ranvier.sim.dense import DenseBackend, chunk_size, exact_kernels, scan_cpu, tensor
from ranvier.sim.layers import Driven, Incoming, Message, walk
from ranvier.sim.layout import Wiring
from ranvier.sim.plan import Plan
from ranvier.sim.runner import Result, finish
from ranvier.sim.spikes import Spikes

CHUNK_BYTES = 8 << 20  # of the largest layer's sums
NEAR = 256 << 10  # bytes of sums, and of weights, that a core keeps near
INT16 = 2**15


@dataclass(frozen=True, eq=False)
class Runs:
    """For each input position, the runs that a spike drives; see `events_kernels.scatter`."""

    first: np.ndarray
    out: np.ndarray
    at: np.ndarray
    length: np.ndarray


def taps(conv: ConvMap) -> np.ndarray:
    """`[n, 4]`: position in, position out, kernel row, kernel column of every synapse bundle."""
    (py, px), (sy, sx), (dy, dx) = conv.padding, conv.stride, conv.dilation
    _, height, width = conv.in_shape
    _, rows, cols = conv.out_shape
    k_y, k_x = conv.weight.shape[2:]
    oy, ox, i, j = np.meshgrid(*map(np.arange, (rows, cols, k_y, k_x)), indexing="ij")
    y, x = oy * sy + i * dy - py, ox * sx + j * dx - px
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    found = np.stack([y * width + x, oy * cols + ox, i, j], -1)[inside]
    return found[np.lexsort((found[:, 1], found[:, 2], found[:, 0]))]


def conv_runs(conv: ConvMap) -> Runs:
    """The runs of a convolution, neighboring ones joined where sums and weights both go on."""
    per_out = conv.out_shape[0] // conv.groups
    k_x = conv.weight.shape[3]
    pos, out, i, j = taps(conv).T
    start = out * conv.out_shape[0]
    at = (i * k_x + (k_x - 1 - j)) * per_out
    joins = np.zeros(len(pos), bool)
    if conv.groups == 1:
        joins[1:] = (np.diff(pos) == 0) & (np.diff(start) == per_out) & (np.diff(at) == per_out)
    heads = np.flatnonzero(~joins)
    length = np.diff(np.append(heads, len(pos))) * per_out
    positions = conv.in_shape[1] * conv.in_shape[2]
    first = np.searchsorted(pos[heads], np.arange(positions + 1))
    return Runs(first, start[heads], at[heads], length)


def final_bound(projection: Any, sent: int, binary: bool) -> int:
    """Bound on one output's |sum|. Steps on the way may wrap: what wraps comes back."""
    weight = projection.map.weight.astype(np.int64)
    axes = {ConvMap: (1, 2, 3), DenseMap: (1,), OneToOne: ()}[type(projection.map)]
    if not binary:
        return int(np.abs(weight).sum(axes).max(initial=0)) * sent
    up, down = np.maximum(weight, 0).sum(axes), np.maximum(-weight, 0).sum(axes)
    return int(max(up.max(initial=0), down.max(initial=0)))


class Scatter:
    """One projection, ready to add what messages drive to sums."""

    def __init__(self, wiring: Wiring, shift: int, binary: bool, dtype: Any) -> None:
        self.wiring, self.binary, self.map = wiring, binary, wiring.projection.map
        exponent = wiring.projection.exponent
        scaled = (wiring.weight.astype(np.int64) << exponent) >> shift
        self.channelwise = isinstance(self.map, OneToOne) or (
            isinstance(self.map, ConvMap) and self.map.weight.shape[:2] == (self.map.in_shape[0], 1)
            and self.map.groups == self.map.in_shape[0]
        )  # fmt: skip
        if self.channelwise:
            self._lay_channelwise(scaled, dtype)
        else:
            self._lay_runs(scaled)

    def _lay_channelwise(self, weight: np.ndarray, dtype: Any) -> None:
        if isinstance(self.map, ConvMap):
            found = taps(self.map)
            k_x = weight.shape[3]
            self.weight = np.ascontiguousarray(
                weight[:, 0].reshape(len(weight), -1).T.astype(dtype)
            )
            self.pairs = np.stack([found[:, 0], found[:, 1], found[:, 2] * k_x + found[:, 3]], -1)
        else:
            self.weight = weight.reshape(1, -1).astype(dtype)
            self.pairs = np.zeros((1, 3), np.int64)

    def _lay_runs(self, weight: np.ndarray) -> None:
        if isinstance(self.map, ConvMap):
            c_out, per_in = weight.shape[:2]
            self.groups, self.per_out = self.map.groups, c_out // self.map.groups
            grouped = weight.reshape(self.groups, self.per_out, per_in, *weight.shape[2:])
            laid = grouped[..., ::-1].transpose(0, 2, 3, 4, 1)
            self.runs = conv_runs(self.map)
            self.positions, self.c_in = int(np.prod(self.map.in_shape[1:])), self.map.in_shape[0]
        else:
            laid = weight.T
            self.groups, self.per_out = 1, len(weight)
            zero = np.zeros(1, np.int64)
            self.runs = Runs(np.array([0, 1]), zero, zero, np.array([len(weight)]))
            self.positions, self.c_in = 1, weight.shape[1]
        small = weight.min(initial=0) >= -128 and weight.max(initial=0) <= 127
        kind = np.int8 if small else np.int32
        self.weight = np.ascontiguousarray(laid.reshape(-1).astype(kind))
        self.k_size = self.weight.size // self.c_in
        near = NEAR // max(1, self.k_size * self.weight.itemsize)
        self.c_block = self.c_in if self.weight.nbytes <= 2 * NEAR else max(32, near // 8 * 8)

    def add(self, sent: Message, acc: np.ndarray, clear: bool) -> None:
        """acc `[rows, n_out]` += what sent `[steps, batch, n_in]` drives (or = where `clear`)."""
        by_bits = self.in_bits and isinstance(sent, Spikes)
        message = sent.bits if by_bits else tensor(sent).numpy()
        message = message.reshape(len(acc), -1)
        if self.wiring.gather is not None:
            message = np.ascontiguousarray(message[:, self.wiring.gather])
        into = acc if self.wiring.scatter is None else np.empty_like(acc)
        fresh = clear or into is not acc
        if self.channelwise:
            channels = self.weight.shape[1]
            shaped = message.reshape(len(message), -1, channels)
            kernel = events_kernels.channelwise()
            kernel(shaped, into.reshape(len(acc), -1, channels), fresh, self.weight, self.pairs)
        else:
            self._scatter(message, into, fresh, by_bits)
        if into is not acc:
            np.copyto(acc, into[:, self.wiring.scatter] + (0 if clear else acc))

    @property
    def in_bits(self) -> bool:
        """Whether packed spikes can be read as they are: a group's channels are whole bytes."""
        whole = not self.channelwise and self.wiring.gather is None
        return whole and self.c_in // self.groups % 8 == 0 and self.c_block % 8 == 0

    def _scatter(self, message: np.ndarray, acc: np.ndarray, clear: bool, by_bits: bool) -> None:
        runs = self.runs
        rows = len(message)
        r_block = min(max(1, NEAR // (acc.shape[1] * acc.itemsize)), 64, max(1, rows // 8))
        kernel = events_kernels.scatter("bits" if by_bits else "bytes" if self.binary else "graded")
        kernel(
            message.reshape(rows, self.positions, -1), acc, clear, self.weight, self.k_size,
            runs.first, runs.out, runs.at, runs.length, self.groups, self.per_out, self.c_block,
            r_block,
        )  # fmt: skip


class Scratch(threading.local):
    """Arrays that are used again, a thread its own: fresh memory costs more than its use."""

    def __init__(self) -> None:
        self._held: dict[str, np.ndarray] = {}

    def take(self, shape: tuple[int, ...], dtype: Any, name: str) -> np.ndarray:
        """An array with any contents, good until `name` is taken again."""
        n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if name not in self._held or self._held[name].nbytes < n_bytes:
            self._held[name] = np.empty(n_bytes, np.uint8)
        return self._held[name][:n_bytes].view(dtype).reshape(shape)


class Target:
    """All that reaches one population: the shared power of two, the type of sums, the scatters."""

    def __init__(self, plan: Plan, name: str) -> None:
        into = plan.into[name]
        arrival = plan.arrival[name]
        self.possible = not arrival.wraps
        self.shift = min((p.exponent + trailing_zeros(p.map.weight) for p in into), default=0)
        bound = sum(
            final_bound(p, plan.sent[p.source], plan.binary(p.source)) << p.exponent for p in into
        )
        plain = all(plan.binary(p.source) for p in into)
        self.dtype = np.int16 if plain and bound >> self.shift < INT16 else np.int32
        self.size = plan.populations[name].size
        if self.possible:
            self.scatters = {
                p.name: Scatter(plan.wirings[p.name], self.shift, plan.binary(p.source), self.dtype)
                for p in into
            }

    def sums(self, incoming: Incoming, batch: int, scratch: Scratch) -> np.ndarray:
        """`[1 or steps, batch, n]`, to be shifted left by `shift`; good until the next call."""
        total: np.ndarray | None = None
        for steps in sorted({len(m) for _, m in incoming}, reverse=True):
            acc = scratch.take((steps, batch, self.size), self.dtype, f"sums{steps}")
            clear = True
            for wiring, message in incoming:
                if len(message) == steps:
                    self.scatters[wiring.projection.name].add(
                        message, acc.reshape(steps * batch, -1), clear
                    )
                    clear = False
            total = acc if total is None else np.add(total, acc, out=total)
        return total if total is not None else np.zeros((1, batch, self.size), self.dtype)


class EventsBackend(DenseBackend):
    """See the module. Messages are the dense engine's, so that the two can share a run."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, "cpu")
        self._targets: dict[str, Target] = {}
        self._scratch = Scratch()

    def part(self, steps: int) -> int:
        return chunk_size(self.plan, steps, CHUNK_BYTES)

    def target(self, name: str) -> Target:
        if name not in self._targets:
            self._targets[name] = Target(self.plan, name)
        return self._targets[name]

    def drive(
        self, name: str, incoming: Incoming, steps: int, batch: int, state: Any, record: bool
    ) -> Driven:
        target = self.target(name)
        if not target.possible:
            return super().drive(name, incoming, steps, batch, state, record)
        total = target.sums(incoming, batch, self._scratch)
        if name in self.plan.cells:
            return scan_cpu(self.plan, name, total, steps, state, record, target.shift)
        sent = total.astype(np.int32) << target.shift
        sent = sent if len(sent) == steps else np.repeat(sent, steps, 0)
        if name in self.plan.gates:
            return Driven(Spikes.of((sent > self.plan.gates[name]).astype(np.uint8)))
        if shift := self.plan.relay_shift(name):
            sent = ((sent.astype(np.int64) + (1 << shift >> 1)) >> shift).astype(np.int32)
        return Driven(torch.from_numpy(sent))


_BACKENDS: weakref.WeakKeyDictionary[Program, EventsBackend] = weakref.WeakKeyDictionary()


def backend(program: Program) -> EventsBackend:
    """The backend of a program, with its weights laid out once."""
    if program not in _BACKENDS:
        _BACKENDS[program] = EventsBackend(program)
    return _BACKENDS[program]


def run_events(program: Program, x: np.ndarray, record: tuple[str, ...] = ()) -> Result:
    """The Result of whole numbers x `[time, batch, *shape]`."""
    use = backend(program)
    with exact_kernels():
        whole, ledger = walk(use, x, record)
    return finish(program, whole.sent, whole.states, record, ledger, "events")
