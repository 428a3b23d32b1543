"""The integer neuron over all steps, compiled: `ranvier.deploy.cells.Cell.step`, fused.

Neurons are cut into chunks whose state stays in the first-level cache; a chunk runs through all
steps before the next begins. `narrow` does everything in 32 bits, which is the same integers where
the arriving sum is at most `bounds.NARROW`; `wide` takes any sum and wraps as the chip does.
Sources of the rules: see `deploy/cells.py`. Kernels are made per kind of cell and cached on disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba
import numpy as np
from numba import njit, prange

from ranvier.sim.spikes import pack_row

CHUNK = 2048
V_MAX = 2**23 - 1
FOLD = 2**23
RESETS = ("zero", "subtract", "none")
TIMINGS = ("immediate", "delayed", "carry", "discard")

i32, i64 = numba.int32, numba.int64


@njit  # type: ignore[misc, unused-ignore]
def _decay(x, k, like):  # type: ignore[no-untyped-def]
    """sign(x) * floor(|x| * k / 4096), 12 bits at a time so that it never leaves x's type."""
    whole = like.dtype.type
    high = whole(whole(x >> 12) * k)
    low = whole(whole(whole(x & 4095) * k) + (4095 if x < 0 else 0))
    return whole(high + whole(low >> 12))


@njit  # type: ignore[misc, unused-ignore]
def _step(memory, a, shift, u, v, p, v_reset, reset, timing, sent):  # type: ignore[no-untyped-def]
    """One step of a chunk; conditions are selects, so that the loop is one run of vectors."""
    k_u, k_v, theta, bias, jump = p
    whole, wide = v.dtype.type, v.itemsize == 8
    zero, keep = reset == 0, (reset == 2) | (timing == 1) | (timing == 3)
    discard = zero & (timing == 3)
    late_zero, late_subtract = zero & (timing == 1), (reset == 1) & (timing != 0)
    carry, low = (reset == 1) & (timing == 2), whole(v_reset)
    for i in range(len(sent)):
        x = whole(whole(a[i]) << shift)
        x = whole(i32(i64(i32(x)) << 6)) if wide else whole(x << 6)
        y, th, jp = v[i], theta[i], jump[i]
        if memory:
            x = whole(x + _decay(u[i], k_u[i], v))
            x = whole(i32(x)) if wide else x
        x = whole(x - 2 * FOLD) if x > FOLD else x
        x = whole(x + 2 * FOLD) if x <= -FOLD else x
        late = y > th
        y = low if late & late_zero else y
        h = whole(whole(_decay(y, k_v[i], v) + x) + bias[i])
        h = whole(h - jp) if late & late_subtract else h
        h = low if late & discard else h
        h = whole(min(max(h, -V_MAX), V_MAX))
        fired = h > th
        sent[i] = fired
        back = whole(h - jp) if fired else h
        back = whole(back + jp) if late & carry else back
        back = whole(min(max(back, -V_MAX), V_MAX))
        y = (low if fired else h) if zero else back
        v[i] = h if keep else y
        u[i] = x


@functools.cache
def scan(memory: bool) -> Callable[..., None]:
    """The kernel for compartments whose u outlives a step, or does not.

    Arguments: a `[1 or steps, batch, n]` (one step: the same at every step), to be shifted left by
    `shift`; u, v `[batch, n]`, int32 or int64, changed in place; k_u, k_v (4096 - decay), theta,
    bias, jump `[n]`; v_reset; reset, timing, places in RESETS and TIMINGS; sent `[steps, batch, n]`
    uint8; us, vs as sent, of u's type, or empty where the states are not recorded.
    """

    def kernel(  # type: ignore[no-untyped-def]
        a, shift, u, v, k_u, k_v, theta, bias, jump, v_reset, reset, timing, sent, us, vs
    ):
        steps, batch, n = sent.shape
        held, record = a.shape[0] == 1, us.size > 0
        n_chunks = (n + CHUNK - 1) // CHUNK
        for job in prange(batch * n_chunks):
            b = job // n_chunks
            lo = (job % n_chunks) * CHUNK
            hi = min(n, lo + CHUNK)
            p = (k_u[lo:hi], k_v[lo:hi], theta[lo:hi], bias[lo:hi], jump[lo:hi])
            u_b, v_b = u[b, lo:hi], v[b, lo:hi]
            for t in range(steps):
                a_t = a[0 if held else t, b, lo:hi]
                _step(memory, a_t, shift, u_b, v_b, p, v_reset, reset, timing, sent[t, b, lo:hi])
                if record:
                    us_t, vs_t = us[t, b, lo:hi], vs[t, b, lo:hi]
                    for i in range(hi - lo):
                        us_t[i] = u_b[i]
                        vs_t[i] = v_b[i]

    return njit(parallel=True, cache=True, nogil=True)(kernel)


