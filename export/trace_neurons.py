"""snntorch 1.0 neurons and ours as neuron models: the names and quirks of that border.

snntorch's rule, v kept before its reset: v = beta v + x - reset * threshold, reset where the v
before exceeded the threshold; that is timing "delayed". `reset_delay=False` lowers v at once but
not twice, which is timing "carry". Ours resets at once, at every spike: timing "immediate".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ranvier.export.neurons import (
    LIF,
    CubaLI,
    CubaLIF,
    NeuronModel,
    Param,
    SlidingWindow,
    Timing,
)
from ranvier.export.trace_values import Port, array

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Cell:
    """How one snntorch class is called: its arguments and outputs, each with its port."""

    states: tuple[tuple[str, Port], ...]  # argument of forward (and attribute) -> port
    outputs: tuple[Port, ...]
    recurrent: bool = False


_LEAKY = Cell((("mem", "v"),), ("out", "v"))
_SYNAPTIC = Cell((("syn", "u"), ("mem", "v")), ("out", "u", "v"))
_RLEAKY = Cell((("spk", "out"), ("mem", "v")), ("out", "v"), recurrent=True)
_HIDDEN = Cell((), ("out",))
_RSYNAPTIC = Cell((("spk", "out"), ("syn", "u"), ("mem", "v")), ("out", "u", "v"), recurrent=True)

# Ours that need all time steps at once, and what to take instead.
_DENSE = "it multiplies all time steps by a dense matrix; a SlidingPSN keeps to a window of them"
_GUESS = "it guesses resets by a sigmoid over time; a LIF with the same weights resets for real"
_WHOLE_TIME = {"PSN": _DENSE, "MaskedPSN": _DENSE, "PSU": _GUESS, "IPSU": _GUESS, "RPSU": _GUESS}


def cell(module: nn.Module) -> Cell | None:
    """How that neuron is called; None where the class is unknown."""
    import snntorch

    from ranvier.train import neurons as ours
    from ranvier.train import neurons_paralif as paralif
    from ranvier.train import neurons_parallel as parallel

    known: dict[type[Any], Cell] = {
        snntorch.Leaky: _LEAKY,
        snntorch.Lapicque: _LEAKY,
        snntorch.Synaptic: _SYNAPTIC,
        snntorch.RLeaky: _RLEAKY,
        snntorch.RSynaptic: _RSYNAPTIC,
        ours.LIF: _LEAKY,
        ours.IF: _LEAKY,
        ours.PLIF: _LEAKY,
        ours.CUBA: _SYNAPTIC,
        paralif.LI: _HIDDEN,
        paralif.ParaLIF: _HIDDEN,
        paralif.RecurrentLIF: _HIDDEN,
        parallel.SlidingPSN: _HIDDEN,
    }
    found = known.get(type(module))
    if found is None:  # a subclass that keeps the forward pass of its parent is its parent
        for base, kind in known.items():
            if isinstance(module, base) and type(module).forward is base.forward:
                return kind
    return found


def refusal(module: nn.Module) -> str | None:
    """Why a neuron has no model; None where it has one."""
    m: Any = module
    name = type(module).__name__
    if cell(module) is None:
        why = _WHOLE_TIME.get(name, "Leaky, Synaptic, RLeaky and Lapicque have")
        return f"the neuron {name} has no model here; {why}"
    if m.inhibition:
        return (
            f"{name} with inhibition=True lets one neuron of a layer fire; a chip's are independent"
        )
    if m.state_quant:
        return (
            f"{name} with state_quant rounds its states by a function; quantize the graph instead"
        )
    if getattr(m, "firing", "t") != "t":
        return f"{name} with firing='{m.firing}' fires by more than its membrane and a threshold"
    low = bool((m.threshold < 0).any())
    if low and not getattr(m, "reset_delay", True) and m.reset_mechanism == "zero":
        return f"{name} with a threshold below 0 and reset_delay=False doubles its membrane"
    return None


def parameter(tensor: Any, shape: tuple[int, ...]) -> Param:
    """A float for one number, else an array that broadcasts to a sample's shape."""
    values = array(tensor)
    if values.size == 1:
        return float(values.reshape(()))
    while values.ndim > len(shape) and values.shape[0] == 1:
        values = values[0]
    if values.ndim < len(shape):  # torch aligns to the last axes
        values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
    return values


