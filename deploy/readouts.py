"""How a Program's output is read: spikes, a membrane, or the current that a relay sends."""

from __future__ import annotations

import numpy as np

from ranvier.deploy.chip import Chip
from ranvier.deploy.program import Population, Readout
from ranvier.export.graph import Graph
from ranvier.export.neurons import LI, CubaLI, Relay
from ranvier.export.nodes import Neuron
from ranvier.train.errors import UnsupportedError


def integrates(graph: Graph, chip: Chip) -> bool:
    """Whether the readout piles up in a membrane, for a chip that cannot send values."""
    (output,) = graph.outputs
    node = graph[output.inputs[0]]
    if chip.graded or not (isinstance(node, Neuron) and isinstance(node.model, Relay)):
        return False
    if output.reduce not in ("mean", "sum") or graph.steps is None:
        raise UnsupportedError(
            f"compile: {chip.name} cannot send values, and output '{output.name}' is "
            "no mean or sum over a known number of steps; read spikes out, or use loihi2"
        )
    return True


def readout_of(
    graph: Graph, population: Population, offset: np.ndarray, integrating: bool
) -> Readout:
    """The Readout of the population behind the graph's output.

    offset       what a relay's bias adds in each step, in float units
    integrating  as `integrates` says
    """
    (output,) = graph.outputs
    name = output.inputs[0]
    node = graph[name]
    assert isinstance(node, Neuron)
    q, one = population.scale, np.ones(())
    if isinstance(node.model, Relay) and integrating:
        return _piled_up(graph, population, offset)
    if isinstance(node.model, Relay):
        offset = np.asarray(offset, np.float64)
        return Readout(
            population=name, kind="current", reduce=output.reduce, scale=one / q, offset=offset
        )
    if isinstance(node.model, (LI, CubaLI)) or output.observe == "v":
        scale = one / (64 * q)
        return Readout(population=name, kind="membrane", reduce=output.reduce, scale=scale)
    if output.observe == "u":
        raise UnsupportedError(
            f"compile: output '{output.name}' observes a current; only v is read"
        )
    return Readout(population=name, kind="spikes", reduce=output.reduce)


def _piled_up(graph: Graph, population: Population, offset: np.ndarray) -> Readout:
    """A membrane that held the sum over all steps: its last value, by the steps for a mean."""
    steps = (graph.steps or 1) if graph.outputs[0].reduce == "mean" else 1
    total = np.asarray(offset, np.float64) * (1 if steps > 1 else graph.steps or 1)
    scale = np.ones(()) / (64 * population.scale * steps)
    return Readout(
        population=population.name, kind="membrane", reduce="last", scale=scale, offset=total
    )
