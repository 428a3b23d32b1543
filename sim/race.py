"""Which of several ways to do the same work is the quickest, found on work that must be done anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence

TURNS = 8
EARLY = 4  # turns after which a lane that is clearly slower runs no more
CLEAR = 1.5


class Race:
    """Lanes take parts of the work by turns; the one with the least seconds a sample, at best, wins.

    lanes    names; the first is asked first
    seconds  what each lane took a sample, one value a part
    winner   None while lanes still run
    """

    def __init__(self, lanes: Sequence[str], turns: int = TURNS) -> None:
        self.seconds: dict[str, list[float]] = {lane: [] for lane in lanes}
        self.winner = lanes[0] if len(lanes) == 1 else None
        self._running = list(lanes)
        self._most = dict.fromkeys(lanes, 0)
        self._took = dict.fromkeys(lanes, 0)
        self._turns = turns

    def next(self) -> str:
        """The lane whose turn it is, or the winner."""
        return self.winner or min(self._running, key=lambda lane: self._took[lane])

    def again(self, turns: int) -> Race:
        """A new race of the lanes that were not clearly slower."""
        return Race(sorted(self._running, key=self.best), turns)

    def best(self, lane: str) -> float:
        return min(self.seconds[lane], default=math.inf)

    def add(self, lane: str, seconds: float, samples: int) -> None:
        """What a part of so many samples took. Small parts cost more a sample: the times of those
        of less than half of the lane's largest do not count, but the turn does."""
        if self.winner is not None:
            return
        if samples > 2 * self._most[lane]:
            self.seconds[lane].clear()
        self._most[lane] = max(samples, self._most[lane])
        if 2 * samples >= self._most[lane]:
            self.seconds[lane].append(seconds / samples)
        self._took[lane] += 1
        done = min(self._took[lane] for lane in self._running)
        if done < min(EARLY, self._turns):
            return
        least = min(map(self.best, self._running))
        self._running = [lane for lane in self._running if self.best(lane) <= CLEAR * least]
        if len(self._running) == 1 or done >= self._turns:
            self.winner = min(self._running, key=self.best)
