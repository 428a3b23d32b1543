"""The integer neuron: what Loihi's CUBA compartment computes, bit for bit, and what microcode adds.

One step of a population, all in int64 with the chip's wraps made explicit; a is the sum of everything
that arrives, v_threshold is `vth << 6`:

    u = fold(wrap32(decay(u, du) + wrap32(a << 6)))   23 bits and sign, folded once
    v = clip(decay(v, dv) + u + bias)                 saturates at +-(2**23 - 1)
    fires where v > v_threshold; then v = 0           u is kept

Source: the fixed-point models of lava-nc 0.10; the conformance suite holds both equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from ranvier.train.errors import RangeError

IntParam: TypeAlias = "int | np.ndarray"
Ints: TypeAlias = "np.ndarray"

V_MAX = 2**23 - 1
VTH_MAX = 2**17 - 1
BIAS_MANT_MAX = 2**12 - 1
SHIFT = 6  # synaptic input and threshold count in units of 2**6


def decay(x: Ints, d: IntParam) -> Ints:
    """x moved towards zero: sign(x) * floor(|x| * (4096 - d) / 4096), for d in 0..4096.

    >>> decay(np.array([-4096, 5]), 1024)
    array([-3072,     3])
    """
    return np.sign(x) * ((np.abs(x) * (4096 - np.asarray(d, np.int64))) >> 12)


def wrap(x: Ints, bits: int) -> Ints:
    """x as a signed integer of `bits` bits, as two's complement wraps it.

    >>> wrap(np.array([2**23, -2**23, 5]), 24)
    array([-8388608, -8388608,        5])
    """
    half = 1 << (bits - 1)
    return (x + half) % (2 * half) - half


def fold(u: Ints) -> Ints:
    """u folded once into (-2**23, 2**23], as the current register does.

    >>> fold(np.array([2**23, 2**23 + 1, -2**23]))
    array([ 8388608, -8388607,  8388608])
    """
    u = np.where(u > 2**23, u - 2**24, u)
    return np.where(u <= -(2**23), u + 2**24, u)


@dataclass(frozen=True, eq=False, kw_only=True)
class Cell:
    """The integer parameters of a population; arrays broadcast to its shape.

    kind       cuba: the compartment above; relay: memoryless, sends a itself (Lava GradedVec, vth 0);
               logic: memoryless, fires where a > vth: OR (vth 0), AND (vth 1) and IAND (vth 0, the
               branch with weight -1) of spikes, without u and v
    shift      of a relay: it sends round(a / 2**shift), halves upwards; 0..15
    du         0..4095 current decay, of which the chip takes du + 1 (4095: no memory; -1: no decay)
    dv         0..4096 voltage decay (4096: no memory)
    vth        threshold, times 2**6 in units of v
    bias_mant, bias_exp   bias = bias_mant << bias_exp is added to v each step
    reset, timing, v_reset, strict   as in `ranvier.export.neurons.Membrane`; v_reset in units of v
    """

    kind: Literal["cuba", "relay", "logic"] = "cuba"
    du: IntParam = 4095
    dv: IntParam = 0
    vth: IntParam = 0
    bias_mant: IntParam = 0
    bias_exp: int = 0
    reset: Literal["zero", "subtract", "none"] = "zero"
    timing: Literal["immediate", "delayed", "carry", "discard"] = "immediate"
    v_reset: int = 0
    strict: bool = True
    shift: int = 0

    def __post_init__(self) -> None:
        limits = {
            "du": (-1, 4095),
            "dv": (0, 4096),
            "vth": (0, VTH_MAX),
            "bias_exp": (0, 7),
            "shift": (0, 15),
        }
        for name, (lo, hi) in {**limits, "bias_mant": (-BIAS_MANT_MAX, BIAS_MANT_MAX)}.items():
            value = np.asarray(getattr(self, name))
            if value.dtype.kind != "i":
                raise RangeError(f"cell: {name} must be a whole number, not {value.dtype}")
            if value.size and (value.min() < lo or value.max() > hi):
                raise RangeError(
                    f"cell: {name} is {value.min()}..{value.max()}; the chip holds {lo}..{hi}"
                )

        if self.kind == "logic" and (np.any(self.bias_mant) or self.reset != "zero"):
            raise RangeError("cell: logic has neither bias nor reset; use kind='cuba' for them")

    @property
    def graded(self) -> bool:
        return self.kind == "relay"

    @property
    def bias(self) -> Ints:
        return np.asarray(self.bias_mant, np.int64) << self.bias_exp

    @property
    def theta(self) -> Ints:
        """The threshold in units of v; a cell that is not strict fires one unit earlier."""
        return (np.asarray(self.vth, np.int64) << SHIFT) - (0 if self.strict else 1)

    @property
    def gate(self) -> Ints:
        """Of logic: it fires where what arrives is above this."""
        return np.asarray(self.vth, np.int64) - (0 if self.strict else 1)

    def why_custom(self) -> str | None:
        """None where Lava's own LIF or GradedVec computes this cell; else what those cannot."""
        if self.kind == "relay":
            return "a shift of the payload" if self.shift else None
        if self.kind == "logic":
            return "logic without a membrane"
        if self.reset != "zero":
            return {"subtract": "subtractive reset", "none": "no reset"}[self.reset]
        if self.v_reset != 0:
            return "reset to a value other than zero"
        if self.timing == "discard":
            return "input lost in the step after a spike"
        # A delayed reset to 0 gives the same spikes as an immediate one; only a recorded v differs.
        return None if self.strict else "fires at the threshold itself"

    def initial(self, shape: tuple[int, ...]) -> tuple[Ints, Ints]:
        """(u, v) before the first step, zero."""
        return np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    def step(self, u: Ints, v: Ints, a: Ints) -> tuple[Ints, Ints, Ints]:
        """(sent, u, v) after one step, for the arriving sum a; arrays `[batch, *shape]`, int64."""
        if self.kind == "relay":
            return (a + ((1 << self.shift) >> 1)) >> self.shift, u, v
        if self.kind == "logic":
            return (a > self.gate).astype(np.int64), u, v
        u = fold(wrap(decay(u, np.asarray(self.du) + 1) + wrap(a << SHIFT, 32), 32))
        late = v > self.theta
        jump = self.theta + (0 if self.strict else 1)
        if self.reset == "zero" and self.timing == "delayed":
            v = np.where(late, self.v_reset, v)
        h = decay(v, self.dv) + u + self.bias
        if self.reset == "subtract" and self.timing != "immediate":
            h = h - late * jump
        if self.reset == "zero" and self.timing == "discard":
            h = np.where(late, self.v_reset, h)
        h = np.clip(h, -V_MAX, V_MAX)
        fired = h > self.theta
        return fired.astype(np.int64), u, self._after(h, fired, late, jump)

    def _after(self, h: Ints, fired: Ints, late: Ints, jump: Ints) -> Ints:
        if self.reset == "none" or self.timing in ("delayed", "discard"):
            return h
        if self.reset == "zero":
            return np.where(fired, self.v_reset, h)
        back = fired.astype(np.int64) - (late if self.timing == "carry" else 0)
        return np.clip(h - back * jump, -V_MAX, V_MAX)

    def fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
