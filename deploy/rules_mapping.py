"""Rules RV1xx: what cannot be mapped. Rules RV2xx: what is mapped at a price."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ranvier.deploy.rules import RULES, Context, Hit, rule
from ranvier.export.maxima import MAX_LEVELS, n_levels
from ranvier.export.neurons import LI, CubaLI, Membrane, Relay, SlidingWindow
from ranvier.export.nodes import Conv, Dense, Input, Join, Neuron, Opaque, Pool, Scale

SPIKE_JOINS = ("and", "iand", "or", "max")


@rule("RV101", "error", "operation without a counterpart")
def opaque(c: Context) -> Iterator[Hit]:
    """Softmax, sigmoid gates, products of activations: read by the tracer, unknown to the chip."""
    for node in c.graph:
        if isinstance(node, Opaque):
            yield (
                node.name,
                f"{node.kind} cannot run on {c.chip.name}: {node.reason}",
                "replace it by sums and thresholds (a spiking gate, a logic join), or leave it on "
                "the host",
            )


@rule("RV102", "error", "product of two graded values")
def product(c: Context) -> Iterator[Hit]:
    """An attention product or a multiplicative gate whose factors are not both spikes."""
    for node in c.graph:
        if isinstance(node, Join) and node.op == "mul" and not _all_binary(c, node):
            kinds = ", ".join(f"'{i}' {c.domains[i]}" for i in node.inputs)
            yield (
                node.name,
                f"the factors are not all spikes: {kinds}; a synapse multiplies by a constant only",
                "put a neuron in front of each factor: a product of spikes is AND",
            )


@rule("RV103", "error", "logic on values that are no spikes")
def logic(c: Context) -> Iterator[Hit]:
    """OR, AND, IAND or a maximum of currents, such as max pooling in front of the neuron."""
    for node in c.graph:
        wanted = isinstance(node, Join) and node.op in SPIKE_JOINS
        wanted = wanted or (isinstance(node, Pool) and node.op == "max")
        if wanted and not _all_binary(c, node) and not _told_apart(c, node):
            bad = next(i for i in node.inputs if c.domains[i].kind != "binary")
            yield (
                node.name,
                f"{_what(node)} takes '{bad}', which is {c.domains[bad]}; logic needs spikes",
                "move it behind the neuron, where the maximum of spikes is an OR"
                + f" (a maximum of whole numbers may span up to {MAX_LEVELS})" * _is_max(node),
            )


@rule("RV104", "error", "graded messages on a chip without them")
def graded(c: Context) -> Iterator[Hit]:
    """Analog pixels into the first layer on Loihi 1, whose spikes carry no payload."""
    if c.chip.graded:
        return
    for node in c.graph:
        if isinstance(node, Input) and c.domains[node.name].kind != "binary":
            yield (
                node.name,
                f"the input sends {c.domains[node.name]}; {c.chip.name} sends one-bit spikes only",
                "encode it as spikes (rate, latency or delta), or use loihi2",
            )
        if isinstance(node, Neuron) and isinstance(node.model, Relay):
            yield (
                node.name,
                f"a relay sends values; {c.chip.name} sends one-bit spikes only",
                "use loihi2, or let each source project to each target (joins='linear')",
            )


@rule("RV105", "error", "neuron that the chip cannot be programmed for")
def microcode(c: Context) -> Iterator[Hit]:
    """A subtractive reset on Loihi 1, whose compartment resets to zero and nothing else."""
    if c.chip.custom:
        return
    for node, why in _custom(c):
        yield (
            node.name,
            f"needs {why}; {c.chip.name} has one fixed compartment",
            "train with reset to zero and a strict threshold, or use loihi2",
        )


@rule("RV106", "error", "membrane sent to other neurons")
def membrane(c: Context) -> Iterator[Hit]:
    """A leaky integrator in the middle of a network: only a readout may show its membrane."""
    for node in c.neurons:
        if isinstance(node.model, (LI, CubaLI)):
            to = [
                t
                for t in c.graph.consumers[node.name]
                if t not in {o.name for o in c.graph.outputs}
            ]
            if to:
                yield (
                    node.name,
                    f"sends its membrane to '{to[0]}'; neurons send spikes",
                    "put a spiking neuron behind it, or make it the readout",
                )


@rule("RV107", "error", "layer that acts on tokens")
def tokens(c: Context) -> Iterator[Hit]:
    """A linear layer on the last axis of a [tokens, features] map, as in MLP mixers."""
    for node in c.graph:
        if isinstance(node, Dense) and len(c.graph.shapes[node.inputs[0]]) > 1:
            yield (
                node.name,
                f"acts on the last axis of {c.graph.shapes[node.inputs[0]]}; only vectors "
                "are mapped",
                "flatten first, or write it as a 1x1 convolution",
            )


@rule("RV108", "error", "not one input")
def entries(c: Context) -> Iterator[Hit]:
    """A network with two sensors: a program has exactly one input population."""
    if len(c.graph.inputs) != 1:
        names = ", ".join(n.name for n in c.graph.inputs) or "none"
        yield (
            c.graph.inputs[0].name if c.graph.inputs else "",
            f"{len(c.graph.inputs)} inputs ({names}); exactly one is mapped",
            "concatenate them into one input",
        )


@rule("RV199", "error", "refused by the compiler")
def refused(c: Context) -> Iterator[Hit]:
    """Whatever else `compile` refuses: lint never passes what cannot be compiled."""
    if c.program is not None or any(_hits(c, code) for code in RULES if code < "RV199"):
        return
    yield "", str(c.compiled), "see the message; it names the node and a way out"


@rule("RV201", "warning", "stem that multiplies")
def stem(c: Context) -> Iterator[Hit]:
    """Direct coding: the first convolution reads pixels, each message is a multiplication."""
    for name, v in c.verdicts.items():
        if v.stem and v.kind != "accumulate-only" and isinstance(c.graph[name], (Conv, Dense)):
            yield (
                name,
                f"reads the input itself, {v.domain}: every message multiplies a weight",
                "accept it (reported apart), or encode the input as spikes",
            )


@rule("RV202", "warning", "layer that adds up whole numbers")
def whole_numbers(c: Context) -> Iterator[Hit]:
    """The convolutions behind SEW-ADD: their input counts 0..n and is no spike."""
    for name, v in c.verdicts.items():
        if not v.stem and v.merged.kind in ("integer", "ternary"):
            yield (
                name,
                f"its input is {v.merged}, made by {' → '.join(v.chain)}",
                "graded messages (joins='graded') or one projection for each source "
                "(joins='linear', binary, more synapses); OR instead of ADD keeps it binary",
            )


@rule("RV203", "warning", "layer that reads real values")
def reals(c: Context) -> Iterator[Hit]:
    """The 1x1 shortcut convolutions of MS-ResNet: they read the membrane current itself."""
    for name, v in c.verdicts.items():
        plain = isinstance(c.graph[name], (Conv, Dense, Scale))
        if plain and not v.stem and v.merged.kind == "real" and not v.merged.whole_after_scale:
            yield (
                name,
                f"its input is {v.merged}, made by {' → '.join(v.chain)}",
                "a parameter-free shortcut, or a neuron in front of it; else it is mapped as "
                "relays or unrolled into every later block",
            )


@rule("RV204", "info", "pooling merged into the layer behind")
def pooled(c: Context) -> Iterator[Hit]:
    """An average or sum pooling has no population: the next layer's kernel grows by its window."""
    for node in c.graph:
        if isinstance(node, Pool) and node.op != "max":
            size = "x".join(map(str, node.kernel))
            yield (
                node.name,
                f"{node.op} over {size} becomes part of the weights behind it: more synapses",
                "nothing; or stride in the convolution instead of pooling",
            )


