"""What lint rules are made of: the context that they look at, and the registry of their codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from ranvier.deploy.chip import Chip
from ranvier.deploy.placement import Placement, place
from ranvier.deploy.program import Program
from ranvier.export.domains import Domain, Verdict, infer_domains, verdicts
from ranvier.export.graph import Graph
from ranvier.export.nodes import Input, Neuron, Opaque
from ranvier.train.errors import CapacityError, RanvierError

Severity: TypeAlias = Literal["error", "warning", "info"]
Hit: TypeAlias = "tuple[str, str, str]"  # node, message, fix
Check: TypeAlias = "Callable[[Context], Iterator[Hit]]"


@dataclass(frozen=True, eq=False)
class Context:
    """What a rule looks at: the source graph, the chip, and what both come to."""

    graph: Graph
    chip: Chip
    weight_bits: int = 8

    @cached_property
    def domains(self) -> dict[str, Domain]:
        return infer_domains(self.graph)

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        return verdicts(self.graph)

    @property
    def neurons(self) -> list[Neuron]:
        return self.graph.populations

    @cached_property
    def bounded(self) -> Graph:
        """The graph with inputs of unknown range taken as 0..1, so that it can be compiled."""
        nodes = [
            replace(n, lo=max(n.lo, 0.0), hi=min(n.hi, 1.0))
            if isinstance(n, Input) and not (math.isfinite(n.lo) and math.isfinite(n.hi))
            else n
            for n in self.graph
        ]
        return self.graph.with_nodes(nodes)

    def _compiled(self, joins: Literal["linear", "graded"]) -> Program | RanvierError:
        from ranvier.deploy.compiler import compile

        try:
            return compile(
                self.bounded, self.chip, None, self.weight_bits, joins, search=False,
                bias_correction=False,
            )  # fmt: skip
        except RanvierError as error:
            return error

    @cached_property
    def compiled(self) -> Program | RanvierError:
        """The program, quickly made (no search, no calibration), or why there is none."""
        if any(isinstance(n, Opaque) for n in self.graph):
            return RanvierError("the graph holds nodes that no chip can run")
        return self._compiled("linear")

    @property
    def program(self) -> Program | None:
        return self.compiled if isinstance(self.compiled, Program) else None

    @cached_property
    def placed(self) -> Placement | CapacityError | None:
        """The placement, the reason why it does not fit, or None where there is no program.

        Joins are linear; where that does not fit one chip, graded ones are tried as well."""
        if self.program is None:
            return None
        found = self._placed(self.program)
        if isinstance(found, Placement) and found.n_chips == 1 or not self.chip.graded:
            return found
        other = self._compiled("graded")
        again = self._placed(other) if isinstance(other, Program) else None
        if not isinstance(again, Placement):
            return found
        fewer = isinstance(found, Placement) and found.n_cores <= again.n_cores
        return found if fewer else again

    def _placed(self, program: Program) -> Placement | CapacityError | None:
        try:
            return place(program, self.chip, max_chips=10**6, solver="greedy")
        except CapacityError as error:
            return error
        except RanvierError:  # a lack of the chip, which has rules of its own
            return None


@dataclass(frozen=True)
class Rule:
    """code, what it means in a few words, and the function that looks for it.

    example  where it comes from in practice, for the reference
    """

    code: str
    severity: Severity
    title: str
    check: Check
    example: str


RULES: dict[str, Rule] = {}


def rule(code: str, severity: Severity, title: str) -> Callable[[Check], Check]:
    """Registers a function as the rule of a code; its docstring is the rule's explanation."""

    def register(check: Check) -> Check:
        text = " ".join((check.__doc__ or "").split())
        RULES[code] = Rule(code, severity, title, check, text)
        return check

    return register


def number(value: Any) -> str:
    """One value, or the range of an array, for a message."""
    a = np.asarray(value, float)
    if a.size == 0 or np.ptp(a) == 0:
        return f"{float(a.reshape(-1)[0]) if a.size else 0:g}"
    return f"{a.min():g}..{a.max():g}"
