"""Neuron models: one frozen class a model, in discrete time, on numpy arrays or torch tensors alike.

All parameters are floats or arrays that broadcast to the population's shape without time and batch
(per channel of a convolution: `[C, 1, 1]`). One call of `step` is one time step of length `dt`; `beta`
and `alpha` are decays a step, `1 - dt/tau` or `exp(-dt/tau)` as `decay` says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

import numpy as np

from ranvier.train.errors import RangeError

Array: TypeAlias = Any  # numpy array or torch tensor
Param: TypeAlias = "float | np.ndarray"
State: TypeAlias = "dict[str, Array]"
Reset: TypeAlias = Literal["zero", "subtract", "none"]
Timing: TypeAlias = Literal["immediate", "delayed", "carry", "discard"]
Decay: TypeAlias = Literal["euler", "exponential", "given"]

RESETS = ("zero", "subtract", "none")
TIMINGS = ("immediate", "delayed", "carry", "discard")


def like(param: Param, x: Array) -> Array:
    """`param` as an array of x's library, dtype and device; python floats stay as they are."""
    if isinstance(param, np.ndarray):
        if isinstance(x, np.ndarray):
            return param.astype(x.dtype, copy=False)
        return x.new_tensor(param)
    return param


def to_float(mask: Array, x: Array) -> Array:
    """A boolean mask as 0.0 / 1.0 in x's dtype."""
    return mask.astype(x.dtype) if isinstance(x, np.ndarray) else mask.to(x.dtype)


def choose(mask: Array, a: Array | float, b: Array | float, x: Array) -> Array:
    """Where `mask` is set a, else b, in x's library and dtype."""
    if isinstance(x, np.ndarray):
        return np.where(mask, a, b).astype(x.dtype, copy=False)
    import torch

    a = a if torch.is_tensor(a) else x.new_tensor(a)
    b = b if torch.is_tensor(b) else x.new_tensor(b)
    return torch.where(mask, a, b)


