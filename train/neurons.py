"""Spiking neurons: snntorch's, with the textbook reset and a scan over all time steps.

Each is a subclass of snntorch's class of the same model. `neuron(x)` returns spikes. With
`multi_step` False x is one step [B, ...] and the state stays inside, as with snntorch's
`init_hidden=True`; `reset_mem()` clears it. With `multi_step` True x is [T, B, ...], the scan
starts from the zero state and keeps none. Both give the same spikes.

snntorch 1.0 resets otherwise: with `reset_delay=True` "subtract" takes the threshold off one step
late, and with `reset_delay=False` not again while the membrane stays above it. The rule here is
v = h - threshold s, at once, at every spike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import snntorch
import torch
from torch import Tensor, nn

from ranvier.train.errors import RangeError
from ranvier.train.scan import RESETS, Rule, lif_scan, lif_step
from ranvier.train.surrogates import surrogate

SpikeFunction = Callable[[Tensor], Tensor]


def _within(decay: float | Tensor, margin: float = 0.0) -> bool:
    value = torch.as_tensor(decay)
    return bool(((value >= margin) & (value <= 1 - margin)).all())


def _check(beta: float | Tensor, reset: str, v_reset: float) -> None:
    if not _within(beta):
        raise RangeError(f"neuron: decay {beta} lies outside 0..1 (1 never leaks, 0 forgets)")
    if reset not in RESETS:
        raise RangeError(f"neuron: reset_mechanism '{reset}' is none of {', '.join(RESETS)}")
    if v_reset != 0 and reset != "zero":
        raise RangeError(
            f"neuron: v_reset {v_reset} with reset_mechanism '{reset}'; only 'zero' uses it"
        )


def _as_tensor(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value))


def _state(kept: Tensor, x: Tensor) -> Tensor:
    """The kept state, or zeros where it is of another shape, dtype or device."""
    fits = kept.shape == x.shape and kept.dtype == x.dtype and kept.device == x.device
    return kept if fits else torch.zeros_like(x)


class LIF(snntorch.Leaky):
    """Leaky integrate-and-fire: h = beta v + x, a spike where h > threshold, then the reset.

    beta             membrane decay a step, 0..1: a number, or a tensor that broadcasts to a sample
    threshold        membrane above which the neuron fires, strictly
    spike_grad       surrogate; None is ATan with alpha 2
    reset_mechanism  "zero": v = v_reset; "subtract": v = h - threshold; "none": v = h
    decay_input      h = beta v + (1 - beta) x, so that a constant input x settles at x
    v_reset          membrane after a spike with "zero"; the leak still pulls towards 0
    Raises RangeError for a decay outside 0..1, an unknown reset, a v_reset that is never used.
    """

    multi_step: bool = False
    mem: Tensor

    def __init__(
        self,
        beta: float | Tensor = 0.5,
        threshold: float | Tensor = 1.0,
        *,
        spike_grad: SpikeFunction | None = None,
        reset_mechanism: str = "zero",
        decay_input: bool = False,
        v_reset: float = 0.0,
        learn_beta: bool = False,
        learn_threshold: bool = False,
    ) -> None:
        _check(beta, reset_mechanism, v_reset)
        super().__init__(
            beta=_as_tensor(beta),
            threshold=_as_tensor(threshold),
            spike_grad=surrogate() if spike_grad is None else spike_grad,
            init_hidden=True,
            learn_beta=learn_beta,
            learn_threshold=learn_threshold,
            reset_mechanism=reset_mechanism,
            reset_delay=False,
        )
        self.decay_input = bool(decay_input)
        self.v_reset = float(v_reset)

    @property
    def rule(self) -> Rule:
        """Surrogate and reset, as the scan takes them."""
        return Rule(self.spike_grad, self.reset_mechanism, self.v_reset)

    def _decays(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha = torch.zeros((), dtype=x.dtype, device=x.device)
        return alpha, self.beta.clamp(0, 1), self.threshold

    def _current(self, x: Tensor) -> Tensor:
        return (1 - self.beta.clamp(0, 1)) * x if self.decay_input else x

    def reset_mem(self) -> Tensor:
        """Clears the state and frees it: snntorch holds on to every neuron ever made."""
        self.mem = self.mem.detach().new_zeros(0)
        return self.mem

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        """Spikes, shaped as `input_`; with `mem` given, (spikes, mem) of one step as snntorch."""
        x = self._current(input_)
        if self.multi_step and mem is None:
            return lif_scan(x, *self._decays(x), self.rule)
        v = _state(self.mem if mem is None else mem, x)
        spikes, _, v = lif_step(x, torch.zeros_like(x), v, self._decays(x), self.rule)
        if mem is not None:
            return spikes, v
        self.mem = v
        return spikes

    def extra_repr(self) -> str:
        form = "decay_input, " if self.decay_input else ""
        return f"{form}reset={self.reset_mechanism}, v_reset={self.v_reset}"


class IF(LIF):
    """Integrate-and-fire: a LIF that never leaks, h = v + x. Arguments as LIF's, less beta."""

    def __init__(self, threshold: float | Tensor = 1.0, **options: Any) -> None:
        super().__init__(1.0, threshold, **options)


