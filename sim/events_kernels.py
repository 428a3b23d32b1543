"""One spike adds contiguous rows of weights: the compiled heart of the event engine.

Sums lie channels last, `[y, x, c_out]`, and weights as `[c_in, kernel row, kernel column reversed,
c_out]`: where the stride is one, a whole kernel row times all output channels is one run of
memory in both. Which runs an input position drives, borders and strides included, stands in tables
(`events.Runs`); the kernels only follow them. Up to four spikes of one position are added at once,
which saves reading and writing the sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import numpy as np
from numba import njit, prange

word = numba.uint64


@njit  # type: ignore[misc, unused-ignore]
def _add_1(acc, o, weight, a, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        acc[o + i] += weight[a + i]


@njit  # type: ignore[misc, unused-ignore]
def _add_2(acc, o, weight, a, b, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        acc[o + i] += weight[a + i] + weight[b + i]


@njit  # type: ignore[misc, unused-ignore]
def _add_4(acc, o, weight, a, b, c, d, n):  # type: ignore[no-untyped-def]
    for i in range(n):
        acc[o + i] += (weight[a + i] + weight[b + i]) + (weight[c + i] + weight[d + i])


@njit  # type: ignore[misc, unused-ignore]
def _add_times(acc, o, weight, a, n, value):  # type: ignore[no-untyped-def]
    for i in range(n):
        acc[o + i] += value * weight[a + i]


@njit  # type: ignore[misc, unused-ignore]
def _add_all(acc, o, weight, at, starts, k, n):  # type: ignore[no-untyped-def]
    """Adds the runs of k spikes, four at a time."""
    j = 0
    while j + 4 <= k:
        a, b, c, d = starts[j], starts[j + 1], starts[j + 2], starts[j + 3]
        _add_4(acc, o, weight, a + at, b + at, c + at, d + at, n)
        j += 4
    if j + 2 <= k:
        _add_2(acc, o, weight, starts[j] + at, starts[j + 1] + at, n)
        j += 2
    if j < k:
        _add_1(acc, o, weight, starts[j] + at, n)


@functools.cache
def scatter(graded: bool) -> Callable[..., None]:
    """The kernel that adds what messages drive: a convolution, or a dense layer as one of 1x1.

    message `[rows, positions, c_in]`;  acc `[rows, n_out]`, set to zero first if `clear`;
    weight flat, `k_size` a channel;  first `[positions + 1]` into run_out, run_at, run_len: where a
    run starts in acc (of group 0) and in a channel's weights, and how long it is;  groups, and
    `per_out` output channels each;  c_block input channels are taken at a time, so that their
    weights stay near;  r_block rows make a task.
    """

    def kernel(  # type: ignore[no-untyped-def]
        message, acc, clear, weight, k_size, first, run_out, run_at, run_len, groups, per_out,
        c_block, r_block,
    ):  # fmt: skip
        rows, positions, c_in = message.shape
        per_in = c_in // groups
        for task in prange((rows + r_block - 1) // r_block):
            starts = np.empty(c_in, np.uint64)
            values = np.empty(c_in, np.int32)
            r_0, r_1 = task * r_block, min(rows, (task + 1) * r_block)
            if clear:
                acc[r_0:r_1] = 0
            for g in range(groups):
                for c_0 in range(g * per_in, (g + 1) * per_in, c_block):
                    c_1 = min((g + 1) * per_in, c_0 + c_block)
                    for r in range(r_0, r_1):
                        for p in range(positions):
                            row = message[r, p]
                            k = 0
                            for c in range(c_0, c_1):
                                starts[k] = c * k_size
                                if graded:
                                    values[k] = row[c]
                                k += row[c] != 0
                            if k == 0:
                                continue
                            for q in range(first[p], first[p + 1]):
                                o, n = word(run_out[q] + g * per_out), word(run_len[q])
                                at = word(run_at[q])
                                if graded:
                                    for j in range(k):
                                        _add_times(acc[r], o, weight, starts[j] + at, n, values[j])
                                else:
                                    _add_all(acc[r], o, weight, at, starts, k, n)

    return njit(parallel=True, cache=True, nogil=True)(kernel)


@functools.cache
def channelwise() -> Callable[..., None]:
    """The kernel for depthwise convolutions and one-to-one maps: channels are vectors, no lists.

    message `[rows, positions, c]`, acc `[rows, positions_out, c]`, weight `[taps, c]` (one-to-one:
    `[positions, c]`);  pairs `[n, 3]`: position in, position out, row of weight.
    """

    def kernel(message, acc, clear, weight, pairs):  # type: ignore[no-untyped-def]
        rows, _, channels = message.shape
        for r in prange(rows):
            if clear:
                acc[r] = 0
            for q in range(len(pairs)):
                x, y, w = message[r, pairs[q, 0]], acc[r, pairs[q, 1]], weight[pairs[q, 2]]
                for c in range(channels):
                    y[c] += x[c] * w[c]

    return njit(parallel=True, cache=True, nogil=True)(kernel)
