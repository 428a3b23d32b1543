"""One time step of a Graph as ONNX operators, in the float order of the interpreter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from typing_extensions import assert_never

from ranvier.export.graph import Graph
from ranvier.export.neurons import (
    IF,
    LI,
    LIF,
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
from ranvier.export.onnx_build import BOOL, Body
from ranvier.train.errors import UnsupportedError

FAR = 2**63 - 1  # "to the end" for Slice


def state_shapes(graph: Graph) -> dict[str, Shape]:
    """State name -> shape without batch: "<neuron>.<state>", and "<delay>.<age>" for a Delay."""
    found: dict[str, Shape] = {}
    for node in graph:
        shape = graph.shapes[node.name]
        if isinstance(node, Neuron):
            kept = node.model.initial(np.zeros((1, *shape), np.float32))
            found.update({f"{node.name}.{key}": shape for key in kept})
        elif isinstance(node, Delay):
            found.update({f"{node.name}.{i}": shape for i in range(node.steps)})
    return found


def add_step(
    body: Body, graph: Graph, inputs: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Adds one step; (our node -> its value, state -> its new value).

    inputs  our Input -> the ONNX value that brings it; states come in under their own names

    Raises UnsupportedError naming a node that ONNX cannot run.
    """
    values, states = dict(inputs), {}
    for node in graph:
        if isinstance(node, Input):
            continue
        shape = graph.shapes[node.name]
        match node:
            case Delay():
                values[node.name] = f"{node.name}.0"
            case Neuron():
                values[node.name], new = add_neuron(body, node, values[node.inputs[0]], shape)
                states.update({f"{node.name}.{k}": v for k, v in new.items()})
            case Output() if node.observe != "out":
                values[node.name] = states[f"{node.inputs[0]}.{node.observe}"]
            case Output():
                values[node.name] = values[node.inputs[0]]
            case _:
                taken = [values[i] for i in node.inputs]
                before = [graph.shapes[i] for i in node.inputs]
                values[node.name] = add_node(body, node, taken, before, shape)
    for node in graph:
        if isinstance(node, Delay):
            line = [f"{node.name}.{i}" for i in range(1, node.steps)] + [values[node.inputs[0]]]
            states.update({f"{node.name}.{i}": v for i, v in enumerate(line)})
    return values, states


def add_node(body: Body, node: Node, taken: list[str], before: list[Shape], shape: Shape) -> str:
    """Adds a node without state; returns its value's name."""
    x = taken[0] if taken else ""
    match node:
        case Conv():
            inputs = [x, body.constant(node.weight)]
            if node.bias is not None:
                inputs.append(body.constant(node.bias))
            return body.op(
                "Conv",
                inputs,
                shape,
                strides=list(node.stride),
                pads=[*node.padding, *node.padding],
                dilations=list(node.dilation),
                group=node.groups,
                kernel_shape=list(node.weight.shape[2:]),
            )
        case Dense():
            weight = body.constant(np.ascontiguousarray(node.weight.T))
            flat = (*before[0][:-1], len(node.weight))
            y = body.op("MatMul", [x, weight], flat)
            if node.bias is not None:
                y = body.op("Add", [y, body.constant(node.bias)], flat)
            if node.out_shape is None:
                return y
            return body.op("Reshape", [y, body.constant([-1, *shape], np.int64)], shape)
        case Pool():
            return add_pool(body, node, x, shape)
        case Flatten():
            target = body.constant([-1, *shape], np.int64)
            return body.op("Reshape", [x, target], shape)
        case Norm():
            params = [body.constant(p) for p in (node.gamma, node.beta, node.mean, node.var)]
            return body.op("BatchNormalization", [x, *params], shape, epsilon=node.eps)
        case Scale():
            y = body.op("Mul", [x, body.constant(node.scale)], shape)
            return (
                y if node.shift is None else body.op("Add", [y, body.constant(node.shift)], shape)
            )
        case Subsample():
            return add_subsample(body, node, x, before[0], shape)
        case Upsample():
            scales = body.constant([1.0, 1.0, *node.factor])
            how: dict[str, Any] = {
                "coordinate_transformation_mode": "asymmetric",
                "nearest_mode": "floor",
            }
            return body.op("Resize", [x, "", scales], shape, mode="nearest", **how)
        case Join():
            return add_join(body, node, taken, shape)
        case Opaque():
            raise UnsupportedError(
                f"onnx: '{node.name}' ({node.kind}) cannot be written: {node.reason}"
            )
        case Input() | Neuron() | Delay() | Output():
            raise UnsupportedError(f"onnx: '{node.name}' has state; it is not written by itself")
        case _:
            assert_never(node)


