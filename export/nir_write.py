"""Graph -> NIR: every node in standard NIR where NIR can say it, the rest in metadata.

One node of ours may become several of theirs: the owner carries the `ranvier` metadata, the others say
whose part they are. A sum (Join add) that one node takes is no node at all: NIR adds what arrives.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

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
from ranvier.export.nir_raw import RawNode
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
    own_fields,
)
from ranvier.train.errors import UnsupportedError

KEY = "ranvier"  # our metadata: one JSON text, and arrays under "ranvier:<field>"
VERSION = 1
DEFAULT_DT = 1e-4  # seconds a step, where neither the graph nor the file says one
SLOWEST = 2.0**-40  # the least 1 - beta that a time constant is made of


def encode(graph: Graph) -> tuple[RawNode, list[str]]:
    """(the NIR graph, what other tools will read differently: a line for each such node)."""
    writer = _Writer(graph)
    for node in graph:
        writer.node(node)
    return writer.finish(), writer.notes


def safe(name: str) -> str:
    """A name that HDF5 takes as one group: '%', '/' and a lone dot are escaped as in an address."""
    escaped = name.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return escaped.replace(".", "%2E") if set(escaped) <= {"."} else escaped


class _Writer:
    """Collects nodes first and wires them at the end, when every sender is known."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.shapes = graph, graph.shapes
        self.dt = graph.dt or DEFAULT_DT
        self.raw = RawNode("NIRGraph")
        self.notes: list[str] = []
        self.sends: dict[str, str] = {}  # our name -> the NIR node that sends its value
        self.shows: dict[str, str] = {}  # our neuron -> the NIR node that sends its v
        self.wires: list[tuple[str, list[str]]] = []  # NIR node -> our nodes whose sum it takes
        self.shape_of: dict[str, Shape] = {}  # NIR node -> the shape it sends
        self.dissolved: dict[str, Any] = {}
        self.binary = binary_nodes(graph)
        self.implicit = implicit_delays(graph)

    # what the emitters below use

    def add(self, key: str, kind: str, sends: Shape, /, **data: Any) -> str:
        taken, n = safe(key), 1
        while taken in self.raw.nodes:
            taken, n = f"{safe(key)}.{n}", n + 1
        self.raw.nodes[taken] = RawNode(kind, data)
        self.shape_of[taken] = sends
        return taken

    def chain(self, a: str, b: str) -> None:
        self.raw.edges.append((a, b))

    def own(self, node: Node, key: str, live: Mapping[str, Any] | None = None) -> None:
        """Writes our metadata to the NIR node `key`; `live` says which of its fields hold ours."""
        said = describe(node)
        for name, value in own_fields(node).items():
            for field, array in _arrays(name, value):
                where = (live or {}).get(field)
                if where is None:
                    where = [f"{KEY}:{field}"]
                    self.raw.nodes[key].meta[f"{KEY}:{field}"] = array
                _place(said["fields"], field, {"@": where})
        self.raw.nodes[key].meta[KEY] = json.dumps(said)

    def part(self, node: Node, key: str) -> str:
        self.raw.nodes[key].meta[KEY] = json.dumps({"part_of": node.name})
        return key

    def simple(
        self, node: Node, nir: str, live: Mapping[str, Any] | None = None, /, **data: Any
    ) -> str:
        key = self.add(node.name, nir, self.shapes[node.name], **data)
        self.own(node, key, live)
        self.wires.append((key, list(node.inputs)))
        self.sends[node.name] = key
        return key

    def finish(self) -> RawNode:
        for key, names in self.wires:
            total: Counter[str] = Counter()
            for name in names:
                total += self.expand(name)
            for source, times in total.items():
                self.chain(source if times == 1 else self.multiple(key, source, times), key)
        graph = self.graph
        said = {
            "version": VERSION,
            "steps": graph.steps,
            "dt": graph.dt,
            "spec": graph.spec,
            "order": list(graph.nodes),
            "dissolved": self.dissolved,
            "meta": plain(graph.meta),
        }
        self.raw.meta[KEY] = json.dumps(said)
        return self.raw

    def expand(self, name: str) -> Counter[str]:
        if name in self.sends:
            return Counter({self.sends[name]: 1})
        total: Counter[str] = Counter()
        for source in self.graph[name].inputs:
            total += self.expand(source)
        return total

    def multiple(self, key: str, source: str, times: int) -> str:
        """NIR has one edge between two nodes at most, so that h + h becomes an explicit 2h."""
        shape = self.shape_of[source]
        scale = self.add(
            f"{key}.{times}x.{source}", "Scale", shape, scale=full(float(times), shape)
        )
        self.raw.nodes[scale].meta[KEY] = json.dumps({"part_of": key})
        self.chain(source, scale)
        return scale

    # a node of ours

    def node(self, node: Node) -> None:
        shape = self.shapes[node.name]
        before = self.shapes[node.inputs[0]] if node.inputs else ()
        match node:
            case Input():
                self.simple(node, "Input", shape=np.array(shape, np.int64))
            case Output():
                self.output(node, shape)
            case Dense():
                self.dense(node, before)
            case Conv():
                self.conv(node, before)
            case Pool():
                self.pool(node, before)
            case Flatten():
                start, end = node.start % len(before), node.end % len(before)
                data = {
                    "input_type": np.array(before, np.int64),
                    "start_dim": start,
                    "end_dim": end,
                }
                self.simple(node, "Flatten", **data)
            case Norm():
                gain = node.gamma / np.sqrt(node.var + node.eps)
                tail = (-1, *[1] * (len(shape) - 1))
                shift = node.beta - node.mean * gain
                self.affine(node, gain.reshape(tail), shift.reshape(tail), shape)
            case Scale():
                self.scale(node, shape)
            case Subsample():
                self.subsample(node, before)
            case Upsample():
                self.unsaid(node, "Upsample", factor=np.array(node.factor, np.int64))
            case Join():
                self.join(node, shape)
            case Neuron():
                _neuron(self, node, shape)
            case Delay() if node.name in self.implicit:
                self.dissolve(node)
            case Delay():
                self.simple(node, "Delay", delay=full(node.steps * self.dt, shape))
            case Opaque():
                self.unsaid(node, "Opaque", kind=node.kind, reason=node.reason)

    def unsaid(self, node: Node, kind: str, /, **data: Any) -> None:
        """A node of a type that NIR does not have, so that other tools refuse it, not misread it."""
        self.simple(node, kind, **data)
        self.notes.append(f"'{node.name}': NIR has no {kind}; other tools will refuse this file")

    def dissolve(self, node: Node) -> None:
        self.dissolved[node.name] = describe(node)

    def output(self, node: Output, shape: Shape) -> None:
        key = self.simple(node, "Output", shape=np.array(shape, np.int64))
        if node.observe == "out":
            return
        shown = self.shows.get(node.inputs[0])
        if node.observe == "v" and shown is not None:
            self.wires.pop()
            self.chain(shown, key)
        else:
            self.notes.append(f"'{node.name}': observes {node.observe}; other tools see the spikes")

    def dense(self, node: Dense, before: Shape) -> None:
        lead = before[:-1]
        index = [0] * len(lead)
        live = {"weight": ["weight", index], "bias": ["bias", index]}
        weight = np.broadcast_to(node.weight, (*lead, *node.weight.shape))
        if node.bias is None:
            self.simple(node, "Linear", live, weight=weight)
        else:
            bias = np.broadcast_to(node.bias, (*lead, *node.bias.shape))
            self.simple(node, "Affine", live, weight=weight, bias=bias)

    def conv(self, node: Conv, before: Shape) -> None:
        live = {"weight": ["weight"], "bias": ["bias"]}
        bias = node.bias
        if bias is None:
            bias = np.zeros(node.weight.shape[0], node.weight.dtype)
        data = conv_data(before[1:], node.stride, node.padding, node.dilation, node.groups)
        kind = "Conv1d" if node.weight.ndim == 3 else "Conv2d"
        self.simple(node, kind, live, weight=node.weight, bias=bias, **data)

    def pool(self, node: Pool, before: Shape) -> None:
        if node.op == "max":
            self.max_pool(node)
        elif len(node.kernel) == 2:
            kind = "AvgPool2d" if node.op == "avg" else "SumPool2d"
            self.simple(node, kind, **pool_data(node))
        else:  # a depthwise convolution is exact; NIR pools in two dimensions only
            size = node.kernel[0]
            value = 1.0 if node.op == "sum" else 1.0 / size
            weight = np.full((before[0], 1, size), value, np.float32)
            data = conv_data(before[1:], node.stride, node.padding, (1,), before[0])
            self.simple(node, "Conv1d", weight=weight, bias=np.zeros(before[0], np.float32), **data)

    def max_pool(self, node: Pool) -> None:
        """On spikes the maximum is whether any came: a sum and a threshold."""
        if node.inputs[0] not in self.binary or len(node.kernel) != 2:
            self.unsaid(node, f"MaxPool{len(node.kernel)}d", **pool_data(node))
            return
        shape = self.shapes[node.name]
        summed = self.part(
            node, self.add(f"{node.name}.sum", "SumPool2d", shape, **pool_data(node))
        )
        self.wires.append((summed, list(node.inputs)))
        self.fires(node, shape, 0.0, [summed])

    def fires(self, node: Node, shape: Shape, level: Any, sources: list[str]) -> str:
        """A Threshold that owns the node, fed by NIR nodes `sources`."""
        key = self.add(node.name, "Threshold", shape, threshold=full(level, shape))
        self.own(node, key)
        for source in sources:
            self.chain(source, key)
        self.sends[node.name] = key
        return key

    def affine(self, node: Node, scale: Any, shift: Any, shape: Shape) -> None:
        key = self.add_affine(node.name, scale, shift, shape)
        self.own(node, key)
        self.wires.append((key, list(node.inputs)))
        self.sends[node.name] = key

    def add_affine(self, name: str, scale: Any, shift: Any, shape: Shape) -> str:
        """scale * x + shift in a standard node: a 1x1 convolution, or a diagonal Affine."""
        scale, shift = np.asarray(scale, np.float32), np.asarray(shift, np.float32)
        if len(shape) in (2, 3) and _per_channel(scale, shape) and _per_channel(shift, shape):
            n, ones = shape[0], [1] * (len(shape) - 1)
            weight = np.diag(np.broadcast_to(scale.ravel(), (n,))).reshape(n, n, *ones)
            data = conv_data(shape[1:], ones, [0] * len(ones), ones, 1)
            bias = np.broadcast_to(shift.ravel(), (n,))
            return self.add(name, f"Conv{len(ones)}d", shape, weight=weight, bias=bias, **data)
        size = math.prod(shape) * shape[-1] if shape else 1
        if size > 2**26:
            raise UnsupportedError(
                f"nir: '{name}' {shape} has a shift for each element; written as Affine it takes "
                f"{size:,} weights. Fold it into the layer before (graph.lower())"
            )
        weight = np.broadcast_to(scale, shape)[..., None] * np.eye(shape[-1], dtype=np.float32)
        return self.add(name, "Affine", shape, weight=weight, bias=full(shift, shape))

    def scale(self, node: Scale, shape: Shape) -> None:
        if node.shift is not None:
            self.affine(node, node.scale, node.shift, shape)
        else:
            self.simple(node, "Scale", scale=full(node.scale, shape))

    def place(self, name: str, n_in: int, n_out: int, at: int, spatial: Shape, stride: Any) -> str:
        """A standard node that puts n_in channels at channel `at` of n_out, taking every stride-th."""
        weight = np.zeros((n_out, n_in), np.float32)
        weight[at : at + n_in] = np.eye(n_in, dtype=np.float32)
        if not spatial:
            return self.add(name, "Linear", (n_out,), weight=weight)
        ones = [1] * len(spatial)
        data = conv_data(spatial, stride, [0] * len(ones), ones, 1)
        shape = (n_out, *(-(-n // s) for n, s in zip(spatial, stride, strict=True)))
        bias, weight = np.zeros(n_out, np.float32), weight.reshape(n_out, n_in, *ones)
        return self.add(name, f"Conv{len(ones)}d", shape, weight=weight, bias=bias, **data)

    def subsample(self, node: Subsample, before: Shape) -> None:
        n_out = self.shapes[node.name][0]
        if len(before) > 3:
            self.unsaid(node, "Subsample")
            return
        key = self.place(node.name, before[0], n_out, node.pad_channels[0], before[1:], node.stride)
        self.own(node, key)
        self.wires.append((key, list(node.inputs)))
        self.sends[node.name] = key

    def join(self, node: Join, shape: Shape) -> None:
        op = node.op
        spikes = all(i in self.binary for i in node.inputs)
        if op in ("mul", "max") and spikes and len(node.inputs) > 1:
            op = "and" if op == "mul" else "or"
        if len(node.inputs) == 1 or (op == "add" and self.alone(node)):
            self.dissolve(node)
        elif op == "add":
            self.simple(node, "Scale", scale=full(1.0, shape))
        elif op in ("and", "or"):
            level = 0.0 if op == "or" else float(len(node.inputs) - 1)
            key = self.fires(node, shape, level, [])
            self.wires.append((key, list(node.inputs)))
        elif op == "iand":
            self.iand(node, shape)
        elif op == "cat" and node.axis == 0 and len(shape) <= 3:
            self.concat(node, shape)
        else:
            self.unsaid(node, {"cat": "Concatenate", "mul": "Multiply"}.get(op, "Maximum"))

    def alone(self, node: Join) -> bool:
        return len(self.graph.consumers[node.name]) == 1

    def iand(self, node: Join, shape: Shape) -> None:
        """(1 - a) * b on spikes: a threshold of 0 on b - a; more inputs in a row."""
        first, *rest = node.inputs
        held = ""
        for i, other in enumerate(rest):
            negative = self.add(
                f"{node.name}.not{i or ''}", "Scale", shape, scale=full(-1.0, shape)
            )
            self.part(node, negative)
            if i == 0:
                self.wires.append((negative, [first]))
            else:
                self.chain(held, negative)
            if i == len(rest) - 1:
                key = self.fires(node, shape, 0.0, [negative])
            else:
                key = self.add(
                    f"{node.name}.step{i}", "Threshold", shape, threshold=full(0.0, shape)
                )
                self.part(node, key)
                self.chain(negative, key)
            self.wires.append((key, [other]))
            held = key

    def concat(self, node: Join, shape: Shape) -> None:
        """Each input is put at its channels by a matrix of ones and zeros; the sum is the whole."""
        key = self.add(node.name, "Scale", shape, scale=full(1.0, shape))
        self.own(node, key)
        at = 0
        for i, name in enumerate(node.inputs):
            n_in, *spatial = self.shapes[name]
            put = self.place(
                f"{node.name}.in{i}", n_in, shape[0], at, tuple(spatial), [1] * len(spatial)
            )
            self.wires.append((self.part(node, put), [name]))
            self.chain(put, key)
            at += n_in
        self.sends[node.name] = key


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


def _per_channel(a: np.ndarray, shape: Shape) -> bool:
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


def _neuron(w: _Writer, node: Neuron, shape: Shape) -> None:
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
            level = _level(model.v_threshold, model.strict)
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
        level = _level(model.v_threshold, model.strict)
        spikes = w.add(f"{node.name}.spikes", "Threshold", shape, threshold=full(level, shape))
        w.chain(key, w.part(node, spikes))
        w.sends[node.name] = spikes
    else:
        w.sends[node.name] = key
    if biased is None:
        w.wires.append((key, sources))
    else:
        w.chain(biased, key)


def _silent(w: _Writer, node: Neuron, model: Membrane, shape: Shape) -> str:
    """A membrane without reset is an integrator whose value a Threshold watches."""
    kind, data = neuron_data(model, shape, model.dt or w.dt)
    kept = {k: v for k, v in data.items() if k not in ("v_threshold", "v_reset")}
    return w.add(node.name, {"IF": "I", "LIF": "LI", "CubaLIF": "CubaLI"}[kind], shape, **kept)


def _level(threshold: Any, strict: bool) -> np.ndarray:
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
        data["v_threshold"] = _level(model.v_threshold, model.strict)
        data["v_reset"] = model.v_reset
    return kind, {k: full(v, shape) for k, v in data.items()}


def _remark(w: _Writer, node: Neuron, model: NeuronModel) -> None:
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
    w: _Writer, node: Neuron, model: SlidingWindow, shape: Shape, biased: str | None
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
    w.fires(node, shape, _level(model.v_threshold, model.strict), arms)


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


def _arrays(name: str, value: Any) -> list[tuple[str, np.ndarray]]:
    if isinstance(value, np.ndarray):
        return [(name, value)]
    if isinstance(value, NeuronModel):
        return [(f"model.{k}", v) for k, v in value.params().items() if isinstance(v, np.ndarray)]
    return []


def _place(fields: dict[str, Any], path: str, value: Any) -> None:
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
        if not isinstance(node, Delay) or not closing or node.steps != 1 or not isinstance(graph[node.inputs[0]], Neuron):
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
