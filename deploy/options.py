"""What `compile` can be asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from ranvier.deploy.chip import Chip
from ranvier.deploy.program import Program
from ranvier.train.errors import RangeError, UnsupportedError

Joins: TypeAlias = Literal[
    "auto", "linear", "graded", "unrolled", "relay", "logic", "linear+logic", "graded+logic"
]
JOINS = {
    "auto": "auto",
    "linear": "linear",
    "unrolled": "linear",
    "graded": "graded",
    "relay": "graded",
    "logic": "auto",
    "linear+logic": "linear",
    "graded+logic": "graded",
}
Thresholds: TypeAlias = Literal["population", "channel"]
InputBits: TypeAlias = "int | Literal['auto']"
Rounding: TypeAlias = Literal["nearest", "together"]


@dataclass(frozen=True)
class Options:
    """The arguments of `compile` as its parts take them.

    joins       the mappings to try: linear, graded, or both
    logic       OR, AND and IAND as neurons without a membrane
    by_channel  a scale and a threshold for each channel
    together    the weights of a row are rounded together
    like        a program whose scales, exponents and joins are kept
    """

    chip: Chip
    weight_bits: int
    input_bits: InputBits
    search: bool
    bias_correction: bool
    by_channel: bool
    together: bool
    joins: tuple[str, ...]
    logic: bool
    like: Program | None = None


def checked(
    chip: Chip,
    weight_bits: int,
    joins: str,
    *,
    input_bits: InputBits,
    search: bool,
    bias_correction: bool,
    thresholds: str,
    rounding: str,
    like: Program | None,
    calibrated: bool,
) -> Options:
    """The Options; raises RangeError and UnsupportedError for what no chip, or not this one, can do."""
    for name, found, known in (
        ("joins", joins, tuple(JOINS)),
        ("thresholds", thresholds, get_args(Thresholds)),
        ("rounding", rounding, get_args(Rounding)),
    ):
        if found not in known:
            raise RangeError(f"compile: {name} '{found}' is none of {', '.join(known)}")
    if not 1 <= weight_bits <= 8 or (input_bits != "auto" and not 1 <= input_bits <= 16):
        raise RangeError(
            f"compile: weight_bits {weight_bits} (1..8) or input_bits {input_bits} (1..16, or auto) is out "
            "of range"
        )
    mappings = _mappings(chip, joins, like)
    logic = joins.endswith("logic") if like is None else bool(like.meta.get("logic"))
    if logic and not chip.custom:
        raise UnsupportedError(
            f"compile: {chip.name} has one fixed compartment, so joins='{joins}' cannot run; without "
            "'logic' OR, AND and IAND are plain LIFs"
        )
    free = like is None
    kind = thresholds if like is None else like.meta.get("thresholds", thresholds)
    return Options(
        chip, weight_bits, input_bits, search, bias_correction and free, kind == "channel",
        rounding == "together" and free and calibrated, mappings, logic, like,
    )  # fmt: skip


def _mappings(chip: Chip, joins: str, like: Program | None) -> tuple[str, ...]:
    wanted: Any = JOINS[joins] if like is None else str(like.meta["joins"])
    if wanted == "graded" and not chip.graded:
        raise UnsupportedError(
            f"compile: {chip.name} has no graded spikes, so joins='{joins}' cannot run; use 'linear'"
        )
    if wanted != "auto":
        return (wanted,)
    return ("linear", "graded") if chip.graded else ("linear",)
