"""Neurons without a loop over time: the membrane of every step is a matrix times the inputs.

PSN, masked and sliding PSN (Fang et al., NeurIPS 2023): H = W X, a spike where H + b > 0.
PSU, IPSU, RPSU (Li et al., IJCNN 2024): V = A X - B S', with S' a guess of the spikes.

All subclass snntorch's SpikingNeuron and follow the two modes of `neurons.py`. Where the matrix
looks at the past alone, the neuron also runs step by step, and equals its parallel form: it keeps
its past inputs and computes the newest row. PSN sees the future and refuses.
"""

from __future__ import annotations

import math
from typing import Any

import snntorch
import torch
from torch import Tensor, nn

from ranvier.train.errors import RangeError, ShapeError, UnsupportedError
from ranvier.train.neurons import SpikeFunction
from ranvier.train.surrogates import surrogate


class ParallelNeuron(snntorch.SpikingNeuron):
    """Base: `parallel(x)` gives the spikes [T, B, ...] of x [T, B, ...].

    causal  whether step t needs nothing later than t
    window  how many inputs back a step looks; None: to the first
    """

    multi_step: bool = False
    causal: bool = True
    window: int | None = None

    def __init__(
        self, threshold: float | Tensor = 1.0, spike_grad: SpikeFunction | None = None
    ) -> None:
        super().__init__(
            threshold=torch.as_tensor(threshold),
            spike_grad=surrogate() if spike_grad is None else spike_grad,
            init_hidden=True,
            reset_mechanism="none",
        )
        self.past: list[Tensor] = []

    def parallel(self, x: Tensor) -> Tensor:
        """Spikes of all steps at once."""
        raise NotImplementedError

    def reset_mem(self) -> None:
        """Forgets the inputs kept for step-by-step use."""
        self.past = []

    def forward(self, input_: Tensor) -> Tensor:
        """Spikes, shaped as `input_`. Raises UnsupportedError step by step where not causal."""
        if self.multi_step:
            return self.parallel(input_)
        if not self.causal:
            raise UnsupportedError(
                f"{type(self).__name__}: a step depends on later inputs, so it cannot run step by"
                " step. Give it the whole sequence, or use masked or sliding PSN."
            )
        if self.past and self.past[-1].shape != input_.shape:
            self.past = []
        self.past.append(input_)
        if self.window is not None:
            self.past = self.past[-self.window :]
        return self.parallel(torch.stack(self.past))[-1]


