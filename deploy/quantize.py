"""Floats to integers, population by population.

All projections into a population share one scale q (integer units of the arriving sum that make 1.0),
up to powers of two: weights q * W / 2**e, threshold q * theta, bias 64 * q * b. The scale is searched:
the one with the least expected squared error of the arriving current on the calibration data, among
those for which interval analysis proves that nothing wraps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ranvier.deploy.bounds import A_LIMIT, RELAY_LIMIT
from ranvier.deploy.cells import BIAS_MANT_MAX, VTH_MAX, Cell
from ranvier.deploy.program import ConvMap, DenseMap, LinearMap, OneToOne, Population, Shape
from ranvier.export.nodes import Conv, Dense, Neuron, Scale
from ranvier.train.errors import RangeError

BIAS_MAX = BIAS_MANT_MAX << 7
MARGIN = 0.98  # of a limit, kept free for the rounding of weights
OCTAVE = np.geomspace(1.0, 0.5, 24, endpoint=False)
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True, eq=False)
class Moments:
    """What a population sends on the calibration data, by channel `[C]`: mean, mean square, and the
    share of messages that are not zero."""

    mean: np.ndarray
    square: np.ndarray
    active: np.ndarray


@dataclass(frozen=True, eq=False)
class Incoming:
    """One projection before quantization; weight in units of the current per message unit.

    bits  its weight bits; wires without parameters of their own always have 8
    """

    name: str
    source: Population
    lag: int
    node: Conv | Dense | Scale
    weight: np.ndarray
    target_shape: Shape
    moments: Moments
    bits: int

    def __post_init__(self) -> None:
        if not np.isfinite(self.weight).all():
            raise RangeError(
                f"compile: the weights of '{self.name}' are not finite; train the network again"
            )
        if self.bits != int(self.bits):
            raise RangeError(
                f"compile: weight_bits is {self.bits}; a whole number, 1..8, is needed"
            )
        if self.bits == 1 and self.mixed:
            raise RangeError(
                f"compile: '{self.name}' has weights of both signs, and one bit holds 0 and one other "
                "value; give weight_bits=2 or more"
            )

    @property
    def top(self) -> float:
        return float(np.abs(self.weight).max(initial=0.0))

    @property
    def mixed(self) -> bool:
        return bool((self.weight < 0).any() and (self.weight > 0).any())

    def spread(self, per_channel: np.ndarray) -> np.ndarray:
        """A number a source channel, broadcast against the weight."""
        if isinstance(self.node, Conv):
            per_group = per_channel.reshape(self.node.groups, -1)
            rows = np.repeat(per_group, self.weight.shape[0] // self.node.groups, 0)
            return rows.reshape(*rows.shape, *[1] * (self.weight.ndim - 2))
        channels = len(per_channel)
        if isinstance(self.node, Dense):
            return np.repeat(per_channel, self.weight.shape[1] // channels)[None]
        return per_channel.reshape(channels, *[1] * (len(self.source.shape) - 1))

    def extent(self) -> tuple[float, float]:
        """The float current that this projection can add at most: (lowest, highest)."""
        low, high = self.extent_rows()
        return float(low.min(initial=0.0)), float(high.max(initial=0.0))

    def extent_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """(lowest, highest) by row of the weight: an output channel, or a neuron of a Dense."""
        lo, hi = min(self.source.lo, 0), max(self.source.hi, 0)
        up = np.where(self.weight > 0, self.weight * hi, self.weight * lo)
        down = np.where(self.weight > 0, self.weight * lo, self.weight * hi)
        axes = tuple(range(1, self.weight.ndim))
        if isinstance(self.node, Scale):
            return np.asarray(down.min(axes)), np.asarray(up.max(axes))
        return np.asarray(down.sum(axes)), np.asarray(up.sum(axes))


def grid(weight: np.ndarray, bits: int) -> tuple[int, int, int]:
    """(lowest, highest, step) of the integer weights that the chip holds for these signs and bits."""
    if (weight < 0).any() and (weight > 0).any():
        step = 2 ** (9 - bits)
        return -256, 256 - step, step
    step = 2 ** (8 - bits)
    return (0, 256 - step, step) if not (weight < 0).any() else (step - 256, 0, step)


def largest_weight(i: Incoming) -> int:
    """The largest |integer weight| that fits a projection's signs and bits."""
    return int(256 - 2 ** (9 - i.bits if i.mixed else 8 - i.bits))


