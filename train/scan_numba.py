"""The scan of `scan.py` compiled for the CPU.

Neurons are cut into chunks that fit the first-level cache; a chunk runs through all steps before
the next begins, so its state never leaves the cache. A kernel is compiled for each reset, surrogate
and shape of network that occurs: its loops then hold no branch, and the compiler vectorizes them.
No fastmath: the sums round as torch's do, and spikes are equal bit by bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from ranvier.train.scan import RESETS, Rule
from ranvier.train.surrogates import Surrogate

CHUNK = 1024  # neurons; about eight arrays of it stay in 32 KiB at float32
PARALLEL_FROM = 1 << 16  # values; below, starting threads costs more than the loop
Kernel = Callable[..., Any]


def _compile(function: Kernel, parallel: bool = False) -> Kernel:
    # Python's error at a division by zero would keep every loop with a quotient from vectorizing.
    compiled: Kernel = njit(cache=True, error_model="numpy", parallel=parallel)(function)
    return compiled


def _slope_python(kind, x, p, k, one):  # type: ignore[no-untyped-def]
    """The surrogate's derivative at x = membrane - threshold; k = pi/2 p.

    `one` has x's type: a literal would make a float64 of a float32.
    """
    if kind == 0:
        return p / (one + one) / (one + (k * x) * (k * x))
    if kind == 1:
        q = one / (one + np.exp(-p * x))
        return p * q * (one - q)
    if kind == 2:
        return one / (p + p) if abs(x) < p else one - one
    if kind == 3:
        return max(p - p * p * abs(x), one - one)
    q = one + p * abs(x)
    return one / (q * q)


def _charge_python(current, a, b, x, u, v):  # type: ignore[no-untyped-def]
    """(synaptic current, membrane) after x has come in, before the spike."""
    u = a * u + x if current else x
    return u, b * v + u


def _after_python(reset, v, th, v_reset):  # type: ignore[no-untyped-def]
    """The membrane after the spike."""
    if reset == 0:
        return v - th if v > th else v
    if reset == 1:
        return v_reset if v > th else v
    return v


def _chunk_python(p, lo, m, one_value):  # type: ignore[no-untyped-def]
    """A parameter of every neuron from lo to lo + m, repeated over the batch; empty if it is one."""
    out = np.empty(0 if one_value else m, p.dtype)
    for j in range(out.size):
        out[j] = p[(lo + j) % p.size]
    return out


_slope = _compile(_slope_python)
_charge = _compile(_charge_python)
_after = _compile(_after_python)
_chunk = _compile(_chunk_python)


# The arguments of the two factories are constants to the compiler, which drops the branches on them.
# still: the same currents arrive at every step, and x has one row.


@cache
def _forward(reset: int, still: bool, current: bool, shared: bool, parallel: bool) -> Kernel:
    def forward(x, alpha, beta, theta, v_reset, s):  # type: ignore[no-untyped-def]
        n_steps, n = s.shape
        one = x.dtype.type(1)
        zero = one - one
        a0, b0, th0 = alpha[0], beta[0], theta[0]
        for c in prange((n + CHUNK - 1) // CHUNK):
            lo = c * CHUNK
            m = min(CHUNK, n - lo)
            a = _chunk(alpha, lo, m, shared)
            b = _chunk(beta, lo, m, shared)
            th = _chunk(theta, lo, m, shared)
            u, v = np.zeros(m, x.dtype), np.zeros(m, x.dtype)
            for t in range(n_steps):
                x_t, s_t = x[0 if still else t, lo : lo + m], s[t, lo : lo + m]
                for j in range(m):
                    decay, leak = (a0, b0) if shared else (a[j], b[j])
                    u_j, h = _charge(current, decay, leak, x_t[j], u[j], v[j])
                    if current:
                        u[j] = u_j
                    threshold = th0 if shared else th[j]
                    s_t[j] = one if h > threshold else zero
                    v[j] = _after(reset, h, threshold, v_reset)

    return _compile(forward, parallel)


@cache
def _backward(
    reset: int, kind: int, still: bool, current: bool, shared: bool, learns: bool, parallel: bool
) -> Kernel:
    def backward(  # type: ignore[no-untyped-def]
        g_s, x, alpha, beta, theta, v_reset, p, k, g_x, g_beta, g_theta
    ):
        n_steps, n = g_s.shape
        one = x.dtype.type(1)
        zero = one - one
        a0, b0, th0 = alpha[0], beta[0], theta[0]
        for c in prange((n + CHUNK - 1) // CHUNK):
            lo = c * CHUNK
            m = min(CHUNK, n - lo)
            a = _chunk(alpha, lo, m, shared)
            b = _chunk(beta, lo, m, shared)
            th = _chunk(theta, lo, m, shared)
            h = np.empty((n_steps, m), x.dtype)  # once more: cheaper than to have stored them
            u, v = np.zeros(m, x.dtype), np.zeros(m, x.dtype)
            for t in range(n_steps):
                x_t, h_t = x[0 if still else t, lo : lo + m], h[t]
                for j in range(m):
                    decay, leak = (a0, b0) if shared else (a[j], b[j])
                    u_j, h_j = _charge(current, decay, leak, x_t[j], u[j], v[j])
                    if current:
                        u[j] = u_j
                    h_t[j] = h_j
                    v[j] = _after(reset, h_j, th0 if shared else th[j], v_reset)
            g_u, g_v = u, v
            g_u[:] = zero
            g_v[:] = zero
            for back in range(n_steps):
                t = n_steps - 1 - back
                h_t, g_t, g_x_t = h[t], g_s[t, lo : lo + m], g_x[0 if still else t, lo : lo + m]
                if learns:
                    g_th = g_theta[lo : lo + m]
                    for j in range(m):
                        over = h_t[j] - (th0 if shared else th[j])
                        g_th[j] -= g_t[j] * _slope(kind, over, p, k, one)
                        if reset == 0:
                            g_th[j] -= g_v[j] if over > zero else zero
                    if t > 0:
                        before, g_b = h[t - 1], g_beta[lo : lo + m]
                        for j in range(m):
                            threshold = th0 if shared else th[j]
                            over = h_t[j] - threshold
                            kept = zero if reset == 1 and over > zero else g_v[j]
                            g_h = g_t[j] * _slope(kind, over, p, k, one) + kept
                            g_b[j] += g_h * _after(reset, before[j], threshold, v_reset)
                for j in range(m):
                    over = h_t[j] - (th0 if shared else th[j])
                    kept = zero if reset == 1 and over > zero else g_v[j]
                    g_h = g_t[j] * _slope(kind, over, p, k, one) + kept
                    g_v[j] = (b0 if shared else b[j]) * g_h
                    if current:
                        g_h = (a0 if shared else a[j]) * g_u[j] + g_h
                        g_u[j] = g_h
                    g_x_t[j] = g_x_t[j] + g_h if still and back > 0 else g_h

    return _compile(backward, parallel)


def _in_parallel(size: int) -> bool:
    """Whether that many values are shared out: over as many threads as torch may use here."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    if threads > 1 and size >= PARALLEL_FROM:
        numba.set_num_threads(threads)
        return True
    return False


