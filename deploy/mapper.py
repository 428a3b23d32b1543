"""A lowered graph, with one mapping of its joins, population by population to integers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from ranvier.deploy.align import align
from ranvier.deploy.bounds import Bound, arriving, prove
from ranvier.deploy.calibration import measure
from ranvier.deploy.cells import VTH_MAX, Cell
from ranvier.deploy.chip import LOIHI1
from ranvier.deploy.currents import logic_scale, total_bias, whole_threshold
from ranvier.deploy.encoding import input_population
from ranvier.deploy.fan_out import fan_out
from ranvier.deploy.incoming import incoming_of
from ranvier.deploy.options import Options
from ranvier.deploy.program import Population, Program, Projection, Shape
from ranvier.deploy.quantize import (
    Incoming,
    Scaled,
    along_rows,
    int_map,
    mean_shift,
    neuron_cell,
)
from ranvier.deploy.readouts import integrates, readout_of
from ranvier.deploy.rounding import refine
from ranvier.deploy.scaling import Need, scale_of
from ranvier.deploy.stem import best_input
from ranvier.export.graph import Graph
from ranvier.export.neurons import LI, CubaLI, Relay, Threshold
from ranvier.export.nodes import Conv, Input, Neuron, Node, Scale
from ranvier.train.errors import CapacityError, UnsupportedError

MARGIN_TRIES = 4
ROUNDED_TOGETHER = 6  # up to so many bits, the weights of a row are rounded together
ONE_TO_ONE_PAYLOAD = 2**15  # of relays that only pass values on, into sums below 2**17
WEIGHTED_PAYLOAD = 2**10  # of relays whose value is multiplied by the weights of a convolution


class Mapper:
    """Makes a Program of a lowered graph.

    x      calibration data `[time, batch, *shape]`, or None
    joins  which mapping of the joins the graph was lowered with
    """

    def __init__(self, graph: Graph, x: np.ndarray | None, options: Options, joins: str) -> None:
        self.graph, self.x, self.options, self.joins = graph, x, options, joins
        self.measured = measure(graph, x)
        self.margin: dict[str, float] = {}
        self.populations: dict[str, Population] = {}
        self.projections: dict[str, Projection] = {}
        self.offset: np.ndarray = np.zeros(())

    @property
    def integrates(self) -> bool:
        return integrates(self.graph, self.options.chip)

    @property
    def last(self) -> str:
        """The population that is read out."""
        return self.graph.outputs[0].inputs[0]

    def program(self) -> Program:
        """The aligned Program. Rounding can carry a sum past what was planned for: then again, finer."""
        for _ in range(MARGIN_TRIES):
            program = self.attempt()
            tight = [bound for bound in prove(program).values() if bound.wraps]
            if not tight:
                return program
            for bound in tight:
                self.margin[bound.population] = self.margin.get(bound.population, 1.0) * 0.9
        raise _wraps(tight[0])

    def attempt(self) -> Program:
        self.populations, self.projections = {}, {}
        o = self.options
        for node in self.graph:
            if isinstance(node, Input):
                self.populations[node.name] = self.entry(node)
        for node in [n for n in self.graph if isinstance(n, Neuron)]:
            self.population(node)
        last = self.populations[self.last]
        read = readout_of(self.graph, last, self.offset, self.integrates)
        return align(
            Program(
                populations=self.populations,
                projections=self.projections,
                readout=read,
                steps=self.graph.steps,
                meta=self.meta(),
            ),
            int(o.chip.max_delay.value),
        )

    def entry(self, node: Input) -> Population:
        o = self.options
        if o.input_bits == "auto" and o.like is not None:
            return o.like.populations[node.name]
        if o.input_bits == "auto":
            return best_input(node, self.graph, self.x, self.measured.moments, o)
        return input_population(node, self.x, o.input_bits, o.chip)

    def meta(self) -> dict[str, Any]:
        o = self.options
        return {
            "chip": o.chip.name,
            "weight_bits": o.weight_bits,
            "joins": self.joins,
            "logic": o.logic,
            "thresholds": "channel" if o.by_channel else "population",
            "calibration_samples": 0 if self.x is None else int(self.x.shape[1]),
            "cost_pj": self.cost(),
            "cost_model": "modelled: Davies 2018 per-event costs on the calibration data, per sample",
        }

    def cost(self) -> float:
        """Modelled energy of a sample in pJ, from mean activity: what `joins="auto"` compares."""
        energy = LOIHI1.energy_pj
        synops = updates = active = 0.0
        moments = self.measured.moments
        for p in self.projections.values():
            share = moments[p.source].active
            used, _ = fan_out(p.map)
            synops += float(np.repeat(share, len(used) // len(share)) @ used)
        for population in self.populations.values():
            if not population.is_input:
                updates += population.size
                active += population.size * float(moments[population.name].active.mean())
        total = (
            synops * energy["synop"].value
            + active * energy["update_active"].value
            + (updates - active) * energy["update_inactive"].value
        )
        return total * (self.graph.steps or 1)

    def population(self, node: Neuron) -> None:
        """Makes a population and the projections into it."""
        _require_readout(self.graph, node)
        o = self.options
        moments, shape = self.measured.moments, self.graph.shapes[node.name]
        incoming = incoming_of(node, self.graph, self.populations, moments, o.weight_bits)
        bias, logic = total_bias(node), logic_scale(node.model, incoming)
        scaled = logic or self.scaled(node, incoming, bias)
        if o.bias_correction and self.x is not None and not logic and not self.passes_on(node):
            bias = bias - mean_shift(incoming, scaled, shape)
        scale = along_rows(scaled.q, len(shape))
        if isinstance(node.model, Relay):
            cell = self.relay_cell(node, incoming, scaled, bias)
        else:
            cell = neuron_cell(whole_threshold(node) if logic else node, scale, bias)
            plain = isinstance(node.model, Threshold) and not np.any(bias)
            if logic and o.logic and plain:
                cell = replace(cell, kind="logic")
        into = [
            _projection(i, node.name, w, e)
            for i, w, e in zip(incoming, scaled.weights, scaled.exponents, strict=True)
        ]
        self.projections.update({p.name: p for p in into})
        lo, hi = self.payload(cell, into, shape)
        self.populations[node.name] = Population(
            name=node.name,
            shape=shape,
            cell=cell,
            scale=np.array(scale),
            lo=lo,
            hi=hi,
            origin=node.name,
        )

    def passes_on(self, node: Neuron) -> bool:
        """Whether it is a relay inside the network, whose value others take."""
        return isinstance(node.model, Relay) and node.name != self.last

    def scaled(self, node: Neuron, incoming: list[Incoming], bias: np.ndarray) -> Scaled:
        shape, margin = self.graph.shapes[node.name], self.margin.get(node.name, 1.0)
        relay = isinstance(node.model, Relay)
        sums = (self.graph.steps or 1) if relay and self.integrates else 0
        found = scale_of(Need(node, shape, incoming, bias, margin, sums), self.options)
        few = [i for i in incoming if i.bits <= ROUNDED_TOGETHER]
        if self.options.together and few:
            found = refine(incoming, found, {i.source.name: self.measured.sent(i) for i in few})
        return found

    def relay_cell(
        self, node: Neuron, incoming: list[Incoming], scaled: Scaled, bias: np.ndarray
    ) -> Cell:
        """The cell of a relay; of the last one, whose bias the readout adds, perhaps a membrane."""
        if self.passes_on(node):
            if np.any(bias):
                raise UnsupportedError(
                    f"compile: relay '{node.name}' has a bias, which it cannot hold"
                )
            return Cell(kind="relay", shift=self.shift(node, incoming, scaled))
        self.offset = bias
        if self.integrates:
            return Cell(vth=VTH_MAX)  # it is proved that this never fires
        return Cell(kind="relay")

    def shift(self, node: Neuron, incoming: list[Incoming], scaled: Scaled) -> int:
        """How far a relay shifts its payload, so that what takes it has room for its own weights."""
        size = math.prod(self.graph.shapes[node.name])

        def each(rows: np.ndarray | float) -> np.ndarray:  # a channel's value for its neurons
            return np.repeat(np.ravel(rows), size // np.size(rows))

        low = np.min(sum(each(i.extent_rows()[0]) for i in incoming) * each(scaled.q))
        high = np.max(sum(each(i.extent_rows()[1]) for i in incoming) * each(scaled.q))
        wide = all(_single(self.graph[c]) for c in self.graph.consumers[node.name])
        limit = ONE_TO_ONE_PAYLOAD if wide else WEIGHTED_PAYLOAD
        return max(0, int(np.ceil(np.log2(max(-low, high, 1.0) / limit))))

    def payload(self, cell: Cell, into: list[Projection], shape: Shape) -> tuple[int, int]:
        """The range of what a population sends."""
        if cell.kind != "relay":
            return 0, 1
        lo, hi = arriving(into, self.populations, shape)
        return lo >> cell.shift, -(-hi >> cell.shift)


def _projection(i: Incoming, target: str, whole: np.ndarray, exponent: int) -> Projection:
    return Projection(
        name=i.name,
        source=i.source.name,
        target=target,
        map=int_map(i, whole),
        exponent=exponent,
        lag=i.lag,
        bits=i.bits,
        origin=i.name,
    )


def _require_readout(graph: Graph, node: Neuron) -> None:
    """Raises UnsupportedError for a membrane that other neurons take."""
    only = [graph.outputs[0].name]
    if isinstance(node.model, (LI, CubaLI)) and graph.consumers[node.name] != only:
        raise UnsupportedError(
            f"compile: '{node.name}' sends its membrane to other neurons; only a readout may. "
            "Put a spiking neuron behind it"
        )


def _single(node: Node) -> bool:
    """Whether a map takes at most one source neuron for each target: no sum can pile up in it."""
    if isinstance(node, Conv):
        return int((node.weight != 0).reshape(len(node.weight), -1).sum(1).max()) <= 1
    return isinstance(node, Scale)


def _wraps(bound: Bound) -> CapacityError:
    return CapacityError(
        f"compile: the sum that arrives at '{bound.population}' can reach {bound.a_lo}..{bound.a_hi}, "
        "which wraps on the chip; use fewer weight_bits or input_bits, or split its fan-in"
    )
