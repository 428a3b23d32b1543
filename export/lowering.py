"""source Graph -> lowered Graph: every population fed by one sum of linear maps from populations.

Each node's value is kept as a sum of terms (a linear map of what one population sends) plus a constant
field. Linear nodes act on every term; a neuron makes a population of its sum; a join of spikes that is
not linear (or, and, iand, max) makes a population of memoryless threshold neurons, a maximum of whole
numbers one for each number.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from typing_extensions import assert_never

from ranvier.export.graph import Graph
from ranvier.export.linear import (
    ConvLin,
    DenseLin,
    DiagLin,
    Linear,
    compose,
    identity,
    image,
    size,
)
from ranvier.export.maps import (
    as_matrix,
    conv_map,
    conv_node,
    narrow,
    pair,
    placed_map,
    plain_form,
    subsample_map,
    upsample_map,
)
from ranvier.export.maxima import common_levels, need_counts
from ranvier.export.neurons import CubaLI, CubaLIF, Relay, SlidingWindow, Threshold
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
from ranvier.export.terms import Term, Value, add_values, dead, merged, times
from ranvier.train.errors import UnsupportedError


def lower(graph: Graph, joins: str = "linear") -> Graph:
    """The lowered graph, with equal output.

    joins  linear: sums of spikes and of currents are pushed through what follows them (more synapses,
           binary messages); graded: a sum that is used by more than one neuron becomes a population
           of relays that send it as a value
    Raises UnsupportedError naming the node that has no place in a lowered graph.
    """
    if graph.spec == "lowered":
        return graph
    if joins not in ("linear", "graded"):
        raise UnsupportedError(f"lowering: joins '{joins}' is neither linear nor graded")
    return _Lowering(graph, joins).result()


class _Lowering:
    def __init__(self, graph: Graph, joins: str) -> None:
        from ranvier.export.domains import infer_domains

        self.graph, self.joins = graph, joins
        self.domains = infer_domains(graph)
        self.shapes = dict(graph.shapes)  # and those of the populations made here
        self.nodes: dict[str, Node] = {}
        self.values: dict[str, Value] = {}
        self.late: list[tuple[Delay, Neuron | Input]] = []

    def result(self) -> Graph:
        for node in self.graph:
            self.values[node.name] = self.value(node)
        return Graph.of(
            list(self.nodes.values()),
            steps=self.graph.steps,
            dt=self.graph.dt,
            spec="lowered",
            meta=self.graph.meta,
        )

    def value(self, node: Node) -> Value:
        """What a source node means, as a sum of terms; emits populations on the way."""
        shape = self.graph.shapes[node.name]
        into = [self.values[i] for i in node.inputs] if not isinstance(node, Delay) else []
        match node:
            case Input():
                self.nodes[node.name] = node
                return self.sent(node.name, shape)
            case Conv():
                linear = conv_map(node, into[0].shape)
                bias = None if node.bias is None else node.bias.reshape(-1, *[1] * (len(shape) - 1))
                return into[0].mapped(linear, shape, node.name, True).plus(bias)
            case Dense():
                return self.dense(node, into[0], shape)
            case Pool():
                return self.pool(node, into[0], shape)
            case Flatten():
                const = into[0].const
                return Value(into[0].terms, shape, None if const is None else const.reshape(shape))
            case Norm():
                factor = node.gamma / np.sqrt(np.asarray(node.var, np.float64) + node.eps)
                shift = node.beta - factor * node.mean
                axes = (-1, *[1] * (len(shape) - 1))
                scaled = DiagLin(factor.reshape(axes), shape)
                return into[0].mapped(scaled, shape, node.name, False).plus(shift.reshape(axes))
            case Scale():
                scaled = DiagLin(np.asarray(node.scale, np.float64), shape)
                return into[0].mapped(scaled, shape, node.name, False).plus(node.shift)
            case Subsample():
                return into[0].mapped(subsample_map(node, into[0].shape), shape, node.name, False)
            case Upsample():
                matrix = upsample_map(node, into[0].shape)
                return into[0].mapped(matrix, shape, node.name, False)
            case Join():
                return self.join(node, into, shape)
            case Neuron():
                return self.neuron(node, into[0], shape)
            case Delay():
                return self.delay(node)
            case Output():
                return self.output(node, into[0], shape)
            case Opaque():
                raise UnsupportedError(
                    f"lowering: '{node.name}' is {node.kind}: {node.reason}. `ranvier lint` lists all "
                    "such nodes with what can be done about each"
                )
            case _:
                assert_never(node)

    @staticmethod
    def sent(name: str, shape: Shape) -> Value:
        return Value((Term(name, 0, identity(shape)),), shape)

    def dense(self, node: Dense, into: Value, shape: Shape) -> Value:
        if len(shape) != 1:
            raise UnsupportedError(
                f"lowering: Dense '{node.name}' acts on the last axis of {into.shape} (tokens); "
                "only vectors are mapped. Flatten first, or write it as a 1x1 convolution"
            )
        linear = DenseLin(np.asarray(node.weight, np.float64))
        return into.mapped(linear, shape, node.name, True).plus(node.bias)

    def pool(self, node: Pool, into: Value, shape: Shape) -> Value:
        channels = into.shape[0]
        one = len(node.kernel) == 1
        kernel = (1, *node.kernel) if one else node.kernel
        stride, padding = pair(node.stride, 1), pair(node.padding, 0)
        share = 1.0 / float(np.prod(kernel)) if node.op == "avg" else 1.0
        ones = np.full((channels, 1, *kernel), share)
        linear = ConvLin(ones, image(into.shape), stride, padding, (1, 1), channels)
        if node.op != "max":
            return into.mapped(linear, shape, node.name, False)
        return self.maximum(node, [into], linear, shape)

    def maximum(
        self, node: Pool | Join, parts: list[Value], window: Linear | None, shape: Shape
    ) -> Value:
        """The maximum over windows, or over parts: an OR of spikes, or one for each whole number."""
        what = "a maximum over a window" if isinstance(node, Pool) else f"'{node.op}'"
        levels = common_levels([(i, self.domains[i]) for i in node.inputs], node.name, what)
        names = [node.name] if len(levels) == 1 else [f"{node.name}>={k}" for k in levels]
        reached = []
        for k, name in zip(levels, names, strict=True):
            spikes = [self.at_least(v, k, levels[0], f"{name}/{i}")
                      for i, v in zip(node.inputs, parts, strict=True)]  # fmt: skip
            if window is not None:
                spikes = [v.mapped(window, shape, node.name, False) for v in spikes]
            either = Neuron(name=name, model=Threshold())
            reached.append(self.populate(either, add_values(spikes, shape)))
        total = add_values(reached, shape).plus(levels[0] - 1 or None)
        return self.relayed(node, total) if len(levels) > 1 and self.joins == "graded" else total

    def at_least(self, value: Value, k: int, first: int, name: str) -> Value:
        """What is more than zero where a whole number is k or more; `first` is the lowest such k of any use.

        A number that is never below 0 is itself that for k = 1: no population is asked for.
        """
        if k == first == 1:
            return value
        need_counts(value, name)
        level = Neuron(name=name, model=Threshold(v_threshold=k - first + 0.5))
        return self.populate(level, value.plus(1 - first or None))

    def need_spikes(self, node: Node, source: str, what: str) -> None:
        domain = self.domains[source]
        if domain.kind != "binary":
            raise UnsupportedError(
                f"lowering: '{node.name}' takes {what} of '{source}', whose values are {domain.kind}; "
                "on the chip this is a logic neuron and needs spikes. Move it behind the neuron"
            )

    def join(self, node: Join, into: list[Value], shape: Shape) -> Value:
        op = node.op
        if op == "cat":
            return self.concatenate(node, into, shape)
        if op == "add":
            total = add_values(into, shape)
            return self.relayed(node, total) if self.joins == "graded" else total
        if op == "max":
            return self.maximum(node, into, None, shape)
        for source in node.inputs:
            self.need_spikes(node, source, f"'{op}'")
        if op == "iand":
            signs, threshold = [-1.0, 1.0], 0.0
        else:
            signs = [1.0] * len(into)
            threshold = len(into) - 1.0 if op in ("and", "mul") else 0.0
        signed = [
            v.mapped(DiagLin(np.asarray(s), shape), shape, node.name, False)
            for v, s in zip(into, signs, strict=True)
        ]
        logic = Neuron(name=node.name, model=Threshold(v_threshold=threshold))
        return self.populate(logic, add_values(signed, shape))

    def relayed(self, node: Join | Pool, total: Value) -> Value:
        """A relay population for a sum that feeds more than one neuron; else the sum itself."""
        users = self.graph.consumers[node.name]
        if len(users) == 1 and isinstance(self.graph[users[0]], (Neuron, Output)):
            return total
        relay = Neuron(name=node.name, model=Relay())
        sent = self.populate(relay, replace(total, const=None))
        return sent.plus(total.const)

    def concatenate(self, node: Join, into: list[Value], shape: Shape) -> Value:
        if node.axis != 0:
            raise UnsupportedError(
                f"lowering: '{node.name}' concatenates along axis {node.axis}; only 0"
            )
        terms: list[Term] = []
        const = np.zeros(shape)
        start = 0
        for value in into:
            placed = placed_map(value.shape, start, shape[0])
            terms += value.mapped(placed, shape, node.name, False).terms
            if value.const is not None:
                const[start : start + value.shape[0]] = value.const
            start += value.shape[0]
        return Value(merged(terms), shape, const if const.any() else None)

    def neuron(self, node: Neuron, into: Value, shape: Shape) -> Value:
        if isinstance(node.model, SlidingWindow):
            into = self.windowed(node, node.model, into)
            model = Threshold(v_threshold=node.model.v_threshold, strict=node.model.strict)
            return self.populate(replace(node, model=model, inputs=()), into)
        if isinstance(node.model, (CubaLIF, CubaLI)) and np.any(np.asarray(node.model.alpha)):
            into = self.with_bias_neuron(node, into)  # the chip's own bias goes past the current
        return self.populate(replace(node, inputs=()), into)

    def windowed(self, node: Neuron, model: SlidingWindow, into: Value) -> Value:
        """The sum over the last k inputs as k projections with lags 0..k-1."""
        into = self.with_bias_neuron(node, into)
        terms = [
            Term(
                t.source,
                t.lag + lag,
                compose(times(w, t.map.out_shape), t.map, node.name),
                t.origin,
            )
            for lag, w in enumerate(model.taps[::-1])
            for t in into.terms
        ]
        return Value(tuple(terms), into.shape)

    def with_bias_neuron(self, node: Neuron, into: Value) -> Value:
        """The constant as a projection from one neuron that fires in every step from the first on.

        One weight for each neuron: at the border of a padded convolution the constant is its own.
        """
        if into.const is None or not np.any(into.const):
            return replace(into, const=None)
        entry = self.graph.inputs[0]
        quiet = Term(entry.name, 0, DenseLin(np.zeros((1, size(entry.shape)))))
        name = f"{node.name}/ones"
        one = Neuron(name=name, model=Threshold(v_threshold=0.5), bias=np.ones(1))
        self.populate(one, Value((quiet,), (1,)))
        column = DenseLin(into.const.reshape(-1, 1))
        return Value((*into.terms, Term(name, 0, column)), into.shape)

    def delay(self, node: Delay) -> Value:
        source = self.graph[node.inputs[0]]
        if isinstance(source, (Input, Neuron)):
            return Value((Term(source.name, node.steps, identity(node.shape)),), node.shape)
        past = self.values.get(source.name)
        if past is None or past.const is not None:
            raise UnsupportedError(
                f"lowering: Delay '{node.name}' holds '{source.name}', which is no population; "
                "delay the spikes that it comes from"
            )
        return replace(past, terms=tuple(replace(t, lag=t.lag + node.steps) for t in past.terms))

    def output(self, node: Output, into: Value, shape: Shape) -> Value:
        source = self.graph[node.inputs[0]]
        is_population = source.name in self.nodes and isinstance(self.nodes[source.name], Neuron)
        if node.observe != "out" and not isinstance(source, Neuron):
            raise UnsupportedError(
                f"lowering: output '{node.name}' observes a state of '{source.name}'"
            )
        name = source.name
        if not is_population:
            name = f"{node.name}/readout"
            self.populate(Neuron(name=name, model=Relay()), into)
        self.nodes[node.name] = replace(node, inputs=(name,))
        return self.sent(name, shape)

    def populate(self, neuron: Neuron, value: Value) -> Value:
        """Emits the maps of `value`, their sum, and the population; its value is what it sends."""
        bias = value.const
        self.shapes[neuron.name] = value.shape
        branches = [
            self.emit(term, neuron.name, value.shape)
            for term in merged(list(value.terms))
            if not dead(term) or len(value.terms) == 1
        ]
        joined = Join(name=f"{neuron.name}/sum", inputs=tuple(branches), op="add")
        if bias is not None:
            old = 0.0 if neuron.bias is None else neuron.bias
            neuron = replace(neuron, bias=narrow(bias + old))
        self.nodes[joined.name] = joined
        self.nodes[neuron.name] = replace(neuron, inputs=(joined.name,))
        return self.sent(neuron.name, value.shape)

    def emit(self, term: Term, target: str, shape: Shape) -> str:
        """The node of one term; gives the name that the target takes."""
        source = self.delayed(term)
        origin = term.origin[-1] if term.origin else f"{term.source}>{target}"
        name = origin if origin not in self.nodes else f"{origin}[{term.source}>{target}]"
        while name in self.nodes:
            name += "'"
        meta = {"origin": list(term.origin), "weighted": bool(term.origin)}
        source_shape = self.shapes[term.source]
        linear = plain_form(term.map)
        made: Shape
        if isinstance(linear, ConvLin) and len(source_shape) in (2, 3):
            node: Node = conv_node(name, source, linear, len(source_shape), meta)
            c, rows, columns = linear.out_shape
            made = (c, rows, columns) if len(source_shape) == 3 else (c, columns)
        elif isinstance(linear, DiagLin) and linear.shape == source_shape:
            node = Scale(name=name, inputs=(source,), scale=narrow(linear.scale), meta=meta)
            made = linear.shape
        else:
            matrix = (
                linear if isinstance(linear, DenseLin) else as_matrix(linear, size(source_shape))
            )
            flat = self.flat(source, source_shape)
            made = shape
            laid_out = shape if len(shape) > 1 else None
            node = Dense(
                name=name,
                inputs=(flat,),
                weight=narrow(matrix.weight),
                meta=meta,
                out_shape=laid_out,
            )
        self.nodes[name] = node
        return name if made == shape else self.reshaped(name, made, shape)

    def reshaped(self, name: str, made: Shape, wanted: Shape) -> str:
        if len(wanted) != 1:
            raise UnsupportedError(
                f"lowering: '{name}' gives {made} where {wanted} is needed; only flattening is mapped"
            )
        self.nodes[f"{name}/flat"] = Flatten(name=f"{name}/flat", inputs=(name,))
        return f"{name}/flat"

    def flat(self, source: str, shape: Shape) -> str:
        if len(shape) == 1:
            return source
        name = f"{source}/flat"
        if name not in self.nodes:
            self.nodes[name] = Flatten(name=name, inputs=(source,))
        return name

    def delayed(self, term: Term) -> str:
        if term.lag == 0:
            return term.source
        name = f"{term.source}@{term.lag}"
        if name not in self.nodes:
            shape = self.shapes[term.source]
            self.nodes[name] = Delay(name=name, inputs=(term.source,), steps=term.lag, shape=shape)
        return name
