"""What turns one step into a model: a Scan over time, or the step with its states outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ranvier.export.nodes import Reduce, Shape
from ranvier.export.onnx_build import BATCH, FLOAT, INT64, IR_VERSION, OPSET, Body, tensor

NEXT = ".next"  # what a state is called on its way out


@dataclass(frozen=True)
class Port:
    """A value that enters or leaves a step: `[batch, *shape]` of an ONNX type."""

    shape: Shape
    dtype: int = FLOAT


@dataclass(frozen=True)
class Network:
    """A step and its ends, by their outside names.

    step      adds one step to a Body, given the value of each input: (outputs, new states)
    readouts  adds what is made of the series outside the loop; the names of those values
    """

    inputs: dict[str, Port]
    states: dict[str, Port]
    outputs: dict[str, Port]
    step: Callable[[Body, dict[str, str]], tuple[dict[str, str], dict[str, str]]]
    readouts: Callable[[Body], list[str]]


def one_step(net: Network) -> onnx.ModelProto:
    """Inputs and states in, outputs and "<state>.next" out."""
    body = Body({})
    inputs = [_info(name, port) for name, port in (net.inputs | net.states).items()]
    body.infos.update({i.name: i for i in inputs})
    outputs, states = _add_step(body, net, {name: name for name in net.inputs})
    proto = body.graph("step", inputs, outputs + states)
    return _model(proto, body, net, None, False)


def sequence(net: Network, steps: int, static: bool) -> onnx.ModelProto:
    """Inputs `[steps, batch, ...]`, or `[batch, ...]` held if `static`; series and readouts out."""
    outer = Body({})
    inner = Body(outer.constants)
    lead = (BATCH,) if static else (steps, BATCH)
    inputs = [tensor(n, (*lead, *p.shape), p.dtype) for n, p in net.inputs.items()]
    arrive = [_info(name, port) for name, port in net.states.items()]
    slices = (
        [tensor("clock", ())] if static else [_info(f"{n}.now", p) for n, p in net.inputs.items()]
    )
    held = [_info(name, port) for name, port in net.inputs.items()] if static else []
    inner.infos.update({i.name: i for i in [*arrive, *slices, *held]})
    outputs, states = _add_step(inner, net, {n: n if static else f"{n}.now" for n in net.inputs})
    for info in held:  # of the outer graph
        del inner.infos[info.name]
    step = inner.graph("step", [*arrive, *slices], states + outputs)
    for name, port in net.inputs.items():
        outer.infos[name] = tensor(name, (*lead, *port.shape), port.dtype)
    first = _zeros(outer, net, next(iter(net.inputs)), 0 if static else 1)
    over = [outer.constant(np.zeros(steps))] if static else list(net.inputs)
    _scan(outer, net, step, first, over, steps)
    ends = [*net.outputs, *net.readouts(outer)]
    return _model(outer.graph("sequence", inputs, ends), outer, net, steps, static)


def _info(name: str, port: Port) -> onnx.ValueInfoProto:
    return tensor(name, (BATCH, *port.shape), port.dtype)


def _add_step(body: Body, net: Network, entries: dict[str, str]) -> tuple[list[str], list[str]]:
    """Adds the step and names its ends as the outside knows them."""
    values, new = net.step(body, entries)
    for name in net.outputs:
        body.rename(values[name], name)
    for name in net.states:
        body.rename(new[name], name + NEXT)
    return list(net.outputs), [name + NEXT for name in net.states]


def _zeros(outer: Body, net: Network, like: str, axis: int) -> list[str]:
    """Zero states for the batch size that `like` has."""
    if not net.states:
        return []
    size = outer.op("Shape", [like], (1,), dtype=INT64, lead=(), start=axis, end=axis + 1)
    made: dict[Port, str] = {}
    for port in net.states.values():
        if port not in made:
            rest = outer.constant(list(port.shape), np.int64)
            n = (1 + len(port.shape),)
            full = outer.op("Concat", [size, rest], n, dtype=INT64, lead=(), axis=0)
            zero = helper.make_tensor("zero", port.dtype, [1], [0])
            made[port] = outer.op(
                "ConstantOfShape", [full], port.shape, dtype=port.dtype, value=zero
            )
    return [made[port] for port in net.states.values()]


def _scan(
    outer: Body, net: Network, step: onnx.GraphProto, first: list[str], over: list[str], steps: int
) -> None:
    last = [f"{name}.last" for name in net.states]
    ends = [*last, *net.outputs]
    node = helper.make_node(
        "Scan", [*first, *over], ends, name="time", body=step, num_scan_inputs=len(over)
    )
    outer.nodes.append(node)
    for name, port in zip(last, net.states.values(), strict=True):
        outer.infos[name] = _info(name, port)
    for name, port in net.outputs.items():
        outer.infos[name] = tensor(name, (steps, BATCH, *port.shape), port.dtype)


def add_reduction(outer: Body, series: str, name: str, how: Reduce, port: Port) -> str:
    """Adds the reduction of a series over time, as `Graph.readout` makes it."""
    kind: dict[str, Any] = {"dtype": port.dtype}
    if how == "sum":
        axes = outer.constant([0], np.int64)
        return outer.op("ReduceSum", [series, axes], port.shape, name, keepdims=0, **kind)
    if how == "last":
        index = outer.constant(-1, np.int64)
        return outer.op("Gather", [series, index], port.shape, name, axis=0, **kind)
    word = {"mean": "ReduceMean", "max": "ReduceMax"}[how]
    return outer.op(word, [series], port.shape, name, axes=[0], keepdims=0, **kind)


def _model(
    proto: onnx.GraphProto, body: Body, net: Network, steps: int | None, static: bool
) -> onnx.ModelProto:
    proto.initializer.extend(body.constants.values())
    model = helper.make_model(
        proto,
        producer_name="ranvier",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    states: dict[str, Any] = {name: list(port.shape) for name, port in net.states.items()}
    said = {"steps": steps, "static": static, "states": states}
    helper.set_model_props(model, {"ranvier": json.dumps(said)})
    return model