def rounded_at(i: Incoming, q: np.ndarray | float, exponent: int) -> np.ndarray:
    """A projection's integer weights at scale q (one, or one a row) and an exponent."""
    return round_weight(i.weight, along_rows(q, i.weight.ndim) / 2**exponent, i.bits)


def along_rows(q: np.ndarray | float, ndim: int) -> np.ndarray | float:
    """A scale a channel `[C]` so that it multiplies rows of an array of ndim axes; one scale as is."""
    return q if np.ndim(q) == 0 else np.reshape(q, (-1, *[1] * (ndim - 1)))


def round_weight(weight: np.ndarray, factor: np.ndarray | float, bits: int) -> np.ndarray:
    """weight * factor on the chip's grid, clipped to its range; int16."""
    low, high, step = grid(weight, bits)
    return np.clip(np.rint(weight * factor / step) * step, low, high).astype(np.int16)


@dataclass(frozen=True, eq=False)
class Scaled:
    """A chosen scale and what it makes of each projection: integer weights and exponents.

    q  one scale, or one a channel `[C]`
    """

    q: np.ndarray | float
    weights: tuple[np.ndarray, ...]
    exponents: tuple[int, ...]
    error: float


def largest_scale(
    incoming: list[Incoming], relay: bool, theta: float, bias: float, memory: float
) -> float:
    """The largest q for which nothing wraps and threshold and bias can be held.

    memory  1 / (1 - alpha): how far the current can pile up
    """
    low = sum(i.extent()[0] for i in incoming)
    high = sum(i.extent()[1] for i in incoming)
    most = max(-low, high, 1e-30) * memory
    limits = [(RELAY_LIMIT if relay else A_LIMIT) * MARGIN / most]
    if theta > 0:
        limits.append(VTH_MAX / theta)
    if bias > 0 and not relay:
        limits.append(BIAS_MAX * MARGIN / (64 * bias))
    return float(min(limits))


def exponent_for(q: float, top: float, bits: int, mixed: bool) -> int:
    """The least e for which a weight `top` still fits at scale q / 2**e."""
    held = 256 - 2 ** (9 - bits if mixed else 8 - bits)
    return max(0, int(np.ceil(np.log2(max(q * top / held, 1e-30)) - 1e-9)))


def choose_scale(
    incoming: list[Incoming], q_max: float, theta: np.ndarray | float, search: bool
) -> Scaled:
    """The scale with the least expected squared error of current and threshold."""
    fills = [max(256 - 2 ** (9 - i.bits), 128) / i.top for i in incoming if i.top > 0]
    if not fills:
        q = min(q_max, 256.0)
        return _at(incoming, q, theta, 1.0)
    start = min(q_max, max(fills))  # at most until the weakest projection fills its range
    scales = start * OCTAVE if search else np.array([start])
    candidates = [
        _at(incoming, float(q), theta, c) for q in scales for c in (CLIPS if search else (1.0,))
    ]
    candidates += [_at(incoming, q, theta, 1.0) for q in _exact(incoming, start)]
    return min(candidates, key=lambda s: s.error)


def at_scale(incoming: list[Incoming], q: np.ndarray | float, exponents: list[int]) -> Scaled:
    """The Scaled of a given scale and given exponents: what a template program prescribes."""
    weights = [rounded_at(i, q, e) for i, e in zip(incoming, exponents, strict=True)]
    return Scaled(q, tuple(weights), tuple(exponents), 0.0)


def _exact(incoming: list[Incoming], start: float) -> list[float]:
    """Scales at which a one-to-one projection of a single weight becomes a whole number."""
    found = []
    for i in incoming:
        if isinstance(i.node, Scale) and i.top > 0 and np.ptp(np.abs(i.weight)) == 0:
            whole = np.floor(start * i.top)
            found += [w / i.top for w in {whole, 2.0 ** np.floor(np.log2(max(whole, 1)))} if w >= 1]
    return found


def _at(incoming: list[Incoming], q: float, theta: np.ndarray | float, clip: float) -> Scaled:
    weights, exponents, error = [], [], 0.0
    for i in incoming:
        e = exponent_for(q, i.top * clip, i.bits, i.mixed)
        whole = round_weight(i.weight, q / 2**e, i.bits)
        off = (whole * (2.0**e / q) - i.weight) ** 2 * i.spread(i.moments.square)
        rows = off.reshape(off.shape[0], -1).sum(1) if not isinstance(i.node, Scale) else off
        error += float(rows.mean())
        weights.append(whole)
        exponents.append(e)
    theta = np.asarray(theta, np.float64)
    error += float(np.mean((np.rint(q * theta) / q - theta) ** 2))
    return Scaled(q, tuple(weights), tuple(exponents), error)