class PLIF(LIF):
    """A LIF whose decay is learned: beta = sigmoid(w), one w a layer (or one a neuron).

    `beta` reads the effective value. Arguments as LIF's; beta must lie strictly inside 0..1.
    Source: Fang et al., "Incorporating learnable membrane time constant", ICCV 2021.
    """

    def _beta_buffer(self, beta: Tensor, learn_beta: bool) -> None:
        if not _within(beta, 1e-6):
            raise RangeError(f"PLIF: beta {beta} must lie strictly between 0 and 1 to be learned")
        self.w = nn.Parameter(torch.logit(beta))

    @property
    def beta(self) -> Tensor:
        """The decay now, 0..1."""
        return torch.sigmoid(self.w)


class CUBA(snntorch.Synaptic):
    """Current-based LIF: u = alpha u + x, h = beta v + u, a spike where h > threshold.

    alpha  decay of the synaptic current a step, 0..1; the reset leaves the current alone
    Other arguments as LIF's; with decay_input the current enters scaled by 1 - beta.
    """

    multi_step: bool = False
    mem: Tensor

    def __init__(
        self,
        alpha: float | Tensor = 0.5,
        beta: float | Tensor = 0.5,
        threshold: float | Tensor = 1.0,
        *,
        spike_grad: SpikeFunction | None = None,
        reset_mechanism: str = "zero",
        decay_input: bool = False,
        v_reset: float = 0.0,
        learn_alpha: bool = False,
        learn_beta: bool = False,
        learn_threshold: bool = False,
    ) -> None:
        _check(beta, reset_mechanism, v_reset)
        _check(alpha, reset_mechanism, v_reset)
        super().__init__(
            alpha=_as_tensor(alpha),
            beta=_as_tensor(beta),
            threshold=_as_tensor(threshold),
            spike_grad=surrogate() if spike_grad is None else spike_grad,
            init_hidden=True,
            learn_alpha=learn_alpha,
            learn_beta=learn_beta,
            learn_threshold=learn_threshold,
            reset_mechanism=reset_mechanism,
            reset_delay=False,
        )
        self.decay_input = bool(decay_input)
        self.v_reset = float(v_reset)

    @property
    def rule(self) -> Rule:
        """Surrogate and reset, as the scan takes them."""
        return Rule(self.spike_grad, self.reset_mechanism, self.v_reset)

    def reset_mem(self) -> tuple[Tensor, Tensor]:
        """Clears the states and frees them."""
        self.syn = self.mem = self.mem.detach().new_zeros(0)
        return self.syn, self.mem

    def forward(self, input_: Tensor, syn: Tensor | None = None, mem: Tensor | None = None) -> Any:
        """Spikes; with `syn` and `mem` given, (spikes, syn, mem) of one step, as snntorch."""
        params = (self.alpha.clamp(0, 1), self.beta.clamp(0, 1), self.threshold)
        x = (1 - params[1]) * input_ if self.decay_input else input_
        if self.multi_step and mem is None:
            return lif_scan(x, *params, self.rule)
        u = _state(self.syn if syn is None else syn, x)
        v = _state(self.mem if mem is None else mem, x)
        spikes, u, v = lif_step(x, u, v, params, self.rule)
        if mem is not None:
            return spikes, u, v
        self.syn, self.mem = u, v
        return spikes

    def extra_repr(self) -> str:
        form = "decay_input, " if self.decay_input else ""
        return f"{form}reset={self.reset_mechanism}, v_reset={self.v_reset}"
