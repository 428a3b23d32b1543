"""Rules RV3xx: what will cost accuracy, each with its number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ranvier.deploy.cells import VTH_MAX
from ranvier.deploy.rules import Context, Hit, number, rule
from ranvier.export.domain_rules import intervals
from ranvier.export.neurons import LI, CubaLI, CubaLIF, Membrane
from ranvier.export.nodes import Conv, Dense, Input, Neuron, Scale

DECAY_UNITS = 4096
TAU_ERROR = 0.01  # of a time constant, from which it is worth a line
FEW_LEVELS = 64  # a threshold of fewer units cannot be told from its neighbours
BROAD = 12.0  # a weight so many times the spread of its layer leaves the rest few levels


@rule("RV301", "warning", "threshold that is not strict")
def not_strict(c: Context) -> Iterator[Hit]:
    """Firing at v >= threshold, as SpikingJelly does: integers make equality common."""
    for node in c.neurons:
        if not getattr(node.model, "strict", True):
            yield (
                node.name,
                "fires at its threshold itself (>=); with integers v equals the threshold often, "
                "and the stock LIF does not fire there",
                "train with a strict threshold (v > threshold)",
            )


@rule("RV302", "warning", "decay that 12 bits cannot hold")
def decay(c: Context) -> Iterator[Hit]:
    """A beta near 1: 1 - beta is below a step of 1/4096, and the time constant is lost."""
    for node in c.neurons:
        for name in ("beta", "alpha"):
            value = getattr(node.model, name, None)
            if value is None:
                continue
            error, held = _tau_error(np.asarray(value, float))
            if error > TAU_ERROR:
                tau, got = (_tau(np.asarray(v, float)) for v in (value, held))
                yield (
                    node.name,
                    f"{name} {number(value)} becomes {number(held)} in 12 bits: a time constant of "
                    f"{tau} steps becomes {got}, {error:.0%} off",
                    f"train with a multiple of 1/4096, or quantization-aware; {name}=1 never leaks",
                )


def _tau_error(beta: np.ndarray) -> tuple[float, np.ndarray]:
    """(largest relative error of the time constant 1 / (1 - beta), what the chip holds)."""
    held = np.rint(beta * DECAY_UNITS) / DECAY_UNITS
    leak, got = 1 - beta, 1 - held
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(leak == got, 0.0, np.abs(leak / np.maximum(got, 1e-30) - 1))
    return float(np.max(np.minimum(error, 1.0), initial=0.0)), held


def _tau(beta: np.ndarray) -> str:
    leak = float(np.min(1 - beta))
    return "infinitely many" if leak <= 0 else f"{1 / leak:.4g}"


@rule("RV303", "warning", "reset that acts late")
def late_reset(c: Context) -> Iterator[Hit]:
    """snntorch's own subtract: the threshold is taken off a step late, from the leaked membrane."""
    for node in c.neurons:
        model: Any = node.model
        if (
            isinstance(model, Membrane)
            and model.timing != "immediate"
            and model.reset == "subtract"
        ):
            yield (
                node.name,
                f"subtracts its threshold in the next step (timing '{model.timing}'), not as the "
                "textbook and the chip do; a custom process keeps it, any stock neuron would not",
                "train with ranvier.train.neurons, whose reset is immediate",
            )


@rule("RV304", "warning", "population that can never fire")
def silent(c: Context) -> Iterator[Hit]:
    """A threshold above all that its input can reach: dead weight, or a wrong scale."""
    for node in c.neurons:
        d = c.domains[node.name]
        if node.model.binary and d.kind == "binary" and d.hi == 0:
            yield (
                node.name,
                f"no input can lift it above its threshold {number(_theta(node))}",
                "prune it, or check threshold and normalization",
            )


@rule("RV305", "warning", "threshold of few levels")
def coarse(c: Context) -> Iterator[Hit]:
    """A threshold tiny against the sums that arrive: the scale that fits them leaves it no bits."""
    for node, theta, vth in _thresholds(c):
        low = int(np.min(vth[theta > 0], initial=VTH_MAX))
        if low < FEW_LEVELS and np.any(theta > 0):
            yield (
                node.name,
                f"threshold {number(theta)} becomes {low} units, since sums up to "
                f"{_reach(c, node):.4g} must fit: an error of up to {50 / max(low, 1):.0f} %",
                "fewer inputs, smaller weights, or a higher threshold (scale the layer before it)",
            )


