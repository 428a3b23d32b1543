"""Algorithmic operations: what the source network asks for, before any chip.

Every Conv, Dense and Scale is counted border-exact, by what really arrives at it: plain or signed
spikes (accumulates), whole numbers (graded accumulates), or anything else (multiplications).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ranvier.deploy.fan_out import fan_out
from ranvier.deploy.program import ConvMap
from ranvier.export.graph import Graph
from ranvier.export.nodes import Conv, Dense, Neuron, Scale, Shape
from ranvier.train.errors import RangeError

DOMAINS = ("spikes", "integers", "reals")
KEYS = (
    "n_synops",
    "n_mults",
    "n_graded",
    "n_unrolled",
    "n_events",
    "n_dense",
    "n_spikes",
    "n_updates",
)


@dataclass(frozen=True, eq=False)
class MapCounts:
    """What one Conv, Dense or Scale did: int64 arrays `[time]`, summed over samples.

    kind        the node's class
    domains     place in DOMAINS of what arrived in each step
    n_events    inputs that are not zero
    n_synops    of those, through weights that are not zero
    n_dense     through all weights, whatever arrived
    n_unrolled  n_synops with each input counted |input| times: accumulates, were whole numbers sent
                as that many spikes; zero in steps with reals
    """

    kind: str
    domains: np.ndarray
    n_events: np.ndarray
    n_synops: np.ndarray
    n_dense: np.ndarray
    n_unrolled: np.ndarray

    @property
    def domain(self) -> str:
        """The widest of what arrived."""
        return DOMAINS[int(self.domains.max(initial=0))]


@dataclass(frozen=True, eq=False)
class Operations:
    """The counts of a run; an energy model takes it as it takes a Ledger.

    maps     node -> MapCounts
    neurons  node -> {"n_spikes", "n_updates"}, `[time]`
    """

    maps: Mapping[str, MapCounts]
    neurons: Mapping[str, Mapping[str, np.ndarray]]
    n_samples: int

    def _of(self, key: str, *domains: str) -> int:
        return int(sum(getattr(m, key).sum() for m in self.maps.values() if m.domain in domains))

    @property
    def n_accumulates(self) -> int:
        """Operations of maps that see nothing but spikes."""
        return self._of("n_synops", "spikes")

    @property
    def n_graded_accumulates(self) -> int:
        """Operations of maps that see whole numbers."""
        return self._of("n_synops", "integers")

    @property
    def n_multiplications(self) -> int:
        """Operations of maps that see reals."""
        return self._of("n_synops", "reals")

    @property
    def n_dense(self) -> int:
        """Operations of a dense pass."""
        return self._of("n_dense", *DOMAINS)

    def total(self, key: str) -> int:
        """One count by the Ledger's names: n_mults is those of n_synops that see reals.

        Raises RangeError for a name that is not in KEYS.
        """
        if key not in KEYS:
            raise RangeError(f"operations: '{key}' is none of {', '.join(KEYS)}")
        if key in ("n_spikes", "n_updates"):
            return int(sum(c[key].sum() for c in self.neurons.values()))
        special = {"n_mults": ("n_synops", "reals"), "n_graded": ("n_synops", "integers")}
        return self._of(*special[key]) if key in special else self._of(key, *DOMAINS)

    def neurobench(self) -> dict[str, float]:
        """NeuroBench's SynapticOperations, a sample: it looks at each step of each layer by itself.

        Source: neurobench 2.3.0; Scale nodes are none of its layers.
        """
        maps = [m for m in self.maps.values() if m.kind != "Scale"]
        spiking = sum(int(m.n_synops[m.domains == 0].sum()) for m in maps)
        other = sum(int(m.n_synops[m.domains > 0].sum()) for m in maps)
        dense = sum(int(m.n_dense.sum()) for m in maps)
        return {
            "Effective_ACs": spiking / self.n_samples,
            "Effective_MACs": other / self.n_samples,
            "Dense": dense / self.n_samples,
        }


def algorithmic(graph: Graph, x: Any) -> Operations:
    """The Operations of x `[time, batch, *shape]` on a source graph, from its float interpreter."""
    maps = [n for n in graph if isinstance(n, (Conv, Dense, Scale))]
    populations = [n for n in graph if isinstance(n, Neuron)]
    names = {n.inputs[0] for n in maps} | {n.name for n in populations}
    _, series = graph.run(x, record=tuple(sorted(names)))
    arrays = {name: np.asarray(s) for name, s in series.items()}
    counted = {n.name: _count(n, arrays[n.inputs[0]], graph.shapes[n.inputs[0]]) for n in maps}
    neurons = {n.name: _neurons(arrays[n.name]) for n in populations}
    return Operations(counted, neurons, int(next(iter(arrays.values())).shape[1]))


def _neurons(sent: np.ndarray) -> dict[str, np.ndarray]:
    flat = sent.reshape(len(sent), -1)
    return {
        "n_spikes": (flat != 0).sum(1, dtype=np.int64),
        "n_updates": np.full(len(flat), flat.shape[1], np.int64),
    }


def _count(node: Conv | Dense | Scale, series: np.ndarray, shape: Shape) -> MapCounts:
    used, zero = synapses(node, shape)
    flat = series.reshape(*series.shape[:2], -1)
    some = (flat != 0).sum(1, dtype=np.int64)
    domains = np.array([_domain(step) for step in flat], np.int64)
    times = np.zeros_like(some)
    for t in np.flatnonzero(domains < 2):
        times[t] = np.abs(flat[t]).sum(0).astype(np.int64)
    dense = np.full(len(flat), int((used + zero).sum()) * flat.shape[1], np.int64)
    kind = type(node).__name__
    return MapCounts(kind, domains, some.sum(1), some @ used, dense, times @ used)


def _domain(step: np.ndarray) -> int:
    if ((step == 0) | (np.abs(step) == 1)).all():
        return 0
    return 1 if (step == np.rint(step)).all() else 2


def synapses(node: Conv | Dense | Scale, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """(weights that are not zero, weights of zero) that each input element meets, `[n]`, int64."""
    match node:
        case Conv():
            return fan_out(_as_map(node, shape))
        case Dense():
            used = (node.weight != 0).sum(0).astype(np.int64)
            repeated = int(np.prod(shape[:-1]))
            return np.tile(used, repeated), np.tile(len(node.weight) - used, repeated)
        case Scale():
            used = np.broadcast_to(node.scale != 0, shape).reshape(-1).astype(np.int64)
            return used, 1 - used


def _as_map(node: Conv, shape: Shape) -> ConvMap:
    """The convolution with one axis of 1 where it has only one; weights become their signs."""
    one = node.weight.ndim == 3
    weight = np.sign(node.weight).astype(np.int64)

    def pair(v: tuple[int, ...], fill: int) -> tuple[int, int]:
        return (fill, v[0]) if one else (v[0], v[1])

    stride, pad = pair(node.stride, 1), pair(node.padding, 0)
    dilation = pair(node.dilation, 1)
    weight = weight[:, :, None] if one else weight
    c, h, w = (shape[0], 1, shape[1]) if one else shape
    sizes = zip((h, w), pad, dilation, weight.shape[2:], stride, strict=True)
    rows, cols = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes)
    return ConvMap(
        weight=weight, in_shape=(c, h, w), out_shape=(len(weight), rows, cols), stride=stride,
        padding=pad, dilation=dilation, groups=node.groups,
    )  # fmt: skip


def count(graph: Graph, x: Any) -> dict[str, float]:
    """`algorithmic` as figures a sample, by name."""
    found = algorithmic(graph, x)
    return {
        "accumulates": found.n_accumulates / found.n_samples,
        "graded_accumulates": found.n_graded_accumulates / found.n_samples,
        "multiplications": found.n_multiplications / found.n_samples,
        "dense": found.n_dense / found.n_samples,
    }
