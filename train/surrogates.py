"""Surrogate gradients: what stands in for the derivative of the step when a network is trained.

The spike is `x > 0` with x = membrane - threshold, strictly; the derivative peaks at x = 0.
Source: models.md's formulas are those of the papers named at each function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ranvier.train.errors import RangeError

# The order is the code by which the compiled kernels know a surrogate.
KINDS = ("atan", "sigmoid", "rectangle", "triangle", "fast_sigmoid")
DEFAULT_ALPHA = {
    "atan": 2.0,  # SEW, PSN, PSU
    "sigmoid": 4.0,  # Spikformer
    "rectangle": 0.5,  # MS-ResNet: width 1, height 1
    "triangle": 1.0,
    "fast_sigmoid": 25.0,  # snntorch; ParaLIF takes 100
}


@dataclass(frozen=True)
class Surrogate:
    """A spike function with a stand-in derivative; fits snntorch's `spike_grad`.

    kind   one of KINDS
    alpha  its parameter: slope of atan, sigmoid, fast_sigmoid; half width of rectangle; 1 / half
           width of triangle; > 0
    Raises RangeError for another kind or an alpha that is not positive.
    """

    kind: str
    alpha: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RangeError(f"surrogate: '{self.kind}' is none of {', '.join(KINDS)}")
        if not self.alpha > 0:
            raise RangeError(f"surrogate {self.kind}: alpha is {self.alpha}; it must be positive")

    @property
    def code(self) -> int:
        """The number of the kind in KINDS."""
        return KINDS.index(self.kind)

    def derivative(self, x: Tensor) -> Tensor:
        """The stand-in for dS/dx at x = membrane - threshold; same shape."""
        return _DERIVATIVE[self.kind](x, self.alpha)

    def __call__(self, x: Tensor) -> Tensor:
        return _Spike.apply(x, self)


class _Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate = surrogate
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * ctx.surrogate.derivative(x), None


def _sigmoid(x: Tensor, a: float) -> Tensor:
    s = torch.sigmoid(a * x)
    return a * s * (1 - s)


_DERIVATIVE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "atan": lambda x, a: (a / 2) / (1 + (math.pi / 2 * a * x) ** 2),
    "sigmoid": _sigmoid,
    "rectangle": lambda x, a: (x.abs() < a).to(x.dtype) / (2 * a),
    "triangle": lambda x, a: (a - a * a * x.abs()).clamp(min=0),
    "fast_sigmoid": lambda x, a: 1 / (1 + a * x.abs()) ** 2,
}


def surrogate(kind: str = "atan", alpha: float | None = None) -> Surrogate:
    """The surrogate of that kind; alpha None takes the published default of DEFAULT_ALPHA.

    Raises RangeError for an unknown kind.
    """
    return Surrogate(kind, DEFAULT_ALPHA.get(kind, 1.0) if alpha is None else float(alpha))
