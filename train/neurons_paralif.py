"""ParaLIF and its recurrent forms: a LIF without reset, filtered in parallel over time.

    i[n] = alpha i[n-1] + x[n]        v[n] = beta v[n-1] + (1 - beta) i[n]

By Fourier transform, padded against wrapping round, or as the plain recurrence; both are equal.
What turns the membrane into spikes is one of the eleven functions in FIRING.
Source: Yarga and Wood, 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import snntorch
import torch
from torch import Tensor, nn

from ranvier.train.errors import RangeError
from ranvier.train.neurons import SpikeFunction
from ranvier.train.surrogates import surrogate

# Name -> (squashing, rule); rules: gumbel, bernoulli, difference, threshold
FIRING: dict[str, tuple[str, str]] = {
    "gs": ("none", "gumbel"),
    "sb": ("sigmoid", "bernoulli"),
    "trb": ("relu-tanh", "bernoulli"),
    "d": ("none", "difference"),
    "sd": ("sigmoid", "difference"),
    "td": ("tanh", "difference"),
    "trd": ("relu-tanh", "difference"),
    "t": ("none", "threshold"),
    "st": ("sigmoid", "threshold"),
    "tt": ("tanh", "threshold"),
    "trt": ("relu-tanh", "threshold"),
}
_SQUASH: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda u: u,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu-tanh": lambda u: torch.relu(torch.tanh(u)),
}
EVAL_SEED = 0x5EED


def default_threshold(firing: str) -> float:
    """0.1 for differences, 1 for the plain threshold; 0.5 where squashing keeps u below 1."""
    squash, rule = FIRING[firing]
    if rule == "difference":
        return 0.1
    return 1.0 if squash == "none" else 0.5


class _Bernoulli(torch.autograd.Function):
    """A spike where noise < rho; the gradient is passed on times rho, as the authors' code does."""

    @staticmethod
    def forward(ctx: Any, rho: Tensor, noise: Tensor) -> Tensor:
        ctx.save_for_backward(rho)
        return (noise < rho).to(rho.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rho,) = ctx.saved_tensors
        return grads[0] * rho, None