def add_pool(body: Body, node: Pool, x: str, shape: Shape) -> str:
    window: dict[str, Any] = {
        "kernel_shape": list(node.kernel),
        "strides": list(node.stride),
        "pads": [*node.padding, *node.padding],
    }
    if node.op == "max":
        return body.op("MaxPool", [x], shape, **window)
    mean = body.op("AveragePool", [x], shape, count_include_pad=1, **window)
    if node.op == "avg":
        return mean
    return body.op("Mul", [mean, body.constant(float(math.prod(node.kernel)))], shape)


def add_subsample(body: Body, node: Subsample, x: str, before: Shape, shape: Shape) -> str:
    n = len(node.stride)
    if n:
        axes = body.constant(range(2, 2 + n), np.int64)
        starts, ends = body.constant([0] * n, np.int64), body.constant([FAR] * n, np.int64)
        steps = body.constant(node.stride, np.int64)
        x = body.op("Slice", [x, starts, ends, axes, steps], (before[0], *shape[1:]))
    if node.pad_channels == (0, 0):
        return x
    front, back = node.pad_channels
    pads = body.constant([0, front, *[0] * n, 0, back, *[0] * n], np.int64)
    return body.op("Pad", [x, pads], shape)


def add_join(body: Body, node: Join, taken: list[str], shape: Shape) -> str:
    if len(taken) == 1:
        return taken[0]
    if node.op == "cat":
        return body.op("Concat", taken, shape, axis=1 + node.axis)
    kind = {"add": "Add", "and": "Mul", "mul": "Mul", "iand": "Mul", "or": "Max", "max": "Max"}
    first, *rest = taken
    for other in rest:
        if node.op == "iand":
            first = body.op("Sub", [body.constant(1.0), first], shape)
        first = body.op(kind[node.op], [first, other], shape)
    return first


# neurons