def mean_shift(incoming: list[Incoming], scaled: Scaled, shape: Shape) -> np.ndarray:
    """The mean current that rounding adds, by output channel, broadcast to the shape."""
    total = np.zeros(shape)
    for i, whole, e in zip(incoming, scaled.weights, scaled.exponents, strict=True):
        units = 2.0**e / along_rows(scaled.q, i.weight.ndim)
        off = (whole * units - i.weight) * i.spread(i.moments.mean)
        if isinstance(i.node, Scale):
            total += np.broadcast_to(off, shape)
        else:
            rows = off.reshape(off.shape[0], -1).sum(1)  # a Dense has a row for each neuron
            each = rows.size == total.size
            total += rows.reshape(shape if each else (-1, *[1] * (len(shape) - 1)))
    return total


def int_map(i: Incoming, whole: np.ndarray) -> LinearMap:
    """The Program's map for an Incoming with whole-number weights."""
    from ranvier.export.linear import image
    from ranvier.export.maps import conv_map

    if isinstance(i.node, Dense):
        return DenseMap(weight=whole)
    if isinstance(i.node, Scale):
        return OneToOne(weight=whole, shape=i.source.shape)
    conv = conv_map(i.node, i.source.shape)
    out = conv.out_shape
    return ConvMap(
        weight=whole.reshape(conv.weight.shape),
        in_shape=image(i.source.shape),
        out_shape=(out[0], out[1], out[2]),
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
    )


def whole(x: Any) -> Any:
    """Rounded: a python int where all entries are one, else an int64 array."""
    rounded = np.rint(np.asarray(x, np.float64)).astype(np.int64)
    same = rounded.size and (rounded == rounded.reshape(-1)[0]).all()
    return int(rounded.reshape(-1)[0]) if same else rounded


def voltage_decay(beta: Any, where: str) -> Any:
    """dv in 0..4096 for a float decay. Raises RangeError outside 0..1."""
    b = np.asarray(beta, np.float64)
    if b.min() < 0 or b.max() > 1:
        raise RangeError(
            f"compile: '{where}' has beta {b.min():g}..{b.max():g}; the chip holds 0..1"
        )
    return whole(4096 - 4096 * b)


def current_decay(alpha: Any, where: str) -> Any:
    """du in -1..4095 for a float decay."""
    a = np.asarray(alpha, np.float64)
    if a.min() < 0 or a.max() > 1:
        raise RangeError(
            f"compile: '{where}' has alpha {a.min():g}..{a.max():g}; the chip holds 0..1"
        )
    return whole(4095 - 4096 * a)


def bias_parts(bias: np.ndarray) -> tuple[Any, int]:
    """(mantissa, exponent) nearest to a bias in units of v."""
    top = float(np.abs(bias).max(initial=0.0))
    exponent = 0
    while np.rint(top / 2**exponent) > BIAS_MANT_MAX and exponent < 7:
        exponent += 1
    return whole(np.clip(bias / 2**exponent, -BIAS_MANT_MAX, BIAS_MANT_MAX)), exponent


def neuron_cell(node: Neuron, q: np.ndarray | float, bias: np.ndarray) -> Cell:
    """The integer cell of a spiking or integrating neuron at scale q (broadcast to its shape)."""
    from ranvier.export.neurons import LI, CubaLI, CubaLIF, Membrane, Threshold

    model, name = node.model, node.name
    mant, exponent = bias_parts(64 * q * bias)
    cell = Cell(bias_mant=mant, bias_exp=exponent)
    if isinstance(model, Threshold):
        vth = whole(q * np.asarray(model.v_threshold))
        return replace(cell, du=4095, dv=4096, vth=vth, strict=model.strict)
    if isinstance(model, (CubaLIF, CubaLI)):
        cell = replace(cell, du=current_decay(model.alpha, name))
    if isinstance(model, (LI, CubaLI)):
        return replace(cell, dv=voltage_decay(model.beta, name), vth=VTH_MAX, reset="none")
    assert isinstance(model, Membrane)
    late = model.reset == "zero" and model.timing in ("delayed", "carry")
    return replace(
        cell,
        dv=voltage_decay(model.beta, name),
        vth=whole(q * np.asarray(model.v_threshold)),
        reset=model.reset,
        timing="immediate" if late else model.timing,  # the same spikes, and the chip's own way
        v_reset=int(whole(64 * np.max(q) * np.asarray(model.v_reset))),
        strict=model.strict,
    )
