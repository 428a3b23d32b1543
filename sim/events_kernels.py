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
def _add_all(acc, base, weight, starts, k, q_0, q_1, runs):  # type: ignore[no-untyped-def]
    """Adds the runs q_0..q_1 of k spikes, four spikes at a time."""
    run_out, run_at, run_len = runs
    j = 0
    while j + 4 <= k:
        a, b, c, d = starts[j], starts[j + 1], starts[j + 2], starts[j + 3]
        for q in range(q_0, q_1):
            o, n, at = word(run_out[q] + base), word(run_len[q]), word(run_at[q])
            _add_4(acc, o, weight, a + at, b + at, c + at, d + at, n)
        j += 4
    if j + 2 <= k:
        a, b = starts[j], starts[j + 1]
        for q in range(q_0, q_1):
            o, n, at = word(run_out[q] + base), word(run_len[q]), word(run_at[q])
            _add_2(acc, o, weight, a + at, b + at, n)
        j += 2
    if j < k:
        a = starts[j]
        for q in range(q_0, q_1):
            o, n, at = word(run_out[q] + base), word(run_len[q]), word(run_at[q])
            _add_1(acc, o, weight, a + at, n)


@njit  # type: ignore[misc, unused-ignore]
def _add_graded(acc, base, weight, starts, values, k, q_0, q_1, runs):  # type: ignore[no-untyped-def]
    """As `_add_all`, each message times its value."""
    run_out, run_at, run_len = runs
    for j in range(k):
        for q in range(q_0, q_1):
            o, n, at = word(run_out[q] + base), word(run_len[q]), word(run_at[q])
            _add_times(acc, o, weight, starts[j] + at, n, values[j])


@njit  # type: ignore[misc, unused-ignore]
def _list_bytes(row, c_0, c_1, k_size, starts):  # type: ignore[no-untyped-def]
    """Lists where the weights of the spikes in row[c_0:c_1] start; how many there are."""
    k = 0
    for c in range(c_0, c_1):
        starts[k] = c * k_size
        k += row[c] != 0
    return k


@njit  # type: ignore[misc, unused-ignore]
def _list_bits(row, c_0, c_1, k_size, starts):  # type: ignore[no-untyped-def]
    """As `_list_bytes`, from packed spikes; bytes without any are passed over."""
    k = 0
    for i in range(c_0 >> 3, c_1 >> 3):
        eight = word(row[i])
        if eight != 0:
            start = i * 8 * k_size
            for j in range(8):
                starts[k] = start + j * k_size
                k += (eight >> word(j)) & word(1)
    return k


@functools.cache
def scatter(kind: str) -> Callable[..., None]:
    """The kernel that adds what messages drive: a convolution, or a dense layer as one of 1x1.

    kind  "graded", "bytes" (plain spikes), or "bits" (packed ones)
    message `[rows, positions, c_in]`, packed `[rows, positions, c_in / 8]`;
    acc `[rows, n_out]`, set to zero first if `clear`;
    weight flat, `k_size` a channel;  first `[positions + 1]` into run_out, run_at, run_len: where a
    run starts in acc (of group 0) and in a channel's weights, and how long it is;  groups, and
    `per_out` output channels each;  c_block input channels are taken at a time, so that their
    weights stay near;  r_block rows make a task.
    """

    graded, bits = kind == "graded", kind == "bits"

    def kernel(  # type: ignore[no-untyped-def]
        message, acc, clear, weight, k_size, first, run_out, run_at, run_len, groups, per_out,
        c_block, r_block,
    ):  # fmt: skip
        rows, positions, c_in = message.shape
        c_in = c_in * 8 if bits else c_in
        per_in = c_in // groups
        runs = (run_out, run_at, run_len)
        for task in prange((rows + r_block - 1) // r_block):
            starts = np.empty(c_in + 1, np.uint64)
            values = np.empty(c_in + 1, np.int32)
            r_0, r_1 = task * r_block, min(rows, (task + 1) * r_block)
            if clear:
                acc[r_0:r_1] = 0
            for g in range(groups):
                base = g * per_out
                for c_0 in range(g * per_in, (g + 1) * per_in, c_block):
                    c_1 = min((g + 1) * per_in, c_0 + c_block)
                    for r in range(r_0, r_1):
                        sums = acc[r]
                        for p in range(positions):
                            row = message[r, p]
                            if graded:
                                k = 0
                                for c in range(c_0, c_1):
                                    starts[k] = c * k_size
                                    values[k] = row[c]
                                    k += row[c] != 0
                            elif bits:
                                k = _list_bits(row, c_0, c_1, k_size, starts)
                            else:
                                k = _list_bytes(row, c_0, c_1, k_size, starts)
                            if k == 0:
                                continue
                            q_0, q_1 = first[p], first[p + 1]
                            if graded:
                                _add_graded(sums, base, weight, starts, values, k, q_0, q_1, runs)
                            else:
                                _add_all(sums, base, weight, starts, k, q_0, q_1, runs)

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
