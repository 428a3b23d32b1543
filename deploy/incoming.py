"""What arrives at a population: its projections before quantization."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ranvier.deploy.cells import Cell
from ranvier.deploy.currents import by_row, gain_of, in_units, message_units
from ranvier.deploy.program import Population
from ranvier.deploy.quantize import Incoming, Moments
from ranvier.export.graph import Graph
from ranvier.export.nodes import Conv, Delay, Dense, Flatten, Neuron, Scale
from ranvier.train.errors import UnsupportedError

WIRE_BITS = 8  # of maps without parameters of their own


def incoming_of(
    node: Neuron,
    graph: Graph,
    populations: Mapping[str, Population],
    moments: Mapping[str, Moments],
    weight_bits: int,
) -> list[Incoming]:
    """An Incoming for each map into a population of a lowered graph.

    populations  those made so far; one that is not yet is a recurrent edge's
    """
    found = []
    for branch in graph[node.inputs[0]].inputs:
        linear = graph[branch]
        if isinstance(linear, Flatten):
            linear = graph[linear.inputs[0]]
        assert isinstance(linear, (Conv, Dense, Scale))
        name, lag = emitter(graph, linear.inputs[0])
        source = populations.get(name) or _ahead(graph, name)
        weight = _gained(node, linear, graph, name)
        found.append(
            Incoming(
                linear.name,
                source,
                lag,
                linear,
                weight / message_units(linear, weight, source),
                graph.shapes[node.name],
                in_units(moments[name], source),
                weight_bits if linear.meta.get("weighted", True) else WIRE_BITS,
            )
        )
    return found


def _gained(node: Neuron, linear: Conv | Dense | Scale, graph: Graph, source: str) -> np.ndarray:
    """A map's weight times the gain of the population that it reaches."""
    gain = gain_of(node.model)
    if isinstance(linear, Scale):
        weight = np.broadcast_to(np.asarray(linear.scale, np.float64), graph.shapes[source])
        return np.asarray(weight * gain)
    weight = np.asarray(linear.weight, np.float64)
    if np.size(gain) == 1:
        return np.asarray(weight * float(np.reshape(gain, ())))
    return np.asarray(weight * by_row(gain, weight, graph.shapes[node.name]))


def emitter(graph: Graph, name: str) -> tuple[str, int]:
    """(population, lag) behind a Flatten or a Delay."""
    lag = 0
    node = graph[name]
    while isinstance(node, (Flatten, Delay)):
        lag += node.steps if isinstance(node, Delay) else 0
        node = graph[node.inputs[0]]
    return node.name, lag


def _ahead(graph: Graph, name: str) -> Population:
    """A population that a recurrent edge takes before it is made: only spikes can go back."""
    node = graph[name]
    assert isinstance(node, Neuron)
    if not node.model.binary:
        raise UnsupportedError(f"compile: '{name}' feeds back a value; only spikes can go back")
    return Population(name=name, shape=graph.shapes[name], cell=Cell())
