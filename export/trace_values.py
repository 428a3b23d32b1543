"""What a tensor stands for while a module is traced, and the builder that gathers the nodes.

The tracer runs the module on real tensors and keeps, for each, one of these:

    At      the value of a node at one step (t None: the same at every step)
    Series  the values of a node at several steps, in one tensor
    Sum     scale * the sum of a node's values over several steps
    Final   one value a sample: a node's series, reduced over all steps

A tensor that has none is a constant. Nodes are made once: the same operation on the same inputs at
the next step is the same node, which is what folds T steps into one graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from ranvier.export.neurons import Membrane, NeuronModel, Threshold
from ranvier.export.nodes import (
    Delay,
    Flatten,
    Input,
    Join,
    Neuron,
    Node,
    Opaque,
    Pool,
    Reduce,
    Scale,
    Shape,
    Subsample,
    Upsample,
    output_shape,
    own_fields,
)
from ranvier.train.errors import RanvierError

Port: TypeAlias = Literal["out", "v", "u"]
# [T, B, ...], [T * B, ...], [B, T, ...], [B, ..., T]
Layout: TypeAlias = Literal["time", "folded", "batch", "last"]


@dataclass(frozen=True)
class At:
    node: str
    t: int | None
    port: Port = "out"


@dataclass(frozen=True)
class Series:
    node: str
    steps: tuple[int, ...]
    port: Port = "out"
    layout: Layout = "time"


@dataclass(frozen=True)
class Sum:
    node: str
    steps: frozenset[int]
    scale: float = 1.0
    port: Port = "out"


@dataclass(frozen=True)
class Final:
    node: str
    how: Reduce
    port: Port = "out"


Value: TypeAlias = "At | Series | Sum | Final"


def array(tensor: Any) -> np.ndarray:
    """A copy of the tensor as numpy, so that later training leaves the graph alone."""
    import torch

    if torch.is_tensor(tensor):
        return np.array(tensor.detach().cpu().numpy())
    return np.array(tensor, dtype=np.float64)


Digests: TypeAlias = "dict[int, tuple[np.ndarray, Any]]"  # id -> (the array, kept alive; its key)


def frozen(value: Any, digests: Digests) -> Any:
    """value as a hashable key; `digests` remembers those of arrays, which come at every step."""
    if isinstance(value, np.ndarray):
        if id(value) not in digests:
            data = hashlib.sha256(np.ascontiguousarray(value).tobytes()).digest()
            digests[id(value)] = (value, (value.shape, value.dtype.str, data))
        return digests[id(value)][1]
    if isinstance(value, NeuronModel):
        return (type(value).__name__, frozen(value.params(), digests))
    if isinstance(value, Mapping):
        return tuple((k, frozen(v, digests)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(frozen(v, digests) for v in value)
    return value


class Builder:
    """Nodes by name, each made once; shapes as they come."""

    def __init__(self, entry: Input, delay_sources: bool = True) -> None:
        """delay_sources  whether delays stand at the populations, or right where they are needed"""
        self.delay_sources = delay_sources
        self.nodes: dict[str, Node] = {entry.name: entry}
        self.shapes: dict[str, Shape] = {entry.name: entry.shape}
        self.digests: Digests = {}
        self._made: dict[Any, str] = {}
        self._counts: dict[str, int] = {}
        self._wanted: dict[str, str] = {}  # name -> the name without its number

    def unique(self, wanted: str) -> str:
        """`wanted`, or with _1, _2, ... where it is taken."""
        name, n = wanted, self._counts.get(wanted, 0)
        while name in self.nodes or name == "output":
            n += 1
            name = f"{wanted}_{n}"
        self._counts[wanted] = n
        self._wanted[name] = wanted
        return name

    def final_names(self, nodes: list[Node]) -> dict[str, str]:
        """New names for the nodes that remain, numbered without gaps."""
        found: dict[str, str] = {}
        taken = {"output"}
        for node in nodes:
            wanted = self._wanted.get(node.name, node.name)
            name, n = wanted, 0
            while name in taken:
                n += 1
                name = f"{wanted}_{n}"
            taken.add(name)
            found[node.name] = name
        return found

    def reach(self, name: str) -> int:
        """How many steps back the node looks, populations' states aside."""
        node = self.nodes[name]
        if isinstance(node, Delay):
            return node.steps + self.reach(node.inputs[0])
        if isinstance(node, Neuron):
            return 0
        return max((self.reach(i) for i in node.inputs), default=0)

    def add(self, node: Node, key: Any = None) -> str:
        """The name of `node`, or of the equal node that already stands.

        key  what to tell nodes apart by, where their fields do not serve
        """
        place = key
        if place is None:
            place = (type(node).__name__, node.inputs, frozen(own_fields(node), self.digests))
        if place not in self._made:
            name = self.unique(node.name)
            node = replace(node, name=name)
            self.shapes[name] = output_shape(node, [self.shapes[i] for i in node.inputs])
            self.nodes[name] = node
            self._made[place] = name
        return self._made[place]

    def made(self, key: Any) -> str | None:
        """The node under that key."""
        return self._made.get(key)

    def remember(self, key: Any, name: str) -> str:
        self._made[key] = name
        return name

    def delayed(self, name: str, steps: int) -> str:
        """The node whose value is that of `name`, `steps` steps ago, all states having been zero.

        With `delay_sources` the Delay stands at the populations, and what is stateless is computed
        anew behind it, so that a bias acts at step 0 too, as in a loop that starts from zero
        spikes; without, step 0 sees nothing at all, as in a loop that says `if t > 0`.
        """
        if steps == 0:
            return name
        node = self.nodes[name]
        if isinstance(node, Delay):
            return self.delayed(node.inputs[0], steps + node.steps)
        if isinstance(node, (Neuron, Input, Opaque)) or not self.delay_sources:
            late = Delay(
                name=f"{name}.delay{steps}",
                inputs=(name,),
                steps=steps,
                shape=self.shapes[name],
                source=node.source,
            )
            return self.add(late)
        behind = tuple(self.delayed(i, steps) for i in node.inputs)
        return self.add(replace(node, inputs=behind))

    def is_binary(self, name: str) -> bool:
        """Whether all values are known to be 0 or 1."""
        node = self.nodes[name]
        match node:
            case Neuron():
                return isinstance(node.model, (Membrane, Threshold)) or node.model.binary
            case Pool():
                return node.op == "max" and self.is_binary(node.inputs[0])
            case Flatten() | Subsample() | Upsample() | Delay():
                return self.is_binary(node.inputs[0])
            case Join():
                keeps = node.op in ("and", "iand", "or", "max", "cat", "mul")
                return keeps and all(self.is_binary(i) for i in node.inputs)
            case Scale():
                return self.complement(name) is not None
            case Input():
                return node.integer and node.lo >= 0 and node.hi <= 1
            case _:
                return False

    def complement(self, name: str) -> str | None:
        """a, where the node is 1 - a and a is binary."""
        node = self.nodes[name]
        if not isinstance(node, Scale) or node.shift is None:
            return None
        flips = bool(np.all(node.scale == -1) and np.all(node.shift == 1))
        return node.inputs[0] if flips and self.is_binary(node.inputs[0]) else None

    def ordered(self, last: str) -> list[Node]:
        """The nodes on which `last` rests, each after its inputs; only Delays look ahead."""
        done: dict[str, Node] = {}
        late = [last]
        while late:
            pending, open_nodes = [late.pop()], set[str]()
            while pending:
                name = pending[-1]
                node = self.nodes[name]
                if name in done:
                    pending.pop()
                elif name in open_nodes or isinstance(node, Delay):
                    done[name] = node
                    late.extend(node.inputs if isinstance(node, Delay) else ())
                    pending.pop()
                else:
                    open_nodes.add(name)
                    wanted = [i for i in node.inputs if i not in done]
                    if open_nodes.intersection(wanted):
                        raise RanvierError(f"trace: '{name}' feeds itself within one step")
                    pending.extend(reversed(wanted))
        return list(done.values())
