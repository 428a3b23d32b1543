"""What the fast engines derive from a Program once: layouts, bounds, cells as arrays."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ranvier.deploy.cells import SHIFT, Cell
from ranvier.deploy.program import Population, Program
from ranvier.sim import bounds
from ranvier.sim.layout import Frame, frames, inner, wire
from ranvier.sim.ledger import Fans, FanTable, fans_of

FOLDS = 2**17  # arriving sums below this never make u fold
RESETS = ("zero", "subtract", "none")
TIMINGS = ("immediate", "delayed", "carry", "discard")


@dataclass(frozen=True, eq=False)
class CellPlan:
    """A compartment's parameters as arrays `[n]` in inner order, of the scan's integer type."""

    reset: int
    timing: int
    memory: bool
    wide: bool
    k_u: np.ndarray
    k_v: np.ndarray
    theta: np.ndarray
    bias: np.ndarray
    jump: np.ndarray
    v_reset: int
    folds: bool = True  # whether a sum can pass the bound from where u folds

    @property
    def plain(self) -> bool:
        """Whether 32 bits hold everything and u does not outlive a step."""
        return not self.wide and not self.memory

    @property
    def dtype(self) -> type[np.signedinteger]:
        return np.int64 if self.wide else np.int32

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.k_u, self.k_v, self.theta, self.bias, self.jump


def plan_cell(
    cell: Cell, population: Population, frame: Frame, wide: bool, most: int = bounds.NARROW
) -> CellPlan:
    """most  bound on what arrives, before it meets the synapses' 2**6"""
    dtype = np.int64 if wide else np.int32

    def spread(value: object) -> np.ndarray:
        full = np.broadcast_to(np.asarray(value, np.int64), population.shape).reshape(-1)
        return inner(full, frame).astype(dtype)

    k_u = spread(4095 - np.asarray(cell.du, np.int64))
    return CellPlan(
        RESETS.index(cell.reset), TIMINGS.index(cell.timing), bool(k_u.any()), wide, k_u,
        spread(4096 - np.asarray(cell.dv, np.int64)), spread(cell.theta), spread(cell.bias),
        spread(np.asarray(cell.vth, np.int64) << SHIFT), cell.v_reset, most >= FOLDS,
    )  # fmt: skip


class Plan:
    """The derived facts of one Program; see each property."""

    def __init__(self, program: Program) -> None:
        self._program = weakref.ref(program)
        self.populations = dict(program.populations)
        self.projections = dict(program.projections)
        self.into = {name: program.into(name) for name in program.populations}
        self.frames = frames(program)
        self.sent = bounds.sent_at_most(program)
        self.arrival = {
            name: bounds.arrival(program, name, self.sent) for name in program.populations
        }
        self.wirings = {
            p.name: wire(p, self.frames[p.source], self.frames[p.target])
            for p in program.projections.values()
        }
        self.cells = {
            p.name: plan_cell(
                p.cell, p, self.frames[p.name], self._wide(p), self.arrival[p.name].total
            )
            for p in program
            if p.cell is not None and p.cell.kind == "cuba"
        }
        self.gates = {
            p.name: inner(
                np.array(np.broadcast_to(p.cell.gate, p.shape)).reshape(-1), self.frames[p.name]
            )
            for p in program
            if p.cell is not None and p.cell.kind == "logic"
        }

    @property
    def program(self) -> Program:
        program = self._program()
        assert program is not None
        return program

    @cached_property
    def fans(self) -> dict[str, Fans]:
        """projection name -> the fan-outs of its source's neurons, inner order."""
        found = {}
        for p in self.projections.values():
            used, zero = fans_of(p.map)
            frame = self.frames[p.source]
            found[p.name] = (inner(used, frame), inner(zero, frame))
        return found

    @cached_property
    def tables(self) -> dict[str, FanTable]:
        """population name -> the fan-outs of its neurons, inner order."""
        return {
            p.name: FanTable.of(
                {q.name: self.fans[q.name] for q in self.program.out_of(p.name)}, p.size
            )
            for p in self.populations.values()
        }

    def _wide(self, p: Population) -> bool:
        v_reset = p.cell.v_reset if p.cell is not None else 0
        return self.arrival[p.name].total > bounds.NARROW or abs(v_reset) > 2**23

    def relay_shift(self, name: str) -> int:
        """By how many bits a relay divides what it sends."""
        cell = self.populations[name].cell
        return 0 if cell is None else cell.shift

    def binary(self, name: str) -> bool:
        """Whether a population's messages are proved to be 0 or 1."""
        p = self.populations[name]
        return p.lo >= 0 and p.hi <= 1 if p.is_input else name in self.cells or name in self.gates

    @cached_property
    def cyclic(self) -> bool:
        """Whether a projection goes back, or to its own source."""
        place = {name: i for i, name in enumerate(self.populations)}
        return any(place[p.source] >= place[p.target] for p in self.projections.values())

    @cached_property
    def last_reader(self) -> dict[str, str]:
        """name -> the last population, in order, that takes its messages."""
        return {p.source: name for name, into in self.into.items() for p in into}


_PLANS: weakref.WeakKeyDictionary[Program, Plan] = weakref.WeakKeyDictionary()


def plan(program: Program) -> Plan:
    """The Plan of a program, made on first use."""
    if program not in _PLANS:
        _PLANS[program] = Plan(program)
    return _PLANS[program]
