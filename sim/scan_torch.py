"""The integer neuron over all steps in plain torch, for the GPU; the same as `scan_kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ranvier.sim.layers import Driven
from ranvier.sim.plan import RESETS, TIMINGS, CellPlan

V_MAX = 2**23 - 1


def decay(x: Tensor, k: Tensor) -> Tensor:
    """sign(x) * floor(|x| * k / 4096), without leaving x's type: 12 bits at a time."""
    low = (x & 4095) * k + (x < 0) * 4095
    return (x >> 12) * k + (low >> 12)


def fold(u: Tensor) -> Tensor:
    u = torch.where(u > 2**23, u - 2**24, u)
    return torch.where(u <= -(2**23), u + 2**24, u)


def scan(
    cell: CellPlan, params: tuple[Tensor, ...], total: Tensor, steps: int, state: Any, record: bool
) -> Driven:
    """See `scan_kernels.scan`; total `[1 or steps, batch, n]`."""
    k_u, k_v, theta, bias, jump = params
    dtype = torch.int64 if cell.wide else torch.int32
    reset, timing = RESETS[cell.reset], TIMINGS[cell.timing]
    u, v = (
        state if state is not None else (torch.zeros_like(total[0], dtype=dtype) for _ in range(2))
    )
    sent = torch.empty((steps, *total.shape[1:]), dtype=torch.uint8, device=total.device)
    us, vs = [], []
    for t in range(steps):
        a = total[t if len(total) > 1 else 0].to(dtype)
        a = a.to(torch.int32).to(dtype) * 64
        a = a.to(torch.int32).to(dtype) if cell.wide else a
        u = a + decay(u, k_u) if cell.memory else a
        u = fold(u.to(torch.int32).to(dtype) if cell.wide else u)
        late = v > theta
        if reset == "zero" and timing == "delayed":
            v = torch.where(late, cell.v_reset, v)
        h = decay(v, k_v) + u + bias
        if reset == "subtract" and timing != "immediate":
            h = h - late * jump
        if reset == "zero" and timing == "discard":
            h = torch.where(late, cell.v_reset, h)
        h = h.clamp(-V_MAX, V_MAX)
        fired = h > theta
        sent[t] = fired
        v = _after(cell, h, fired, late, jump)
        if record:
            us.append(u)
            vs.append(v)
    if record:
        return Driven(sent, torch.stack(us), torch.stack(vs), (u, v))
    return Driven(sent, state=(u, v))


def _after(cell: CellPlan, h: Tensor, fired: Tensor, late: Tensor, jump: Tensor) -> Tensor:
    reset, timing = RESETS[cell.reset], TIMINGS[cell.timing]
    if reset == "none" or timing in ("delayed", "discard"):
        return h
    if reset == "zero":
        return torch.where(fired, cell.v_reset, h)
    back = fired * jump
    if timing == "carry":
        back = back - late * jump
    return (h - back).clamp(-V_MAX, V_MAX)
