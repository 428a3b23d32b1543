"""Between graph nodes and linear maps: a map of each linear node, and a node of each map."""

from __future__ import annotations

import numpy as np

from ranvier.export.linear import ConvLin, DenseLin, DiagLin, Linear, image, size
from ranvier.export.nodes import Conv, Shape, Subsample, Upsample


def narrow(a: np.ndarray) -> np.ndarray:
    return np.asarray(a, np.float32)


def plain_form(linear: Linear) -> Linear:
    """A pointwise convolution that only scales channels, as the one-to-one map that it is."""
    if isinstance(linear, ConvLin) and linear.pointwise and linear.stride == (1, 1):
        depthwise = linear.groups == linear.in_shape[0] == linear.weight.shape[0]
        if depthwise:
            return DiagLin(linear.weight.reshape(-1, 1, 1), linear.in_shape)
    return linear


def as_matrix(linear: Linear, columns: int) -> DenseLin:
    return DenseLin(linear.apply(np.eye(columns)).reshape(columns, -1).T)


def conv_node(name: str, source: str, c: ConvLin, axes: int, meta: dict[str, object]) -> Conv:
    """A Conv of a map; one-dimensional where the source is a sequence (C, L)."""
    weight = narrow(c.weight)
    if axes == 3:
        return Conv(
            name=name,
            inputs=(source,),
            weight=weight,
            stride=c.stride,
            padding=c.padding,
            dilation=c.dilation,
            groups=c.groups,
            meta=meta,
        )
    return Conv(
        name=name,
        inputs=(source,),
        weight=weight[:, :, 0],
        stride=c.stride[1:],
        padding=c.padding[1:],
        dilation=c.dilation[1:],
        groups=c.groups,
        meta=meta,
    )


def conv_map(node: Conv, shape: Shape) -> ConvLin:
    """A Conv node as a map on images (C, H, W)."""
    weight = np.asarray(node.weight, np.float64)
    return ConvLin(
        weight[:, :, None] if weight.ndim == 3 else weight,
        image(shape),
        pair(node.stride, 1),
        pair(node.padding, 0),
        pair(node.dilation, 1),
        node.groups,
    )


def pair(axes: tuple[int, ...], first: int) -> tuple[int, int]:
    """One number an axis, as (rows, columns): a sequence has one row, for which `first` stands."""
    return (axes[0], axes[1]) if len(axes) == 2 else (first, axes[0])


def placed_map(shape: Shape, start: int, channels: int) -> Linear:
    """The channels of a shape as start, start + 1, ... of `channels`."""
    rows = np.zeros((channels, shape[0], 1, 1))
    rows[start : start + shape[0], :, 0, 0] = np.eye(shape[0])
    return DenseLin(rows[:, :, 0, 0]) if len(shape) == 1 else ConvLin(rows, image(shape))


def subsample_map(node: Subsample, shape: Shape) -> ConvLin:
    before, after = node.pad_channels
    weight = np.zeros((before + shape[0] + after, shape[0], 1, 1))
    weight[before : before + shape[0], :, 0, 0] = np.eye(shape[0])
    return ConvLin(weight, image(shape), pair(node.stride, 1))


def upsample_map(node: Upsample, shape: Shape) -> DenseLin:
    rows = np.eye(size(shape)).reshape(-1, *shape)
    for axis, factor in enumerate(node.factor):
        rows = np.repeat(rows, factor, 2 + axis)
    return DenseLin(rows.reshape(size(shape), -1).T)
