"""What becomes of the integer weights of a dense layer in lava-dl's netx and Lava's Dense."""

from __future__ import annotations

import math

import numpy as np


def applied_weights(part: np.ndarray, whole: np.ndarray) -> np.ndarray | None:
    """The integer weights that netx' Dense applies for weights `part` of a layer with `whole`.

    netx scales a matrix up to 8 bits, Lava truncates it by its signs and bits and scales sums back.
    None where that is no multiple of the scale, so that sums would be rounded.
    """
    clipped = np.clip(whole, -256, 254) if whole.min() < 0 < whole.max() else whole
    part = np.clip(part, clipped.min(), clipped.max())
    low, high = int(clipped.min()), int(clipped.max())
    if low == high == 0:
        return part
    signed = low < 0 <= high
    if signed:
        scale = min(127 / high if high else math.inf, -128 / low)
    else:
        scale = -256 / low if high < 0 else 255 / high
    up = math.floor(math.log2(scale)) + signed
    if up < 0:
        return None
    zeros = next((n for n in range(8, 0, -1) if not (clipped % 2**n).any()), 0)
    bits = 8 - up - (zeros - signed)
    kept = _kept(part << up, bits)
    return kept >> up if kept is not None and not (kept % 2**up).any() else None


def _kept(weight: np.ndarray, bits: int) -> np.ndarray | None:
    """What Lava's Dense keeps of integer weights, by the signs of these alone; None: nothing."""
    mixed = weight.min() < 0 < weight.max()
    sign = -1 if weight.max() <= 0 and weight.min() < 0 else 1
    held = np.clip(sign * weight, -256 if mixed else 0, 255)
    cut = 8 - bits + mixed
    return sign * ((held >> cut) << cut) if cut >= 0 else None
