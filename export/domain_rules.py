"""Which values each node of a Graph can send: a rule for each node of the closed union."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from typing_extensions import assert_never

from ranvier.export.graph import Graph
from ranvier.export.intervals import Interval, between, hull, scaled, through_weights, times
from ranvier.export.neurons import (
    LI,
    CubaLI,
    CubaLIF,
    Membrane,
    NeuronModel,
    Relay,
    SlidingWindow,
    Threshold,
)
from ranvier.export.nodes import (
    Conv,
    Delay,
    Dense,
    Flatten,
    Input,
    Join,
    Neuron,
    Node,
    Norm,
    Opaque,
    Output,
    Pool,
    Scale,
    Shape,
    Subsample,
    Upsample,
)

Kind: TypeAlias = Literal["binary", "ternary", "integer", "real"]

_ROUNDS = 8  # turns round a cycle before a bound that still grows is taken as unbounded


@dataclass(frozen=True)
class Domain:
    """The values of an edge.

    kind    binary 0/1; ternary -1/0/1; integer lo..hi; real lo..hi
    lo, hi  the bounds, which may be infinite
    grid    1 for whole numbers; 1/n where values are k/n, as an average of n spikes is; None: any
    """

    kind: Kind
    lo: float
    hi: float
    grid: float | None = None

    @property
    def whole_after_scale(self) -> bool:
        """Real, but a whole number once multiplied by a constant."""
        return self.kind == "real" and self.grid is not None

    def holds(self, values: Any, slack: float = 1e-5) -> bool:
        """Whether all of `values` lie in the domain, up to rounding of relative size `slack`."""
        values = np.asarray(values, float)
        if values.size == 0:
            return True
        room = slack * max(1.0, float(np.abs(values).max()))
        if values.min() < self.lo - room or values.max() > self.hi + room:
            return False
        if self.grid is None:
            return True
        steps = values / self.grid
        return bool(np.abs(steps - np.rint(steps)).max() <= room / self.grid)

    def __str__(self) -> str:
        if self.kind in ("binary", "ternary"):
            return self.kind if self.hi > self.lo else f"always {self.lo:g}"
        if not (math.isfinite(self.lo) or math.isfinite(self.hi)):
            return self.kind
        span = f"{self.kind} {self.lo:.4g}..{self.hi:.4g}"
        if self.grid is None or self.kind == "integer":
            return span
        return f"{span} in steps of {as_fraction(self.grid)} (integer after scale)"


def as_fraction(x: float) -> str:
    """x as 1/n where it is one.

    >>> as_fraction(0.25)
    '1/4'
    """
    n = round(1 / x) if x else 0
    return f"1/{n}" if n > 1 and math.isclose(n * x, 1.0) else f"{x:.4g}"


def infer_domains(graph: Graph) -> dict[str, Domain]:
    """name -> Domain of what the node sends, for every node of the graph.

    The bounds are those of interval arithmetic, channel by channel: no input within the Input's own
    range can leave them. Integers of SEW-ADD come out exactly: a sum of k spikes is 0..k.
    """
    return {name: _domain(value) for name, value in intervals(graph).items()}


def intervals(graph: Graph) -> dict[str, Interval]:
    """name -> the same with bounds for each channel, broadcasting to the node's shape."""
    found: dict[str, Interval] = {}
    for turn in range(_ROUNDS + 1):
        before = dict(found)
        for node in graph:
            value = _of(graph, node, found)
            if turn == _ROUNDS and node.name in before:
                value = before[node.name].widened(value)
            found[node.name] = value
        if not graph.recurrent or (turn and all(found[n].same(before[n]) for n in found)):
            return found
    for node in graph:  # bounds that grew are infinite now; carry that to whatever follows
        found[node.name] = found[node.name].widened(_of(graph, node, found))
    return found


