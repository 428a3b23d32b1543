"""The walk of all fast engines: layer by layer over all steps, or step by step where a cycle is.

An engine is a `Backend`: it turns the messages that reach a population into what that population
sends. Messages are `[steps, batch, n]` in inner layout (`Spikes`, or a tensor of whole numbers); a
message that is the same at every step may have one step.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np

from ranvier.sim.layout import Wiring, inner, outer
from ranvier.sim.ledger import Counter, Ledger
from ranvier.sim.plan import Plan

Message: TypeAlias = Any
Incoming: TypeAlias = "list[tuple[Wiring, Message]]"


@dataclass
class Driven:
    """What a population did: messages, u and v `[steps, batch, n]` (where asked), its state.

    some  int64 `[steps, n]`: plain spikes over the batch, where they were counted on the way
    """

    sent: Message
    u: Any = None
    v: Any = None
    state: Any = None
    some: np.ndarray | None = None


class Backend(Protocol):
    """How one engine computes."""

    plan: Plan

    def part(self, steps: int) -> int:
        """How many samples to run at once."""
        ...

    def run(self, part: Walk) -> Outcome: ...

    def load(self, x: np.ndarray) -> Message: ...

    def drive(
        self, name: str, incoming: Incoming, steps: int, batch: int, state: Any, record: bool
    ) -> Driven: ...

    def count(self, sent: Message, tally: Tally) -> None: ...

    def join(self, parts: list[Message]) -> Message: ...

    def quiet(self, like: Message, steps: int) -> Message: ...

    def numpy(self, message: Message) -> np.ndarray: ...


class Tally:
    """Counts of one population's messages, inner layout, added up over parts of a batch.

    some, plain `[steps, n]` and payload `[steps]` as in `Counter.add_counts`; without a payload all
    messages are plain. `steps` is 1 where every message so far was held in time.
    """

    def __init__(self, steps: int, n: int, graded: bool, some: np.ndarray | None = None) -> None:
        self.graded, self.n = graded, n
        self.some = np.zeros((steps, n), np.int64) if some is None else some
        self.plain = np.zeros_like(self.some) if graded else self.some
        self.payload = np.zeros(steps, np.int64)

    def full(self, steps: int) -> Tally:
        """As counts of `steps` steps."""
        if len(self.some) == steps:
            return self
        other = Tally(steps, self.n, self.graded)
        for mine, theirs in zip(self._arrays(), other._arrays(), strict=True):
            theirs += mine
        return other

    def step(self, t: int) -> Tally:
        """A view of the counts of one step."""
        one = copy.copy(self)
        one.some, one.payload = self.some[t : t + 1], self.payload[t : t + 1]
        one.plain = self.plain[t : t + 1] if self.graded else one.some
        return one

    def _arrays(self) -> list[np.ndarray]:
        return [self.some, self.plain, self.payload] if self.graded else [self.some]


@dataclass
class Outcome:
    """Series `[time, batch, *shape]` of what was kept."""

    sent: dict[str, np.ndarray] = field(default_factory=dict)
    states: dict[str, dict[str, np.ndarray]] = field(default_factory=lambda: {"u": {}, "v": {}})


class Walk:
    """One run of x `[time, batch, *shape]`, whole numbers, through a backend.

    recent  step by step: population -> step -> what it sent, as far back as it is still to arrive
    """

    def __init__(
        self, backend: Backend, x: np.ndarray, record: tuple[str, ...], tallies: dict[str, Tally]
    ) -> None:
        self.backend, self.plan, self.record = backend, backend.plan, record
        self.tallies = tallies
        self.steps, self.batch = x.shape[:2]
        self.readout = self.plan.program.readout
        self.outcome = Outcome()
        self.recent: dict[str, dict[int, Message]] = {}
        self.entry = self._entry(x)

    def _entry(self, x: np.ndarray) -> Message:
        name = next(n for n, p in self.plan.populations.items() if p.is_input)
        held = self.steps > 1 and is_held(x)
        flat = (x[:1] if held else x).reshape(1 if held else self.steps, self.batch, -1)
        return self.backend.load(inner(flat, self.plan.frames[name]))

    def run(self) -> Outcome:
        (self._by_step if self.plan.cyclic else self._by_layer)()
        return self.outcome

    def _records(self, name: str) -> bool:
        membrane = self.readout.kind == "membrane" and self.readout.population == name
        return membrane or "u" in self.record or "v" in self.record

    def _by_layer(self) -> None:
        live: dict[str, Message] = {}
        for name, population in self.plan.populations.items():
            if population.is_input:
                done = Driven(self.entry)
            else:
                into = self.plan.into[name]
                incoming = [
                    (self.plan.wirings[p.name], self._late(live[p.source], p.lag)) for p in into
                ]
                done = self.backend.drive(
                    name, incoming, self.steps, self.batch, None, self._records(name)
                )
            live[name] = done.sent
            self._keep(name, done)
            for source in {p.source for p in self.plan.into[name]} | {name}:
                if self.plan.last_reader.get(source, name) == name:
                    del live[source]

    def _late(self, message: Message, lag: int) -> Message:
        if lag == 0:
            return message
        if message.shape[0] == 1 and self.steps > 1:
            message = self.backend.join([message] * self.steps)
        quiet = self.backend.quiet(message, min(lag, self.steps))
        return self.backend.join([quiet, message])[: self.steps]

    def _by_step(self) -> None:
        """Holds what is still to arrive, and the series that were asked for."""
        reach = {name: 0 for name in self.plan.populations}
        for p in self.plan.projections.values():
            reach[p.source] = max(reach[p.source], p.lag)
        self.recent = {name: {} for name in self.plan.populations}
        state: dict[str, Any] = {}
        kept: dict[str, list[Driven]] = {n: [] for n in self.plan.populations if self._keeps(n)}
        for t in range(self.steps):
            for name, population in self.plan.populations.items():
                if population.is_input:
                    held = self.entry.shape[0] == 1
                    done = Driven(self.entry if held else self.entry[t : t + 1])
                else:
                    incoming = [
                        (self.plan.wirings[p.name], self.recent[p.source][t - p.lag])
                        for p in self.plan.into[name]
                        if t >= p.lag
                    ]
                    record = self._records(name)
                    done = self.backend.drive(
                        name, incoming, 1, self.batch, state.get(name), record
                    )
                    state[name] = done.state
                self.recent[name][t] = done.sent
                self.recent[name].pop(t - reach[name] - 1, None)
                self._tally(name, done, t)
                if name in kept:
                    kept[name].append(done)
        for name, series in kept.items():
            join = self.backend.join
            u, v = (
                join([getattr(d, k) for d in series]) if getattr(series[0], k) is not None else None
                for k in ("u", "v")
            )
            self._show(name, Driven(join([d.sent for d in series]), u, v))

    def _keep(self, name: str, done: Driven) -> None:
        self._tally(name, done)
        if self._keeps(name):
            self._show(name, done)

    def _tally(self, name: str, done: Driven, at: int | None = None) -> None:
        """Counts what was sent: at all steps, or at one."""
        population = self.plan.populations[name]
        steps = len(done.sent) if at is None else self.steps
        if name not in self.tallies and done.some is not None:
            self.tallies[name] = Tally(steps, population.size, population.graded, done.some)
            return
        tally = self.tallies.get(name) or Tally(steps, population.size, population.graded)
        tally = self.tallies[name] = tally.full(max(steps, len(tally.some)))
        if at is not None:
            tally = tally.step(at)
        if done.some is not None:
            tally.some += done.some
            return
        sent = done.sent
        if len(sent) < len(tally.some):
            sent = self.backend.join([sent] * len(tally.some))
        self.backend.count(sent, tally)

    def _keeps(self, name: str) -> bool:
        return self._records(name) or "spikes" in self.record or name == self.readout.population

    def _show(self, name: str, done: Driven) -> None:
        """The series that were asked for."""
        if "spikes" in self.record or name == self.readout.population:
            self.outcome.sent[name] = self._series(name, done.sent)
        if not self._records(name):
            return
        shape = (self.steps, self.batch, *self.plan.populations[name].shape)
        for key in ("u", "v"):
            value = getattr(done, key)
            self.outcome.states[key][name] = (
                np.zeros(shape, np.int64) if value is None else self._series(name, value, np.int64)
            )

    def _series(self, name: str, message: Message, dtype: Any = None) -> np.ndarray:
        """A message as `[time, batch, *shape]` in the neurons' own order."""
        own = outer(self.backend.numpy(message), self.plan.frames[name])
        shaped = own.reshape(-1, self.batch, *self.plan.populations[name].shape)
        full = np.broadcast_to(shaped, (self.steps, *shaped.shape[1:]))
        return full if dtype is None else full.astype(dtype)


