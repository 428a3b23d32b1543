"""The input population: how real values enter the chip."""

from __future__ import annotations

import numpy as np

from ranvier.deploy.chip import Chip
from ranvier.deploy.program import Population
from ranvier.export.nodes import Input
from ranvier.train.errors import RangeError, UnsupportedError


def input_population(node: Input, x: np.ndarray | None, input_bits: int, chip: Chip) -> Population:
    """The input population: plain spikes where all values are 0 or 1, else graded levels."""
    lo, hi, whole_numbers = node.lo, node.hi, node.integer
    if x is not None:
        seen_lo, seen_hi = float(x.min()), float(x.max())
        lo = seen_lo if not np.isfinite(lo) else lo
        if not np.isfinite(hi):  # images are known to reach 1.0, whether these samples do or not
            hi = 1.0 if 0 <= seen_lo and 0.5 < seen_hi <= 1 else seen_hi
        whole_numbers = whole_numbers or bool((x == np.rint(x)).all())
    if not (np.isfinite(lo) and np.isfinite(hi)):
        raise RangeError(
            f"compile: the range of input '{node.name}' is not known; give calibration data "
            "(calibration=x; --calibration digits, or FILE.npz with x)"
        )
    lo, hi = min(lo, 0.0), max(hi, 1e-9)
    if whole_numbers and lo >= 0 and hi <= 1:
        return Population(name=node.name, shape=node.shape, origin=node.name)
    levels = 2**input_bits - 1
    if not chip.graded:
        raise UnsupportedError(
            f"compile: input '{node.name}' is analog ({lo:g}..{hi:g}) and {chip.name} "
            "has no graded spikes; encode it as spikes (rate, latency, delta), or use loihi2"
        )
    scale = levels_per_one(x, lo, hi, levels, whole_numbers)
    return Population(
        name=node.name,
        shape=node.shape,
        scale=np.array(scale),
        origin=node.name,
        lo=int(np.floor(lo * scale)),
        hi=int(np.ceil(hi * scale)),
    )


def levels_per_one(
    x: np.ndarray | None, lo: float, hi: float, levels: int, whole_numbers: bool
) -> float:
    """Levels per 1.0: the coarsest grid on which the calibration data lies exactly, if any."""
    finest = (levels if lo >= 0 else levels // 2) / max(hi, -lo)
    if whole_numbers and finest >= 1:
        return 1.0
    if x is not None:
        seen = np.unique(x[:, :16])
        for n in range(1, int(finest) + 1):
            if np.abs(seen * n - np.rint(seen * n)).max() < 1e-4:
                return float(n)
    return float(finest)
