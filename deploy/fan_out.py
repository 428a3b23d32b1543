"""How many synapses each source neuron drives, border-exact."""

from __future__ import annotations

import numpy as np

from ranvier.deploy.program import ConvMap, DenseMap, LinearMap, OneToOne


def fan_out(linear: LinearMap) -> tuple[np.ndarray, np.ndarray]:
    """(synapses with a weight, synapses with weight zero) of each source neuron, `[n_in]`, int64."""
    match linear:
        case DenseMap():
            used = (linear.weight != 0).sum(0).astype(np.int64)
            return used, linear.weight.shape[0] - used
        case OneToOne():
            used = np.broadcast_to(linear.weight != 0, linear.shape).reshape(-1).astype(np.int64)
            return used, 1 - used
        case ConvMap():
            used = _placements(linear, (linear.weight != 0).astype(np.int64))
            return used, _placements(linear, np.ones_like(linear.weight, np.int64)) - used


def _placements(conv: ConvMap, mask: np.ndarray) -> np.ndarray:
    """How many synapses of `mask` each source neuron drives: the transposed convolution of ones."""
    c_out, per_group, k_y, k_x = mask.shape
    by_tap = mask.reshape(conv.groups, c_out // conv.groups, per_group, k_y, k_x).sum(1)
    by_tap = by_tap.reshape(conv.in_shape[0], k_y, k_x)
    (py, px), (sy, sx), (dy, dx) = conv.padding, conv.stride, conv.dilation
    channels, height, width = conv.in_shape
    rows, cols = conv.out_shape[1:]
    count = np.zeros((channels, height + 2 * py, width + 2 * px), np.int64)
    for i in range(k_y):
        for j in range(k_x):
            ys = slice(i * dy, i * dy + (rows - 1) * sy + 1, sy)
            xs = slice(j * dx, j * dx + (cols - 1) * sx + 1, sx)
            count[:, ys, xs] += by_tap[:, i, j, None, None]
    return count[:, py : py + height, px : px + width].reshape(-1)