def _domain(value: Interval) -> Domain:
    lo, hi = float(np.min(value.lo)), float(np.max(value.hi))
    if value.grid != 1.0:
        return Domain("real", lo, hi, value.grid)
    kind: Kind = "integer"
    if lo >= 0 and hi <= 1:
        kind = "binary"
    elif lo >= -1 and hi <= 1:
        kind = "ternary"
    return Domain(kind, lo, hi, 1.0)


def _of(graph: Graph, node: Node, found: Mapping[str, Interval]) -> Interval:
    """The interval of one node from those of its inputs; a Delay's may not be known yet."""
    if isinstance(node, Delay):
        past = found.get(node.inputs[0])
        still = between(0.0, 0.0, 1.0)
        return still if past is None else hull(past, still)
    values = [found[i] for i in node.inputs]
    shapes = [graph.shapes[i] for i in node.inputs]
    match node:
        case Input():
            return Interval(np.asarray(node.lo), np.asarray(node.hi), 1.0 if node.integer else None)
        case Conv() | Dense():
            return through_weights(node, values[0], shapes[0])
        case Pool():
            return _pooled(node, values[0], shapes[0])
        case Flatten():
            return values[0].reshaped(shapes[0], graph.shapes[node.name])
        case Norm():
            gain = node.gamma / np.sqrt(node.var + node.eps)
            tail = (slice(None), *[None] * (len(shapes[0]) - 1))
            return scaled(values[0], gain[tail], (node.beta - gain * node.mean)[tail])
        case Scale():
            return scaled(values[0], node.scale, node.shift)
        case Subsample():
            return _subsampled(node, values[0], shapes[0])
        case Upsample():
            return values[0].by_channel(shapes[0])
        case Join():
            return _joined(node, values, shapes)
        case Neuron():
            return _sent(node, values[0], graph.steps)
        case Opaque():
            return _opaque(node, values)
        case Output():
            return _observed(graph, node, values[0], found)
        case _:
            assert_never(node)


def _pooled(node: Pool, x: Interval, shape: Shape) -> Interval:
    x = x.by_channel(shape)
    if node.op == "max":
        return x
    n = int(np.prod(node.kernel))
    if any(node.padding):
        x = x.with_zero()
    if node.op == "sum":
        return Interval(x.lo * n, x.hi * n, x.grid)
    return Interval(x.lo, x.hi, None if x.grid is None else x.grid / n)


def _subsampled(node: Subsample, x: Interval, shape: Shape) -> Interval:
    if not any(node.pad_channels):
        return x.by_channel(shape)
    thin = (shape[0], *[1] * (len(shape) - 1))
    lo, hi = (np.broadcast_to(b, thin) for b in x.by_channel(shape).bounds)
    pad = [node.pad_channels, *[(0, 0)] * (len(shape) - 1)]
    return Interval(np.pad(lo, pad), np.pad(hi, pad), x.grid)


def _joined(node: Join, values: list[Interval], shapes: list[Shape]) -> Interval:
    if node.op == "cat":
        return Interval.concatenated(values, shapes, node.axis)
    first, *rest = values
    for other in rest:
        match node.op:
            case "add":
                first = first + other
            case "and" | "mul":
                first = first * other
            case "iand":
                first = scaled(first, np.asarray(-1.0), np.asarray(1.0)) * other
            case "or" | "max":
                first = first.larger(other)
            case _:
                assert_never(node.op)
    return first


def memory(beta: Any, steps: int | None) -> np.ndarray:
    """The sum of beta**k over `steps` steps (None: for ever): how much a leaky sum can gather."""
    beta = np.asarray(beta, float)
    if steps is not None:
        return np.sum([beta**k for k in range(steps)], axis=0)
    with np.errstate(divide="ignore"):
        return np.where(beta < 1, 1 / (1 - np.minimum(beta, 1.0)), np.inf)