class _Cell:
    """Arithmetic on one population's values, in the order of `ranvier.export.neurons`."""

    def __init__(self, body: Body, shape: Shape) -> None:
        self.body, self.shape = body, shape

    def num(self, value: Any) -> str:
        return self.body.constant(value)

    def two(self, kind: str, a: str, b: str) -> str:
        return self.body.op(kind, [a, b], self.shape)

    def above(self, v: str, model: Membrane | Threshold | SlidingWindow) -> str:
        kind = "Greater" if model.strict else "GreaterOrEqual"
        return self.body.op(kind, [v, self.num(model.v_threshold)], self.shape, dtype=BOOL)

    def as_float(self, mask: str) -> str:
        return self.body.op("Cast", [mask], self.shape, to=1)

    def where(self, mask: str, a: str, b: str) -> str:
        return self.body.op("Where", [mask, a, b], self.shape)

    def decayed(self, v: str, beta: Any, leak: Any) -> str:
        if isinstance(leak, float) and leak == 0.0:
            one = isinstance(beta, float) and beta == 1.0
            return v if one else self.two("Mul", self.num(beta), v)
        moved = self.two("Mul", self.num(beta), self.two("Sub", v, self.num(leak)))
        return self.two("Add", self.num(leak), moved)

    def gained(self, current: str, r: Any) -> str:
        one = isinstance(r, float) and r == 1.0
        return current if one else self.two("Mul", self.num(r), current)

    def integrate(self, m: Membrane, v: str, current: str) -> tuple[str, str]:
        late = self.above(v, m) if m.timing != "immediate" and m.reset != "none" else ""
        before = v
        if m.reset == "zero" and m.timing == "delayed":
            before = self.where(late, self.num(m.v_reset), v)
        h = self.two("Add", self.decayed(before, m.beta, m.v_leak), self.gained(current, m.r))
        if m.reset == "subtract" and late:
            h = self.two("Sub", h, self.two("Mul", self.as_float(late), self.num(m.v_threshold)))
        if m.reset == "zero" and m.timing == "discard":
            h = self.where(late, self.num(m.v_reset), h)
        fired = self.above(h, m)
        spikes = self.as_float(fired)
        if m.reset == "none" or m.timing in ("delayed", "discard"):
            return spikes, h
        if m.reset == "zero":
            return spikes, self.where(fired, self.num(m.v_reset), h)
        taken = self.two("Sub", spikes, self.as_float(late)) if late else spikes
        return spikes, self.two("Sub", h, self.two("Mul", taken, self.num(m.v_threshold)))

    def synapse(self, m: CubaLIF | CubaLI, u: str, x: str) -> str:
        return self.two(
            "Add", self.two("Mul", self.num(m.alpha), u), self.two("Mul", self.num(m.w_in), x)
        )

    def window(self, m: SlidingWindow, name: str, x: str) -> tuple[str, dict[str, str]]:
        past = [x, *(f"{name}.x{i}" for i in range(1, len(m.taps)))]
        terms = [
            self.two("Mul", self.num(float(w)), p) for w, p in zip(m.taps[::-1], past, strict=True)
        ]
        h, *rest = terms
        for term in rest:
            h = self.two("Add", h, term)
        new = {f"x{i}": past[i - 1] for i in range(1, len(m.taps))}
        return self.as_float(self.above(h, m)), new


def add_neuron(body: Body, node: Neuron, x: str, shape: Shape) -> tuple[str, dict[str, str]]:
    """Adds a population's step; (its output, state -> new value)."""
    cell, model, name = _Cell(body, shape), node.model, node.name
    if node.bias is not None:
        x = cell.two("Add", x, cell.num(node.bias))
    match model:
        case IF() | LIF():
            spikes, v = cell.integrate(model, f"{name}.v", x)
            return spikes, {"v": v}
        case CubaLIF():
            u = cell.synapse(model, f"{name}.u", x)
            spikes, v = cell.integrate(model, f"{name}.v", u)
            return spikes, {"u": u, "v": v}
        case LI():
            v = _integrated(cell, model, f"{name}.v", x)
            return v, {"v": v}
        case CubaLI():
            u = cell.synapse(model, f"{name}.u", x)
            v = _integrated(cell, model, f"{name}.v", u)
            return v, {"u": u, "v": v}
        case Threshold():
            return cell.as_float(cell.above(x, model)), {}
        case Relay():
            return x, {}
        case SlidingWindow():
            return cell.window(model, name, x)
        case _:
            raise _unknown(node, model)


def _integrated(cell: _Cell, m: LI | CubaLI, v: str, x: str) -> str:
    """leak + beta * (v - leak) + r * x, with no shortcut for a leak of zero: as LI.step has it."""
    leak = cell.num(m.v_leak)
    moved = cell.two("Mul", cell.num(m.beta), cell.two("Sub", v, leak))
    return cell.two("Add", cell.two("Add", leak, moved), cell.two("Mul", cell.num(m.r), x))


def _unknown(node: Neuron, model: NeuronModel) -> UnsupportedError:
    return UnsupportedError(
        f"onnx: '{node.name}' is a {type(model).__name__}, which has no ONNX form"
    )
