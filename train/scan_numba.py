"""The scan of `scan.py` compiled for the CPU.

Neurons are cut into chunks that fit the first-level cache; a chunk runs through all steps before
the next begins, so its state never leaves the cache. No fastmath: the sums round as torch's do, and
spikes are equal bit by bit. Loops are short and many on purpose: the compiler cannot prove that
arrays do not overlap, and vectorizes a loop only while it has few of them to check.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


@njit(cache=True)
def _chunk_of(p, lo, m):  # type: ignore[no-untyped-def]
    """A parameter of one value, or of one a neuron repeated over the batch, from lo to lo + m."""
    out = np.empty(m, p.dtype)
    for j in range(m):
        out[j] = p[(lo + j) % p.size] if p.size > 1 else p[0]
    return out


@njit(cache=True)
def _derivative(kind, p, x, out):  # type: ignore[no-untyped-def]
    """out = surrogate'(x); one plain loop a kind, so that each vectorizes."""
    zero, one = out.dtype.type(0), out.dtype.type(1)
    if kind == 0:
        k = out.dtype.type(math.pi / 2) * p
        half = p / (one + one)
        for j in range(x.size):
            out[j] = half / (one + (k * x[j]) * (k * x[j]))
    elif kind == 1:
        for j in range(x.size):
            q = one / (one + np.exp(-p * x[j]))
            out[j] = p * q * (one - q)
    elif kind == 2:
        height = one / (p + p)
        for j in range(x.size):
            out[j] = height if abs(x[j]) < p else zero
    elif kind == 3:
        for j in range(x.size):
            q = p - p * p * abs(x[j])
            out[j] = q if q > zero else zero
    else:
        for j in range(x.size):
            q = one + p * abs(x[j])
            out[j] = one / (q * q)


@njit(cache=True)
def _theta_gradient(reset, over, d, g_v, g_theta):  # type: ignore[no-untyped-def]
    for j in range(d.size):
        g_theta[j] -= d[j]
    if reset == 0:
        for j in range(d.size):
            if over[j] > 0:
                g_theta[j] -= g_v[j]


@njit(cache=True)
def _beta_gradient(reset, v_reset, h, th, g_h, g_beta):  # type: ignore[no-untyped-def]
    for j in range(h.size):
        v = h[j]
        if v > th[j]:
            if reset == 0:
                v = v - th[j]
            elif reset == 1:
                v = v_reset
        g_beta[j] += g_h[j] * v


@njit(cache=True)
def _charge(x_t, a, b, current, u, v):  # type: ignore[no-untyped-def]
    """u and v after the currents of one step have come in; v is then the membrane h."""
    for j in range(v.size):
        v[j] = b[j] * v[j]
    if current:
        for j in range(v.size):
            u[j] = a[j] * u[j]
        for j in range(v.size):
            u[j] = u[j] + x_t[j]
        for j in range(v.size):
            v[j] = v[j] + u[j]
    else:
        for j in range(v.size):
            v[j] = v[j] + x_t[j]


@njit(cache=True)
def _reset(reset, v_reset, th, v):  # type: ignore[no-untyped-def]
    if reset == 0:
        for j in range(v.size):
            v[j] = v[j] - th[j] if v[j] > th[j] else v[j]
    elif reset == 1:
        for j in range(v.size):
            v[j] = v_reset if v[j] > th[j] else v[j]


