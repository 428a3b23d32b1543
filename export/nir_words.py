"""What a Graph is called in NIR: the parts of `nir_write` that only compute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ranvier.export.graph import Graph
from ranvier.export.neurons import IF, LI, LIF, CubaLI, CubaLIF, Membrane, NeuronModel
from ranvier.export.nodes import (
    Delay,
    Flatten,
    Input,
    Join,
    Neuron,
    Node,
    Pool,
    Shape,
    Subsample,
    Upsample,
    own_fields,
)
from ranvier.train.errors import UnsupportedError

KEY = "ranvier"  # our metadata: one JSON text, and arrays under "ranvier:<field>"
VERSION = 1
DEFAULT_DT = 1e-4  # seconds a step, where neither the graph nor the file says one
SLOWEST = 2.0**-40  # the least 1 - beta that a time constant is made of


def safe(name: str) -> str:
    """A name that HDF5 takes as one group: '%', '/' and a lone dot are escaped as in an address."""
    escaped = name.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return escaped.replace(".", "%2E") if set(escaped) <= {"."} else escaped


def full(value: Any, shape: Shape) -> np.ndarray:
    """`value` for every element of `shape`, float32 as NIR files usually are."""
    return np.ascontiguousarray(np.broadcast_to(np.asarray(value, np.float32), shape))


def conv_data(
    spatial: Shape, stride: Any, padding: Any, dilation: Any, groups: int
) -> dict[str, Any]:
    """The geometry of a Conv1d (integers) or Conv2d (pairs), as NIR stores it."""
    fields = {"input_shape": spatial, "stride": stride, "padding": padding, "dilation": dilation}
    if len(spatial) == 1:
        return {**{k: int(v[0]) for k, v in fields.items()}, "groups": int(groups)}
    return {**{k: np.array(v, np.int64) for k, v in fields.items()}, "groups": int(groups)}


def pool_data(node: Pool) -> dict[str, Any]:
    return {
        "kernel_size": np.array(node.kernel, np.int64),
        "stride": np.array(node.stride, np.int64),
        "padding": np.array(node.padding, np.int64),
    }


def per_channel(a: np.ndarray, shape: Shape) -> bool:
    return a.size == 1 or (a.ndim == len(shape) and a.shape == (shape[0], *[1] * (len(shape) - 1)))


# neurons


def gains(beta: Any, dt: float, decay: str) -> tuple[np.ndarray, np.ndarray]:
    """(tau in seconds, the NIR resistance that makes the input's gain 1) for a decay a step.

    Euler: beta = 1 - dt/tau, the gain is dt/tau * R. Exponential: beta = exp(-dt/tau), the gain is
    (1 - beta) * R. Both need R = 1 / (1 - beta); a decay of 1 has no tau and gets a very long one.
    """
    b = np.asarray(beta, np.float64)
    rest = np.where(np.abs(1.0 - b) < SLOWEST, SLOWEST, 1.0 - b)
    tau = dt / rest
    if decay == "exponential":
        inside = (b > 0) & (b < 1.0 - SLOWEST)
        tau = np.where(inside, -dt / np.log(np.where(inside, b, 0.5)), tau)
    return tau, 1.0 / rest


def fire_level(threshold: Any, strict: bool) -> np.ndarray:
    """The level above which NIR fires (it is strict): just below where v >= threshold is meant."""
    level = np.asarray(threshold, np.float32)
    return level if strict else np.nextafter(level, np.float32(-np.inf))


def neuron_data(model: NeuronModel, shape: Shape, dt: float) -> tuple[str, dict[str, np.ndarray]]:
    """(NIR type, its fields) nearest to a model: same decay and gain a step of `dt`."""
    if not isinstance(model, (IF, LIF, CubaLIF, LI, CubaLI)):
        raise UnsupportedError(f"nir: it has no word for the neuron model {type(model).__name__}")
    tau, unit = gains(model.beta, dt, model.decay)
    r = np.asarray(model.r, np.float64)
    still = bool(np.all(np.asarray(model.beta) == 1.0) and np.all(np.asarray(model.v_leak) == 0.0))
    data: dict[str, Any] = {"tau": tau, "r": r * unit, "v_leak": model.v_leak}
    kind = type(model).__name__
    if isinstance(model, (CubaLIF, CubaLI)):
        tau_syn, w_unit = gains(model.alpha, dt, model.decay)
        data = {"tau_syn": tau_syn, "tau_mem": tau, "r": r * unit, "v_leak": model.v_leak}
        data["w_in"] = np.asarray(model.w_in, np.float64) * w_unit
    elif still:
        kind, data = ("I" if isinstance(model, LI) else "IF"), {"r": r}
    elif isinstance(model, IF):
        kind = "LIF"
    if isinstance(model, Membrane):
        data["v_threshold"] = fire_level(model.v_threshold, model.strict)
        data["v_reset"] = model.v_reset
    return kind, {k: full(v, shape) for k, v in data.items()}


# metadata


def describe(node: Node) -> dict[str, Any]:
    """What JSON can say of a node; arrays are left to `own`."""
    said: dict[str, Any] = {
        "node": type(node).__name__,
        "name": node.name,
        "inputs": list(node.inputs),
    }
    fields = {k: v for k, v in own_fields(node).items() if not isinstance(v, np.ndarray)}
    fields.pop("function", None)
    model = fields.get("model")
    if isinstance(model, NeuronModel):
        kept = {k: v for k, v in model.params().items() if not isinstance(v, np.ndarray)}
        fields["model"] = {"model": type(model).__name__, **kept}
    said["fields"] = fields
    if node.source:
        said["source"] = node.source
    if meta := plain(node.meta):
        said["meta"] = meta
    return json.loads(json.dumps(said, default=_number))


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(type(value).__name__)


def plain(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that JSON can say."""
    found: dict[str, Any] = {}
    for key, value in meta.items():
        try:
            found[str(key)] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return found


def arrays_of(name: str, value: Any) -> list[tuple[str, np.ndarray]]:
    if isinstance(value, np.ndarray):
        return [(name, value)]
    if isinstance(value, NeuronModel):
        return [(f"model.{k}", v) for k, v in value.params().items() if isinstance(v, np.ndarray)]
    return []


def put_at(fields: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        fields = fields[parent]
    fields[last] = value


# what the graph tells


def binary_nodes(graph: Graph) -> set[str]:
    """The nodes whose values are 0 or 1 for certain."""
    found: set[str] = set()
    for node in graph:
        fed = all(i in found for i in node.inputs)
        match node:
            case Input():
                sure = node.integer and node.lo >= 0 and node.hi <= 1
            case Neuron():
                sure = node.model.binary
            case Flatten() | Subsample() | Upsample():
                sure = fed
            case Pool():
                sure = fed and node.op == "max"
            case Join():
                sure = fed and (node.op != "add" or len(node.inputs) == 1)
            case Delay():
                sure = fed or _closes_on_spikes(graph, node)
            case _:
                sure = False
        if sure:
            found.add(node.name)
    return found


def _closes_on_spikes(graph: Graph, node: Delay) -> bool:
    source = graph[node.inputs[0]]
    return isinstance(source, Neuron) and source.model.binary


def implicit_delays(graph: Graph) -> set[str]:
    """Delays of one step that are the only delay of their cycles: NIR's own reading of a cycle.

    NIR's tools take a cycle without a Delay as one step late; so such a Delay needs no node, and
    snntorch's and others' recurrent layers look as they expect them.
    """
    place = {name: i for i, name in enumerate(graph.nodes)}
    found = set()
    for node in graph:
        closing = isinstance(node, Delay) and place[node.inputs[0]] >= place[node.name]
        if (
            not isinstance(node, Delay)
            or not closing
            or node.steps != 1
            or not isinstance(graph[node.inputs[0]], Neuron)
        ):
            continue
        loop = _reached(graph, node.name, True) & _reached(graph, node.name, False)
        if sum(isinstance(graph[n], Delay) for n in loop) == 1:
            found.add(node.name)
    return found


def _reached(graph: Graph, start: str, forward: bool) -> set[str]:
    seen, todo = {start}, [start]
    while todo:
        name = todo.pop()
        for other in graph.consumers[name] if forward else graph[name].inputs:
            if other not in seen:
                seen.add(other)
                todo.append(other)
    return seen
