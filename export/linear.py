"""Linear maps and their composition, in float64: what lowering pushes through joins and pools.

A map goes from a flat view of one population to a flat view of another; shapes are (C, H, W) for
convolutions. Composition is exact or refused; a dense matrix is the way out for small maps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from ranvier.export.nodes import Shape, window
from ranvier.train.errors import UnsupportedError

DENSE_LIMIT = 2**24  # entries of the largest matrix that composition may fall back to


@dataclass(frozen=True, eq=False)
class ConvLin:
    """Cross-correlation; weight [C_out, C_in/groups, kH, kW], padding ((top, left)) symmetric."""

    weight: np.ndarray
    in_shape: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def out_shape(self) -> Shape:
        axes = zip(
            self.in_shape[1:],
            self.weight.shape[2:],
            self.stride,
            self.padding,
            self.dilation,
            strict=True,
        )
        return (self.weight.shape[0], *(window(*a) for a in axes))

    @property
    def zero_outside(self) -> bool:
        """Whether the map, continued past its borders, gives zeros there: then it may be padded.

        So it is where windows neither overlap nor leave a rest, as in pooling by whole tiles."""
        if self.padding != (0, 0):
            return False
        axes = zip(
            self.in_shape[1:],
            self.weight.shape[2:],
            self.stride,
            self.dilation,
            self.out_shape[1:],
            strict=True,
        )
        return all(d * (k - 1) < s and out * s >= n for n, k, s, d, out in axes)

    @property
    def pointwise(self) -> bool:
        return self.weight.shape[2:] == (1, 1) and self.padding == (0, 0)

    def apply(self, x: np.ndarray) -> np.ndarray:
        import torch
        from torch.nn import functional as F

        t = torch.from_numpy(np.array(x, np.float64)).reshape(-1, *self.in_shape)
        w = torch.from_numpy(np.array(self.weight, np.float64))
        return F.conv2d(t, w, None, self.stride, self.padding, self.dilation, self.groups).numpy()

    def transposed(self, y: np.ndarray) -> np.ndarray:
        """The transpose of the map on rows y `[n, *out_shape]` -> `[n, *in_shape]`."""
        import torch
        from torch.nn.grad import conv2d_input

        w = torch.from_numpy(np.array(self.weight, np.float64))
        seed = torch.from_numpy(np.array(y, np.float64)).reshape(-1, *self.out_shape)
        size = (len(seed), *self.in_shape)
        return conv2d_input(
            size, w, seed, self.stride, self.padding, self.dilation, self.groups
        ).numpy()


@dataclass(frozen=True, eq=False)
class DenseLin:
    """A matrix [out, in] on the flattened source."""

    weight: np.ndarray

    @property
    def out_shape(self) -> Shape:
        return (self.weight.shape[0],)

    def apply(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(x, np.float64).reshape(-1, self.weight.shape[1]) @ self.weight.T

    def transposed(self, y: np.ndarray) -> np.ndarray:
        return y.reshape(len(y), -1) @ self.weight


@dataclass(frozen=True, eq=False)
class DiagLin:
    """Neuron i to neuron i, times `scale`, which broadcasts to `shape`."""

    scale: np.ndarray
    shape: Shape

    @property
    def out_shape(self) -> Shape:
        return self.shape

    @property
    def full(self) -> np.ndarray:
        return np.broadcast_to(np.asarray(self.scale, np.float64), self.shape)

    @property
    def per_channel(self) -> np.ndarray | None:
        """[C] where the scale is one number a channel of a (C, ...) shape, else None."""
        first = self.full.reshape(self.shape[0], -1)
        same = (first == first[:, :1]).all()
        return np.array(first[:, 0]) if same else None

    def apply(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(x, np.float64).reshape(-1, *self.shape) * self.full

    def transposed(self, y: np.ndarray) -> np.ndarray:
        return y.reshape(-1, *self.shape) * self.full


Linear: TypeAlias = ConvLin | DenseLin | DiagLin


def identity(shape: Shape) -> DiagLin:
    return DiagLin(np.ones(()), shape)


def size(shape: Shape) -> int:
    return int(np.prod(shape))


def image(shape: Shape) -> tuple[int, int, int]:
    """A shape as (C, H, W): vectors and sequences get axes of 1."""
    if len(shape) == 3:
        return (shape[0], shape[1], shape[2])
    if len(shape) == 2:
        return (shape[0], 1, shape[1])
    if len(shape) == 1:
        return (shape[0], 1, 1)
    raise UnsupportedError(f"lowering: a shape of {len(shape)} axes {shape} has no (C, H, W) form")


def compose(b: Linear, a: Linear, where: str) -> Linear:
    """The map b after a.

    Raises UnsupportedError naming `where` if neither a convolution nor a matrix of up to
    DENSE_LIMIT entries says it exactly."""
    if isinstance(a, DiagLin) and isinstance(b, DiagLin):
        return DiagLin(a.full * b.full.reshape(a.shape), a.shape)
    if isinstance(b, ConvLin) and isinstance(a, DiagLin):
        channel = DiagLin(a.full.reshape(b.in_shape), b.in_shape).per_channel
        if channel is not None:
            return replace(b, weight=b.weight * _by_input(b, channel))
    if isinstance(b, DiagLin) and isinstance(a, ConvLin):
        channel = DiagLin(b.full.reshape(a.out_shape), a.out_shape).per_channel
        if channel is not None:
            return replace(a, weight=a.weight * channel[:, None, None, None])
    if isinstance(b, ConvLin) and isinstance(a, ConvLin):
        joined = _conv_after_conv(b, a)
        if joined is not None:
            return joined
    return _as_matrix(b, a, where)


def _by_input(b: ConvLin, channel: np.ndarray) -> np.ndarray:
    """[C_in] as a factor of b's grouped weight."""
    per_group = channel.reshape(b.groups, -1)
    return np.repeat(per_group, b.weight.shape[0] // b.groups, 0)[:, :, None, None]


def ungrouped(conv: ConvLin) -> np.ndarray:
    """The weight with all input channels, zeros between groups."""
    if conv.groups == 1:
        return conv.weight
    c_out, per_group = conv.weight.shape[:2]
    full = np.zeros((c_out, per_group * conv.groups, *conv.weight.shape[2:]))
    step = c_out // conv.groups
    for g in range(conv.groups):
        rows = slice(g * step, (g + 1) * step)
        full[rows, g * per_group : (g + 1) * per_group] = conv.weight[rows]
    return full


def _conv_after_conv(b: ConvLin, a: ConvLin) -> ConvLin | None:
    """One convolution, if the padding allows it: b unpadded, or a zero outside of its output."""
    if a.out_shape != b.in_shape or (b.padding != (0, 0) and not a.zero_outside):
        return None
    wa, wb = ungrouped(a), ungrouped(b)
    reach = [d * (k - 1) for d, k in zip(a.dilation, wa.shape[2:], strict=True)]
    hop = [s * d for s, d in zip(a.stride, b.dilation, strict=True)]
    kernel = [r + h * (k - 1) + 1 for r, h, k in zip(reach, hop, wb.shape[2:], strict=True)]
    out = np.zeros((wb.shape[0], wa.shape[1], *kernel))
    for i in range(wb.shape[2]):
        for j in range(wb.shape[3]):
            tap = np.einsum("om,mikl->oikl", wb[:, :, i, j], wa)
            rows = slice(i * hop[0], i * hop[0] + reach[0] + 1, a.dilation[0])
            cols = slice(j * hop[1], j * hop[1] + reach[1] + 1, a.dilation[1])
            out[:, :, rows, cols] += tap
    return ConvLin(
        out,
        a.in_shape,
        (a.stride[0] * b.stride[0], a.stride[1] * b.stride[1]),
        (
            a.padding[0] + b.padding[0] * a.stride[0],
            a.padding[1] + b.padding[1] * a.stride[1],
        ),
    )


def in_size(m: Linear) -> int:
    return m.weight.shape[1] if isinstance(m, DenseLin) else size(_in_shape(m))


def _in_shape(m: ConvLin | DiagLin) -> Shape:
    return m.in_shape if isinstance(m, ConvLin) else m.shape


def _as_matrix(b: Linear, a: Linear, where: str) -> DenseLin:
    rows, columns = size(b.out_shape), in_size(a)
    if rows * columns > DENSE_LIMIT:
        raise UnsupportedError(
            f"lowering: '{where}' follows another linear map without a neuron between them, and the "
            f"two make no convolution; as a matrix they would have {rows} x {columns} entries "
            f"({DENSE_LIMIT} allowed). Put a neuron between them, or remove the padding"
        )
    if isinstance(b, DenseLin):
        return DenseLin(a.transposed(b.weight).reshape(rows, columns))
    eye = np.eye(columns)
    return DenseLin(b.apply(a.apply(eye)).reshape(columns, rows).T)


def add_maps(a: Linear, b: Linear) -> Linear | None:
    """a + b as one map where both have one geometry, else None."""
    if isinstance(a, DiagLin) and isinstance(b, DiagLin) and a.shape == b.shape:
        return DiagLin(a.full + b.full, a.shape)
    if isinstance(a, DenseLin) and isinstance(b, DenseLin):
        return DenseLin(a.weight + b.weight)
    if isinstance(a, ConvLin) and isinstance(b, ConvLin):
        geometry = ("in_shape", "stride", "padding", "dilation", "groups")
        same = all(getattr(a, g) == getattr(b, g) for g in geometry)
        if same and a.weight.shape == b.weight.shape:
            return replace(a, weight=a.weight + b.weight)
    return None