def filter_sequential(
    x: Tensor, alpha: Tensor, beta: Tensor, state: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(v [T, ...], (i, v) after the last step) of x [T, ...] by the recurrence."""
    i, v = (torch.zeros_like(x[0]), torch.zeros_like(x[0])) if state is None else state
    out = []
    for x_t in x:
        i = alpha * i + x_t
        v = beta * v + (1 - beta) * i
        out.append(v)
    return torch.stack(out), (i, v)


def filter_fft(x: Tensor, alpha: Tensor, beta: Tensor, padding: int = 3) -> Tensor:
    """v [T, ...] of x [T, ...] as a product of spectra, zero-padded to `padding` T.

    Input and both kernels are T long, so their convolution is 3 T - 2 long. Padded to 2 T, as
    published, its end wraps round into the first T - 2 steps unless the kernels have died by then.
    """
    n, size = len(x), padding * len(x)
    powers = torch.arange(n, device=x.device, dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))
    synapse = alpha.to(x.dtype) ** powers
    membrane = (1 - beta.to(x.dtype)) * beta.to(x.dtype) ** powers
    spectrum = torch.fft.rfft(synapse, size, dim=0) * torch.fft.rfft(membrane, size, dim=0)
    return torch.fft.irfft(torch.fft.rfft(x, size, dim=0) * spectrum, size, dim=0)[:n]


class LI(snntorch.SpikingNeuron):
    """Leaky integrator: the membrane v itself, no spikes; the readout of ParaLIF networks.

    alpha, beta  decays a step, 0..1; numbers, or tensors that broadcast to a sample
    learn        learn both, stored as logits, so that they stay inside 0..1
    backend      fft or sequential
    """

    multi_step: bool = False

    def __init__(
        self,
        alpha: float | Tensor = 0.5,
        beta: float | Tensor = 0.5,
        *,
        learn: bool = False,
        backend: str = "fft",
        threshold: float | Tensor = 1.0,
        spike_grad: SpikeFunction | None = None,
        learn_threshold: bool = False,
    ) -> None:
        if backend not in ("fft", "sequential"):
            raise RangeError(f"ParaLIF: backend '{backend}' is neither fft nor sequential")
        super().__init__(
            threshold=torch.as_tensor(threshold),
            spike_grad=surrogate("fast_sigmoid", 100.0) if spike_grad is None else spike_grad,
            init_hidden=True,
            reset_mechanism="none",
            learn_threshold=learn_threshold,
        )
        self.backend = backend
        self.learn = learn
        self._put_decay("alpha", alpha)
        self._put_decay("beta", beta)
        self.state: tuple[Tensor, Tensor] | None = None

    def _put_decay(self, name: str, value: float | Tensor) -> None:
        value = torch.as_tensor(value, dtype=torch.get_default_dtype())
        margin = 1e-6 if self.learn else 0.0
        if not bool(((value >= margin) & (value <= 1 - margin)).all()):
            raise RangeError(f"ParaLIF: {name} {value.tolist()} lies outside 0..1")
        if self.learn:
            self.register_parameter(f"{name}_logit", nn.Parameter(torch.logit(value)))
        else:
            self.register_buffer(f"{name}_value", value)

    def decays(self) -> tuple[Tensor, Tensor]:
        """(alpha, beta) now."""
        if self.learn:
            return torch.sigmoid(self.alpha_logit), torch.sigmoid(self.beta_logit)
        return self.alpha_value, self.beta_value

    def integrate(self, x: Tensor) -> Tensor:
        """The membrane [T, ...] from the zero state."""
        if self.backend == "fft":
            return filter_fft(x, *self.decays())
        return filter_sequential(x, *self.decays())[0]

    def integrate_step(self, x: Tensor) -> Tensor:
        """The membrane after one more step."""
        if self.state is not None and self.state[0].shape != x.shape:
            self.state = None
        v, self.state = filter_sequential(x[None], *self.decays(), self.state)
        return v[0]

    def reset_mem(self) -> None:
        """Back to the zero state."""
        self.state = None

    def forward(self, input_: Tensor) -> Tensor:
        """The membrane, shaped as `input_`."""
        return self.integrate(input_) if self.multi_step else self.integrate_step(input_)


class ParaLIF(LI):
    """A leaky integrator and a firing function, one of FIRING.

    threshold  None: default_threshold; learned, kept above zero
    Random functions (gs, sb, trb) draw from torch's generator while training; in eval mode from
    one of their own, reset with the state, so that evaluation repeats itself.
    sd jumps from 0 to about 0.5 at the first step; that spike says nothing, and is the rule's own.
    """

    def __init__(
        self,
        firing: str = "sd",
        alpha: float | Tensor = 0.5,
        beta: float | Tensor = 0.5,
        *,
        threshold: float | None = None,
        learn_threshold: bool = True,
        **options: Any,
    ) -> None:
        if firing not in FIRING:
            raise RangeError(f"ParaLIF: firing '{firing}' is none of {', '.join(FIRING)}")
        start = default_threshold(firing) if threshold is None else threshold
        super().__init__(
            alpha,
            beta,
            threshold=torch.tensor(float(start)),
            learn_threshold=learn_threshold and FIRING[firing][1] in ("difference", "threshold"),
            **options,
        )
        self.firing = firing
        self.squashed: Tensor | None = None
        self._generator: torch.Generator | None = None

    def reset_mem(self) -> None:
        super().reset_mem()
        self.squashed = None
        self._generator = None

    def _noise(self, like: Tensor) -> Tensor:
        if self.training:
            return torch.rand_like(like)
        if self._generator is None:
            self._generator = torch.Generator(like.device).manual_seed(EVAL_SEED)
        return torch.rand(
            like.shape, generator=self._generator, dtype=like.dtype, device=like.device
        )

    def fire_from(self, u: Tensor, before: Tensor | None = None) -> Tensor:
        """Spikes of the membranes u [T, ...]; `before` is the squashed membrane of step -1."""
        squash, rule = FIRING[self.firing]
        u = _SQUASH[squash](u)
        threshold = torch.relu(self.threshold).to(u.dtype)
        if rule == "gumbel":
            noise = self._noise(u).clamp(1e-7, 1 - 1e-7)
            soft = torch.sigmoid(2 * u + torch.logit(noise))
            return (soft > 0.5).to(u.dtype) + soft - soft.detach()
        if rule == "bernoulli":
            return _Bernoulli.apply(u, self._noise(u))
        if rule == "threshold":
            return self.spike_grad(u - threshold)
        first = torch.zeros_like(u[:1]) if before is None else before[None]
        return self.spike_grad(u - torch.cat([first, u[:-1]]) - threshold)

    def _fire_step(self, u: Tensor) -> Tensor:
        spikes = self.fire_from(u[None], self.squashed)[0]
        self.squashed = _SQUASH[FIRING[self.firing][0]](u)
        return spikes

    def forward(self, input_: Tensor) -> Tensor:
        """Spikes, shaped as `input_`."""
        if not self.multi_step:
            if self.state is not None and self.state[0].shape != input_.shape:
                self.reset_mem()
            return self._fire_step(self.integrate_step(input_))
        self._generator = None
        return self.fire_from(self.integrate(input_))

    def extra_repr(self) -> str:
        return f"firing={self.firing}, backend={self.backend}"


class RecurrentParaLIF(ParaLIF):
    """ParaLIF with recurrent weights in one hidden pass, no loop over time.

        u_h = LI(x); h[n] = fire(u_h[n-1]); u = u_h + LI(x + W h + b); s = fire(u)

    features  neurons, the last axis of x
    hidden    "fire", or "relu" for a real-valued h
    """

    def __init__(
        self, features: int, firing: str = "sd", *args: Any, hidden: str = "fire", **options: Any
    ) -> None:
        super().__init__(firing, *args, **options)
        if hidden not in ("fire", "relu"):
            raise RangeError(f"RecurrentParaLIF: hidden '{hidden}' is neither fire nor relu")
        self.hidden = hidden
        self.recurrent = nn.Linear(features, features)
        nn.init.kaiming_uniform_(self.recurrent.weight, nonlinearity="linear")
        nn.init.zeros_(self.recurrent.bias)
        self.second: tuple[Tensor, ...] | None = None

    def reset_mem(self) -> None:
        super().reset_mem()
        self.second = None

    def _hidden(self, u: Tensor, before: Tensor | None = None) -> Tensor:
        return torch.relu(u) if self.hidden == "relu" else self.fire_from(u, before)

    def forward(self, input_: Tensor) -> Tensor:
        """Spikes of x [T, B, features], or of one step [B, features]."""
        if not self.multi_step:
            return self._step(input_)
        self._generator = None
        u_h = self.integrate(input_)
        h = self._hidden(torch.cat([torch.zeros_like(u_h[:1]), u_h[:-1]]))
        return self.fire_from(u_h + self.integrate(input_ + self.recurrent(h)))

    def _step(self, x: Tensor) -> Tensor:
        if self.state is not None and self.state[0].shape != x.shape:
            self.reset_mem()
        squash = _SQUASH[FIRING[self.firing][0]]
        zero = torch.zeros_like(x)
        u_before, squashed_before, i, v = self.second or (zero, None, zero, zero)
        h = self._hidden(u_before[None], squashed_before)[0]
        u_h = self.integrate_step(x)
        u_2, (i, v) = filter_sequential((x + self.recurrent(h))[None], *self.decays(), (i, v))
        self.second = (u_h, squash(u_before), i, v)
        return self._fire_step(u_h + u_2[0])


class RecurrentLIF(snntorch.SpikingNeuron):
    """LIF with recurrent weights: the spikes of a step enter the current of the next.

        i[n] = alpha i[n-1] + x[n] + W s[n-1] + b
        v[n] = beta v[n-1] (1 - s[n-1]) + (1 - beta) i[n]

    features  neurons, the last axis of x. Runs step by step in both modes.
    """

    multi_step: bool = False

    def __init__(
        self,
        features: int,
        alpha: float = 0.5,
        beta: float = 0.5,
        threshold: float = 1.0,
        *,
        spike_grad: SpikeFunction | None = None,
    ) -> None:
        super().__init__(
            threshold=torch.tensor(float(threshold)),
            spike_grad=surrogate("fast_sigmoid", 100.0) if spike_grad is None else spike_grad,
            init_hidden=True,
            reset_mechanism="zero",
        )
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("beta", torch.tensor(float(beta)))
        self.recurrent = nn.Linear(features, features)
        nn.init.kaiming_uniform_(self.recurrent.weight, nonlinearity="linear")
        nn.init.zeros_(self.recurrent.bias)
        self.state: tuple[Tensor, Tensor, Tensor] | None = None

    def reset_mem(self) -> None:
        """Back to the zero state."""
        self.state = None

    def _step(self, x: Tensor) -> Tensor:
        if self.state is None or self.state[0].shape != x.shape:
            zero = torch.zeros_like(x)
            self.state = (zero, zero, zero)
        s, i, v = self.state
        i = self.alpha * i + x + self.recurrent(s)
        v = self.beta * v + (1 - self.beta) * i
        s = self.spike_grad(v - self.threshold).to(x.dtype)
        self.state = (s, i, v * (1 - s.detach()))
        return s

    def forward(self, input_: Tensor) -> Tensor:
        """Spikes of x [T, B, features], or of one step [B, features]."""
        if not self.multi_step:
            return self._step(input_)
        self.reset_mem()
        spikes = torch.stack([self._step(x) for x in input_])
        self.reset_mem()
        return spikes
