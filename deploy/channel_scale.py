"""A scale for each channel of a population: thresholds that absorb the weights' scale by channel.

One scale for a whole population wastes levels on every channel whose weights are small beside the
largest. A threshold a channel takes that up: with weights q[c] * W[c], threshold q[c] * theta and
bias 64 * q[c] * b, channel c fires exactly as before for any q[c]. A relay has no threshold; the
populations behind it divide by its scale. Exponents stay one a projection, as the chip has them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ranvier.deploy.bounds import A_LIMIT, RELAY_LIMIT
from ranvier.deploy.cells import VTH_MAX
from ranvier.deploy.quantize import (
    BIAS_MAX,
    MARGIN,
    Incoming,
    Scaled,
    grid,
    largest_weight,
    rounded_at,
)
from ranvier.export.nodes import Scale

FACTORS = np.geomspace(
    2.0, 0.5, 49
)  # around the scale that fills the weights' range: clipped first
OCTAVES = 12


def fits(incoming: list[Incoming], channels: int) -> bool:
    """Whether every map has one row, or one plane, a channel of the target."""
    return bool(incoming) and all(len(i.weight) == channels for i in incoming)


def largest_rows(incoming: list[Incoming]) -> np.ndarray:
    """`[C]`: the largest |weight| of each channel over all projections."""
    return np.asarray(np.max([_tops(i) for i in incoming], 0))


def largest_scales(
    incoming: list[Incoming], relay: bool, theta: np.ndarray, bias: np.ndarray, memory: float
) -> np.ndarray:
    """`[C]`: the largest scale of each channel for which nothing wraps, as `largest_scale`."""
    extents = [i.extent_rows() for i in incoming]
    low, high = (sum(e[k] for e in extents) for k in (0, 1))
    most = np.maximum(np.maximum(-low, high), 1e-30) * memory
    limit = (RELAY_LIMIT if relay else A_LIMIT) * MARGIN / most
    if relay:
        return np.asarray(limit)
    with np.errstate(divide="ignore"):
        limit = np.minimum(limit, VTH_MAX / theta)
        limit = np.minimum(limit, BIAS_MAX * MARGIN / (64 * bias))
    return np.asarray(limit)


def choose_scales(
    incoming: list[Incoming], q_max: np.ndarray, theta: np.ndarray, search: bool
) -> Scaled:
    """The scales `[C]` with the least expected squared error of each channel's current.

    q_max  `[C]`, from `largest_scales`
    theta  `[C]`; where it is not 0, q * theta is made whole
    """
    best: Scaled | None = None
    for exponents in _exponents(incoming, q_max):
        caps = np.minimum(q_max, _filling(incoming, exponents))
        q, error = caps, np.full(len(caps), np.inf)
        for candidate in _candidates(incoming, exponents, caps, q_max, search):
            candidate = _whole_thresholds(candidate, theta)
            found = _error(incoming, exponents, candidate)
            q, error = np.where(found < error, candidate, q), np.minimum(found, error)
        if best is None or error.mean() < best.error:
            weights = tuple(rounded_at(i, q, e) for i, e in zip(incoming, exponents, strict=True))
            best = Scaled(q, weights, exponents, float(error.mean()))
    assert best is not None
    return best


def _tops(i: Incoming) -> np.ndarray:
    """The largest |weight| of each row."""
    return np.asarray(np.abs(i.weight).reshape(len(i.weight), -1).max(1))


def _filling(incoming: list[Incoming], exponents: tuple[int, ...]) -> np.ndarray:
    """`[C]`: the scale at which the first of a channel's projections fills its weight range."""
    caps = []
    for i, e in zip(incoming, exponents, strict=True):
        low, high, _ = grid(i.weight, i.bits)
        held = float(min(high, -low) if low and high else max(high, -low))
        caps.append(held * 2**e / np.maximum(_tops(i), 1e-30))
    filled: np.ndarray = np.min(caps, 0)
    used = filled < 1e20  # a channel without any weight takes what the others take
    return np.where(used, filled, np.median(filled[used]) if used.any() else 256.0)


def _exponents(incoming: list[Incoming], q_max: np.ndarray) -> list[tuple[int, ...]]:
    """Exponents for the projections: all that some common scale would ask for."""
    one = (0,) * len(incoming)
    tops = [float(np.median(t[t > 0])) if (t := _tops(i)).any() else 0.0 for i in incoming]
    start = min(float(np.median(_filling(incoming, one))), float(np.median(q_max)))
    found = [one]
    for q in start * 2.0 ** np.arange(OCTAVES):
        if q <= 2 * float(np.median(q_max)):
            found.append(
                tuple(
                    max(0, int(np.ceil(np.log2(max(q * t / largest_weight(i), 1e-30)) - 1e-9)))
                    for i, t in zip(incoming, tops, strict=True)
                )
            )
    return [e for e in dict.fromkeys(found) if min(e) == 0] or [one]


def _candidates(
    incoming: list[Incoming],
    exponents: tuple[int, ...],
    caps: np.ndarray,
    q_max: np.ndarray,
    search: bool,
) -> Iterator[np.ndarray]:
    yield caps
    if not search:
        return
    for factor in FACTORS:
        yield np.minimum(caps * factor, q_max)
    for i, e in zip(incoming, exponents, strict=True):
        if isinstance(i.node, Scale):  # whole numbers on a wire
            top = np.maximum(_tops(i), 1e-30) / 2**e
            whole = np.floor(caps * top)
            for n in (whole, 2 ** np.floor(np.log2(np.maximum(whole, 1)))):
                yield np.where((n >= 1) & (n / top <= q_max), n / top, caps)


def _whole_thresholds(q: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """q lowered to where q * theta is a whole number, where that is a small change."""
    units = q * theta
    return np.where(units >= 32, q * np.floor(units) / np.maximum(units, 1e-30), q)


def _error(incoming: list[Incoming], exponents: tuple[int, ...], q: np.ndarray) -> np.ndarray:
    total = np.zeros(len(q))
    for i, e in zip(incoming, exponents, strict=True):
        rows = q.reshape(-1, *[1] * (i.weight.ndim - 1))
        off = (rounded_at(i, q, e) * (2.0**e / rows) - i.weight) ** 2 * i.spread(i.moments.square)
        flat = off.reshape(len(off), -1)
        total += flat.mean(1) if isinstance(i.node, Scale) else flat.sum(1)
    return total
