"""The ladder from floats to the chip's integers, rung by rung, on the same samples.

    float            the graph as traced
    lowered          normalization and poolings merged into the weights: the same function
    integer weights  all parameters and the input as the chip holds them; float states
    integer states   the Program itself

What each population sends is compared between rungs, so that a difference has a layer, a step, a
neuron and the rung that brought it in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ranvier.deploy.cells import Cell, decay
from ranvier.deploy.currents import message_units
from ranvier.deploy.program import OneToOne, Program
from ranvier.export.domains import infer_domains
from ranvier.export.graph import Graph
from ranvier.export.neurons import NeuronModel, Relay, SlidingWindow
from ranvier.export.nodes import Conv, Dense, Neuron, Node, Scale
from ranvier.sim.runner import run

RUNGS = ("float", "lowered", "integer weights", "integer states")


def read_back(program: Program, name: str) -> np.ndarray:
    """A projection's weights in float units of its target's current, as its integers say.

    weight * 2**exponent / (target's scale) * (units of the source's message that make 1.0)
    """
    p = program.projections[name]
    source, target = program.populations[p.source], program.populations[p.target]
    weight = np.asarray(p.map.weight, np.float64) * 2.0**p.exponent
    scale = np.asarray(target.scale, np.float64)
    if scale.size > 1 and not isinstance(p.map, OneToOne):
        rows = np.broadcast_to(scale, target.shape).reshape(target.shape[0], -1)[:, 0]
        scale = rows.reshape(-1, *[1] * (weight.ndim - 1))
    elif scale.size == 1:
        scale = scale.reshape(())
    return np.asarray(weight / scale * message_units(p.map, weight, source))


def levels(program: Program, x: np.ndarray) -> np.ndarray:
    """x as the chip's input population sends it, in floats."""
    scale = program.input.message_scale
    return np.asarray(np.rint(np.asarray(x, np.float64) * scale) / scale)


def with_integers(lowered: Graph, program: Program, keep: tuple[str, ...] = ()) -> Graph:
    """The lowered graph with every parameter as the Program holds it; states stay floats.

    keep  populations left as they were, with the weights that lead to them
    """
    targets = {p.name: p.target for p in program.projections.values()}
    nodes: list[Node] = []
    for node in lowered:
        if isinstance(node, Neuron) and node.name in program.populations and node.name not in keep:
            node = _neuron(node, program)
        elif isinstance(node, (Conv, Dense, Scale)) and targets.get(node.name, "") not in (
            *keep,
            "",
        ):
            node = _layer(node, read_back(program, node.name))
        nodes.append(node)
    return lowered.with_nodes(nodes)


def _layer(node: Conv | Dense | Scale, weight: np.ndarray) -> Node:
    if isinstance(node, Scale):
        return replace(node, scale=weight)
    return replace(node, weight=weight.reshape(node.weight.shape))


def _neuron(node: Neuron, program: Program) -> Neuron:
    population = program.populations[node.name]
    cell, q = population.cell, np.asarray(population.scale, np.float64)
    assert cell is not None
    if isinstance(node.model, Relay):
        last = population.name == program.readout.population
        return replace(node, bias=np.asarray(program.readout.offset) if last else None)
    bias = cell.bias / (64 * q)
    return replace(node, model=_model(node.model, cell, q), bias=bias if np.any(bias) else None)


def _model(model: NeuronModel, cell: Cell, q: np.ndarray) -> NeuronModel:
    """The float model with the cell's parameters; gains stand in the weights already."""
    whole: dict[str, Any] = {
        "r": 1.0, "w_in": 1.0, "v_leak": 0.0,
        "beta": _plain((4096 - np.asarray(cell.dv)) / 4096),
        "alpha": _plain((4095 - np.asarray(cell.du)) / 4096),
        "v_threshold": _plain(np.asarray(cell.vth) / q),
        "v_reset": _plain(cell.v_reset / (64 * q)),
    }  # fmt: skip
    if isinstance(model, SlidingWindow):
        return replace(model, v_threshold=whole["v_threshold"])
    have = model.params()
    return replace(model, **{k: v for k, v in whole.items() if k in have})


def _plain(x: np.ndarray) -> float | np.ndarray:
    return float(x.reshape(-1)[0]) if np.size(x) == 1 else x


@dataclass(frozen=True)
class Divergence:
    """The earliest value in which the chip leaves the float network.

    step, sample, neuron  where; step in algorithmic time, all from 0
    values                what the population sent: float, chip
    membranes             what was compared with the threshold, in units of the float network; None
                          where the model has no membrane
    threshold             of that neuron, float and chip
    stage                 the rung of the ladder that brought it in
    """

    population: str
    step: int
    sample: int
    neuron: tuple[int, ...]
    values: tuple[float, float]
    membranes: tuple[float, float] | None
    threshold: tuple[float, float] | None
    stage: str

    def __str__(self) -> str:
        a, b = (f"{v:g}" for v in self.values)
        text = (
            f"'{self.population}' step {self.step}, sample {self.sample}, neuron {self.neuron}: "
            f"float sent {a}, chip {b}; brought in by: {self.stage}"
        )
        if self.membranes and self.threshold:
            (v, w), (t, s) = self.membranes, self.threshold
            text += f" (membrane {v:.5g} of {t:.5g} in float, {w:.5g} of {s:.5g} on the chip)"
        return text


@dataclass(frozen=True, eq=False)
class Agreement:
    """How far a population's messages on one rung are those of the float network.

    same     fraction of equal values, over time, samples and neurons
    overlap  messages in both over messages in either (1 where both are silent)
    """

    same: float
    overlap: float


