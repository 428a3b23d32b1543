"""Trace and Ledger: what was sent, and what it cost, counted exactly in int64."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ranvier.deploy.fan_out import fan_out
from ranvier.deploy.program import LinearMap, Population, Program
from ranvier.train.errors import RangeError, ShapeError

if TYPE_CHECKING:
    import nir
    import pandas

Fans: TypeAlias = "tuple[np.ndarray, np.ndarray]"
POPULATION_COUNTS = ("n_spikes", "n_payload", "n_graded", "n_updates")
PROJECTION_COUNTS = ("n_events", "n_synops", "n_synops_zero", "n_mults")


@dataclass(frozen=True, eq=False)
class Record:
    """What one population did: arrays `[time, batch, *shape]`; u and v where asked for."""

    spikes: np.ndarray | None = None
    u: np.ndarray | None = None
    v: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Trace(Mapping[str, Record]):
    """name -> Record; spikes are uint8, or int32 where messages are graded."""

    records: Mapping[str, Record]

    def to_nir(self, dt: float = 1e-3) -> nir.NIRGraphData:
        """The trace as NIR's data format; see `ranvier.sim.ledger_file.trace_to_nir`."""
        from ranvier.sim.ledger_file import trace_to_nir

        return trace_to_nir(self, dt)

    def __getitem__(self, name: str) -> Record:
        if name not in self.records:
            known = ", ".join(self.records) or "nothing; run(..., record=('spikes',)) does"
            raise KeyError(f"trace: no population '{name}' was recorded, only {known}")
        return self.records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, eq=False)
