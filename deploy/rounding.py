"""Rounding that looks at what arrives together: the weights of a row are rounded so that the error of
their sum is small on the calibration data, not the error of each.

Neighboring pixels and channels are alike, so that rounding errors of one sign add up where nearest
rounding takes them for independent. With H the covariance of a kernel's inputs and d the errors of a row,
coordinate descent lowers d H d, one weight at a time, from nearest rounding on; the mean of the error is
left to the bias correction.
Source: the objective of Nagel et al. 2020 (2004.10568) and Frantar et al. 2022 (2210.17323).
"""

from __future__ import annotations

import numpy as np

from ranvier.deploy.quantize import Incoming, Scaled, along_rows, grid
from ranvier.export.nodes import Conv, Scale

MAX_INPUTS = 1200  # of a row: H has its square
MAX_PATCHES = 6000
SWEEPS = 3
RIDGE = 0.05  # of the mean variance, added to each: inputs that were rarely seen stay nearest


def refine(incoming: list[Incoming], scaled: Scaled, series: dict[str, np.ndarray]) -> Scaled:
    """The same scales with the rows of each projection rounded together.

    series  `[samples, *shape]` of what the sources sent in float units
    """
    weights = list(scaled.weights)
    for k, (i, e) in enumerate(zip(incoming, scaled.exponents, strict=True)):
        sent = series.get(i.source.name)
        if sent is None or not sent.size or isinstance(i.node, Scale):
            continue
        groups = i.node.groups if isinstance(i.node, Conv) else 1
        rows = i.weight.reshape(groups, len(i.weight) // groups, -1)
        if groups > 8 or rows.shape[2] > MAX_INPUTS:
            continue
        exact = i.weight * (along_rows(scaled.q, i.weight.ndim) / 2.0**e)
        inputs = _inputs(i, sent, groups)
        found = [
            descend(x, r, w, grid(i.weight, i.bits))
            for x, r, w in zip(
                inputs, exact.reshape(rows.shape), weights[k].reshape(rows.shape), strict=True
            )
        ]
        weights[k] = np.stack(found).reshape(i.weight.shape).astype(np.int16)
    return Scaled(scaled.q, tuple(weights), scaled.exponents, scaled.error)


def descend(
    inputs: np.ndarray, exact: np.ndarray, whole: np.ndarray, allowed: tuple[int, int, int]
) -> np.ndarray:
    """Whole numbers `[rows, n]` near `exact` whose sums over `inputs` `[m, n]` are near its sums.

    allowed  (lowest, highest, step)
    """
    low, high, step = allowed
    centered = inputs - inputs.mean(0)
    cov = centered.T @ centered / len(inputs)
    variance = np.diag(cov)
    if not variance.any():
        return whole
    cov = cov + RIDGE * variance.mean() * np.eye(len(cov))
    found = whole.astype(np.float64)
    slope = (found - exact) @ cov
    for _ in range(SWEEPS):
        for k in np.argsort(-variance):
            best = found[:, k] - slope[:, k] / cov[k, k]
            best = np.clip(np.rint(best / step) * step, low, high)
            moved = best - found[:, k]
            if moved.any():
                found[:, k] = best
                slope += moved[:, None] * cov[k]
    return found


def _inputs(i: Incoming, sent: np.ndarray, groups: int) -> list[np.ndarray]:
    """For each group, `[patches, inputs of a row]`: what kernels saw, at random places."""
    if not isinstance(i.node, Conv):
        return [sent.reshape(len(sent), -1).astype(np.float64)[:MAX_PATCHES]]
    from ranvier.export.maps import conv_map

    conv = conv_map(i.node, i.source.shape)
    (sy, sx), (py, px), (dy, dx) = conv.stride, conv.padding, conv.dilation
    k_y, k_x = conv.weight.shape[2:]
    _, rows, columns = conv.out_shape
    rng = np.random.default_rng(0)
    n = min(MAX_PATCHES, len(sent) * rows * columns)
    s, y, x = (rng.integers(0, m, n) for m in (len(sent), rows, columns))
    padded = np.pad(sent, [(0, 0), (0, 0), (py, py), (px, px)])
    at_y = (y * sy)[:, None, None] + np.arange(k_y)[:, None] * dy
    at_x = (x * sx)[:, None, None] + np.arange(k_x)[None] * dx
    patches = padded[s[:, None, None], :, at_y, at_x]  # [n, k_y, k_x, C]
    patches = patches.transpose(0, 3, 1, 2).astype(np.float64)
    return [part.reshape(n, -1) for part in np.split(patches, groups, axis=1)]