def _forward(x, alpha, beta, theta, reset, v_reset, s):  # type: ignore[no-untyped-def]
    n_steps, n = x.shape
    zero, one = x.dtype.type(0), x.dtype.type(1)
    current = alpha.size > 1 or alpha[0] != zero
    for c in prange((n + CHUNK - 1) // CHUNK):
        lo = c * CHUNK
        m = min(CHUNK, n - lo)
        u = np.zeros(m, x.dtype)
        v = np.zeros(m, x.dtype)
        a = _chunk_of(alpha, lo, m)
        b = _chunk_of(beta, lo, m)
        th = _chunk_of(theta, lo, m)
        for t in range(n_steps):
            _charge(x[t, lo : lo + m], a, b, current, u, v)
            s_t = s[t, lo : lo + m]
            for j in range(m):
                s_t[j] = one if v[j] > th[j] else zero
            _reset(reset, v_reset, th, v)


def _backward(  # type: ignore[no-untyped-def]
    g_s, x, alpha, beta, theta, reset, v_reset, kind, p, learns, g_x, g_beta, g_theta
):
    n_steps, n = x.shape
    zero = x.dtype.type(0)
    current = alpha.size > 1 or alpha[0] != zero
    for c in prange((n + CHUNK - 1) // CHUNK):
        lo = c * CHUNK
        m = min(CHUNK, n - lo)
        u = np.zeros(m, x.dtype)
        v = np.zeros(m, x.dtype)
        a = _chunk_of(alpha, lo, m)
        b = _chunk_of(beta, lo, m)
        th = _chunk_of(theta, lo, m)
        h = np.empty((n_steps, m), x.dtype)
        for t in range(n_steps):  # the membranes once more: cheaper than to have stored them
            _charge(x[t, lo : lo + m], a, b, current, u, v)
            h[t] = v
            _reset(reset, v_reset, th, v)
        g_u = np.zeros(m, x.dtype)
        g_v = np.zeros(m, x.dtype)
        d = u
        over = v
        for back in range(n_steps):
            t = n_steps - 1 - back
            h_t = h[t]
            g_t = g_s[t, lo : lo + m]
            for j in range(m):
                over[j] = h_t[j] - th[j]
            _derivative(kind, p, over, d)
            for j in range(m):
                d[j] = g_t[j] * d[j]
            if learns:
                _theta_gradient(reset, over, d, g_v, g_theta[lo : lo + m])
            if reset == 1:
                for j in range(m):
                    g_v[j] = zero if over[j] > zero else g_v[j]
            for j in range(m):
                g_v[j] = d[j] + g_v[j]
            if current:
                for j in range(m):
                    g_u[j] = a[j] * g_u[j]
                for j in range(m):
                    g_u[j] = g_u[j] + g_v[j]
                g_x[t, lo : lo + m] = g_u
            else:
                g_x[t, lo : lo + m] = g_v
            if learns and t > 0:
                _beta_gradient(reset, v_reset, h[t - 1], th, g_v, g_beta[lo : lo + m])
            for j in range(m):
                g_v[j] = b[j] * g_v[j]


_compiled: dict[tuple[str, bool], Callable[..., None]] = {}


def _jit(function: Callable[..., None], size: int) -> Callable[..., None]:
    """The compiled function; its threads are as many as torch may use here, and one is no pool."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    parallel = threads > 1 and size >= PARALLEL_FROM
    key = (function.__name__, parallel)
    if key not in _compiled:
        _compiled[key] = njit(function, parallel=parallel, cache=True)
    if parallel:
        numba.set_num_threads(threads)
    return _compiled[key]


def _arrays(*tensors: Tensor) -> list[Any]:
    return [t.detach().contiguous().numpy() for t in tensors]


def forward(
    x: Tensor, alpha: Tensor, beta: Tensor, theta: Tensor, rule: Rule, save: bool
) -> tuple[Tensor, Tensor]:
    """(spikes, x) [T, N]; the backward computes the membranes from x once more."""
    s = torch.empty_like(x)
    arrays = _arrays(x, alpha, beta, theta)
    v_reset = arrays[0].dtype.type(rule.v_reset)
    _jit(_forward, x.numel())(*arrays, RESETS.index(rule.reset), v_reset, s.numpy())
    return s, x


def backward(
    g_s: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, theta: Tensor, rule: Rule, learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(g_x [T, N], g_beta [N], g_theta [N]); the last two are empty unless `learns`."""
    assert isinstance(rule.spike, Surrogate)
    g_x = torch.empty_like(x)
    g_beta, g_theta = (x.new_zeros(x.shape[1] if learns else 0) for _ in range(2))
    arrays = _arrays(g_s, x, alpha, beta, theta)
    as_type = arrays[0].dtype.type
    _jit(_backward, x.numel())(
        *arrays,
        RESETS.index(rule.reset),
        as_type(rule.v_reset),
        rule.spike.code,
        as_type(rule.spike.alpha),
        learns,
        g_x.numpy(),
        g_beta.numpy(),
        g_theta.numpy(),
    )
    return g_x, g_beta, g_theta
