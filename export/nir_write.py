"""Graph -> NIR: every node in standard NIR where NIR can say it, the rest in metadata.

One node of ours may become several of theirs: the owner carries the `ranvier` metadata, the others
say whose part they are. A sum (Join add) that one node takes is no node at all: NIR adds what
arrives.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ranvier.export.graph import Graph
from ranvier.export.nir_cells import add_neuron
from ranvier.export.nir_raw import RawNode
from ranvier.export.nir_words import (
    DEFAULT_DT,
    KEY,
    VERSION,
    arrays_of,
    binary_nodes,
    conv_data,
    describe,
    full,
    implicit_delays,
    per_channel,
    plain,
    pool_data,
    put_at,
    safe,
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
    own_fields,
)
from ranvier.train.errors import UnsupportedError


def encode(graph: Graph) -> tuple[RawNode, list[str]]:
    """(the NIR graph, what other tools will read differently: a line for each such node)."""
    writer = Writer(graph)
    for node in graph:
        writer.node(node)
    return writer.finish(), writer.notes


class Writer:
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
            for field, array in arrays_of(name, value):
                where = (live or {}).get(field)
                if where is None:
                    where = [f"{KEY}:{field}"]
                    self.raw.nodes[key].meta[f"{KEY}:{field}"] = array
                put_at(said["fields"], field, {"@": where})
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
                add_neuron(self, node, shape)
            case Delay() if node.name in self.implicit:
                self.dissolve(node)
            case Delay():
                self.simple(node, "Delay", delay=full(node.steps * self.dt, shape))
            case Opaque():
                self.unsaid(node, "Opaque", kind=node.kind, reason=node.reason)

    def unsaid(self, node: Node, kind: str, /, **data: Any) -> None:
        """A node of a type that NIR does not have, so that other tools refuse it."""
        self.simple(node, kind, **data)
        self.refused(node, kind)

    def refused(self, node: Node, kind: str) -> None:
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
            key = self.simple(node, "Linear", live, weight=weight)
        else:
            bias = np.broadcast_to(node.bias, (*lead, *node.bias.shape))
            key = self.simple(node, "Affine", live, weight=weight, bias=bias)
        if node.out_shape is not None:
            laid = self.add(f"{node.name}.shaped", "Unflatten", node.out_shape)
            self.chain(key, self.part(node, laid))
            self.sends[node.name] = laid
            self.refused(node, "Unflatten")

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
        if len(shape) in (2, 3) and per_channel(scale, shape) and per_channel(shift, shape):
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
        """A standard node that puts n_in channels at channel `at` of n_out, by the stride."""
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