def is_held(x: np.ndarray) -> bool:
    """Whether x is the same at every step."""
    return x.strides[0] == 0 or all(np.array_equal(step, x[0]) for step in x[1:])


def joined(outcomes: list[Outcome]) -> Outcome:
    """The outcomes of parts of a batch as one."""
    if len(outcomes) == 1:
        return outcomes[0]
    first = outcomes[0]
    sent = {n: np.concatenate([o.sent[n] for o in outcomes], 1) for n in first.sent}
    states = {
        k: {n: np.concatenate([o.states[k][n] for o in outcomes], 1) for n in part}
        for k, part in first.states.items()
    }
    return Outcome(sent, states)


def walk(backend: Backend, x: np.ndarray, record: tuple[str, ...]) -> tuple[Outcome, Ledger]:
    """What x `[time, batch, *shape]` does, in parts as the backend wants them, and the counts."""
    steps, batch = x.shape[:2]
    tallies: dict[str, Tally] = {}
    parts: list[Outcome] = []
    done = 0
    while done < batch:
        stop = done + backend.part(steps)
        parts.append(backend.run(Walk(backend, x[:, done:stop], record, tallies)))
        done = stop
    counter = Counter(backend.plan.program, steps, batch, backend.plan.tables)
    for name, tally in tallies.items():
        whole = tally.full(steps)
        payload = whole.payload if whole.graded else whole.some.sum(1)
        counter.add_counts(name, whole.some, whole.plain, payload)
        counter.neurons[name] = outer(whole.some.sum(0), backend.plan.frames[name])
    return joined(parts), counter.ledger()
