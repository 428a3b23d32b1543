"""The Graph: an ordered mapping name -> node, checked when built; what the whole pipeline passes on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ranvier.export.nodes import (
    Conv,
    Delay,
    Dense,
    Flatten,
    Input,
    Join,
    Neuron,
    Node,
    Opaque,
    Output,
    Scale,
    Shape,
    output_shape,
    own_fields,
)
from ranvier.train.errors import FormatError, ShapeError, UnsupportedError

Spec = Literal["source", "lowered"]

_ARITY: dict[type[Any], tuple[int, int]] = {Input: (0, 0), Join: (1, 10**6), Opaque: (0, 10**6)}


@dataclass(frozen=True, eq=False)
class Graph:
    """A float network.

    nodes  name -> node, in an order in which every node but a Delay comes after its inputs
    steps  the number of time steps it was made for (None: any)
    dt     seconds a step (None: not said)
    spec   "source" as traced, or "lowered": every population is fed by one sum of linear maps that
           come straight from populations or inputs
    """

    nodes: Mapping[str, Node]
    steps: int | None = None
    dt: float | None = None
    spec: Spec = "source"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", dict(self.nodes))
        self._check_wiring()
        _ = self.shapes
        if self.spec == "lowered":
            check_lowered(self)

    @classmethod
    def of(cls, nodes: list[Node], **kwargs: Any) -> Graph:
        """A graph of `nodes`, in their order.

        Raises FormatError where two bear one name."""
        named: dict[str, Node] = {}
        for node in nodes:
            if node.name in named:
                raise FormatError(f"graph: two nodes are named '{node.name}'")
            named[node.name] = node
        return cls(named, **kwargs)

    def _check_wiring(self) -> None:
        seen: set[str] = set()
        for name, node in self.nodes.items():
            least, most = _ARITY.get(type(node), (1, 1))
            if name != node.name:
                raise FormatError(f"graph: node '{node.name}' stands under the name '{name}'")
            if not least <= len(node.inputs) <= most:
                raise FormatError(
                    f"graph: {type(node).__name__} '{name}' has {len(node.inputs)} inputs; "
                    f"it takes {least if least == most else f'at least {least}'}"
                )
            for source in node.inputs:
                if source not in self.nodes:
                    raise FormatError(f"graph: '{name}' takes '{source}', which is no node")
                if source not in seen and not isinstance(node, Delay):
                    raise FormatError(
                        f"graph: '{name}' takes '{source}', which comes later; "
                        "a cycle must go through a Delay of at least one step"
                    )
            if isinstance(node, Delay) and node.steps < 1:
                raise FormatError(
                    f"graph: Delay '{name}' has {node.steps} steps; at least 1 is needed"
                )
            seen.add(name)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """name -> shape, without time and batch."""
        found: dict[str, Shape] = {}
        for name, node in self.nodes.items():
            known = [found.get(i, ()) for i in node.inputs]
            found[name] = output_shape(node, known)
        for name, node in self.nodes.items():
            if isinstance(node, Delay) and found[node.inputs[0]] != node.shape:
                raise ShapeError(
                    f"graph: Delay '{name}' has shape {node.shape}, its input {found[node.inputs[0]]}"
                )
        return found

    @cached_property
    def consumers(self) -> dict[str, list[str]]:
        """name -> the names of the nodes that take it, once for each place."""
        found: dict[str, list[str]] = {name: [] for name in self.nodes}
        for name, node in self.nodes.items():
            for source in node.inputs:
                found[source].append(name)
        return found

    @property
    def inputs(self) -> list[Input]:
        return [n for n in self.nodes.values() if isinstance(n, Input)]

    @property
    def outputs(self) -> list[Output]:
        return [n for n in self.nodes.values() if isinstance(n, Output)]

    @property
    def populations(self) -> list[Neuron]:
        return [n for n in self.nodes.values() if isinstance(n, Neuron)]

    @property
    def recurrent(self) -> bool:
        """Whether a Delay takes a node that stands after it."""
        place = {name: i for i, name in enumerate(self.nodes)}
        return any(
            isinstance(n, Delay) and place[n.inputs[0]] >= place[n.name]
            for n in self.nodes.values()
        )

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def with_nodes(self, nodes: list[Node], **changes: Any) -> Graph:
        """This graph with other nodes (and other fields)."""
        return replace(self, nodes=Graph.of(nodes).nodes, **changes)

    def run(self, x: Any, record: tuple[str, ...] = ()) -> Any:
        """The output series `[time, batch, ...]` for x `[time, batch, *shape]`, in floats.

        x  numpy or torch; the answer is of the same kind. x without the time axis is held for
           `steps` steps. `record` names nodes: then (output, {name: series}) is returned.
        """
        from ranvier.export.interpret import run

        return run(self, x, record)

    def readout(self, series: Any) -> Any:
        """What the output's `reduce` makes of a series `[time, batch, ...]`: `[batch, ...]`."""
        from ranvier.export.interpret import reduce_time

        return reduce_time(series, self.outputs[0].reduce)

    def lower(self, joins: str = "linear") -> Graph:
        """The lowered graph with equal output; `joins` as in `ranvier.export.lowering.lower`."""
        from ranvier.export.lowering import lower

        return lower(self, joins=joins)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the graph as HDF5, atomically."""
        from ranvier.export.graph_file import save

        save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Graph:
        """The graph in `path`. Raises FormatError where it holds none."""
        from ranvier.export.graph_file import load

        return load(path)

    def diff(self, other: Graph) -> list[str]:
        """How `other` differs, a line a difference; empty where both are structurally equal."""
        return diff(self, other)

    def __str__(self) -> str:
        rows = [
            (n.name, type(n).__name__, detail(n), str(self.shapes[n.name]), ", ".join(n.inputs))
            for n in self
        ]
        heads = ("name", "node", "what", "shape", "from")
        widths = [max(len(r[i]) for r in [heads, *rows]) for i in range(5)]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in [heads, *rows]
        ]
        return "\n".join(line.rstrip() for line in lines)


def detail(node: Node) -> str:
    """A few words on what the node does, for tables."""
    match node:
        case Conv():
            kernel = "x".join(map(str, node.weight.shape[2:]))
            groups = f" groups {node.groups}" if node.groups > 1 else ""
            return f"{kernel} stride {node.stride[0]} pad {node.padding[0]}{groups}"
        case Dense():
            return f"{node.weight.shape[1]} -> {node.weight.shape[0]}"
        case Neuron():
            reset = getattr(node.model, "reset", None)
            return type(node.model).__name__ + (f" reset {reset}" if reset else "")
        case Opaque():
            return node.kind
        case _:
            plain = {k: v for k, v in own_fields(node).items() if isinstance(v, (str, int, tuple))}
            return " ".join(f"{k} {v}" for k, v in plain.items() if k != "shape" and v is not False)


def check_lowered(graph: Graph) -> None:
    """Raises UnsupportedError naming the first node that a lowered graph must not hold.

    A population takes one Join(add) of linear maps (Conv, Dense, Scale, without bias); a map comes
    from a population, an Input, or a Delay of one; Flatten may stand before or after a map.
    """
    for node in graph:
        if not _has_place(graph, node):
            raise UnsupportedError(
                f"lowered graph: {type(node).__name__} '{node.name}' (from "
                f"{', '.join(node.inputs) or 'nothing'}) has no place in it"
            )


def _has_place(graph: Graph, node: Node) -> bool:
    sources = [graph[i] for i in node.inputs]
    maps = (Conv, Dense, Scale)
    emitters = (Input, Neuron, Delay)
    match node:
        case Input():
            return True
        case Output():
            return isinstance(sources[0], Neuron)
        case Neuron():
            return isinstance(sources[0], Join)
        case Join():
            return node.op == "add" and all(isinstance(s, (*maps, Flatten)) for s in sources)
        case Conv() | Dense():
            return node.bias is None and isinstance(sources[0], (*emitters, Flatten))
        case Scale():
            return node.shift is None and isinstance(sources[0], (*emitters, Flatten))
        case Flatten():
            return isinstance(sources[0], (*emitters, *maps))
        case Delay():
            return isinstance(sources[0], (Input, Neuron))
        case _:
            return False


def same_value(a: Any, b: Any) -> bool:
    """Deep equality of node fields: arrays by dtype-free exact value, models by class and fields."""
    from ranvier.export.neurons import NeuronModel

    if isinstance(a, NeuronModel) or isinstance(b, NeuronModel):
        return type(a) is type(b) and all(
            same_value(v, b.params()[k]) for k, v in a.params().items()
        )
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        if a is None or b is None:
            return False
        return bool(np.shape(a) == np.shape(b) and np.array_equal(a, b))
    if callable(a) or callable(b):
        return True
    return bool(a == b)


def diff(a: Graph, b: Graph) -> list[str]:
    found = [f"only in the first: '{n}'" for n in a.nodes if n not in b.nodes]
    found += [f"only in the second: '{n}'" for n in b.nodes if n not in a.nodes]
    for name in (n for n in a.nodes if n in b.nodes):
        x, y = a[name], b[name]
        if type(x) is not type(y):
            found.append(f"'{name}': {type(x).__name__} against {type(y).__name__}")
            continue
        if x.inputs != y.inputs:
            found.append(f"'{name}': from {x.inputs} against {y.inputs}")
        other = own_fields(y)
        for key, value in own_fields(x).items():
            if not same_value(value, other[key]):
                found.append(f"'{name}': {key} differs")
    for key in ("steps", "dt", "spec"):
        if getattr(a, key) != getattr(b, key):
            found.append(f"{key}: {getattr(a, key)} against {getattr(b, key)}")
    return found