@dataclass(frozen=True, eq=False, kw_only=True)
class NeuronModel:
    """Base of all models. `dt` is the length of a step in seconds (None: not known, not needed)."""

    dt: float | None = None

    binary = True  # what it sends: spikes 0/1, or a graded value
    memoryless = False

    def initial(self, x: Array) -> State:
        """The state before the first step, zero, shaped as one step's input x `[batch, *shape]`."""
        return {}

    def step(self, state: State, x: Array) -> tuple[Array, State]:
        """One time step: the sum of currents x `[batch, *shape]` -> (output, new state)."""
        raise NotImplementedError

    def params(self) -> dict[str, Any]:
        """The fields as a mapping, in order."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, eq=False, kw_only=True)
class Membrane(NeuronModel):
    """What IF, LIF and CUBA LIF share: h = leak(v) + r * i; fire; reset.

    leak(v) = v_leak + beta * (v - v_leak). Fires where h > v_threshold (>= if not `strict`).
    reset   zero: v becomes v_reset; subtract: v_threshold is taken off; none: v stays.
    timing  immediate: the reset acts in the step of the spike (the textbook rule, and the chip's);
            delayed: v is kept before its reset, which acts at the start of the next step
            (snntorch's default, reset_delay=True); carry: snntorch's reset_delay=False, where a v
            still above threshold after its reset is lowered before the next step's comparison;
            discard: as delayed, but "zero" throws away the next step's input too, as snntorch's
            Synaptic, Lapicque, RLeaky and RSynaptic do (its Leaky does not).
    decay   how beta came from a time constant; `given` where it was not.
    """

    beta: Param = 1.0
    r: Param = 1.0
    v_threshold: Param = 1.0
    v_leak: Param = 0.0
    v_reset: Param = 0.0
    reset: Reset = "zero"
    timing: Timing = "immediate"
    strict: bool = True
    decay: Decay = "given"

    def __post_init__(self) -> None:
        if self.reset not in RESETS:
            raise RangeError(f"neuron: reset '{self.reset}' is none of {', '.join(RESETS)}")
        if self.timing not in TIMINGS:
            raise RangeError(f"neuron: timing '{self.timing}' is none of {', '.join(TIMINGS)}")

    def initial(self, x: Array) -> State:
        return {"v": x * 0.0}

    def fires(self, v: Array) -> Array:
        threshold = like(self.v_threshold, v)
        return v > threshold if self.strict else v >= threshold

    def leaked(self, v: Array) -> Array:
        beta = like(self.beta, v)
        if isinstance(self.v_leak, float) and self.v_leak == 0.0:
            return v if isinstance(beta, float) and beta == 1.0 else beta * v
        leak = like(self.v_leak, v)
        return leak + beta * (v - leak)

    def integrate(self, v: Array, current: Array) -> tuple[Array, Array]:
        """(spikes, v) after one step with the current `current`."""
        threshold, v_reset = like(self.v_threshold, v), like(self.v_reset, v)
        late = to_float(self.fires(v), v) if self.timing != "immediate" else 0.0
        if self.reset == "zero" and self.timing == "delayed":
            v = choose(self.fires(v), v_reset, v, v)
        gained = (
            current if isinstance(self.r, float) and self.r == 1.0 else like(self.r, v) * current
        )
        h = self.leaked(v) + gained
        if self.reset == "subtract" and self.timing != "immediate":
            h = h - late * threshold
        if self.reset == "zero" and self.timing == "discard":
            h = choose(self.fires(v), v_reset, h, h)
        spikes = to_float(self.fires(h), h)
        if self.reset == "none" or self.timing in ("delayed", "discard"):
            return spikes, h
        if self.reset == "zero":
            return spikes, choose(self.fires(h), v_reset, h, h)
        return spikes, h - (spikes - late) * threshold


@dataclass(frozen=True, eq=False, kw_only=True)
class IF(Membrane):
    """Integrate and fire: h = v + r * x. NIR: IF; snntorch: Leaky(beta=1); Lava: LIF(du=4095, dv=0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not np.all(np.asarray(self.beta) == 1.0):
            raise RangeError("IF: beta must be 1; use LIF for a leak")

    def step(self, state: State, x: Array) -> tuple[Array, State]:
        spikes, v = self.integrate(state["v"], x)
        return spikes, {"v": v}


@dataclass(frozen=True, eq=False, kw_only=True)
class LIF(Membrane):
    """Leaky integrate and fire: h = leak(v) + r * x. NIR: LIF; snntorch: Leaky; Lava: LIF."""

    def step(self, state: State, x: Array) -> tuple[Array, State]:
        spikes, v = self.integrate(state["v"], x)
        return spikes, {"v": v}


@dataclass(frozen=True, eq=False, kw_only=True)
class CubaLIF(Membrane):
    """Current-based LIF: u = alpha * u + w_in * x; h = leak(v) + r * u.

    NIR: CubaLIF; snntorch: Synaptic; Lava: LIF(du, dv).
    """

    alpha: Param = 0.0
    w_in: Param = 1.0

    def initial(self, x: Array) -> State:
        return {"u": x * 0.0, "v": x * 0.0}

    def step(self, state: State, x: Array) -> tuple[Array, State]:
        u = like(self.alpha, x) * state["u"] + like(self.w_in, x) * x
        spikes, v = self.integrate(state["v"], u)
        return spikes, {"u": u, "v": v}


@dataclass(frozen=True, eq=False, kw_only=True)
class LI(NeuronModel):
    """Leaky integrator, a readout: v = v_leak + beta * (v - v_leak) + r * x; sends v, never fires."""

    beta: Param = 1.0
    r: Param = 1.0
    v_leak: Param = 0.0
    decay: Decay = "given"

    binary = False

    def initial(self, x: Array) -> State:
        return {"v": x * 0.0}

    def step(self, state: State, x: Array) -> tuple[Array, State]:
        leak = like(self.v_leak, x)
        v = leak + like(self.beta, x) * (state["v"] - leak) + like(self.r, x) * x
        return v, {"v": v}


@dataclass(frozen=True, eq=False, kw_only=True)
class CubaLI(NeuronModel):
    """Current-based leaky integrator: u = alpha * u + w_in * x; v = leak(v) + r * u; sends v."""

    alpha: Param = 0.0
    beta: Param = 1.0
    r: Param = 1.0
    w_in: Param = 1.0
    v_leak: Param = 0.0
    decay: Decay = "given"

    binary = False

    def initial(self, x: Array) -> State:
        return {"u": x * 0.0, "v": x * 0.0}

    def step(self, state: State, x: Array) -> tuple[Array, State]:
        u = like(self.alpha, x) * state["u"] + like(self.w_in, x) * x
        leak = like(self.v_leak, x)
        v = leak + like(self.beta, x) * (state["v"] - leak) + like(self.r, x) * u
        return v, {"u": u, "v": v}


@dataclass(frozen=True, eq=False, kw_only=True)
class Threshold(NeuronModel):
    """Memoryless: fires where the summed input exceeds v_threshold. NIR: Threshold.

    OR is Threshold(0) of a + b, AND is Threshold(1) of a + b, IAND is Threshold(0) of s - a.
    """

    v_threshold: Param = 0.0
    strict: bool = True

    memoryless = True

    def step(self, state: State, x: Array) -> tuple[Array, State]:
        threshold = like(self.v_threshold, x)
        return to_float(x > threshold if self.strict else x >= threshold, x), {}


@dataclass(frozen=True, eq=False, kw_only=True)
class Relay(NeuronModel):
    """Memoryless, graded: sends its summed input as a value. Lava: GradedVec(vth=0)."""

    binary = False
    memoryless = True

    def step(self, state: State, x: Array) -> tuple[Array, State]:
        return x, {}


@dataclass(frozen=True, eq=False, kw_only=True)
class SlidingWindow(NeuronModel):
    """A neuron over the last k inputs: h = sum_i taps[i] * x[t - k + 1 + i]; fires where h > threshold.

    taps  [k], the newest input's weight last. A sliding PSN of order k is one of these.
    """

    taps: np.ndarray
    v_threshold: Param = 1.0
    strict: bool = True

    def initial(self, x: Array) -> State:
        return {f"x{i}": x * 0.0 for i in range(1, len(self.taps))}  # x1 is the step before

    def step(self, state: State, x: Array) -> tuple[Array, State]:
        past = [x, *(state[f"x{i}"] for i in range(1, len(self.taps)))]
        h = sum(float(w) * p for w, p in zip(self.taps[::-1], past, strict=True))
        threshold = like(self.v_threshold, x)
        spikes = to_float(h > threshold if self.strict else h >= threshold, x)
        return spikes, {f"x{i}": past[i - 1] for i in range(1, len(self.taps))}


MODELS: dict[str, type[NeuronModel]] = {
    m.__name__: m for m in (IF, LIF, CubaLIF, LI, CubaLI, Threshold, Relay, SlidingWindow)
}
