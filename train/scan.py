"""The membrane equation over all time steps at once, with a backward written by hand.

    u[t] = alpha u[t-1] + x[t]          synaptic current; alpha = 0 leaves u = x
    h[t] = beta v[t-1] + u[t]           membrane before the spike
    s[t] = h[t] > threshold
    v[t] = h[t] (1 - s[t]) + v_reset s[t]     reset zero
           h[t] - threshold s[t]              reset subtract
           h[t]                               reset none

The reset is detached, that is s[t] is a constant in v[t]. Backends: `numba` (CPU), `triton` (CUDA),
`torch` (anywhere), chosen by `pick_backend`; `loop` is autograd through the plain step loop and
takes any spike function. All give the same spikes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ranvier.train.errors import RangeError
from ranvier.train.surrogates import Surrogate

RESETS = ("subtract", "zero", "none")  # snntorch's order
BACKENDS = ("numba", "triton", "torch", "loop")
_forced: list[str] = []


@dataclass(frozen=True)
class Rule:
    """What a scan does besides its numbers: surrogate, reset (one of RESETS) and v_reset."""

    spike: Callable[[Tensor], Tensor]
    reset: str = "zero"
    v_reset: float = 0.0


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every scan inside the block runs on that backend.

    Raises RangeError if `name` is none of BACKENDS.
    """
    if name not in BACKENDS:
        raise RangeError(f"scan: backend '{name}' is none of {', '.join(BACKENDS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def pick_backend(x: Tensor, spike: Callable[[Tensor], Tensor]) -> str:
    """The fastest backend for that tensor: `loop` for a foreign spike function, else by device."""
    if not isinstance(spike, Surrogate):
        return "loop"
    if _forced:
        return _forced[-1]
    if x.is_cuda:
        return "triton" if _installed("triton") and x.dtype != torch.float64 else "torch"
    return "numba" if x.device.type == "cpu" and _installed("numba") else "torch"


def lif_scan(x: Tensor, alpha: Tensor, beta: Tensor, threshold: Tensor, rule: Rule) -> Tensor:
    """Spikes [T, B, ...] of `x` [T, B, ...] from the zero state, as 0.0 and 1.0 in x's dtype.

    alpha, beta, threshold  scalars, or tensors that broadcast to x[0, 0]
    Half precision is computed in float32, since the membrane accumulates.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    params = [p.to(wide.dtype) for p in (alpha, beta, threshold)]
    backend = pick_backend(x, rule.spike)
    if backend == "loop":
        return step_loop(wide, params[0], params[1], params[2], rule).to(x.dtype)
    back = _channels_last(wide, params)
    if back is not None:
        wide = wide.permute(0, 1, 3, 4, 2)
    flat = [_per_neuron(p, wide.shape[2:]) for p in params]
    # A static image's currents, expanded over time: the compiled loops read one step again and again.
    still = backend == "numba" and wide.stride(0) == 0 and not alpha.requires_grad
    rows = wide[:1] if still else wide
    spikes = _Scan.apply(rows.reshape(len(rows), -1), len(wide), *flat, rule, backend)
    spikes = spikes.view(wide.shape).to(x.dtype)
    return spikes if back is None else spikes.permute(back)


def _channels_last(x: Tensor, params: list[Tensor]) -> tuple[int, ...] | None:
    """The way back from [T, B, H, W, C], where x [T, B, C, H, W] lies so in memory; else None."""
    if x.ndim != 5 or any(p.numel() > 1 for p in params) or x.stride(2) != 1 or x.shape[2] == 1:
        return None
    return (0, 1, 4, 2, 3)


def _per_neuron(p: Tensor, shape: torch.Size) -> Tensor:
    """A parameter as [1] or [neurons of one sample]."""
    return p.reshape(1) if p.numel() == 1 else p.expand(shape).reshape(-1)


def lif_step(
    x: Tensor, u: Tensor, v: Tensor, params: tuple[Tensor, Tensor, Tensor], rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """(spikes, u, v) after one step; the definition that every scan is tested against."""
    alpha, beta, threshold = params
    u = alpha * u + x
    h = beta * v + u
    s = rule.spike(h - threshold).to(h.dtype)  # snntorch gives float32
    return s, u, after_spike(h, s, threshold, rule)


def after_spike(h: Tensor, s: Tensor, threshold: Tensor, rule: Rule) -> Tensor:
    """The membrane after the reset, spikes detached."""
    if rule.reset == "none":
        return h
    s = s.detach()
    if rule.reset == "subtract":
        return h - threshold * s
    return h * (1 - s) + rule.v_reset * s


def step_loop(x: Tensor, alpha: Tensor, beta: Tensor, threshold: Tensor, rule: Rule) -> Tensor:
    """The same scan as a loop over time under autograd."""
    u = v = torch.zeros_like(x[0])
    out = []
    for x_t in x:
        s, u, v = lif_step(x_t, u, v, (alpha, beta, threshold), rule)
        out.append(s)
    return torch.stack(out)


class _Scan(torch.autograd.Function):
    """Keeps one tensor for the backward, x or the membrane h, as its backend asks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        steps: int,
        alpha: Tensor,
        beta: Tensor,
        theta: Tensor,
        rule: Rule,
        backend: str,
    ) -> Tensor:
        x = x.contiguous()
        forward, _ = kernels(backend)
        needs_grad = any(ctx.needs_input_grad)
        spikes, kept = forward(x, steps, alpha, beta, theta, rule, needs_grad)
        if needs_grad:
            inputs = x if ctx.needs_input_grad[2] else x.new_empty(0)
            ctx.save_for_backward(kept, inputs, alpha, beta, theta)
            ctx.rule, ctx.backend = rule, backend
        return spikes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, x, alpha, beta, theta = ctx.saved_tensors
        _, backward = kernels(ctx.backend)
        _, _, for_alpha, for_beta, for_theta, *_ = ctx.needs_input_grad
        learns = for_beta or for_theta
        g_x, g_beta, g_theta = backward(
            grads[0].contiguous(), kept, alpha, beta, theta, ctx.rule, learns
        )
        return (
            g_x,
            None,
            _alpha_gradient(x, g_x, alpha) if for_alpha else None,
            _reduce(g_beta, beta) if for_beta else None,
            _reduce(g_theta, theta) if for_theta else None,
            None,
            None,
        )


