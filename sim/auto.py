"""The auto engine: each population's sums by the faster of dense and events, as measured here.

A population is decided once for each power of two of the density of its messages: the first parts
of a batch are computed both ways, by turns, and the quicker way stays. The integers are the same.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ranvier.deploy.program import Program
from ranvier.sim.dense import chunk_size, exact_kernels, scan_cpu
from ranvier.sim.events import CHUNK_BYTES, EventsBackend
from ranvier.sim.layers import Driven, Incoming, walk
from ranvier.sim.runner import Result, finish

WAYS = ("dense", "events")
DENSE_IF = 0.9  # its sums are wider, which the scan pays for
CLEAR = 2.5  # a ratio at which one trial is enough
TRIALS = 5
SMALL = 10**7  # multiplications of the dense way before it is worth to compile and try the other


@dataclass
class Choice:
    """Seconds that each way took at best, and what was decided from them."""

    density: float
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAYS, math.inf))
    trials: int = 0
    work: int = 0
    way: str | None = None

    def decide(self) -> None:
        """Settles the way when the times are clear or the trials are used up."""
        slow, fast = max(self.seconds.values()), min(self.seconds.values())
        if self.trials >= TRIALS or slow > CLEAR * fast:
            dense = self.seconds["dense"] < DENSE_IF * self.seconds["events"]
            self.way = "dense" if dense else "events"


def density(message: Any) -> float:
    """The share of a message that is not zero, from its first sample's last step."""
    part = message[-1, 0].numpy()
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
        target = self.target(name)
        if not target.possible or name not in self.plan.cells or not incoming:
            return super().drive(name, incoming, steps, batch, state, record)
        choice = self._choice(name, incoming)
        choice.work += sum(self._macs(w.projection.name) * len(m) * batch for w, m in incoming)
        if choice.way is None and choice.work > SMALL:
            self._try(choice, name, incoming, batch)
        way = choice.way or ("events" if self._warm else "dense")
        if way == "dense":
            total, shift = self.arrive(name, incoming, batch).numpy(), 0
        else:
            total, shift = self._sums(name, incoming, batch), target.shift
        return scan_cpu(self.plan, name, total, steps, state, record, shift)

    def _choice(self, name: str, incoming: Incoming) -> Choice:
        seen = max(density(m) for _, m in incoming)
        key = (name, round(math.log2(max(seen, 1e-4))))
        return self.choices.setdefault(key, Choice(seen))

    def _macs(self, name: str) -> int:
        if name not in self._work:
            self._work[name] = int(sum(f.sum() for f in self.plan.fans[name]))
        return self._work[name]

    def _sums(self, name: str, incoming: Incoming, batch: int) -> np.ndarray:
        messages = [(w, self.numpy(m)) for w, m in incoming]
        return self.target(name).sums(messages, batch, self._scratch)

    def _try(self, choice: Choice, name: str, incoming: Incoming, batch: int) -> None:
        """Both ways, by turns; before the first trial each runs once untimed, to be compiled."""
        ways: dict[str, Callable[[], object]] = {
            "dense": lambda: self.arrive(name, incoming, batch),
            "events": lambda: self._sums(name, incoming, batch),
        }
        for way, compute in ways.items():
            if choice.trials == 0:
                compute()
            start = time.thread_time()  # not the wall's: other processes must not decide
            compute()
            choice.seconds[way] = min(choice.seconds[way], time.thread_time() - start)
        choice.trials += 1
        self._warm = True
        choice.decide()


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
        whole, ledger = walk(use, x, record, chunk_size(use.plan, len(x), CHUNK_BYTES))
    return finish(program, whole.sent, whole.states, record, ledger, "auto")
