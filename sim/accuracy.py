"""Right answers, counted: accuracy with its confidence interval, and where two engines disagree."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a rate of `right` in `n`, 95 % by default.

    (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    Source: Wilson, J. Am. Stat. Assoc. 22, 1927, 209-212.

    >>> low, high = wilson(8, 10)
    >>> round(low, 3), round(high, 3)
    (0.49, 0.943)
    """
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return (p + zz / 2 - half) / (1 + zz), (p + zz / 2 + half) / (1 + zz)


def sign_test(won: int, lost: int) -> float:
    """The chance of winning so many of won + lost samples, or more, by throwing a coin for each.

    >>> sign_test(5, 0), sign_test(3, 3)
    (0.03125, 0.65625)
    """
    n = won + lost
    return sum(math.comb(n, k) for k in range(won, n + 1)) / 2**n


@dataclass(frozen=True)
class Score:
    """How many of n an engine got right; `of` says what was judged."""

    right: int
    n: int
    of: str = "samples"

    @property
    def accuracy(self) -> float:
        return self.right / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, Wilson."""
        return wilson(self.right, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.2%} ({low:.2%} to {high:.2%}, {self.n} {self.of})"


def score(output: np.ndarray, labels: np.ndarray, of: str = "samples") -> Score:
    """Of outputs `[n, classes]`."""
    return Score(int((output.argmax(-1) == labels).sum()), len(labels), of)


def judged(output: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(outputs `[k, classes]`, classes `[k]`): what there is a label for.

    output, labels  `[n, classes]` and `[n]`, or `[time, n, classes]` and `[n, time]`, where a label
                    below 0 says that the step has none
    """
    if labels.ndim == 1:
        return output, labels
    said = labels >= 0
    return output.swapaxes(0, 1)[said], labels[said]


def confusion(a: np.ndarray, b: np.ndarray, classes: int) -> np.ndarray:
    """counts[i, j]: samples that the first engine takes for class i, the second for j."""
    found = np.zeros((classes, classes), np.int64)
    np.add.at(found, (a.argmax(-1), b.argmax(-1)), 1)
    return found