@dataclass(frozen=True, eq=False)
class Ladder:
    """Float graph, lowered graph and Program side by side on samples x.

    x  floats `[time, batch, *shape]`, or `[batch, *shape]` held for the graph's steps
    """

    graph: Graph
    program: Program
    x: np.ndarray

    @cached_property
    def lowered(self) -> Graph:
        return lowered_like(self.graph, self.program)

    @cached_property
    def series(self) -> np.ndarray:
        from ranvier.export.interpret import with_time

        (entry,) = self.graph.inputs
        steps = self.program.steps or self.graph.steps
        return np.asarray(with_time(np.asarray(self.x), entry.shape, steps, "compare"))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Populations that stand in every rung and send whole numbers, in order."""
        domains = infer_domains(self.graph)
        return tuple(
            n.name
            for n in self.lowered.populations
            if n.name in self.program.populations
            and n.name in domains
            and domains[n.name].grid == 1.0
            and self.graph.shapes[n.name] == self.program.populations[n.name].shape
        )

    @cached_property
    def sent(self) -> dict[str, dict[str, np.ndarray]]:
        """rung -> population -> `[time, batch, *shape]`."""
        x = self.series.astype(np.float64)
        quantized = with_integers(self.lowered, self.program)
        found = {
            "float": self._run(self.graph, self.series.astype(np.float32)),
            "lowered": self._run(self.lowered, x),
            "integer weights": self._run(quantized, levels(self.program, x)),
        }
        result = run(self.program, self.series, record=("spikes",))
        chip = {n: np.asarray(result.trace[n].spikes, np.float64) for n in self.names}
        return {**found, "integer states": {n: v / self._unit(n) for n, v in chip.items()}}

    def _unit(self, name: str) -> np.ndarray:
        return np.asarray(self.program.populations[name].message_scale)

    def _run(self, graph: Graph, x: np.ndarray) -> dict[str, np.ndarray]:
        if not self.names:
            return {}
        _, values = graph.run(x, record=self.names)
        return {n: np.asarray(v) for n, v in values.items()}

    @cached_property
    def agreement(self) -> dict[str, dict[str, Agreement]]:
        """rung -> population -> Agreement with the float rung."""
        first = self.sent["float"]
        return {
            rung: {n: _agreement(first[n], values[n]) for n in self.names}
            for rung, values in self.sent.items()
        }

    @cached_property
    def first_divergence(self) -> Divergence | None:
        """The earliest step, and in it the population that stands first; None where all agree."""
        first, last = self.sent["float"], self.sent[RUNGS[-1]]
        places = []
        for i, name in enumerate(self.names):
            where = np.argwhere(first[name] != last[name])
            if len(where):
                places.append((int(where[0][0]), i, tuple(int(k) for k in where[0])))
        if not places:
            return None
        _, i, at = min(places)
        return self._divergence(self.names[i], at)

    def _divergence(self, name: str, at: tuple[int, ...]) -> Divergence:
        values = [float(self.sent[rung][name][at]) for rung in RUNGS]
        stage = next(r for r, v in zip(RUNGS, values, strict=True) if v != values[0])
        step, sample, *neuron = at
        membranes, thresholds = self._membranes(name, step, sample, tuple(neuron))
        return Divergence(
            name, step, sample, tuple(neuron), (values[0], values[-1]), membranes, thresholds, stage
        )

    def _membranes(self, name: str, step: int, sample: int, neuron: tuple[int, ...]) -> Any:
        """((float, chip) membranes, (float, chip) thresholds) at one place, or (None, None)."""
        node, population = self.lowered[name], self.program.populations[name]
        cell = population.cell
        if not isinstance(node, Neuron) or cell is None or cell.kind != "cuba":
            return None, None
        model: Any = node.model
        if "beta" not in model.params():
            return None, None
        x = self.series[:, sample : sample + 1]
        v = self._float_membrane(node, x.astype(np.float64), step)[0][neuron]
        h = self._chip_membrane(name, x, step)[0][neuron]
        q = np.broadcast_to(population.scale, population.shape)[neuron]
        theta = np.broadcast_to(np.asarray(model.v_threshold), population.shape)[neuron]
        vth = np.broadcast_to(np.asarray(cell.vth), population.shape)[neuron]
        return (float(v), float(h / (64 * q))), (float(theta), float(vth / q))

    def _float_membrane(self, node: Neuron, x: np.ndarray, step: int) -> np.ndarray:
        _, recorded = self.lowered.run(x, record=(node.inputs[0],))
        current = np.asarray(recorded[node.inputs[0]], np.float64)
        if node.bias is not None:
            current = current + node.bias
        model: Any = node.model
        state = model.initial(current[0])
        for t in range(step):
            _, state = model.step(state, current[t])
        if model.timing == "immediate":
            model = replace(model, reset="none")  # what stands before the reset of this step
        return np.asarray(model.step(state, current[step])[1]["v"])

    def _chip_membrane(self, name: str, x: np.ndarray, step: int) -> np.ndarray:
        from ranvier.sim.reference import run_reference

        cell: Any = self.program.populations[name].cell
        series = run_reference(self.program, self.program.encode(x[: step + 1]))
        u, v = series.u[name], series.v[name]
        if cell.timing != "immediate":
            return v[step]
        before = v[step - 1] if step else np.zeros_like(v[0])
        return np.asarray(decay(before, cell.dv) + u[step] + cell.bias)


def lowered_like(graph: Graph, program: Program) -> Graph:
    """The lowered graph from which the program was made."""
    return (
        graph if graph.spec == "lowered" else graph.lower(str(program.meta.get("joins", "linear")))
    )


def _agreement(a: np.ndarray, b: np.ndarray) -> Agreement:
    same = float((a == b).mean()) if a.size else 1.0
    either = int(((a != 0) | (b != 0)).sum())
    both = int(((a != 0) & (a == b)).sum())
    return Agreement(same, both / either if either else 1.0)