def _reduce(per_element: Tensor, p: Tensor) -> Tensor:
    """Sums over the batch (and over all neurons where the parameter is one number)."""
    return per_element.view(-1, p.numel()).sum(0)


def _alpha_gradient(x: Tensor, g_x: Tensor, alpha: Tensor) -> Tensor:
    """Sum over t of g_u[t] u[t-1]; g_u is g_x."""
    decay = alpha.repeat(x.shape[1] // alpha.numel())
    u = torch.zeros_like(x[0])
    total = torch.zeros_like(u)
    for t in range(1, x.shape[0]):
        u = decay * u + x[t - 1]
        total += g_x[t] * u
    return _reduce(total, alpha)


Kernels = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]


def kernels(backend: str) -> Kernels:
    """(forward, backward) of that backend over flattened [T, N] tensors.

    forward takes x [T, N], or [1, N] for the same at each of its steps (numba only), and returns the
    spikes and what its backward wants kept: x (numba) or h (triton, torch).
    """
    if backend == "numba":
        from ranvier.train import scan_numba as compiled
    elif backend == "triton":
        from ranvier.train import scan_triton as compiled  # type: ignore[no-redef]
    else:
        return torch_forward, torch_backward
    return compiled.forward, compiled.backward


def _tile(p: Tensor, n: int) -> Tensor:
    return p if p.numel() == 1 else p.repeat(n // p.numel())


def torch_forward(
    x: Tensor, steps: int, alpha: Tensor, beta: Tensor, theta: Tensor, rule: Rule, save: bool
) -> tuple[Tensor, Tensor]:
    """(spikes, h) [T, N]; h is empty unless `save`."""
    params = tuple(_tile(p, x.shape[1]) for p in (alpha, beta, theta))
    spikes = torch.empty_like(x)
    h = torch.empty_like(x) if save else x.new_empty(0)
    u = v = torch.zeros_like(x[0])
    for t in range(x.shape[0]):
        u = params[0] * u + x[t]
        h_t = params[1] * v + u
        torch.gt(h_t, params[2], out=spikes[t])
        v = after_spike(h_t, spikes[t], params[2], rule)
        if save:
            h[t] = h_t
    return spikes, h


def torch_backward(
    g_s: Tensor, h: Tensor, alpha: Tensor, beta: Tensor, theta: Tensor, rule: Rule, learns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(g_x [T, N], g_beta [N], g_theta [N]); the last two are zero unless `learns`."""
    assert isinstance(rule.spike, Surrogate)
    a, b, th = (_tile(p, h.shape[1]) for p in (alpha, beta, theta))
    g_x = torch.empty_like(h)
    g_u = torch.zeros_like(h[0])
    g_v, g_beta, g_theta = (torch.zeros_like(h[0]) for _ in range(3))
    for t in range(h.shape[0] - 1, -1, -1):
        x = h[t] - th
        s = (x > 0).to(h.dtype)
        fire = g_s[t] * rule.spike.derivative(x)
        g_h = fire + (g_v * (1 - s) if rule.reset == "zero" else g_v)
        g_u = g_h + a * g_u
        g_x[t] = g_u
        if learns:
            g_theta -= fire + (g_v * s if rule.reset == "subtract" else 0)
            if t > 0:
                s = (h[t - 1] > th).to(h.dtype)
                g_beta += g_h * after_spike(h[t - 1], s, th, rule)
        g_v = b * g_h
    return g_x, g_beta, g_theta