@functools.cache
def scan_fast(reset: int, timing: int, folds: bool) -> Callable[..., None]:
    """`scan` for compartments of 32 bits whose u does not outlive a step, from rest, nothing recorded.

    reset, timing  places in RESETS and TIMINGS, known to the compiler
    folds          whether a sum can pass 2**17, from where the chip's u folds
    Arguments as for `scan`; bits `[steps, batch, ceil(n / 8)]` as in `Spikes`; chunk, a multiple of
    8; some `[steps, n]` int64 gets the spikes of each neuron over the batch.
    """
    zero, subtract = reset == 0, reset == 1
    immediate, delayed, carry, discard = (timing == k for k in range(4))
    back_now = immediate or carry

    def kernel(a, shift, k_v, theta, bias, jump, v_reset, chunk, bits, some):  # type: ignore[no-untyped-def]
        steps, batch = bits.shape[:2]
        n = a.shape[2]
        held, low, up = a.shape[0] == 1, i32(v_reset), i32(shift + 6)
        for job in prange((n + chunk - 1) // chunk):
            lo, hi = job * chunk, min(n, (job + 1) * chunk)
            k_c, th_c, bias_c, jump_c = k_v[lo:hi], theta[lo:hi], bias[lo:hi], jump[lo:hi]
            v, out = np.empty(hi - lo, np.int32), np.zeros((hi - lo + 7) // 8 * 8, np.uint8)
            counts = np.zeros((steps, hi - lo), np.int32)
            for b in range(batch):
                v[:] = 0
                for t in range(steps):
                    a_t, count = a[0 if held else t, b, lo:hi], counts[t]
                    for i in range(hi - lo):
                        x, y, th = i32(i32(a_t[i]) << (up & 31)), v[i], th_c[i]
                        if folds:
                            x = i32(x - 2 * FOLD) if x > FOLD else x
                            x = i32(x + 2 * FOLD) if x <= -FOLD else x
                        late = y > th
                        if zero and delayed:
                            y = low if late else y
                        h = i32(i32(_decay(y, k_c[i], v) + x) + bias_c[i])
                        if subtract and not immediate:
                            h = i32(h - jump_c[i]) if late else h
                        if zero and discard:
                            h = low if late else h
                        h = i32(min(max(h, -V_MAX), V_MAX))
                        fired = h > th
                        out[i] = fired
                        count[i] += fired
                        if zero and back_now:
                            h = low if fired else h
                        if subtract and back_now:
                            h = i32(h - jump_c[i]) if fired else h
                            if carry:
                                h = i32(h + jump_c[i]) if late else h
                            h = i32(min(max(h, -V_MAX), V_MAX))
                        v[i] = h
                    pack_row(out, bits[t, b, lo // 8 : (hi + 7) // 8])
            for t in range(steps):
                some[t, lo:hi] = counts[t]

    return njit(parallel=True, cache=True, nogil=True)(kernel)


@functools.cache
def tally() -> Callable[..., None]:
    """The kernel that adds the plain spikes of sent `[steps, batch, n]` to some `[steps, n]`."""

    def kernel(sent, some):  # type: ignore[no-untyped-def]
        steps, batch, n = sent.shape
        n_chunks = (n + CHUNK - 1) // CHUNK
        for job in prange(steps * n_chunks):
            t = job // n_chunks
            lo = (job % n_chunks) * CHUNK
            m = min(CHUNK, n - lo)
            count = np.zeros(m, np.int32)
            for b in range(batch):
                row = sent[t, b, lo : lo + m]
                for i in range(m):
                    count[i] += row[i] != 0
            for i in range(m):
                some[t, lo + i] += count[i]

    return njit(parallel=True, cache=True, nogil=True)(kernel)


@functools.cache
def tally_graded() -> Callable[..., None]:
    """As `tally`, with plain `[steps, n]` (messages of 1), payload `[steps]` (sum of |message|)."""

    def kernel(sent, some, plain, payload):  # type: ignore[no-untyped-def]
        steps, batch, n = sent.shape
        for t in prange(steps):
            total = i64(0)
            for b in range(batch):
                row = sent[t, b]
                for i in range(n):
                    x = i64(row[i])
                    some[t, i] += x != 0
                    plain[t, i] += x == 1
                    total += abs(x)
            payload[t] += total

    return njit(parallel=True, cache=True, nogil=True)(kernel)


@functools.cache
def add_times() -> Callable[..., None]:
    """The kernel for total `[steps, batch, n]` float32 += sent (uint8) times weight `[n]` float32."""

    def kernel(total, sent, weight):  # type: ignore[no-untyped-def]
        steps, batch, n = sent.shape
        for job in prange(steps * batch):
            into, row = total[job // batch, job % batch], sent[job // batch, job % batch]
            for i in range(n):
                into[i] += numba.float32(row[i]) * weight[i]

    return njit(parallel=True, cache=True, nogil=True)(kernel)