def model_of(module: nn.Module, shape: tuple[int, ...]) -> NeuronModel:
    """The neuron model of an snntorch neuron (or ours) on samples of `shape`."""
    import snntorch

    m: Any = module
    special = _zoo_model(m, shape)
    if special is not None:
        return special
    common: dict[str, Any] = {
        "v_threshold": parameter(m.threshold, shape),
        "reset": m.reset_mechanism,
        "timing": _timing(m),
        "v_reset": float(getattr(m, "v_reset", 0.0)),
    }
    beta = parameter(m.beta.clamp(0, 1), shape)
    if isinstance(m, snntorch.Lapicque):
        beta, gain = _lapicque(m, shape)
        return LIF(**common, beta=beta, r=gain, decay="euler")
    r: Param = 1.0
    if getattr(m, "decay_input", False):
        r = parameter(1 - m.beta.clamp(0, 1), shape)
    if isinstance(m, (snntorch.Synaptic, snntorch.RSynaptic)):
        alpha = parameter(m.alpha.clamp(0, 1), shape)
        if getattr(m, "decay_input", False):
            return CubaLIF(**common, alpha=alpha, beta=beta, w_in=r)
        return CubaLIF(**common, alpha=alpha, beta=beta)
    return LIF(**common, beta=beta, r=r)


def _zoo_model(m: Any, shape: tuple[int, ...]) -> NeuronModel | None:
    """The models of our own neurons that are no Leaky: sliding PSN, and ParaLIF with its kin."""
    from ranvier.train import neurons_paralif as paralif
    from ranvier.train import neurons_parallel as parallel

    if isinstance(m, parallel.SlidingPSN):
        return SlidingWindow(taps=array(m.weight), v_threshold=parameter(m.threshold, shape))
    if not isinstance(m, (paralif.LI, paralif.RecurrentLIF)):
        return None
    alpha, beta = m.decays() if isinstance(m, paralif.LI) else (m.alpha, m.beta)
    decays: dict[str, Any] = {
        "alpha": parameter(alpha, shape),
        "beta": parameter(beta, shape),
        "r": parameter(1 - beta, shape),
    }
    if isinstance(m, paralif.RecurrentLIF):
        return CubaLIF(**decays, v_threshold=parameter(m.threshold, shape), reset="zero")
    if isinstance(m, paralif.ParaLIF):
        threshold = parameter(m.threshold.clamp(min=0), shape)
        return CubaLIF(**decays, v_threshold=threshold, reset="none")
    return CubaLI(**decays)


def _timing(m: Any) -> Timing:
    import snntorch

    from ranvier.train import neurons as ours

    if isinstance(m, (ours.LIF, ours.CUBA)):
        return "immediate"
    if isinstance(m, snntorch.RSynaptic) or getattr(m, "reset_delay", True):
        # RSynaptic computes the prompt reset on a local variable and drops it
        late = type(m).forward is not snntorch.Leaky.forward and m.reset_mechanism == "zero"
        return "discard" if late else "delayed"
    return "carry"


def _lapicque(m: Any, shape: tuple[int, ...]) -> tuple[Param, Param]:
    """beta and r of v = (1 - dt / RC) v + (dt / C) x, in torch's own arithmetic."""
    gain = m.R * (1 / (m.R * m.C)) * m.time_step
    return parameter(1 - (m.time_step / (m.R * m.C)), shape), parameter(gain, shape)


def graded(module: nn.Module, shape: tuple[int, ...]) -> np.ndarray | None:
    """The factor on the spikes, where it is not 1."""
    factor = array(getattr(module, "graded_spikes_factor", 1.0))
    return None if np.all(factor == 1) else np.asarray(parameter(factor, shape))
