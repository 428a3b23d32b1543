"""The auto engine: the quickest of dense, events and a mixture of both, as measured here.

Once for each power of two of the density of the input, one part of a batch is run with every
population computed both ways, by turns: the quicker way is the population's own. What is timed is
the whole step from messages to messages, since the sums of the two have different types. Going from
one way to the other costs what no population alone shows - messages and weights leave the caches -
so the next parts, which must be run anyway, go by turns through three lanes: dense everywhere,
events everywhere, and each population its own way. The quickest stays. Now and then the lanes that
were not clearly slower race again, since a machine has its phases; and where the network fires twice
as much as it did, or half as much, all is measured anew. The integers are the same in every lane.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ranvier.deploy.program import Program
from ranvier.sim.dense import DenseBackend, exact_kernels
from ranvier.sim.events import EventsBackend
from ranvier.sim.layers import Driven, Incoming, Outcome, Walk, walk
from ranvier.sim.race import CLEAR, Race
from ranvier.sim.runner import Result, finish
from ranvier.sim.spikes import Spikes

WAYS = ("dense", "events")
OWN = "own"  # the lane in which each population has its own way
TRIALS = 5
WORTH = 0.85  # the other way must take at most this share of the time to be changed to
FAR = 2.5  # a lane that takes so many times the least by the trial alone does not race
SMALL = 10**8  # multiplications of the dense way before it is worth to compile and try the other
WATCH = 64  # parts from one look at the whole to the next
AGAIN = 2  # turns of a race that is run again


@dataclass
class Choice:
    """Seconds that each way of a population took at best."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAYS, 0.0))


@dataclass
class Found:
    """What was measured at one density of the input.

    choices  population -> its seconds
    ways     population -> its own way
    race     of the lanes
    density  spikes of all populations a neuron and step, when it was measured
    samples  of the part that was measured, if a larger one would say something else
    parts    run since
    """

    choices: dict[str, Choice]
    ways: dict[str, str]
    race: Race
    density: float
    samples: float = math.inf
    parts: int = 0

    def way(self, lane: str, name: str) -> str:
        return self.ways.get(name, usual(self.choices.values())) if lane == OWN else lane


class Now(threading.local):
    """What the part that a thread runs goes by: a trial, or the ways of a lane."""

    trial: dict[str, Choice] | None = None
    found: Found | None = None
    lane: str = WAYS[0]


