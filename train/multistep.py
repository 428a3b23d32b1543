"""One network, two ways to run: all time steps at once, or one by one.

Multi-step tensors are [T, B, ...]. Stateless layers see time folded into the batch, [T B, ...];
neurons see time and scan over it. Single-step tensors are [B, ...] and everything is called as is.
"""

from __future__ import annotations

from typing import Any

import snntorch
from torch import Tensor, nn


class Stepped(nn.Module):
    """Base of every module that holds neurons: knows by `multi_step` whether tensors carry time."""

    multi_step: bool = False

    def seq(self, x: Tensor, *modules: nn.Module | None) -> Tensor:
        """x through the modules in turn, each as its kind wants it; None is skipped."""
        for module in modules:
            if module is not None:
                x = seq(module, x) if self.multi_step else module(x)
        return x


def keeps_time(module: nn.Module) -> bool:
    """True for neurons and for modules made of them, which take [T, B, ...] themselves."""
    return isinstance(module, (Stepped, snntorch.SpikingNeuron))


def seq(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) for x [T, B, ...]: time folded into the batch around a stateless module."""
    if keeps_time(module):
        return module(x)
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def set_multi_step(net: nn.Module, multi_step: bool) -> None:
    """Sets the mode of the module and of all inside it, and clears every state."""
    for module in net.modules():
        if keeps_time(module):
            module.multi_step = multi_step  # type: ignore[assignment]
    reset_states(net)


def reset_states(net: nn.Module) -> None:
    """Clears the state of every neuron inside, at any depth (snntorch's goes one level deep)."""
    for module in net.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            reset: Any = getattr(module, "reset_mem", None)
            if reset is not None:
                reset()
