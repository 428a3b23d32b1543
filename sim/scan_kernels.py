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

CHUNK = 2048
V_MAX = 2**23 - 1
FOLD = 2**23
RESETS = ("zero", "subtract", "none")
TIMINGS = ("immediate", "delayed", "carry")

i32, i64 = numba.int32, numba.int64


@njit  # type: ignore[misc, unused-ignore]
def _decay(x, k, like):  # type: ignore[no-untyped-def]
    """sign(x) * floor(|x| * k / 4096), 12 bits at a time so that it never leaves x's type."""
    whole = like.dtype.type
    high = whole(whole(x >> 12) * k)
    low = whole(whole(whole(x & 4095) * k) + (4095 if x < 0 else 0))
    return whole(high + whole(low >> 12))


@functools.cache
def scan(reset: int, timing: int, memory: bool, record: bool, wide: bool) -> Callable[..., None]:
    """The kernel of one kind of cell.

    reset, timing  places in RESETS, TIMINGS;  memory: whether u outlives a step;  record: whether
    u and v are written.  Arguments: a `[1 or steps, batch, n]` (one step: the same at every step);
    u, v `[batch, n]`, changed in place; k_u, k_v (4096 - decay), theta, bias, jump `[n]`; v_reset;
    sent `[steps, batch, n]` uint8; us, vs `[steps, batch, n]`, or empty.
    """
    late_zero = reset == 0 and timing == 1
    late_subtract = reset == 1 and timing != 0
    keep = reset == 2 or timing == 1
    carry = timing == 2

    def kernel(a, u, v, k_u, k_v, theta, bias, jump, v_reset, sent, us, vs):  # type: ignore[no-untyped-def]
        steps, batch, n = sent.shape
        held = a.shape[0] == 1
        whole = v.dtype.type
        n_chunks = (n + CHUNK - 1) // CHUNK
        for job in prange(batch * n_chunks):
            b = job // n_chunks
            lo = (job % n_chunks) * CHUNK
            m = min(CHUNK, n - lo)
            u_b, v_b = u[b, lo : lo + m], v[b, lo : lo + m]
            ku_b, kv_b = k_u[lo : lo + m], k_v[lo : lo + m]
            th_b, bias_b, jump_b = theta[lo : lo + m], bias[lo : lo + m], jump[lo : lo + m]
            for t in range(steps):
                a_t = a[0 if held else t, b, lo : lo + m]
                s_t = sent[t, b, lo : lo + m]
                for i in range(m):
                    x = whole(a_t[i])
                    if wide:
                        x = whole(i32(whole(i32(x)) << 6))
                    else:
                        x = whole(x << 6)
                    y = v_b[i]
                    if memory:
                        x = whole(x + _decay(u_b[i], ku_b[i], v))
                    x = whole(x - 2 * FOLD) if x > FOLD else x
                    x = whole(x + 2 * FOLD) if x <= -FOLD else x
                    late = y > th_b[i]
                    if late_zero:
                        y = whole(v_reset) if late else y
                    h = whole(whole(_decay(y, kv_b[i], v) + x) + bias_b[i])
                    if late_subtract:
                        h = whole(h - jump_b[i]) if late else h
                    h = whole(V_MAX) if h > V_MAX else h
                    h = whole(-V_MAX) if h < -V_MAX else h
                    fired = h > th_b[i]
                    s_t[i] = fired
                    if keep:
                        y = h
                    elif reset == 0:
                        y = whole(v_reset) if fired else h
                    else:
                        y = whole(h - jump_b[i]) if fired else h
                        if carry:
                            y = whole(y + jump_b[i]) if late else y
                        y = whole(V_MAX) if y > V_MAX else y
                        y = whole(-V_MAX) if y < -V_MAX else y
                    v_b[i] = y
                    if memory or record:
                        u_b[i] = x
                if record:
                    us_t, vs_t = us[t, b, lo : lo + m], vs[t, b, lo : lo + m]
                    for i in range(m):
                        us_t[i] = u_b[i]
                        vs_t[i] = v_b[i]

    return njit(parallel=True, cache=True, nogil=True)(kernel)


@functools.cache
def tally() -> Callable[..., None]:
    """The kernel that counts plain spikes: sent `[steps, batch, n]` -> some `[steps, n]`."""

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
            some[t, lo : lo + m] = count

    return njit(parallel=True, cache=True, nogil=True)(kernel)


@functools.cache
def tally_graded() -> Callable[..., None]:
    """As `tally`, with plain `[steps, n]` (messages that are 1) and payload `[steps]` (sum of |message|)."""

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
            payload[t] = total

    return njit(parallel=True, cache=True, nogil=True)(kernel)
