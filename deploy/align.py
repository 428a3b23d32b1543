"""Time on the chip: each population's depth, each projection's delay.

Every synapse takes one chip step. A population of depth d works on a sample's step s in chip step s + d;
a projection with an algorithmic lag L therefore waits `depth(target) - depth(source) - 1 + L` steps
more. The depths are the smallest for which no such delay is negative: longest paths.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ranvier.deploy.cells import Cell
from ranvier.deploy.program import OneToOne, Population, Program, Projection
from ranvier.train.errors import UnsupportedError

MAX_DELAY = 62


def align(program: Program, max_delay: int = MAX_DELAY) -> Program:
    """The program with depths and delays set; delays beyond `max_delay` go through relays.

    Raises UnsupportedError for a cycle with more synapses than algorithmic steps.
    """
    depth = _depths(program)
    populations = {n: replace(p, depth=depth[n]) for n, p in program.populations.items()}
    projections: dict[str, Projection] = {}
    for name, p in program.projections.items():
        delay = depth[p.target] - depth[p.source] - 1 + p.lag
        source, lag, at, n = p.source, p.lag, depth[p.source], 0
        while delay > max_delay:
            first = min(lag, at + max_delay)  # the relay comes after the sample's first step, too
            relay = _relay(populations[source], f"{name}/relay{n}", at + max_delay + 1 - first)
            populations[relay.name] = relay
            hop = _hop(populations[source], relay, first, max_delay)
            projections[hop.name] = hop
            source, lag, at, n = relay.name, lag - first, relay.depth, n + 1
            delay = depth[p.target] - at - 1 + lag
        projections[name] = replace(p, source=source, lag=lag, delay=delay)
    return program.with_parts(
        populations=_in_order(populations, list(program.populations), projections),
        projections=projections,
    )


def _depths(program: Program) -> dict[str, int]:
    depth = {p.name: 0 if p.is_input else 1 for p in program}
    for _ in range(len(depth) + 1):
        changed = False
        for p in program.projections.values():
            least = depth[p.source] + 1 - p.lag
            if depth[p.target] < least:
                depth[p.target], changed = least, True
        if not changed:
            return depth
    loop = next(
        p for p in program.projections.values() if p.lag and depth[p.source] >= depth[p.target]
    )
    raise UnsupportedError(
        f"align: '{loop.name}' closes a cycle with more synapses than algorithmic steps; on the chip "
        "every synapse takes a step, so the spikes would come too late. Add delay to the recurrence"
    )


def _relay(source: Population, name: str, depth: int) -> Population:
    """A population that sends what `source` sent, unchanged."""
    cell = Cell(kind="relay") if source.graded else Cell(du=4095, dv=4096, vth=0)
    return Population(
        name=name,
        shape=source.shape,
        cell=cell,
        lo=source.lo,
        hi=source.hi,
        depth=depth,
        scale=source.scale if source.graded else np.ones(()),
        origin=source.origin,
    )


def _hop(source: Population, relay: Population, lag: int, delay: int) -> Projection:
    one = OneToOne(weight=np.ones((), np.int16), shape=source.shape)
    name = f"{source.name}>{relay.name}"
    return Projection(
        name=name, source=source.name, target=relay.name, map=one, lag=lag, delay=delay
    )


def _in_order(
    populations: dict[str, Population], first: list[str], projections: dict[str, Projection]
) -> dict[str, Population]:
    """Relays placed right before the population that they feed; the rest stays in order."""
    feeds: dict[str, str] = {p.source: p.target for p in projections.values()}
    order = list(first)
    for name in reversed([n for n in populations if n not in first]):
        order.insert(order.index(feeds[name]), name)
    return {name: populations[name] for name in order}