@rule("RV306", "warning", "threshold that saturates its register")
def saturating(c: Context) -> Iterator[Hit]:
    """A threshold large against the weights: 17 bits hold it, and the weights lose theirs."""
    for node, theta, vth in _thresholds(c):
        top = int(np.max(vth, initial=0))
        weights = _weight_levels(c, node.name)
        if top >= 0.95 * VTH_MAX and weights is not None and weights < 127:
            yield (
                node.name,
                f"threshold {number(theta)} fills its register ({top} of {VTH_MAX}); the largest "
                f"weight is left {weights} levels",
                "raise the weights in front of it, or lower the threshold",
            )


@rule("RV307", "warning", "scale that differs inside a channel")
def per_token(c: Context) -> Iterator[Hit]:
    """Normalization per token or pixel: shared weights cannot take its factors in."""
    for node in c.graph:
        if isinstance(node, Scale):
            shape = c.graph.shapes[node.name]
            full = np.broadcast_to(node.scale, shape)
            if len(shape) > 1 and np.ptp(full.reshape(shape[0], -1), axis=1).max() > 0:
                yield (
                    node.name,
                    f"its factor differs inside a channel ({number(node.scale)}): weights that all "
                    "places share cannot hold it, each place gets a projection of its own",
                    "normalize by channel",
                )


@rule("RV308", "info", "input of unknown range")
def unknown_range(c: Context) -> Iterator[Hit]:
    """The graph does not say what its input holds: calibration data must."""
    for node in c.graph:
        if isinstance(node, Input) and not (math.isfinite(node.lo) and math.isfinite(node.hi)):
            yield (
                node.name,
                "its range is not declared; lint takes 0..1",
                "give compile calibration data, or declare lo and hi",
            )


@rule("RV309", "warning", "weights with far outliers")
def outliers(c: Context) -> Iterator[Hit]:
    """One weight far beyond the others: 8 bits stretched to it leave the rest few levels."""
    for node in c.graph:
        if isinstance(node, (Conv, Dense)):
            used = np.abs(np.asarray(node.weight, float))
            used = used[used > 0]
            if used.size < 64:
                continue
            ratio = float(used.max() / np.sqrt(np.mean(used**2)))
            if ratio > BROAD:
                yield (
                    node.name,
                    f"its largest weight is {ratio:.1f} times their root mean square; the typical "
                    f"one keeps {127 / ratio:.0f} of 127 levels",
                    "clip the outlier, or train quantization-aware",
                )


@rule("RV310", "warning", "leak towards a value other than zero")
def leak(c: Context) -> Iterator[Hit]:
    """v_leak: kept as a constant bias, rounded to 12 bits and an exponent."""
    for node in c.neurons:
        value = getattr(node.model, "v_leak", 0.0)
        if np.any(np.asarray(value)) and isinstance(node.model, (Membrane, LI, CubaLI)):
            yield (
                node.name,
                f"leaks towards {number(value)}; the chip leaks to zero, so a bias makes up for it",
                "train with v_leak = 0",
            )


@rule("RV311", "warning", "current that piles up")
def current(c: Context) -> Iterator[Hit]:
    """A slow synaptic current: its sum must fit 24 bits, which takes bits from every weight."""
    for node in c.neurons:
        if isinstance(node.model, (CubaLIF, CubaLI)):
            alpha = float(np.max(np.asarray(node.model.alpha)))
            if alpha >= 0.9:
                gain = math.inf if alpha >= 1 else 1 / (1 - alpha)
                yield (
                    node.name,
                    f"its current keeps {alpha:g} a step and piles up {gain:.4g} times; the scale "
                    "that keeps it below 24 bits is as much smaller",
                    "a faster synaptic decay",
                )


def _theta(node: Neuron) -> np.ndarray:
    return np.asarray(getattr(node.model, "v_threshold", 0.0), float)


def _thresholds(c: Context) -> Iterator[tuple[Neuron, np.ndarray, np.ndarray]]:
    """(neuron, threshold in floats, its integers) of every membrane that the program holds."""
    for node in c.neurons:
        population = c.program.populations.get(node.name) if c.program else None
        cell = None if population is None else population.cell
        if isinstance(node.model, Membrane) and cell is not None:
            shape = c.graph.shapes[node.name]
            theta, vth = _theta(node), np.asarray(cell.vth)
            yield node, np.broadcast_to(theta, shape), np.broadcast_to(vth, shape)


def _reach(c: Context, node: Neuron) -> float:
    """The largest sum that can arrive at a neuron, in floats."""
    found = intervals(c.bounded)[node.inputs[0]]
    return float(max(np.max(found.hi), -np.min(found.lo)))


def _weight_levels(c: Context, name: str) -> int | None:
    """The largest integer weight of all projections into a population."""
    assert c.program is not None
    tops = [int(np.abs(p.map.weight).max(initial=0)) for p in c.program.into(name)]
    return max(tops) if tops else None
