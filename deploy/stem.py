"""How many bits an analog input is given: its levels and the stem's weights share one sum.

The sum that arrives at a population stays below 2**17. With 255 levels of input its whole-number weights
add up to 514 at most: a stem of 27 inputs has 4 or 5 bits a weight left, one of 147 has two. Fewer levels
round the pixels more and the weights less; which is better follows from the network and its data.
"""

from __future__ import annotations

import numpy as np

from ranvier.deploy.currents import total_bias
from ranvier.deploy.encoding import input_population
from ranvier.deploy.incoming import emitter, incoming_of
from ranvier.deploy.options import Options
from ranvier.deploy.program import Population
from ranvier.deploy.quantize import Incoming, Moments
from ranvier.deploy.scaling import Need, scale_of
from ranvier.export.graph import Graph
from ranvier.export.nodes import Input, Neuron, Scale
from ranvier.train.errors import CapacityError

FEWEST, MOST = 4, 8  # bits


def best_input(
    node: Input, graph: Graph, x: np.ndarray | None, moments: dict[str, Moments], options: Options
) -> Population:
    """The input population of the number of bits with the least expected squared error of what arrives.

    x  calibration data; without it, or where the input is spikes, MOST bits
    """
    most = input_population(node, x, MOST, options.chip)
    stems = [n for n in graph if isinstance(n, Neuron) and _sees_only(n, node.name, graph)]
    if x is None or not most.graded or not stems:
        return most
    made = [input_population(node, x, b, options.chip) for b in range(MOST, FEWEST - 1, -1)]
    errors = [sum(_error(n, p, graph, x, moments, options) for n in stems) for p in made]
    return made[int(np.argmin(errors))]


def _sees_only(node: Neuron, source: str, graph: Graph) -> bool:
    """Whether all that arrives at a population comes from `source`."""
    maps = [graph[b] for b in graph[node.inputs[0]].inputs]
    return all(emitter(graph, m.inputs[0])[0] == source for m in maps)


def _error(
    node: Neuron,
    source: Population,
    graph: Graph,
    x: np.ndarray,
    moments: dict[str, Moments],
    options: Options,
) -> float:
    """Expected squared error of a population's current: of its rounded weights, and of rounded input."""
    incoming = incoming_of(node, graph, {source.name: source}, moments, options.weight_bits)
    need = Need(node, graph.shapes[node.name], incoming, total_bias(node))
    try:
        rounded = scale_of(need, options).error
    except CapacityError:
        return float("inf")
    units = np.asarray(x, np.float64) * float(source.scale)
    off = ((np.rint(units) - units) ** 2).mean((0, 1, *range(3, units.ndim)))
    return rounded + sum(_passed(i, off) for i in incoming)


def _passed(i: Incoming, off: np.ndarray) -> float:
    """A squared error by channel of the source, through a map: the mean over its rows."""
    rows = i.weight**2 * i.spread(off)
    flat = rows if isinstance(i.node, Scale) else rows.reshape(len(rows), -1).sum(1)
    return float(flat.mean())
