"""Spike-domain inference: what every edge of a Graph can carry, and what that makes of each layer.

A domain is a set of values lo..hi, on a grid or not: binary, ternary, integer, real.
`infer_domains` derives one for every node; `verdicts` says of each layer whether it only adds
weights (binary input), adds them several times (whole numbers) or must multiply (reals), and names
the chain of nodes that made it so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ranvier.export.domain_rules import Domain, infer_domains, intervals
from ranvier.export.graph import Graph
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
    Pool,
    Scale,
    Subsample,
    Upsample,
)

__all__ = ["Domain", "Edge", "Verdict", "binary_only", "infer_domains", "intervals", "verdicts"]

VerdictKind: TypeAlias = Literal["accumulate-only", "graded accumulate", "multiply"]


@dataclass(frozen=True)
class Edge:
    """One wire: from the node `source` to the node `target`, and what it carries."""

    source: str
    target: str
    domain: Domain

    def __str__(self) -> str:
        return f"{self.source} -> {self.target} ({self.domain})"


@dataclass(frozen=True)
class Verdict:
    """What a layer's input makes of its arithmetic.

    domain  what arrives, as the network is written
    merged  what arrives once poolings in front of the layer are merged into its weights, as the
            compiler does: both are linear, so that the messages are those of the population before
    chain   the nodes that made the domain what it is, from the first to the layer's input
    stem    whether it reads the network's input, before any neuron
    """

    node: str
    kind: VerdictKind
    domain: Domain
    merged: Domain
    chain: tuple[str, ...]
    reason: str
    stem: bool = False


def verdicts(graph: Graph) -> dict[str, Verdict]:
    """name -> Verdict of each Conv and Dense, and of whatever else multiplies two values.

    A Scale counts where it is a synapse (it reads a population), a Join where it is a product; an
    Opaque node always multiplies.
    """
    domains, stem = infer_domains(graph), stem_layers(graph)
    found: dict[str, Verdict] = {}
    for node in graph:
        match node:
            case Conv() | Dense():
                found[node.name] = _of_layer(graph, domains, node, node.name in stem)
            case Scale() if isinstance(emitter(graph, node.inputs[0]), (Input, Neuron, Delay)):
                found[node.name] = _of_layer(graph, domains, node, node.name in stem)
            case Join() if node.op == "mul":
                found[node.name] = _of_product(graph, domains, node)
            case Opaque() if node.inputs:
                worst = max((domains[i] for i in node.inputs), key=_badness)
                why = f"{node.kind}: {node.reason}"
                found[node.name] = Verdict(node.name, "multiply", worst, worst, (node.name,), why)
            case _:
                pass
    return found


def stem_layers(graph: Graph) -> set[str]:
    """The layers that read the input, and those after them up to the first neuron or fork."""
    found: set[str] = set()
    for entry in graph.inputs:
        for name in graph.consumers[entry.name]:
            while True:
                node = graph[name]
                if isinstance(node, (Neuron, Output, Join, Delay, Opaque)):
                    break
                if isinstance(node, (Conv, Dense, Scale)):
                    found.add(name)
                if len(graph.consumers[name]) != 1:
                    break
                name = graph.consumers[name][0]
    return found


def emitter(graph: Graph, name: str) -> Node:
    """The node that sends what `name` passes on, shapes and linear poolings looked through."""
    node = graph[name]
    while isinstance(node, (Flatten, Subsample, Upsample)) or (
        isinstance(node, Pool) and node.op != "max"
    ):
        node = graph[node.inputs[0]]
    return node


_BADNESS = {"binary": 0, "ternary": 1, "integer": 2, "real": 4}


def _badness(d: Domain) -> tuple[int, float]:
    return _BADNESS[d.kind] - (1 if d.whole_after_scale else 0), d.hi - d.lo


def verdict_kind(d: Domain) -> VerdictKind:
    """Binary: accumulate-only; whole, perhaps after a scale: graded accumulate; else multiply."""
    if d.kind == "binary":
        return "accumulate-only"
    return "graded accumulate" if d.grid is not None else "multiply"


def _of_layer(graph: Graph, domains: Mapping[str, Domain], node: Node, stem: bool) -> Verdict:
    source = node.inputs[0]
    domain, merged = domains[source], domains[emitter(graph, source).name]
    chain = blame(graph, domains, source)
    kind = verdict_kind(domain)
    reason = _why(graph, domain, merged, chain, stem)
    return Verdict(node.name, kind, domain, merged, chain, reason, stem)


def _why(graph: Graph, domain: Domain, merged: Domain, chain: tuple[str, ...], stem: bool) -> str:
    if domain.kind == "binary":
        return "its input is binary: a spike adds a weight"
    if stem:
        return f"stem: it reads the network's input, {domain}"
    made = f"'{chain[0]}' ({type(graph[chain[0]]).__name__})" if chain else "the input"
    if domain.whole_after_scale and merged.kind == "binary":
        return f"{made} averages spikes: {domain}; merged with the layer, its input is binary"
    if domain.kind in ("integer", "ternary"):
        summed = [n for n in chain if isinstance(graph[n], Join)]
        if len(summed) > 1:
            return f"its input is {domain}: {len(summed)} joins in a row, the first is {made}"
        return f"its input is {domain}, made by {made}"
    if domain.whole_after_scale:
        return f"its input is {domain}, made by {made}"
    return f"its input is {domain}: {made} makes real values and no neuron stands between"


def blame(graph: Graph, domains: Mapping[str, Domain], name: str) -> tuple[str, ...]:
    """The nodes that made `name` more than binary, first cause first; () where it is binary."""
    chain: list[str] = []
    while domains[name].kind != "binary" and name not in chain:
        chain.append(name)
        worse = [i for i in graph[name].inputs if domains[i].kind != "binary"]
        same = [i for i in worse if domains[i].kind == domains[name].kind]
        if not (same or worse):
            break
        name = max(same or worse, key=lambda i: _badness(domains[i]))
        if isinstance(graph[name], Input) and isinstance(graph[chain[-1]], (Conv, Dense)):
            break
    return tuple(reversed(chain))


def _of_product(graph: Graph, domains: Mapping[str, Domain], node: Join) -> Verdict:
    incoming = [domains[i] for i in node.inputs]
    worst = max(incoming, key=_badness)
    n_graded = sum(d.kind != "binary" for d in incoming)
    if n_graded == 0:
        kind: VerdictKind = "accumulate-only"
        reason = "a product of spikes: AND"
    elif n_graded == 1:
        kind = verdict_kind(worst)
        reason = f"a value ({worst}) passed or stopped by a spike"
    else:
        kind, reason = "multiply", f"a product of two graded values, one of them {worst}"
    guilty = max(node.inputs, key=lambda i: _badness(domains[i]))
    return Verdict(node.name, kind, worst, worst, blame(graph, domains, guilty), reason)


def binary_only(graph: Graph, *, merge_pools: bool = True) -> tuple[bool, list[Edge]]:
    """Whether every layer after the stem only ever adds weights, and the edges that break it.

    merge_pools  average and sum poolings count as part of the layer behind them, as the compiler
                 maps them; False takes the network as it is written
    """
    domains, broken = infer_domains(graph), []
    for verdict in verdicts(graph).values():
        domain = verdict.merged if merge_pools else verdict.domain
        node = graph[verdict.node]
        if verdict.stem or (domain.kind == "binary" and not isinstance(node, Opaque)):
            continue
        source = max(node.inputs, key=lambda i: _badness(domains[i]))
        broken.append(Edge(source, verdict.node, domain))
    return not broken, broken
