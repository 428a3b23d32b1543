"""Optimizers, and the learning rate as a function of the step: a schedule has no state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ranvier.train.errors import RangeError, UnsupportedError

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "step", "constant", "onecycle")


@dataclass(frozen=True)
class Schedule:
    """Learning rate at each optimizer step.

    kind        cosine: from lr to 0; step: lr * gamma after every `step_epochs`; constant;
                onecycle: up for 30 %, then to 0
    lr          peak learning rate
    n_steps     optimizer steps of the whole training
    n_warmup    first steps, over which lr rises linearly from lr / n_warmup
    n_per_step  optimizer steps between two drops of `step`
    gamma       factor of a drop
    """

    kind: str
    lr: float
    n_steps: int
    n_warmup: int = 0
    n_per_step: int = 1
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UnsupportedError(
                f"train: there is no schedule '{self.kind}'; known: {', '.join(SCHEDULES)}"
            )
        if not self.lr > 0:
            raise RangeError(f"train: lr is {self.lr}; give a positive learning rate")

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step 0, 1, ...

        >>> s = Schedule("cosine", 0.1, n_steps=4, n_warmup=2)
        >>> [round(s(i), 4) for i in range(4)]
        [0.05, 0.1, 0.1, 0.05]
        """
        if step < self.n_warmup:
            return self.lr * (step + 1) / self.n_warmup
        done = (step - self.n_warmup) / max(self.n_steps - self.n_warmup, 1)
        match self.kind:
            case "cosine":
                return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
            case "step":
                return self.lr * self.gamma ** (step // max(self.n_per_step, 1))
            case "onecycle":
                return self.lr * _one_cycle(done)
            case _:
                return self.lr


def _one_cycle(done: float) -> float:
    """Cosine rise from 1/25 to 1 over the first 30 %, then cosine fall to 0 (Smith, Topin 2018)."""
    if done < 0.3:
        return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * done / 0.3))
    return 0.5 * (1 + math.cos(math.pi * min((done - 0.3) / 0.7, 1.0)))


def make_optimizer(
    net: nn.Module,
    name: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Optimizer over net's parameters; decay spares biases, norms and taus.

    Raises UnsupportedError for an unknown name, RangeError where the network has nothing to train.
    """
    groups = _groups(net.parameters(), weight_decay)
    if not groups:
        raise RangeError(f"train: {type(net).__name__} has no trainable parameters")
    match name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr)
        case "adam":
            return torch.optim.Adam(groups, lr=lr)
        case "sgd":
            return torch.optim.SGD(groups, lr=lr, momentum=momentum)
        case _:
            raise UnsupportedError(
                f"train: there is no optimizer '{name}'; known: {', '.join(OPTIMIZERS)}"
            )


def _groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    trainable = [p for p in parameters if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1]
    spared = [p for p in trainable if p.ndim <= 1]
    pairs = ((decayed, weight_decay), (spared, 0.0))
    return [{"params": group, "weight_decay": decay} for group, decay in pairs if group]


class Ema:
    """Moving average of a network's state: average <- decay * average + (1 - decay) * value.

    Whole-number buffers (batch counters) are copied. Swap it in for evaluation with `swap`.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise RangeError(f"train: ema is {decay}; give a decay between 0 and 1, such as 0.999")
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - self.decay)
            else:
                self.state[name].copy_(value)

    @torch.no_grad()
    def swap(self, net: nn.Module) -> None:
        """Exchanges the average and the network's state; a second call puts both back."""
        for name, value in net.state_dict().items():
            mine = self.state[name].clone()
            self.state[name].copy_(value)
            value.copy_(mine)
