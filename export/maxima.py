"""Maxima of small whole numbers by thresholds: max(x) = lo + sum over k of OR of [x >= k], k = lo+1..hi.

A chip has no maximum of values. It has OR, of spikes; and a sum of spikes (SEW-ADD) of bounded range is told
by as many thresholds as it has values above the lowest. What interval analysis says of the range is a proof,
so that the result is exact for every input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ranvier.export.terms import Value, weight_of
from ranvier.train.errors import UnsupportedError

if TYPE_CHECKING:
    from ranvier.export.domain_rules import Domain

MAX_LEVELS = 8  # each is two populations at most and a projection to whatever follows
WIDEST_WEIGHT = 255  # that a synapse of the chip holds


def n_levels(domain: Domain) -> int:
    """How many thresholds tell the values of a domain apart; 0 where they are no bounded integers."""
    if domain.kind == "real" or not np.isfinite([domain.lo, domain.hi]).all():
        return 0
    return max(1, int(domain.hi - domain.lo))


def common_levels(sources: Sequence[tuple[str, Domain]], name: str, what: str) -> list[int]:
    """The k of [x >= k] that tell the values of all sources apart.

    name, what  of the node, and what it takes of the sources, for the message
    Raises UnsupportedError for reals, and for more than MAX_LEVELS whole numbers.
    """
    for source, domain in sources:
        text = f"lowering: '{name}' takes {what} of '{source}', whose values are "
        if n_levels(domain) == 0:
            raise UnsupportedError(
                f"{text}{domain.kind}; the chip has no maximum of such values, only of spikes (an OR) and "
                "of small whole numbers. Put a neuron in front of it, or pool by average or by stride, "
                "which are linear"
            )
    lo = min(int(d.lo) for _, d in sources)
    hi = max(lo + 1, *(int(d.hi) for _, d in sources))
    if hi - lo > MAX_LEVELS:
        source, domain = max(sources, key=lambda s: s[1].hi)
        raise UnsupportedError(
            f"lowering: '{name}' takes {what} of '{source}', whose values are {domain}: {hi - lo} thresholds "
            f"would tell them apart, {MAX_LEVELS} are allowed. Join by OR, or pool earlier, where fewer "
            "spikes are summed"
        )
    return list(range(lo + 1, hi + 1))


def need_counts(value: Value, name: str) -> None:
    """Raises UnsupportedError unless each term counts: whole weights of one sign that a synapse holds."""
    for term in value.terms:
        w = weight_of(term)
        mixed = (w < 0).any() and (w > 0).any()
        if mixed or (w != np.rint(w)).any() or np.abs(w).max(initial=0) > WIDEST_WEIGHT:
            raise UnsupportedError(
                f"lowering: '{name}' is a threshold on whole numbers, but what '{term.source}' adds to them "
                f"is no whole number of one sign up to {WIDEST_WEIGHT}. Put a neuron in front of it"
            )
