"""What lowering keeps of a node: its value as a sum of linear maps of what populations send."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ranvier.export.linear import DiagLin, Linear, add_maps, compose
from ranvier.export.nodes import Shape


@dataclass(frozen=True, eq=False)
class Term:
    """map of what `source` sent `lag` steps ago; `origin` are the nodes whose weights it holds."""

    source: str
    lag: int
    map: Linear
    origin: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Value:
    """A sum of terms plus a constant (of `shape`, zero if None)."""

    terms: tuple[Term, ...]
    shape: Shape
    const: np.ndarray | None = None

    def mapped(self, linear: Linear, shape: Shape, name: str, weighted: bool) -> Value:
        terms = tuple(
            Term(t.source, t.lag, compose(linear, t.map, name), t.origin + (name,) * weighted)
            for t in self.terms
        )
        const = None if self.const is None else linear.apply(self.const).reshape(shape)
        return Value(terms, shape, const)

    def plus(self, constant: np.ndarray | float | None) -> Value:
        if constant is None:
            return self
        field = np.broadcast_to(np.asarray(constant, np.float64), self.shape)
        return replace(self, const=field if self.const is None else self.const + field)


def times(w: float, shape: Shape) -> DiagLin:
    return DiagLin(np.asarray(float(w)), shape)


def weight_of(term: Term) -> np.ndarray:
    """The numbers of a term's map, in whatever layout it has."""
    return term.map.scale if isinstance(term.map, DiagLin) else term.map.weight


def dead(term: Term) -> bool:
    return not np.any(weight_of(term))


def add_values(values: list[Value], shape: Shape) -> Value:
    terms = merged([t for v in values for t in v.terms])
    consts = [v.const for v in values if v.const is not None]
    return Value(terms, shape, sum(consts[1:], consts[0]) if consts else None)


def merged(terms: list[Term]) -> tuple[Term, ...]:
    """Terms with the same source, lag, geometry and origin become one (h + h is 2h)."""
    kept: list[Term] = []
    for term in terms:
        for i, other in enumerate(kept):
            if (other.source, other.lag, other.origin) == (term.source, term.lag, term.origin):
                both = add_maps(other.map, term.map)
                if both is not None:
                    kept[i] = replace(other, map=both)
                    break
        else:
            kept.append(term)
    return tuple(kept)