def _arrays(*tensors: Tensor) -> list[Any]:
    return [t.detach().contiguous().numpy() for t in tensors]


def _flags(alpha: Tensor, *others: Tensor) -> tuple[bool, bool]:
    """(whether there is a synaptic current, whether each parameter is one number)."""
    one_value = alpha.numel() == 1
    return not one_value or bool(alpha[0] != 0), one_value and all(p.numel() == 1 for p in others)


def forward(
    x: Tensor, steps: int, alpha: Tensor, beta: Tensor, theta: Tensor, rule: Rule, save: bool
) -> tuple[Tensor, Tensor]:
    """(spikes [steps, N], x); the backward computes the membranes from x once more."""
    s = x.new_empty(steps, x.shape[1])
    arrays = _arrays(x, alpha, beta, theta)
    flags = (x.shape[0] < steps, *_flags(alpha, beta, theta), _in_parallel(s.numel()))
    kernel = _forward(RESETS.index(rule.reset), *flags)
    kernel(*arrays, arrays[0].dtype.type(rule.v_reset), s.numpy())
    return s, x


def backward(
    g_s: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, theta: Tensor, rule: Rule, learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(g_x shaped as x, g_beta [N], g_theta [N]); the last two are empty unless `learns`."""
    assert isinstance(rule.spike, Surrogate)
    g_x = torch.empty_like(x)
    g_beta, g_theta = (x.new_zeros(x.shape[1] if learns else 0) for _ in range(2))
    arrays = _arrays(g_s, x, alpha, beta, theta)
    as_type, p = arrays[0].dtype.type, rule.spike.alpha
    numbers = (as_type(v) for v in (rule.v_reset, p, math.pi / 2 * p))
    flags = (x.shape[0] < g_s.shape[0], *_flags(alpha, beta, theta), learns)
    kernel = _backward(RESETS.index(rule.reset), rule.spike.code, *flags, _in_parallel(g_s.numel()))
    kernel(*arrays, *numbers, g_x.numpy(), g_beta.numpy(), g_theta.numpy())
    return g_x, g_beta, g_theta
