"""What a population's current is made of: gain, bias, units, and sums that need no scale."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from ranvier.deploy.program import DenseMap, LinearMap, OneToOne, Population
from ranvier.deploy.quantize import Incoming, Moments, Scaled
from ranvier.export.neurons import LI, CubaLI, CubaLIF, Membrane, NeuronModel, Relay, Threshold
from ranvier.export.nodes import Conv, Dense, Neuron, Scale
from ranvier.train.errors import UnsupportedError


def gain_of(model: NeuronModel) -> np.ndarray | float:
    """The factor between a summed current and what is added to v in units of the float model."""
    if isinstance(model, (CubaLIF, CubaLI)):
        return np.asarray(model.r, np.float64) * np.asarray(model.w_in, np.float64)
    if isinstance(model, (Membrane, LI)):
        return np.asarray(model.r, np.float64)
    return 1.0


def by_row(gain: Any, weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A gain that broadcasts to the target's shape as a factor of the weight's rows: channels, or neurons."""
    flat = np.asarray(gain).reshape(-1)
    if len(flat) != weight.shape[0] == math.prod(shape):
        flat = np.broadcast_to(gain, shape).reshape(-1)
    if len(flat) != weight.shape[0]:
        raise UnsupportedError(
            f"compile: a gain of shape {np.shape(gain)} differs inside a channel of a convolution"
        )
    return flat.reshape(-1, *[1] * (weight.ndim - 1))


def message_units(
    linear: Conv | Dense | Scale | LinearMap, weight: np.ndarray, source: Population
) -> np.ndarray:
    """The units of the source's messages that make 1.0, broadcast against the map's weight."""
    channels = np.asarray(source.message_scale, np.float64).reshape(-1)
    if channels.size == 1:
        return channels.reshape(())
    if isinstance(linear, (Scale, OneToOne)):
        return channels.reshape(-1, *[1] * (len(source.shape) - 1))
    if isinstance(linear, (Dense, DenseMap)):
        return np.repeat(channels, weight.shape[1] // len(channels))
    per_group = channels.reshape(linear.groups, -1)
    rows = np.repeat(per_group, len(weight) // linear.groups, 0)
    return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))


def in_units(m: Moments, source: Population) -> Moments:
    scale = np.asarray(source.message_scale)
    s = scale.reshape(-1) if scale.size > 1 else float(scale.reshape(()))
    return Moments(m.mean * s, m.square * s * s, m.active)


def total_bias(node: Neuron) -> np.ndarray:
    """What is added to v each step, in units of the float model."""
    model = node.model
    bias = np.zeros(()) if node.bias is None else np.asarray(node.bias, np.float64)
    if isinstance(model, (CubaLIF, CubaLI)) and np.any(bias) and np.any(np.asarray(model.alpha)):
        raise UnsupportedError(
            f"compile: '{node.name}' of a lowered graph has a bias on its synaptic current, which piles "
            "up over the first steps; the chip adds its bias to v. Compile the source graph: lowering makes "
            "it a neuron that fires in every step"
        )
    bias = bias * gain_of(model)
    leak = getattr(model, "v_leak", 0.0)
    if np.any(leak):
        bias = bias + (1.0 - np.asarray(getattr(model, "beta", 1.0))) * np.asarray(leak)
    return np.asarray(bias)


def logic_scale(model: NeuronModel, incoming: list[Incoming]) -> Scaled | None:
    """Scale 1 for logic and for sums of spikes: whole numbers in, whole-number weights that fit."""
    if not isinstance(model, (Threshold, Relay)) or not incoming:
        return None
    if any(np.any(i.source.message_scale != 1) or i.source.is_input for i in incoming):
        return None
    theta = np.asarray(getattr(model, "v_threshold", 0.0))
    if theta.min() < 0 or (theta != np.rint(theta)).any() and not getattr(model, "strict", True):
        return None
    for i in incoming:
        mixed = (i.weight < 0).any() and (i.weight > 0).any()
        if mixed or (i.weight != np.rint(i.weight)).any() or i.top > 255:
            return None
    weights = tuple(i.weight.astype(np.int16) for i in incoming)
    return Scaled(1.0, weights, (0,) * len(incoming), 0.0)


def whole_threshold(node: Neuron) -> Neuron:
    """A strict Threshold of whole numbers at the whole number below: x > 1.5 is x > 1."""
    if not isinstance(node.model, Threshold) or not node.model.strict:
        return node
    theta = np.floor(np.asarray(node.model.v_threshold, np.float64))
    return replace(node, model=replace(node.model, v_threshold=theta))
