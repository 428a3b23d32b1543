"""The auto engine: each population by the faster of dense and events, as measured here.

A population is decided once for each power of two of the density of its messages: the first part of
a batch that is worth it is computed both ways, by turns, and the quicker way stays. What is timed
is the whole step from messages to messages, since the sums of the two have different types. Going
from one way to the other costs what no layer alone shows - messages and weights leave the caches -
so where the two are close, the way that won most so far stays. The integers are the same.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ranvier.deploy.program import Program
from ranvier.sim.dense import CHUNK_BYTES as DENSE_BYTES
from ranvier.sim.dense import DenseBackend, chunk_size, exact_kernels
from ranvier.sim.events import CHUNK_BYTES, EventsBackend
from ranvier.sim.layers import Driven, Incoming, walk
from ranvier.sim.runner import Result, finish

WAYS = ("dense", "events")
CLEAR = 1.5  # a ratio at which two trials are enough
TRIALS = 5
WORTH = 0.85  # the other way must take at most this share of the time to be changed to
SMALL = 10**7  # multiplications of the dense way before it is worth to compile and try the other


@dataclass
class Choice:
    """Seconds that each way took at best, and what was decided from them."""

    density: float
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAYS, math.inf))
    trials: int = 0
    work: int = 0
    way: str | None = None

    @property
    def clear(self) -> bool:
        slow, fast = max(self.seconds.values()), min(self.seconds.values())
        return self.trials > 1 and slow > CLEAR * fast


def density(message: Any) -> float:
    """The share of a message that is not zero, from the last step of a few samples."""
    part = message[-1, :4].numpy()
    part = part.view(np.bool_) if part.itemsize == 1 else part  # counted eight at a time
    return float(np.count_nonzero(part)) / max(1, part.size)


class AutoBackend(EventsBackend):
    """See the module. `choices` tells, by population and density, what was measured and decided."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.choices: dict[tuple[str, int], Choice] = {}
        self._work: dict[str, int] = {}
        self._warm = False  # whether the event kernels are compiled already

    def drive(
        self, name: str, incoming: Incoming, steps: int, batch: int, state: Any, record: bool
    ) -> Driven:
        whole = (name, incoming, steps, batch, state, record)
        if not self.target(name).possible or not incoming:
            return DenseBackend.drive(self, *whole)
        choice = self._choice(name, incoming)
        if choice.way is None:
            choice.work += sum(self._macs(w.projection.name) * len(m) * batch for w, m in incoming)
            if choice.work > SMALL:
                self._settle(choice, whole)
        return self._by(choice.way or self._usual(), whole)

    def _by(self, way: str, whole: Any) -> Driven:
        engine = DenseBackend if way == "dense" else EventsBackend
        return engine.drive(self, *whole)

    def _choice(self, name: str, incoming: Incoming) -> Choice:
        seen = max(density(m) for _, m in incoming)
        key = (name, round(math.log2(max(seen, 1e-4))))
        return self.choices.setdefault(key, Choice(seen))

    def _macs(self, name: str) -> int:
        if name not in self._work:
            self._work[name] = int(sum(f.sum() for f in self.plan.fans[name]))
        return self._work[name]

    def _settle(self, choice: Choice, whole: Any) -> None:
        """Both ways, by turns, until it is clear; each runs once untimed, to be compiled."""
        *first, state, record = whole
        for trial in range(-1, TRIALS):
            for way in WAYS if trial % 2 else WAYS[::-1]:
                fresh = None if state is None else tuple(a.copy() for a in state)
                start = time.thread_time()  # not the wall's: other processes must not decide
                self._by(way, (*first, fresh, record))
                if trial >= 0:
                    spent = time.thread_time() - start
                    choice.seconds[way] = min(choice.seconds[way], spent)
            choice.trials = trial + 1
            if choice.clear:
                break
        self._warm = True
        choice.way = better(choice, self._decided())

    def _decided(self) -> list[Choice]:
        return [c for c in self.choices.values() if c.way is not None]

    def _usual(self) -> str:
        """The way of a population that is not worth a trial yet."""
        return usual(self._decided()) or ("events" if self._warm else "dense")

    def chunk_bytes(self) -> int:
        """Parts of a batch are as large as the way likes them that most of the work goes."""
        return DENSE_BYTES["cpu"] if usual(self._decided()) == "dense" else CHUNK_BYTES


def usual(decided: Sequence[Choice]) -> str | None:
    """The way that would take less for all of them together; None where there are none."""
    return min(WAYS, key=lambda way: sum(c.seconds[way] for c in decided)) if decided else None


def better(choice: Choice, decided: Sequence[Choice]) -> str:
    """The quicker way; where the two are close, the usual one of those decided."""
    quick = min(WAYS, key=lambda way: choice.seconds[way])
    common = usual(decided) or quick
    return quick if choice.seconds[quick] < WORTH * choice.seconds[common] else common


_BACKENDS: weakref.WeakKeyDictionary[Program, AutoBackend] = weakref.WeakKeyDictionary()


def backend(program: Program) -> AutoBackend:
    """The backend of a program, with its choices so far."""
    if program not in _BACKENDS:
        _BACKENDS[program] = AutoBackend(program)
    return _BACKENDS[program]


def run_auto(program: Program, x: np.ndarray, record: tuple[str, ...] = ()) -> Result:
    """The Result of whole numbers x `[time, batch, *shape]`."""
    use = backend(program)
    with exact_kernels():
        whole, ledger = walk(use, x, record, chunk_size(use.plan, len(x), use.chunk_bytes()))
    return finish(program, whole.sent, whole.states, record, ledger, "auto")
