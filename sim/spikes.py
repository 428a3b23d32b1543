"""Plain spikes between populations: eight a byte, so that what waits for a later reader is small.

The scan of a population writes them so, and the event kernels read them so; what needs a byte a
spike - the dense products, recordings - unpacks them for the time that it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import njit, prange, uint8, uint64

GATHER = uint64(0x0102040810204080)  # eight bytes of 0 or 1, times this: their bits at the top
SPREAD = uint64(0x0101010101010101)
PLACES = uint64(0x8040201008040201)  # bit k of byte k
BELOW = uint64(0x7F7F7F7F7F7F7F7F)
ONES = np.array([bin(i).count("1") for i in range(256)], np.uint8)


@dataclass(frozen=True, eq=False)
class Spikes:
    """Spikes `[steps, batch, n]` of 0 and 1.

    bits  uint8 `[steps, batch, ceil(n / 8)]`: neuron 8 k + j is bit j of byte k; what is beyond n is 0
    """

    bits: np.ndarray
    n: int

    @staticmethod
    def of(plain: np.ndarray) -> Spikes:
        """From uint8 `[steps, batch, n]` of 0 and 1."""
        steps, batch, n = plain.shape
        bits = np.empty((steps, batch, -(-n // 8)), np.uint8)
        pack()(np.ascontiguousarray(plain).reshape(-1, n), bits.reshape(steps * batch, -1))
        return Spikes(bits, n)

    @property
    def shape(self) -> tuple[int, int, int]:
        steps, batch, _ = self.bits.shape
        return steps, batch, self.n

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, steps: slice) -> Spikes:
        return Spikes(self.bits[steps], self.n)

    def plain(self) -> np.ndarray:
        """uint8 `[steps, batch, n]` of 0 and 1."""
        steps, batch, n = self.shape
        out = np.empty(self.shape, np.uint8)
        unpack()(np.ascontiguousarray(self.bits).reshape(steps * batch, -1), out.reshape(-1, n))
        return out

    def count(self) -> int:
        return int(ONES[self.bits].sum(dtype=np.int64))

    @staticmethod
    def joined(parts: list[Spikes]) -> Spikes:
        """One after the other in time."""
        return Spikes(np.concatenate([p.bits for p in parts]), parts[0].n)

    def quiet(self, steps: int) -> Spikes:
        """So many steps without a spike, of this shape."""
        return Spikes(np.zeros((steps, *self.bits.shape[1:]), np.uint8), self.n)


@njit  # type: ignore[misc, unused-ignore]
def pack_row(row, bits):  # type: ignore[no-untyped-def]
    """bits `[k]` from row, bytes of 0 and 1, at least 8 k of them."""
    words = row[: 8 * len(bits)].view(np.uint64)
    for i in range(len(bits)):
        bits[i] = uint8((words[i] * GATHER) >> uint64(56))


@functools.cache
def pack() -> Callable[..., None]:
    """The kernel for plain `[rows, n]` -> bits `[rows, ceil(n / 8)]`."""

    def kernel(plain, bits):  # type: ignore[no-untyped-def]
        rows, n = plain.shape
        whole = n // 8
        for r in prange(rows):
            pack_row(plain[r], bits[r, :whole])
            if n > 8 * whole:
                last = uint8(0)
                for i in range(8 * whole, n):
                    last |= uint8(plain[r, i] << uint8(i - 8 * whole))
                bits[r, whole] = last

    return njit(parallel=True, cache=True, nogil=True)(kernel)


@functools.cache
def unpack() -> Callable[..., None]:
    """The kernel for bits `[rows, ceil(n / 8)]` -> plain `[rows, n]`."""

    def kernel(bits, plain):  # type: ignore[no-untyped-def]
        rows, n = plain.shape
        whole = n // 8
        for r in prange(rows):
            words = plain[r, : 8 * whole].view(np.uint64)
            for i in range(whole):
                places = (uint64(bits[r, i]) * SPREAD) & PLACES
                words[i] = ((places + BELOW) >> uint64(7)) & SPREAD
            for i in range(8 * whole, n):
                plain[r, i] = (bits[r, whole] >> uint8(i - 8 * whole)) & uint8(1)

    return njit(parallel=True, cache=True, nogil=True)(kernel)