def _over_time(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [T, T] times x [T, ...]."""
    return (matrix.to(x.dtype) @ x.flatten(1)).view(x.shape)


def _per_step(b: Tensor, x: Tensor) -> Tensor:
    """b [T] shaped to broadcast over x [T, ...]."""
    return b[: len(x)].to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def decay_matrix(beta: float | Tensor, steps: int, like: Tensor) -> Tensor:
    """Lower triangular [steps, steps]: beta^(i - j) for i >= j."""
    i = torch.arange(steps, device=like.device)
    gap = (i[:, None] - i[None, :]).to(like.dtype)
    base = torch.as_tensor(beta, dtype=like.dtype, device=like.device)
    return torch.where(gap >= 0, base ** gap.clamp(min=0), torch.zeros_like(gap))


class PSN(ParallelNeuron):
    """Parallel spiking neuron: H = W X, S = H + bias > 0; W and bias learned, one a layer.

    steps  T, to which the neuron is built
    weight [T, T] starts Kaiming-uniform, bias [T] at -1: a threshold of 1. `threshold` reads -bias.
    """

    causal = False

    def __init__(self, steps: int, *, spike_grad: SpikeFunction | None = None) -> None:
        super().__init__(spike_grad=spike_grad)
        self.steps = steps
        self.weight = nn.Parameter(torch.empty(steps, steps))
        self.bias = nn.Parameter(torch.full((steps,), -1.0))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def _threshold_buffer(self, threshold: Tensor, learn_threshold: bool) -> None:
        """The threshold is -bias; snntorch keeps none."""

    @property
    def threshold(self) -> Tensor:
        """What the membrane must exceed, per step."""
        return -self.bias

    def matrix(self) -> Tensor:
        """The matrix over time now in use."""
        return self.weight

    def _fits(self, x: Tensor) -> bool:
        return len(x) == self.steps

    def parallel(self, x: Tensor) -> Tensor:
        n = len(x)
        if not self._fits(x):
            raise ShapeError(
                f"{type(self).__name__}: {n} steps came to a neuron built for {self.steps};"
                " build the network with that many steps, or use sliding PSN"
            )
        h = _over_time(self.matrix()[:n, :n], x) + _per_step(self.bias, x)
        return self.spike_grad(h)

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


class MaskedPSN(PSN):
    """PSN that sees the last `order` inputs alone, once its mask has closed.

    H = (W * (lam M + 1 - lam)) X, M[i, j] = 1 for j <= i <= j + order - 1. While training `lam`
    grows from 0 to 1 (`set_mask`); in eval mode it counts as 1: the neuron is causal only then.
    """

    causal = True

    def __init__(
        self, steps: int, order: int, *, lam: float = 1.0, spike_grad: SpikeFunction | None = None
    ) -> None:
        if order < 1:
            raise RangeError(f"MaskedPSN: order is {order}; a step needs at least its own input")
        super().__init__(steps, spike_grad=spike_grad)
        self.order = order
        self.register_buffer("lam", torch.tensor(float(lam)))
        i = torch.arange(steps)
        gap = i[:, None] - i[None, :]
        mask = ((gap >= 0) & (gap < order)).float()
        self.register_buffer("mask", mask, persistent=False)

    def matrix(self) -> Tensor:
        lam = self.lam if self.training and self.multi_step else torch.ones_like(self.lam)
        return self.weight * (lam * self.mask + (1 - lam))

    def _fits(self, x: Tensor) -> bool:
        return len(x) <= self.steps if not self.multi_step else len(x) == self.steps

    def extra_repr(self) -> str:
        return f"steps={self.steps}, order={self.order}"


def set_mask(net: nn.Module, epoch: int, epochs: int) -> float:
    """Sets and returns lam of every masked PSN: min(8 epoch / (epochs - 1), 1), epoch from 0.

    The mask is closed after an eighth of the training. Source: the authors' code.
    """
    lam = 1.0 if epochs <= 1 else min(8 * epoch / (epochs - 1), 1.0)
    for module in net.modules():
        if isinstance(module, MaskedPSN):
            module.lam.fill_(lam)
    return lam


class SlidingPSN(ParallelNeuron):
    """H[t] = sum_i weight[i] X[t - order + 1 + i], the same taps at every step; any length.

    order     inputs in the window; weight [order], the newest input's last
    exp_init  weight starts at 1 for the newest and halves from tap to tap; else Kaiming-uniform
    backend   gemm: a banded matrix; conv: a causal convolution
    """

    def __init__(
        self,
        order: int,
        *,
        exp_init: bool = True,
        backend: str = "gemm",
        spike_grad: SpikeFunction | None = None,
    ) -> None:
        if order < 1 or backend not in ("gemm", "conv"):
            raise RangeError(
                f"SlidingPSN: order {order}, backend '{backend}'; order is 1 or more, the backend"
                " gemm or conv"
            )
        super().__init__(spike_grad=spike_grad)
        self.window = self.order = order
        self.backend = backend
        self.weight = nn.Parameter(2.0 ** torch.arange(1 - order, 1, dtype=torch.float32))
        self.bias = nn.Parameter(torch.tensor(-1.0))
        if not exp_init:
            nn.init.kaiming_uniform_(self.weight.view(1, -1), a=math.sqrt(5))

    def _threshold_buffer(self, threshold: Tensor, learn_threshold: bool) -> None:
        """The threshold is -bias; snntorch keeps none."""

    @property
    def threshold(self) -> Tensor:
        """What the membrane must exceed."""
        return -self.bias

    def matrix(self, steps: int) -> Tensor:
        """The banded matrix [steps, steps] that the taps make."""
        i = torch.arange(steps, device=self.weight.device)
        tap = self.order - 1 - (i[:, None] - i[None, :])
        seen = (tap >= 0) & (tap < self.order)
        return torch.where(
            seen, self.weight[tap.clamp(0, self.order - 1)], self.weight.new_zeros(())
        )

    def _conv(self, x: Tensor) -> Tensor:
        rows = x.flatten(1).t().unsqueeze(1)  # [neurons, 1, T]
        padded = nn.functional.pad(rows, (self.order - 1, 0))
        out = nn.functional.conv1d(padded, self.weight.to(x.dtype).view(1, 1, -1))
        return out.squeeze(1).t().reshape(x.shape)

    def parallel(self, x: Tensor) -> Tensor:
        h = self._conv(x) if self.backend == "conv" else _over_time(self.matrix(len(x)), x)
        return self.spike_grad(h + self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"order={self.order}, backend={self.backend}"


class PSU(ParallelNeuron):
    """Parallel spiking unit: V = A X - B sigmoid(A X), a spike where V > threshold.

    A[i, j] = (1 - beta) beta^(i - j) for i >= j, the membrane of a LIF without reset;
    B[i, j] = threshold beta^(i - j) for i > j, what its spikes would have taken off.
    The sigmoid guesses the spikes; it is 0.5 for a silent neuron, which drifts below zero.
    """

    def __init__(
        self,
        beta: float = 0.5,
        threshold: float | Tensor = 1.0,
        *,
        spike_grad: SpikeFunction | None = None,
    ) -> None:
        if not 0 <= beta < 1:
            raise RangeError(f"{type(self).__name__}: decay {beta} must lie in 0 <= beta < 1")
        super().__init__(threshold, spike_grad)
        self.register_buffer("beta", torch.tensor(float(beta)))

    def charge_matrix(self, steps: int, like: Tensor) -> Tensor:
        """A, [steps, steps]."""
        return (1 - self.beta.to(like.dtype)) * decay_matrix(self.beta, steps, like)

    def reset_matrix(self, steps: int, like: Tensor) -> Tensor:
        """B, [steps, steps], zero on the diagonal."""
        lower = torch.tril(decay_matrix(self.beta, steps, like), -1)
        return self.threshold.to(like.dtype) * lower

    def charge(self, x: Tensor) -> Tensor:
        """The membrane before the guessed resets."""
        return _over_time(self.charge_matrix(len(x), x), x)

    def guess(self, x: Tensor, charged: Tensor) -> Tensor:
        """The probability of a spike at each step."""
        return torch.sigmoid(charged)

    def membrane(self, x: Tensor) -> Tensor:
        """V of every step."""
        charged = self.charge(x)
        return charged - _over_time(self.reset_matrix(len(x), x), self.guess(x, charged))

    def parallel(self, x: Tensor) -> Tensor:
        return self.spike_grad(self.membrane(x) - self.threshold.to(x.dtype))


class _LearnedMatrix(PSU):
    """A PSU with a learned causal matrix over time, tril(weight) X + bias; T^2 + T numbers."""

    def __init__(
        self,
        steps: int,
        beta: float = 0.5,
        threshold: float | Tensor = 1.0,
        *,
        spike_grad: SpikeFunction | None = None,
    ) -> None:
        super().__init__(beta, threshold, spike_grad=spike_grad)
        self.steps = steps
        self.weight = nn.Parameter(torch.empty(steps, steps))
        self.bias = nn.Parameter(torch.zeros(steps))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def learned(self, x: Tensor) -> Tensor:
        """tril(weight) x + bias over the first len(x) steps."""
        n = len(x)
        if n > self.steps:
            raise ShapeError(
                f"{type(self).__name__}: {n} steps came to a neuron built for {self.steps}"
            )
        return _over_time(torch.tril(self.weight)[:n, :n], x) + _per_step(self.bias, x)

    def extra_repr(self) -> str:
        return f"steps={self.steps}"


class IPSU(_LearnedMatrix):
    """Input-aware PSU: the charge is learned, V = A_I X - B sigmoid(A_I X).

    raw_reset  subtract B X, the raw input, as the released code does, not the guessed spikes
    """

    def __init__(self, steps: int, *args: Any, raw_reset: bool = False, **options: Any) -> None:
        super().__init__(steps, *args, **options)
        self.raw_reset = raw_reset

    def charge(self, x: Tensor) -> Tensor:
        return self.learned(x)

    def guess(self, x: Tensor, charged: Tensor) -> Tensor:
        return x if self.raw_reset else torch.sigmoid(charged)


class RPSU(_LearnedMatrix):
    """Reset-aware PSU: the guess is learned, V = A X - B sigmoid(A_R X)."""

    def guess(self, x: Tensor, charged: Tensor) -> Tensor:
        return torch.sigmoid(self.learned(x))
