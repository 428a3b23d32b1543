"""Plain spikes times 8-bit weights in whole numbers: the processor's own 8-bit products.

oneDNN, which torch carries, sums bytes into 32-bit integers (AVX-512 VNNI and its like) at several
times the rate of float32. The sums come back as float32, which holds them where their bound is below
2**24. Spikes are 0 or 1, so that even processors whose 8-bit products saturate at 16 bits cannot
lose anything; and each layer is held once against float32 before it is used at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranvier.deploy.program import ConvMap, DenseMap, LinearMap

Product = Callable[[Tensor], Tensor]
NARROWEST = 64  # columns of a dense layer below which float32 is as quick


def product(linear: LinearMap, weight: np.ndarray, shift: int, plain: Product) -> Product | None:
    """`[rows, n_in]` uint8 of 0 and 1, channels last -> `[rows, n_out]` float32; None where it cannot.

    weight  as the map's, whole numbers; the product is shifted left by `shift`
    plain   the same in float32: what is held against it once
    """
    if not fits(linear, weight):
        return None
    try:
        made = (
            _conv(linear, weight, shift) if isinstance(linear, ConvMap) else _dense(weight, shift)
        )
        probe = _probe(linear)
        return made if torch.equal(made(probe), plain(probe)) else None
    except (
        RuntimeError,
        AttributeError,
        TypeError,
    ):  # torch's operators here are another version's
        return None


def fits(linear: LinearMap, weight: np.ndarray) -> bool:
    """Whether the map's form and weights are ones for which 8 bits are right and worth it."""
    small = weight.size > 0 and weight.min() >= -128 and weight.max() <= 127
    match linear:
        case ConvMap():  # one channel a group meets the same fault as in float32, see dense.py
            plain = linear.groups == 1 and linear.in_shape[0] > 1 and not sees_padding_only(linear)
            return small and plain and available()
        case DenseMap():
            return small and len(weight) >= NARROWEST and available()
    return False


def sees_padding_only(conv: ConvMap) -> bool:
    """Whether some row or column of outputs reads nothing but padding.

    oneDNN's 8-bit convolution (torch 2.13, AVX-512) crashes on such columns: an input one column
    wide, a kernel as wide, a stride of 2 and padding of 1 give two outputs left and right of it.
    """
    axes = zip(
        conv.in_shape[1:], conv.out_shape[1:], conv.weight.shape[2:],
        conv.stride, conv.padding, conv.dilation, strict=True,
    )  # fmt: skip
    for n, n_out, k, stride, padding, dilation in axes:
        at = np.arange(n_out)[:, None] * stride - padding + np.arange(k) * dilation
        if not ((at >= 0) & (at < n)).any(1).all():
            return True
    return False


def _probe(linear: LinearMap) -> Tensor:
    """Two samples, one of them all spikes."""
    n = int(np.prod(linear.in_shape))
    some = np.random.default_rng(n).random(n) < 0.5
    return torch.from_numpy(np.stack([np.ones(n, np.uint8), some.astype(np.uint8)]))


@functools.cache
def available() -> bool:
    """Whether torch here has the operators."""
    try:
        return (
            hasattr(torch.ops.onednn, "qconv2d_pointwise") and torch.backends.mkldnn.is_available()
        )
    except (AttributeError, RuntimeError):
        return False


def _scales(n: int, shift: int) -> tuple[Tensor, Tensor]:
    return torch.full((n,), float(1 << shift)), torch.zeros(n, dtype=torch.int64)


def _conv(conv: ConvMap, weight: np.ndarray, shift: int) -> Product:
    c, h, w = conv.in_shape
    place = [list(conv.stride), list(conv.padding), list(conv.dilation)]
    scale, zero = _scales(len(weight), shift)
    ops: Any = torch.ops.onednn
    packed = ops.qconv_prepack(
        torch.from_numpy(weight.astype(np.int8)), scale, 1.0, 0, *place, conv.groups, [64, c, h, w]
    )

    def call(x: Tensor) -> Tensor:
        seen = x.reshape(-1, h, w, c).permute(0, 3, 1, 2)
        y = ops.qconv2d_pointwise(
            seen, 1.0, 0, packed, scale, zero, None, *place, conv.groups, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        return y.permute(0, 2, 3, 1).reshape(len(x), -1)

    return call


def _dense(weight: np.ndarray, shift: int) -> Product:
    scale, zero = _scales(len(weight), shift)
    ops: Any = torch.ops.onednn
    packed = ops.qlinear_prepack(torch.from_numpy(weight.astype(np.int8)), None)

    def call(x: Tensor) -> Tensor:
        y: Tensor = ops.qlinear_pointwise(
            x, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y

    return call