class Ledger:
    """Counts per step, summed over samples: int64 arrays `[time]`. Ledgers add.

    populations  name -> n_spikes (messages that are not zero), n_payload (the sum of their absolute
                 values), n_graded (those that are not a plain spike), n_updates (neuron updates)
    projections  name -> n_events (messages that reach it), n_synops (synaptic operations through
                 weights that are not zero, border-exact), n_synops_zero (through weights of zero),
                 n_mults (those of n_synops whose message is not a plain spike)
    sizes        name -> neurons
    n_samples    how many samples were counted
    inputs       the names of the populations that only send what comes from outside
    neurons      name -> messages of each neuron, `[n]`, over all steps; empty where not kept
    meta         payload_bits: name -> bits of a message, where messages are more than spikes
    """

    populations: Mapping[str, Mapping[str, np.ndarray]]
    projections: Mapping[str, Mapping[str, np.ndarray]]
    sizes: Mapping[str, int]
    n_samples: int
    inputs: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    neurons: Mapping[str, np.ndarray] = field(default_factory=dict)

    def total(self, key: str) -> int:
        """The sum of one count over everything and all steps; spikes leave out the input's."""
        part = self.populations if key in POPULATION_COUNTS else self.projections
        return int(sum(v[key].sum() for n, v in part.items() if n not in self.inputs))

    @property
    def n_spikes(self) -> int:
        return self.total("n_spikes")

    @property
    def n_messages(self) -> int:
        """Messages leaving populations, the input's included."""
        return int(sum(v["n_spikes"].sum() for v in self.populations.values()))

    @property
    def n_synops(self) -> int:
        return self.total("n_synops")

    @property
    def n_updates(self) -> int:
        return self.total("n_updates")

    @property
    def n_mults(self) -> int:
        return self.total("n_mults")

    @property
    def n_graded(self) -> int:
        return self.total("n_graded")

    @property
    def n_payload_bits(self) -> int:
        """Bits that the messages carry beside their address; plain spikes carry none."""
        bits = self.meta.get("payload_bits", {})
        return int(sum(self.populations[n]["n_spikes"].sum() * b for n, b in bits.items()))

    @property
    def n_steps(self) -> int:
        return len(next(iter(self.populations.values()))["n_spikes"])

    @property
    def spikes_per_neuron(self) -> float:
        """Mean spikes a neuron and sample, over all populations but the input."""
        neurons = sum(n for name, n in self.sizes.items() if name not in self.inputs)
        return self.n_spikes / (neurons * self.n_samples) if neurons and self.n_samples else 0.0

    def rate(self, name: str) -> float:
        """Mean messages a neuron, step and sample of one population."""
        spikes = self.populations[name]["n_spikes"]
        return float(spikes.sum() / (len(spikes) * self.sizes[name] * self.n_samples))

    def __radd__(self, other: Any) -> Ledger:
        """So that sum(ledgers) works: it starts from 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __add__(self, other: Ledger) -> Ledger:
        if not isinstance(other, Ledger):
            return NotImplemented
        if self.sizes != other.sizes or set(self.projections) != set(other.projections):
            raise ShapeError("ledger: only ledgers of the same program add")
        return Ledger(
            _added(self.populations, other.populations),
            _added(self.projections, other.projections),
            self.sizes,
            self.n_samples + other.n_samples,
            self.inputs,
            self.meta,
            {n: a + other.neurons[n] for n, a in self.neurons.items() if n in other.neurons},
        )

    def steps(self, start: int | None, stop: int | None) -> Ledger:
        """The ledger of steps start..stop, the end left out; per-neuron counts are not by step."""

        def cut(part: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
            return {n: {k: v[start:stop] for k, v in c.items()} for n, c in part.items()}

        parts = cut(self.populations), cut(self.projections)
        return replace(self, populations=parts[0], projections=parts[1], neurons={})

    def only(self, *names: str) -> Ledger:
        """The ledger of some populations and projections.

        Raises RangeError for a name that it does not hold.
        """
        for name in names:
            if name not in self.populations and name not in self.projections:
                raise RangeError(f"ledger: it holds no population or projection named '{name}'")

        def pick(part: Mapping[str, Any]) -> dict[str, Any]:
            return {n: c for n, c in part.items() if n in names}

        bits = pick(self.meta.get("payload_bits", {}))
        return replace(
            self,
            populations=pick(self.populations),
            projections=pick(self.projections),
            sizes=pick(self.sizes),
            neurons=pick(self.neurons),
            meta={**self.meta, "payload_bits": bits},
        )

    def same_counts(self, other: Ledger) -> bool:
        return self.to_dict() == other.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and ints, for JSON."""
        return {
            "n_samples": self.n_samples,
            "sizes": dict(self.sizes),
            "inputs": list(self.inputs),
            "populations": _plain(self.populations),
            "projections": _plain(self.projections),
            "payload_bits": dict(self.meta.get("payload_bits", {})),
        }

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> Ledger:
        def back(part: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
            return {n: {k: np.asarray(v, np.int64) for k, v in c.items()} for n, c in part.items()}

        return Ledger(
            back(d["populations"]),
            back(d["projections"]),
            dict(d["sizes"]),
            d["n_samples"],
            tuple(d["inputs"]),
            {"payload_bits": dict(d.get("payload_bits", {}))},
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the ledger as JSON or HDF5, by the suffix, atomically."""
        from ranvier.sim.ledger_file import save

        save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Ledger:
        """The ledger in `path`. Raises FormatError where it holds none."""
        from ranvier.sim.ledger_file import load

        return load(path)

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each part, step and count: part, name, step, count, value."""
        from ranvier.sim.ledger_file import to_pandas

        return to_pandas(self)


def _added(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    return {n: {k: c[k] + b[n][k] for k in c} for n, c in a.items()}


def _plain(part: Mapping[str, Any]) -> dict[str, dict[str, list[int]]]:
    return {n: {k: v.tolist() for k, v in c.items()} for n, c in part.items()}


class Counter:
    """Adds up a Ledger population by population, as an engine produces messages."""

    def __init__(
        self,
        program: Program,
        steps: int,
        n_samples: int,
        tables: Mapping[str, FanTable] | None = None,
    ) -> None:
        """tables  population name -> FanTable in the order of neurons in which counts will come."""
        self.program, self.steps, self.n_samples = program, steps, n_samples
        self._tables = tables or {
            p.name: FanTable.of({q.name: fans_of(q.map) for q in program.out_of(p.name)}, p.size)
            for p in program
        }
        self._populations: dict[str, dict[str, np.ndarray]] = {}
        self._projections: dict[str, dict[str, np.ndarray]] = {}
        self.neurons: dict[str, np.ndarray] = {}  # name -> messages of each, in the neurons' order

    def add(self, name: str, sent: np.ndarray) -> None:
        """Counts what population `name` sent, `[time, batch, *shape]`, whole numbers."""
        flat = sent.reshape(self.steps, self.n_samples, -1)
        some = (flat != 0).sum(1, dtype=np.int64)
        self.neurons[name] = some.sum(0)
        if not self.program.populations[name].graded:
            self.add_counts(name, some, some, some.sum(1))
            return
        payload = np.abs(flat.astype(np.int64)).sum((1, 2))
        self.add_counts(name, some, (flat == 1).sum(1, dtype=np.int64), payload)

    def add_counts(
        self, name: str, some: np.ndarray, plain: np.ndarray, payload: np.ndarray
    ) -> None:
        """As `add`, from counts over the batch, int64.

        some, plain  `[time, n]`: messages that are not zero, and those that are a plain spike
        payload      `[time]`: the sum of their absolute values
        """
        population = self.program.populations[name]
        graded = None if plain is some else some - plain
        updates = 0 if population.is_input else population.size * self.n_samples
        self._populations[name] = {
            "n_spikes": some.sum(1),
            "n_payload": payload,
            "n_graded": np.zeros(self.steps, np.int64) if graded is None else graded.sum(1),
            "n_updates": np.full(self.steps, updates, np.int64),
        }
        self._through(name, some, graded)

    def _through(self, name: str, some: np.ndarray, graded: np.ndarray | None) -> None:
        """What the messages of a population cause in the projections that it feeds."""
        projections, table = self.program.out_of(name), self._tables[name]
        if not projections:
            return
        events, synops = some.sum(1), table.through(some, self.n_samples)
        mults = synops * 0 if graded is None else table.through(graded, self.n_samples)
        for i, p in enumerate(projections):
            self._projections[p.name] = {
                "n_events": _late(events, p.lag),
                "n_synops": _late(synops[:, 2 * i], p.lag),
                "n_synops_zero": _late(synops[:, 2 * i + 1], p.lag),
                "n_mults": _late(mults[:, 2 * i], p.lag),
            }

    def ledger(self) -> Ledger:
        order = self.program.projections
        return Ledger(
            {n: self._populations[n] for n in self.program.populations},
            {n: self._projections[n] for n in order},
            {p.name: p.size for p in self.program},
            self.n_samples,
            tuple(p.name for p in self.program if p.is_input),
            {"payload_bits": {p.name: payload_bits(p) for p in self.program if p.graded}},
            self.neurons,
        )


_FANS: weakref.WeakKeyDictionary[Any, Fans] = weakref.WeakKeyDictionary()


def fans_of(linear: LinearMap) -> Fans:
    """`fan_out`, kept while the map lives."""
    if linear not in _FANS:
        _FANS[linear] = fan_out(linear)
    return _FANS[linear]


@dataclass(frozen=True, eq=False)
class FanTable:
    """The fan-outs of one population's neurons into all that it feeds.

    whole  int64 `[n, 2 k]`: for each of k projections the synapses whose weight is not zero, and
           those whose weight is
    """

    whole: np.ndarray
    floats: np.ndarray  # the same; its products are several times as quick where they are exact
    most: int  # the largest sum of a column

    @staticmethod
    def of(fans: Mapping[str, Fans], n: int) -> FanTable:
        columns = [f for pair in fans.values() for f in pair]
        whole = np.stack(columns, 1) if columns else np.zeros((n, 0), np.int64)
        return FanTable(whole, whole.astype(np.float64), int(whole.sum(0).max(initial=0)))

    def through(self, counts: np.ndarray, n_samples: int) -> np.ndarray:
        """counts `[time, n]`, none above n_samples -> int64 `[time, 2 k]`."""
        if self.most * n_samples >= 2**53:
            return counts @ self.whole
        return (counts.astype(np.float64) @ self.floats).astype(np.int64)


def payload_bits(population: Population) -> int:
    """The bits that one message of a population takes; a plain spike takes none.

    A range that does not go below zero is sent without a sign.
    """
    if not population.graded:
        return 0
    if population.lo >= 0:
        return max(1, int(population.hi).bit_length())
    return max(int(population.hi).bit_length(), int(-population.lo - 1).bit_length()) + 1


def _late(counts: np.ndarray, lag: int) -> np.ndarray:
    """Counts by the step in which they arrive; those after the last step drop."""
    if lag == 0:
        return counts
    return np.concatenate([np.zeros_like(counts[:lag]), counts])[: len(counts)]