class AutoBackend(EventsBackend):
    """See the module. `found` tells, by the power of two of the input's density, what was measured."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.found: dict[int, Found] = {}
        self._last: Found | None = None
        self._work = 0
        self._now = Now()

    def part(self, steps: int) -> int:
        """As large as the way likes it that most of the work goes."""
        if self._last is None:
            return EventsBackend.part(self, steps)
        lane = self._last.race.next()
        way = usual(self._last.choices.values()) if lane == OWN else lane
        return (DenseBackend if way == "dense" else EventsBackend).part(self, steps)

    def run(self, part: Walk) -> Outcome:
        key = round(math.log2(max(density(part.entry), 1e-4)))
        found = self._last = self.found.get(key)
        if found is None or part.batch > 2 * found.samples:
            return self._first(key, part)
        self._now.found, self._now.lane = found, found.race.next()
        if part.record:  # states are kept, which takes time of its own
            return part.run()
        found.parts += 1
        watched = found.parts % WATCH == 0
        before = fired(part) if watched else 0
        start = time.thread_time()  # not the wall's: other processes must not decide
        outcome = part.run()
        found.race.add(self._now.lane, time.thread_time() - start, part.batch)
        if watched and found.race.winner is not None:
            found.race = found.race.again(AGAIN)
        if watched and not 0.5 <= ratio(self._density(part, before), found.density) <= 2:
            self.found.pop(key, None)
        return outcome

    def _first(self, key: int, part: Walk) -> Outcome:
        """A part before anything is known: with both ways of each population, if worth it."""
        self._now.found, self._now.lane = None, WAYS[0]
        self._work += self._macs * part.steps * part.batch
        if self._work <= SMALL:
            return part.run()
        before = fired(part)
        trial: dict[str, Choice] = {}
        self._now.trial = trial
        try:
            outcome = part.run()
        finally:
            self._now.trial = None
        if trial:
            self._last = self.found[key] = settled(trial, self._density(part, before))
            if part.batch < EventsBackend.part(self, part.steps):
                self._last.samples = part.batch
        return outcome

    def _density(self, part: Walk, before: int) -> float:
        neurons = sum(p.size for p in self.plan.populations.values())
        return (fired(part) - before) / (neurons * part.steps * part.batch)

    @cached_property
    def _macs(self) -> int:
        return int(sum(f.sum() for fans in self.plan.fans.values() for f in fans))

    def drive(
        self, name: str, incoming: Incoming, steps: int, batch: int, state: Any, record: bool
    ) -> Driven:
        whole = (name, incoming, steps, batch, state, record)
        now = self._now
        if not incoming or not self.target(name).possible:
            return DenseBackend.drive(self, *whole)
        if now.trial is not None:
            return self._try(now.trial.setdefault(name, Choice()), whole)
        return self._by(now.lane if now.found is None else now.found.way(now.lane, name), whole)

    def _by(self, way: str, whole: Any) -> Driven:
        engine = DenseBackend if way == "dense" else EventsBackend
        return engine.drive(self, *whole)

    def _try(self, choice: Choice, whole: Any) -> Driven:
        """Both ways, by turns, until it is clear; each runs once untimed, to be compiled."""
        *first, state, record = whole
        least = dict.fromkeys(WAYS, math.inf)
        for trial in range(-1, TRIALS):
            for way in WAYS if trial % 2 else WAYS[::-1]:
                fresh = None if state is None else tuple(a.copy() for a in state)
                start = time.thread_time()
                done = self._by(way, (*first, fresh, record))
                if trial >= 0:
                    least[way] = min(least[way], time.thread_time() - start)
            if trial > 0 and max(least.values()) > CLEAR * min(least.values()):
                break
        for way in WAYS:
            choice.seconds[way] += least[way]
        return done


def density(message: Any) -> float:
    """The share of a message that is not zero, from the last step of a few samples."""
    if isinstance(message, Spikes):
        part = Spikes(message.bits[-1:, :4], message.n)
        return part.count() / max(1, math.prod(part.shape))
    few = message[-1, :4].numpy()
    return float(np.count_nonzero(few)) / max(1, few.size)


def fired(part: Walk) -> int:
    """Messages of all populations so far."""
    return int(sum(t.some.sum() for t in part.tallies.values()))


def ratio(now: float, then: float) -> float:
    return max(now, 1e-9) / max(then, 1e-9)


def settled(choices: dict[str, Choice], density: float) -> Found:
    """What a trial says: each population's way, and the lanes that are worth a race."""
    every = choices.values()
    ways = {name: better(choice, every) for name, choice in choices.items()}
    own = sum(choice.seconds[ways[name]] for name, choice in choices.items())
    close = [way for way in WAYS if total(way, every) <= FAR * own]
    lanes = close if len(set(ways.values())) == 1 else [OWN, *close]
    return Found(choices, ways, Race(lanes), density)


def total(way: str, choices: Iterable[Choice]) -> float:
    return sum(c.seconds[way] for c in choices)


def usual(choices: Iterable[Choice]) -> str:
    """The way that would take less for all of them together."""
    every = list(choices)
    return min(WAYS, key=lambda way: total(way, every))


def better(choice: Choice, choices: Iterable[Choice]) -> str:
    """The quicker way; where the two are close, the usual one of all."""
    quick, common = min(WAYS, key=lambda way: choice.seconds[way]), usual(choices)
    return quick if choice.seconds[quick] < WORTH * choice.seconds[common] else common


_BACKENDS: weakref.WeakKeyDictionary[Program, AutoBackend] = weakref.WeakKeyDictionary()


def backend(program: Program) -> AutoBackend:
    """The backend of a program, with what it found so far."""
    if program not in _BACKENDS:
        _BACKENDS[program] = AutoBackend(program)
    return _BACKENDS[program]


def run_auto(program: Program, x: np.ndarray, record: tuple[str, ...] = ()) -> Result:
    """The Result of whole numbers x `[time, batch, *shape]`."""
    use = backend(program)
    with exact_kernels():
        whole, ledger = walk(use, x, record)
    return finish(program, whole.sent, whole.states, record, ledger, "auto")