def gathered(x: Interval, beta: Any, steps: int | None, gain: Any = 1.0) -> Interval:
    """The range of v with v = beta * v + gain * x from v = 0, without any reset."""
    driven = scaled(x, np.asarray(gain, float), None)
    total = memory(beta, steps)
    lo, hi = times(driven.lo, total), times(driven.hi, total)
    return Interval(np.minimum(driven.lo, lo), np.maximum(driven.hi, hi), None)


def _drive(node: Neuron, x: Interval, steps: int | None) -> Interval:
    """The range of what a neuron compares with its threshold, its resets left out."""
    model: Any = node.model
    if node.bias is not None:
        x = x + Interval(node.bias, node.bias, None)
    match model:
        case CubaLIF() | CubaLI():
            u = gathered(x, model.alpha, steps, model.w_in)
            return gathered(u.with_zero(), model.beta, steps, model.r)
        case Membrane() | LI():
            return gathered(x, model.beta, steps, model.r)
        case SlidingWindow():
            up, down = model.taps.clip(0, None).sum(), model.taps.clip(None, 0).sum()
            x = x.with_zero()
            lo = times(up, x.lo) + times(down, x.hi)
            return Interval(lo, times(up, x.hi) + times(down, x.lo), None)
        case _:
            return x


def _sent(node: Neuron, x: Interval, steps: int | None) -> Interval:
    if isinstance(node.model, Relay):
        return x if node.bias is None else x + Interval(node.bias, node.bias, None)
    drive = _drive(node, x, steps)
    if not node.model.binary:
        return _with_leak(node.model, drive)
    return Interval(np.zeros(()), (~never_fires(node.model, drive)).astype(float), 1.0)


def _with_leak(model: NeuronModel, v: Interval) -> Interval:
    leak = np.asarray(getattr(model, "v_leak", 0.0))
    return v if not np.any(leak) else v + Interval(np.minimum(leak, 0), np.maximum(leak, 0), None)


def never_fires(model: NeuronModel, drive: Interval) -> np.ndarray:
    """Which neurons (broadcast) provably never reach their threshold, whatever comes."""
    theta = np.asarray(getattr(model, "v_threshold", 0.0))
    if isinstance(model, Membrane):
        lifted = np.any(model.v_leak) or np.any(np.asarray(model.v_reset) > 0)
        if lifted or np.any(theta <= 0):
            return np.zeros((), bool)
    # a reset only lowers v, and a v below zero decays upwards to zero at most
    high = drive.hi if isinstance(model, Threshold) else np.maximum(drive.hi, 0)
    return high <= theta if getattr(model, "strict", True) else high < theta


def _opaque(node: Opaque, values: list[Interval]) -> Interval:
    kind = node.kind.lower()
    if "lo" in node.meta and "hi" in node.meta:
        grid = 1.0 if node.meta.get("integer") else None
        return between(node.meta["lo"], node.meta["hi"], grid)
    if any(word in kind for word in ("sigmoid", "softmax", "gate")):
        return between(0.0, 1.0)
    if any(word in kind for word in ("matmul", "product", "attention", "einsum", "bmm")) and values:
        whole = all(v.grid == 1.0 for v in values)
        positive = all(bool(np.all(v.lo >= 0)) for v in values)
        return between(0.0 if positive else -np.inf, np.inf, 1.0 if whole else None)
    return between(-np.inf, np.inf)


def _observed(graph: Graph, node: Output, x: Interval, found: Mapping[str, Interval]) -> Interval:
    source = graph[node.inputs[0]]
    if node.observe == "out" or not isinstance(source, Neuron):
        return x
    model: Any = source.model
    arriving = found[source.inputs[0]]
    if source.bias is not None:
        arriving = arriving + Interval(source.bias, source.bias, None)
    if node.observe == "u":
        alpha, w_in = getattr(model, "alpha", 0.0), getattr(model, "w_in", 1.0)
        return gathered(arriving, alpha, graph.steps, w_in)
    if getattr(model, "reset", "none") != "none":
        return between(-np.inf, np.inf)
    return _with_leak(model, _drive(source, arriving, graph.steps).with_zero())