@rule("RV205", "info", "logic population")
def logic_population(c: Context) -> Iterator[Hit]:
    """Max pooling, OR, AND, IAND of spikes: one more population of neurons and one more step.

    A maximum of small whole numbers, as sums of spikes are, takes two for each of them."""
    for node in c.graph:
        joined = (
            isinstance(node, Join) and node.op in (*SPIKE_JOINS, "mul") and len(node.inputs) > 1
        )
        if (joined or (isinstance(node, Pool) and node.op == "max")) and _all_binary(c, node):
            n = int(np.prod(c.graph.shapes[node.name]))
            yield (
                node.name,
                f"{_what(node)} is {n:,} logic neurons of its own and one step of latency",
                "nothing; a vanilla sum before the neuron costs none",
            )
        elif (levels := _told_apart(c, node)) > 1:
            yield (
                node.name,
                f"{_what(node)} of whole numbers is {levels} populations of logic neurons and {levels - 1} "
                "of thresholds before them, two steps of latency",
                "pool ahead of the sum, where there are spikes, or join by OR",
            )


@rule("RV206", "warning", "neuron that needs microcode")
def custom(c: Context) -> Iterator[Hit]:
    """Subtractive reset, no reset, v_reset: exact on Loihi 2, as a neuron program of our own."""
    if not c.chip.custom:
        return
    for node, why in _custom(c):
        yield (
            node.name,
            f"{why}: a custom process; Lava's own LIF cannot compute it",
            "reset to zero with a strict threshold runs on the stock LIF",
        )


@rule("RV207", "info", "delay beyond the synapse's own")
def delays(c: Context) -> Iterator[Hit]:
    """A skip over many layers waits longer than a synapse can: relays pass its spikes on."""
    if c.program is None:
        return
    for p in c.program:
        if "/relay" in p.name:
            path = c.program.projections.get(p.name.split("/relay")[0])
            yield (
                p.name if path is None else path.target,
                f"the path waits longer than {int(c.chip.max_delay.value)} steps; "
                f"'{p.name}' relays it",
                "fewer layers between both ends of the skip",
            )


def _is_max(node: Any) -> bool:
    return isinstance(node, (Pool, Join)) and node.op == "max"


def _told_apart(c: Context, node: Any) -> int:
    """How many thresholds tell the values of a maximum apart; 0 where that is no way to map it."""
    if not _is_max(node):
        return 0
    found = [n_levels(c.domains[i]) for i in node.inputs]
    return max(found) if min(found) and max(found) <= MAX_LEVELS else 0


def _all_binary(c: Context, node: Any) -> bool:
    return all(c.domains[i].kind == "binary" for i in node.inputs)


def _what(node: Any) -> str:
    return f"{node.op} pooling" if isinstance(node, Pool) else str(node.op).upper()


def _hits(c: Context, code: str) -> bool:
    return next(RULES[code].check(c), None) is not None


def _custom(c: Context) -> Iterator[tuple[Neuron, str]]:
    """Neurons that the stock compartment cannot compute, and why."""
    for node in c.neurons:
        model: Any = node.model
        if isinstance(model, SlidingWindow):
            yield node, "a window over past inputs"
        elif isinstance(model, Membrane):
            why = _why_custom(model)
            if why:
                yield node, why


def _why_custom(model: Membrane) -> str | None:
    if model.reset != "zero":
        return {"subtract": "subtractive reset", "none": "no reset"}[model.reset]
    if np.any(model.v_reset):
        return f"reset to {np.max(np.abs(model.v_reset)):g} instead of zero"
    return None if model.strict else "firing at the threshold itself"
