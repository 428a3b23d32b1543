"""Neurons -> NIR nodes: the nearest standard neuron, or the standard nodes that make one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ranvier.export.neurons import (
    LI,
    CubaLI,
    Membrane,
    NeuronModel,
    Relay,
    SlidingWindow,
    Threshold,
)
from ranvier.export.nir_words import fire_level, full, neuron_data
from ranvier.export.nodes import Neuron, Shape

if TYPE_CHECKING:
    from ranvier.export.nir_write import Writer


def add_neuron(w: Writer, node: Neuron, shape: Shape) -> None:
    """Adds a population, its bias and, where it never resets, the Threshold that watches it."""
    model, sources = node.model, list(node.inputs)
    biased = None
    if node.bias is not None:
        biased = w.part(node, w.add_affine(f"{node.name}.bias", 1.0, node.bias, shape))
        w.wires.append((biased, sources))
    match model:
        case SlidingWindow():
            _window(w, node, model, shape, biased)
            return
        case Threshold():
            level = fire_level(model.v_threshold, model.strict)
            key = w.add(node.name, "Threshold", shape, threshold=full(level, shape))
        case Relay():
            key = w.add(node.name, "Scale", shape, scale=full(1.0, shape))
        case Membrane() if model.reset == "none":
            key = _silent(w, node, model, shape)
        case _:
            kind, data = neuron_data(model, shape, model.dt or w.dt)
            key = w.add(node.name, kind, shape, **data)
            _remark(w, node, model)
    w.own(node, key)
    if isinstance(model, (LI, CubaLI)):
        w.shows[node.name] = key
    if isinstance(model, Membrane) and model.reset == "none":
        w.shows[node.name] = key
        level = fire_level(model.v_threshold, model.strict)
        spikes = w.add(f"{node.name}.spikes", "Threshold", shape, threshold=full(level, shape))
        w.chain(key, w.part(node, spikes))
        w.sends[node.name] = spikes
    else:
        w.sends[node.name] = key
    if biased is None:
        w.wires.append((key, sources))
    else:
        w.chain(biased, key)


def _silent(w: Writer, node: Neuron, model: Membrane, shape: Shape) -> str:
    """A membrane without reset is an integrator whose value a Threshold watches."""
    kind, data = neuron_data(model, shape, model.dt or w.dt)
    kept = {k: v for k, v in data.items() if k not in ("v_threshold", "v_reset")}
    return w.add(node.name, {"IF": "I", "LIF": "LI", "CubaLIF": "CubaLI"}[kind], shape, **kept)


def _remark(w: Writer, node: Neuron, model: NeuronModel) -> None:
    if not isinstance(model, Membrane):
        return
    if model.reset == "subtract":
        w.notes.append(
            f"'{node.name}': reset subtract ({model.timing}); other tools reset to v_reset"
        )
    elif model.reset == "zero" and model.timing == "discard":
        w.notes.append(f"'{node.name}': drops the input after a spike; other tools keep it")
    if np.any(np.asarray(model.beta) > 1.0):
        w.notes.append(f"'{node.name}': a decay above 1 gives a negative time constant")


def _window(
    w: Writer, node: Neuron, model: SlidingWindow, shape: Shape, biased: str | None
) -> None:
    """Taps as delays and scales into one Threshold."""
    entry = biased
    if entry is None:
        entry = w.part(node, w.add(f"{node.name}.in", "Scale", shape, scale=full(1.0, shape)))
        w.wires.append((entry, list(node.inputs)))
    arms = []
    for age, tap in enumerate(reversed(model.taps.tolist())):
        scaled = w.part(
            node, w.add(f"{node.name}.tap{age}", "Scale", shape, scale=full(tap, shape))
        )
        if age:
            late = w.add(f"{node.name}.late{age}", "Delay", shape, delay=full(age * w.dt, shape))
            w.chain(entry, w.part(node, late))
            w.chain(late, scaled)
        else:
            w.chain(entry, scaled)
        arms.append(scaled)
    w.fires(node, shape, fire_level(model.v_threshold, model.strict), arms)
