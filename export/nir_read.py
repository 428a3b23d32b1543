"""NIR of other tools -> Graph: structure (nested graphs, cycles, missing ends) here, single nodes
in `nir_nodes`.

A cycle without a Delay is one step late, as NIR's discrete tools run it: the step is put where a
neuron's spikes leave for the loop.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from ranvier.export.graph import Graph
from ranvier.export.nir_fields import (
    STATEFUL,
    STATELESS,
    Context,
    batch_axis,
    declared_shape_fits,
    in_shape,
    oblong_kernels,
    out_shape,
    shape_field,
    spyx_dialect,
)
from ranvier.export.nir_nodes import convert
from ranvier.export.nir_raw import MAX_DEPTH, RawNode
from ranvier.export.nodes import Delay, Input, Join, Node, Output, Shape, output_shape
from ranvier.train.errors import FormatError, ShapeError, UnsupportedError

KNOWN = {"Input", "Output", *STATEFUL, *STATELESS}


def decode(raw: RawNode, context: Context, steps: int | None) -> Graph:
    """The Graph of a NIR graph. Raises FormatError, ShapeError, RangeError or UnsupportedError."""
    flat = flatten(raw, "", 0)
    check(flat)
    spliced(flat)
    complete(flat)
    context.spyx = spyx_dialect(flat)
    context.batched = batch_axis(flat)
    context.oblong = oblong_kernels(flat)
    context.note_dialects()
    nodes = _Builder(flat, context).build()
    meta = {"nir": {"version": raw.version, "notes": list(context.notes)}}
    return Graph.of(nodes, steps=steps, dt=context.dt, meta=meta)


@dataclass
class Flat:
    """A NIR graph without nesting; `wires` are the ends of nested graphs, which only pass values
    on.
    """

    nodes: dict[str, RawNode] = field(default_factory=dict)
    edges: Counter[tuple[str, str]] = field(default_factory=Counter)
    wires: set[str] = field(default_factory=set)

    def sources(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {name: [] for name in self.nodes}
        for (a, b), times in self.edges.items():
            found[b] += [a] * times
        return found

    def targets(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {name: [] for name in self.nodes}
        for a, b in self.edges:
            found[a].append(b)
        return found


def flatten(raw: RawNode, prefix: str, depth: int) -> Flat:
    """All nodes of nested graphs under "outer.inner" names; their inner ends become wires."""
    if depth > MAX_DEPTH:
        raise FormatError(f"nir: graphs nest deeper than {MAX_DEPTH}")
    flat, ends = Flat(), {}
    for key, node in raw.nodes.items():
        name = prefix + key
        if node.type != "NIRGraph":
            flat.nodes[name] = node
            if prefix and node.type in ("Input", "Output"):
                flat.wires.add(name)
            continue
        inner = flatten(node, f"{name}.", depth + 1)
        flat.nodes |= inner.nodes
        flat.edges += inner.edges
        flat.wires |= inner.wires
        ends[key] = (_end(node, name, "Input"), _end(node, name, "Output"))
    for a, b in raw.edges:
        for end in (a, b):
            if end not in raw.nodes:
                raise FormatError(f"nir: the edge '{a}' -> '{b}' names '{end}', which is no node")
        edge = (ends[a][1] if a in ends else prefix + a, ends[b][0] if b in ends else prefix + b)
        flat.edges[edge] += 1
        if flat.edges[edge] > 1:
            raise FormatError(
                f"nir: the edge '{a}' -> '{b}' stands twice; nir 1.0 forbids it, and whether it "
                "means once or twice is not clear. Write 2h as a Scale of 2"
            )
    return flat


def _end(node: RawNode, name: str, kind: str) -> str:
    found = [k for k, n in node.nodes.items() if n.type == kind]
    if len(found) != 1:
        raise UnsupportedError(
            f"nir: the nested graph '{name}' has {len(found)} {kind} nodes; one is needed, since "
            "an edge to a graph cannot say which"
        )
    return f"{name}.{found[0]}"


def check(flat: Flat) -> None:
    for name, node in flat.nodes.items():
        if node.type not in KNOWN:
            raise UnsupportedError(
                f"nir: node '{name}' has type '{node.type}', which NIR 1.0 does not have; "
                f"it knows {', '.join(sorted(KNOWN))}"
            )


def spliced(flat: Flat) -> None:
    """Takes the wires out: what came in goes on to each of their targets."""
    for wire in sorted(flat.wires):
        before = {a: n for (a, b), n in flat.edges.items() if b == wire}
        after = {b: n for (a, b), n in flat.edges.items() if a == wire}
        for edge in [e for e in flat.edges if wire in e]:
            del flat.edges[edge]
        for a, n in before.items():
            for b, m in after.items():
                flat.edges[a, b] += n * m
        del flat.nodes[wire]


def complete(flat: Flat) -> None:
    """Gives every root an Input, and every leaf an Output where the graph has none; checks the
    ends.
    """
    if not flat.nodes:
        raise FormatError("nir: the graph has no nodes")
    sources, targets = flat.sources(), flat.targets()
    ends = any(n.type == "Output" for n in flat.nodes.values())
    for name, node in list(flat.nodes.items()):
        if node.type == "Input" and sources[name]:
            raise FormatError(
                f"nir: Input '{name}' takes '{sources[name][0]}'; an Input takes nothing"
            )
        if node.type == "Output" and targets[name]:
            raise FormatError(
                f"nir: Output '{name}' feeds '{targets[name][0]}'; an Output feeds nothing"
            )
        if node.type == "Output" and not sources[name]:
            raise FormatError(f"nir: nothing leads to Output '{name}'")
        if not sources[name] and node.type != "Input":
            shape = in_shape(node)
            if shape is None:
                raise FormatError(f"nir: nothing leads to '{name}' and its input shape is not said")
            end = _new(flat, f"input_{name}", RawNode("Input", {"shape": np.array(shape)}))
            flat.edges[end, name] += 1
        if not targets[name] and node.type != "Output" and not ends:
            flat.edges[name, _new(flat, f"output_{name}", RawNode("Output"))] += 1
    if not any(n.type == "Input" for n in flat.nodes.values()):
        raise FormatError("nir: the graph has no Input; add one to say where its values come in")
    if not any(n.type == "Output" for n in flat.nodes.values()):
        raise FormatError("nir: the graph has no Output; add one to say which value it gives")


def _new(flat: Flat, name: str, node: RawNode) -> str:
    while name in flat.nodes:
        name += "_"
    flat.nodes[name] = node
    return name


class _Builder:
    """Orders the nodes, cuts the cycles, and converts node by node with known input shapes."""

    def __init__(self, flat: Flat, context: Context) -> None:
        self.flat, self.context = flat, context
        self.sources, self.targets = flat.sources(), flat.targets()
        self.cut: set[tuple[str, str]] = set()
        self.done: dict[str, Node] = {}
        self.shapes: dict[str, Shape] = {}
        self.value: dict[str, str] = {}  # NIR node -> the node of ours that sends its value
        self.delays: dict[str, str] = {}  # neuron -> the Delay that carries it back
        self.late: list[tuple[str, list[str]]] = []  # Delay -> what it takes, wired at the end
        self.looped: set[str] = set()

    def build(self) -> list[Node]:
        for name in self.order():
            self.one(name)
        for delay, names in self.late:
            takes = tuple(self.value[n] for n in names)
            if len(takes) > 1:
                takes = (self.put(Join(name=self.fresh(f"{delay}.sum"), inputs=takes, op="add")),)
            self.done[delay] = replace(self.done[delay], inputs=takes)
        return list(self.done.values())

    def order(self) -> list[str]:
        """A topological order after `cut` has taken an edge of every cycle."""
        self.looped = {n for n in self.flat.nodes if self.closes(n)}
        self.cut = {(a, b) for a, b in self.flat.edges if b in self.looped}
        self.cut |= {self.toward_neuron(edge) for edge in self.back_edges()}
        waiting = {
            n: sum((s, n) not in self.cut for s in set(self.sources[n])) for n in self.flat.nodes
        }
        ready, order = deque(n for n in self.flat.nodes if waiting[n] == 0), []
        while ready:
            name = ready.popleft()
            order.append(name)
            for target in self.targets[name]:
                if (name, target) not in self.cut:
                    waiting[target] -= 1
                    if waiting[target] == 0:
                        ready.append(target)
        return order

    def closes(self, name: str) -> bool:
        """Whether `name` is a Delay of at least a step on a cycle."""
        raw = self.flat.nodes[name]
        if raw.type != "Delay" or not self.context.steps_of(name, raw.data).any():
            return False
        seen, todo = set(), [name]
        while todo:
            for target in self.targets[todo.pop()]:
                if target == name:
                    return True
                if target not in seen:
                    seen.add(target)
                    todo.append(target)
        return False

    def back_edges(self) -> list[tuple[str, str]]:
        """Edges that close a cycle, depth first from the inputs; none in a Delay's loop."""
        color: dict[str, int] = {}
        found = []
        starts = sorted(self.flat.nodes, key=lambda n: self.flat.nodes[n].type != "Input")
        for start in starts:
            if start in color:
                continue
            color[start] = 1
            stack = [(start, self.onward(start))]
            while stack:
                name, rest = stack[-1]
                target = next(rest, None)
                if target is None:
                    color[name] = 2
                    stack.pop()
                elif color.get(target) == 1:
                    found.append((name, target))
                elif target not in color:
                    color[target] = 1
                    stack.append((target, self.onward(target)))
        return found

    def onward(self, name: str) -> Iterator[str]:
        return (t for t in self.targets[name] if (name, t) not in self.cut)

    def toward_neuron(self, edge: tuple[str, str]) -> tuple[str, str]:
        """The edge moved back over maps that only this loop uses, to where a neuron sends."""
        a, b = edge
        while (
            self.flat.nodes[a].type in STATELESS
            and len(set(self.sources[a])) == 1
            and len(self.targets[a]) == 1
            and self.sources[a][0] != a
        ):
            a, b = self.sources[a][0], a
        return a, b

    # one node

    def one(self, name: str) -> None:
        raw = self.flat.nodes[name]
        if raw.type == "Input":
            shape = shape_field(name, raw.data.get("shape"), self.context)
            self.put(Input(name=name, shape=shape), name)
            return
        if name in self.looped:
            self.close(name, raw)
            return
        taken = [self.taken(s, name) for s in self.sources[name]]
        source = taken[0]
        if len(taken) > 1:
            source = self.put(Join(name=self.fresh(f"{name}.sum"), inputs=tuple(taken), op="add"))
        if raw.type == "Output":
            self.put(Output(name=name, inputs=(source,)), name)
            declared_shape_fits(name, raw, self.shapes[source], self.context)
            return
        for node in convert(name, raw, source, self.shapes[source], self.context):
            self.put(node, name)

    def close(self, name: str, raw: RawNode) -> None:
        """A Delay that stands on a cycle; what it takes is known at the end."""
        steps = np.unique(self.context.steps_of(name, raw.data))
        if len(steps) != 1:
            raise UnsupportedError(
                f"nir: Delay '{name}' on a cycle has {len(steps)} different delays"
            )
        shape = out_shape(raw) or self.loop_shape(self.sources[name][0], name)
        self.put(Delay(name=name, inputs=(name,), steps=int(steps[0]), shape=shape), name)
        self.late.append((name, self.sources[name]))

    def taken(self, source: str, name: str) -> str:
        """The node of ours that brings `source` to `name`: itself, or a Delay where the cycle is
        cut.
        """
        if (source, name) not in self.cut:
            return self.value[source]
        if source not in self.delays:
            shape = self.loop_shape(source, name)
            delay = self.fresh(f"{source}.back")
            self.put(Delay(name=delay, inputs=(delay,), steps=1, shape=shape))
            self.delays[source] = delay
            self.late.append((delay, [source]))
        return self.delays[source]

    def loop_shape(self, source: str, target: str) -> Shape:
        """The shape of a value that is not known yet: its sender's own, or what its takers say."""
        others = [s for s in self.sources[target] if s != source and s in self.value]
        found = out_shape(self.flat.nodes[source])
        if found is None:
            found = in_shape(self.flat.nodes[target])
        if found is None and others:
            found = self.shapes[self.value[others[0]]]
        if found is None:
            raise FormatError(f"nir: the shape that '{source}' sends around its cycle is not said")
        return found

    def fresh(self, name: str) -> str:
        while name in self.done or name in self.flat.nodes:
            name += "_"
        return name

    def put(self, node: Node, key: str | None = None) -> str:
        known = [self.shapes[i] if i in self.shapes else () for i in node.inputs]
        shape = output_shape(node, known)
        if math.prod(shape) > 2**31:
            raise ShapeError(f"nir: '{node.name}' would have shape {shape}, more than 2**31 values")
        self.done[node.name], self.shapes[node.name] = node, shape
        if key is not None:
            self.value[key] = node.name
        return node.name
