"""Losses of a spiking classifier, by name.

Each takes the network's output and the labels: output [B, n] (already a mean over time) or [T, B,
n] (every step's
logits), y int64 [B], [T, B] for a label a step, or probabilities [B, n] from mixup. Each returns
one scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ranvier.train.data import IGNORE
from ranvier.train.errors import ShapeError, UnsupportedError


@dataclass(frozen=True)
class Loss:
    """A loss by name, with what it needs from the network.

    function  (output, y, smoothing) -> scalar
    per_step  wants [T, B, n], not the mean over time
    scale     factor on the output before the loss: a mean of rare spikes gives small logits, whose
              softmax hardly differs from a uniform one; the network itself is left as it is
    """

    name: str
    function: Callable[[Tensor, Tensor, float], Tensor]
    per_step: bool = False
    smoothing: float = 0.0
    scale: float = 1.0

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return self.function(output * self.scale, y, self.smoothing)


def mean_cross_entropy(output: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the mean over time of what the network reads out, membranes or spikes."""
    return _cross_entropy(output.mean(0) if output.ndim == 3 else output, y, smoothing)


def tet(output: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over time of the cross-entropy of every step, so that no step leans on the others.

    Source: Deng et al., ICLR 2022.
    """
    n_steps = _require_steps("tet", output)
    labels = y.expand(n_steps, *y.shape).flatten(0, 1)
    return _cross_entropy(output.flatten(0, 1), labels, smoothing)


def per_step(output: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of every step against its own label, y [T, B], where it is not IGNORE."""
    _require_steps("per-step", output)
    if y.shape != output.shape[:2]:
        raise ShapeError(
            f"train: loss 'per-step' wants one label a step, {tuple(output.shape[:2])}, found"
            f" {tuple(y.shape)}; "
            "use 'ce' or 'tet' where a sample has one label"
        )
    return _cross_entropy(output.flatten(0, 1), y.flatten(), smoothing)


def mse_one_hot(output: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean square error of the mean over time against the one-hot label."""
    mean = output.mean(0) if output.ndim == 3 else output
    target = _probabilities(y, mean.shape[-1]).to(mean.dtype)
    return F.mse_loss(mean, target * (1 - smoothing) + smoothing / mean.shape[-1])


def rate_penalty(rates: list[Tensor], target: float) -> Tensor:
    """Mean over layers of max(0, rate - target)^2: silent enough costs nothing.

    rates   spikes per neuron and step of each layer, 0..1
    target  allowed rate
    """
    if not rates:
        return torch.zeros(())
    return torch.stack([F.relu(rate - target) ** 2 for rate in rates]).mean()


LOSSES: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], bool]] = {
    "ce": (mean_cross_entropy, False),
    "mse": (mse_one_hot, False),
    "tet": (tet, True),
    "per-step": (per_step, True),
}


def make_loss(name: str, smoothing: float = 0.0, scale: float = 1.0) -> Loss:
    """The loss `name`. Raises UnsupportedError for an unknown one."""
    if name not in LOSSES:
        raise UnsupportedError(f"train: there is no loss '{name}'; known: {', '.join(LOSSES)}")
    function, wants_steps = LOSSES[name]
    return Loss(name, function, wants_steps, smoothing, scale)


def _cross_entropy(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    if y.is_floating_point():
        return F.cross_entropy(logits, y, label_smoothing=smoothing)
    return F.cross_entropy(logits, y, label_smoothing=smoothing, ignore_index=IGNORE)


def _probabilities(y: Tensor, n: int) -> Tensor:
    return y if y.is_floating_point() else F.one_hot(y, n)


def _require_steps(name: str, output: Tensor) -> int:
    if output.ndim != 3:
        raise ShapeError(
            f"train: loss '{name}' needs the output of every step [T, B, n], found"
            f" {tuple(output.shape)}; the network "
            "gives only its mean: use loss='ce', or a network with sequence(x)"
        )
    return output.shape[0]
