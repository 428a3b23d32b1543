"""The scan of `scan.py` as two Triton kernels for CUDA.

One program takes BLOCK neurons through all steps with the state in registers: each value is read
once and written once. Numbers of the rule are compile-time constants; those are float32, so float64
tensors are left to torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ranvier.train.scan import RESETS, Rule
from ranvier.train.surrogates import Surrogate

BLOCK = 512


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr,
    s_ptr,
    h_ptr,
    alpha_ptr,
    beta_ptr,
    theta_ptr,
    n_steps,
    n,
    n_alpha,
    n_beta,
    n_theta,
    V_RESET: tl.constexpr,
    RESET: tl.constexpr,
    SAVE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    mask = j < n
    alpha = tl.load(alpha_ptr + j % n_alpha, mask=mask, other=0.0)
    beta = tl.load(beta_ptr + j % n_beta, mask=mask, other=0.0)
    theta = tl.load(theta_ptr + j % n_theta, mask=mask, other=0.0)
    u = tl.zeros_like(beta)
    v = tl.zeros_like(beta)
    at = j
    for _ in range(n_steps):
        u = alpha * u + tl.load(x_ptr + at, mask=mask, other=0.0)
        h = beta * v + u
        fires = h > theta
        tl.store(s_ptr + at, fires.to(h.dtype), mask=mask)
        if SAVE:
            tl.store(h_ptr + at, h, mask=mask)
        if RESET == 0:
            v = tl.where(fires, h - theta, h)
        elif RESET == 1:
            v = tl.where(fires, V_RESET, h)
        else:
            v = h
        at += n


@triton.jit
def _derivative(x, KIND: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == 0:
        k = 1.5707963267948966 * P * x
        return (P / 2) / (1 + k * k)
    elif KIND == 1:
        q = 1 / (1 + tl.exp(-P * x))
        return P * q * (1 - q)
    elif KIND == 2:
        return tl.where(tl.abs(x) < P, 1 / (2 * P), 0.0)
    elif KIND == 3:
        return tl.maximum(P - P * P * tl.abs(x), 0.0)
    else:
        q = 1 + P * tl.abs(x)
        return 1 / (q * q)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    g_s_ptr,
    h_ptr,
    alpha_ptr,
    beta_ptr,
    theta_ptr,
    g_x_ptr,
    g_beta_ptr,
    g_theta_ptr,
    n_steps,
    last,
    n,
    n_alpha,
    n_beta,
    n_theta,
    V_RESET: tl.constexpr,
    RESET: tl.constexpr,
    KIND: tl.constexpr,
    P: tl.constexpr,
    LEARNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    mask = j < n
    alpha = tl.load(alpha_ptr + j % n_alpha, mask=mask, other=0.0)
    beta = tl.load(beta_ptr + j % n_beta, mask=mask, other=0.0)
    theta = tl.load(theta_ptr + j % n_theta, mask=mask, other=0.0)
    g_u = tl.zeros_like(beta)
    g_v = tl.zeros_like(beta)
    g_beta = tl.zeros_like(beta)
    g_theta = tl.zeros_like(beta)
    at = j + last
    for _ in range(n_steps):
        h = tl.load(h_ptr + at, mask=mask, other=0.0)
        fires = h > theta
        fire = tl.load(g_s_ptr + at, mask=mask, other=0.0) * _derivative(h - theta, KIND, P)
        if LEARNS:
            g_theta -= fire
            if RESET == 0:
                g_theta -= tl.where(fires, g_v, 0.0)
        if RESET == 1:
            g_v = tl.where(fires, 0.0, g_v)
        g_h = fire + g_v
        g_u = g_h + alpha * g_u
        tl.store(g_x_ptr + at, g_u, mask=mask)
        if LEARNS:
            v = tl.load(h_ptr + at - n, mask=mask & (at >= n), other=0.0)
            if RESET == 0:
                v = tl.where(v > theta, v - theta, v)
            elif RESET == 1:
                v = tl.where(v > theta, V_RESET, v)
            g_beta += tl.where(at >= n, g_h * v, 0.0)
        g_v = beta * g_h
        at -= n
    if LEARNS:
        tl.store(g_beta_ptr + j, g_beta, mask=mask)
        tl.store(g_theta_ptr + j, g_theta, mask=mask)


def _grid(n: int) -> tuple[int]:
    return (triton.cdiv(n, BLOCK),)


def forward(
    x: Tensor, steps: int, alpha: Tensor, beta: Tensor, theta: Tensor, rule: Rule, save: bool
) -> tuple[Tensor, Tensor]:
    """(spikes, h) [T, N]; h is empty unless `save`."""
    s = torch.empty_like(x)
    h = torch.empty_like(x) if save else x.new_empty(0)
    n_steps, n = x.shape
    params = [p.contiguous() for p in (alpha, beta, theta)]
    with torch.cuda.device_of(x):
        _forward[_grid(n)](
            x,
            s,
            h,
            *params,
            n_steps,
            n,
            *(p.numel() for p in params),
            V_RESET=rule.v_reset,
            RESET=RESETS.index(rule.reset),
            SAVE=save,
            WIDTH=BLOCK,
            enable_fp_fusion=False,  # a fused multiply-add would round, and spike, otherwise
        )
    return s, h


def backward(
    g_s: Tensor, h: Tensor, alpha: Tensor, beta: Tensor, theta: Tensor, rule: Rule, learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(g_x [T, N], g_beta [N], g_theta [N]); the last two are empty unless `learns`."""
    assert isinstance(rule.spike, Surrogate)
    n_steps, n = h.shape
    g_x = torch.empty_like(h)
    g_beta, g_theta = (h.new_zeros(n if learns else 0) for _ in range(2))
    params = [p.contiguous() for p in (alpha, beta, theta)]
    with torch.cuda.device_of(h):
        _backward[_grid(n)](
            g_s,
            h,
            *params,
            g_x,
            g_beta,
            g_theta,
            n_steps,
            (n_steps - 1) * n,
            n,
            *(p.numel() for p in params),
            V_RESET=rule.v_reset,
            RESET=RESETS.index(rule.reset),
            KIND=rule.spike.code,
            P=rule.spike.alpha,
            LEARNS=learns,
            WIDTH=BLOCK,
            enable_fp_fusion=False,
        )
    return g_x, g_beta, g_theta
