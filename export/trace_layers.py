"""Layers as nodes: each function takes torch's own arguments and returns a node without a name,
or a sentence that says why the graph has no word for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ranvier.export.nodes import (
    Conv,
    Dense,
    Flatten,
    Node,
    Norm,
    Pool,
    Shape,
    Upsample,
)
from ranvier.export.trace_values import array

if TYPE_CHECKING:
    from torch import nn

Made: TypeAlias = "list[Node] | str"  # nodes in a row (none: the value as it is), or a refusal


def pair(value: Any, n: int) -> tuple[int, ...]:
    """A torch size argument as n integers."""
    if isinstance(value, (tuple, list)):
        return tuple(int(v) for v in value) * (n if len(value) == 1 else 1)
    return (int(value),) * n


def dense(weight: Any, bias: Any = None) -> Made:
    return [Dense(name="", weight=array(weight), bias=None if bias is None else array(bias))]


def conv(
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Made:
    """A convolution; `padding` also "same" or "valid", as torch pads: the odd one at the end."""
    kernel = array(weight)
    n = kernel.ndim - 2
    if n not in (1, 2):
        return f"a convolution over {n} axes; 1 and 2 are known"
    steps, wide = pair(stride, n), pair(dilation, n)
    if padding == "same":
        pads = []
        for axis in range(n):
            kernel, wide, pad = _same(kernel, wide, axis)
            pads.append(pad)
    else:
        pads = list(pair(0 if padding == "valid" else padding, n))
    return [
        Conv(
            name="",
            weight=kernel,
            bias=None if bias is None else array(bias),
            stride=steps,
            padding=tuple(pads),
            dilation=wide,
            groups=int(groups),
        )
    ]


def _same(
    kernel: np.ndarray, dilation: tuple[int, ...], axis: int
) -> tuple[np.ndarray, tuple[int, ...], int]:
    """(kernel, dilation, padding) along `axis` with equal padding on both sides.

    Where torch pads one more at the end, a zero in front of the kernel makes up for it.
    """
    place, d, k = axis + 2, dilation[axis], kernel.shape[axis + 2]
    total = d * (k - 1)
    if total % 2 == 0:
        return kernel, dilation, total // 2
    shape = list(kernel.shape)
    shape[place] = total + 2  # the kernel spread out, and a zero in front
    spread = np.zeros(shape, kernel.dtype)
    taps: list[Any] = [slice(None)] * kernel.ndim
    taps[place] = slice(1, None, d)
    spread[tuple(taps)] = kernel
    wide = tuple(1 if i == axis else w for i, w in enumerate(dilation))
    return spread, wide, total // 2 + 1


def crop(shape: Shape, spans: list[range]) -> Made:
    """Some of the elements, in order and evenly spaced: a linear map of zeros and ones."""
    if len(shape) not in (1, 2, 3) or any(r.step < 1 for r in spans):
        return f"a slice of {shape}"
    n = len(shape) - 1
    chosen = np.zeros((len(spans[0]), shape[0], *[1] * n), np.float32)
    chosen[np.arange(len(spans[0])), list(spans[0])] = 1
    if n == 0:
        return dense_of(chosen)
    made: list[Node] = []
    if len(spans[0]) != shape[0]:
        made.append(
            Conv(name="", weight=chosen, stride=(1,) * n, padding=(0,) * n, dilation=(1,) * n)
        )
    sides = [
        (r.start, length - 1 - r[-1], r.step)
        for r, length in zip(spans[1:], shape[1:], strict=True)
    ]
    if any(side != (0, 0, 1) for side in sides):
        channels = len(spans[0])
        kernel = np.zeros((channels, 1, *[a + b + 1 for a, b, _ in sides]), np.float32)
        place: Any = (slice(None), 0, *[a for a, _, _ in sides])
        kernel[place] = 1
        made.append(
            Conv(
                name="",
                weight=kernel,
                stride=tuple(s for _, _, s in sides),
                padding=(0,) * n,
                dilation=(1,) * n,
                groups=channels,
            )
        )
    return made


def dense_of(weight: np.ndarray) -> Made:
    return [Dense(name="", weight=weight)]


def norm(mean: Any, var: Any, gamma: Any, beta: Any, eps: float) -> Made:
    if mean is None or var is None:
        return "batch normalization without running statistics depends on the batch"
    n = len(mean)
    return [
        Norm(
            name="",
            mean=array(mean),
            var=array(var),
            gamma=np.ones(n, np.float32) if gamma is None else array(gamma),
            beta=np.zeros(n, np.float32) if beta is None else array(beta),
            eps=float(eps),
        )
    ]


def pool(
    op: Any, shape: Shape, kernel: Any, stride: Any = None, padding: Any = 0, **more: Any
) -> Made:
    """avg or max pooling on samples of `shape`; `more` as torch names it."""
    n = len(shape) - 1
    size = pair(kernel, n)
    steps = size if stride is None or stride == () or stride == [] else pair(stride, n)
    pads = pair(padding, n)
    if any(d != 1 for d in pair(more.get("dilation", 1), n)):
        return "pooling with dilation"
    if more.get("return_indices"):
        return "pooling that returns indices"
    if any(pads) and not more.get("count_include_pad", True):
        return "average pooling with padding that it does not count"
    if more.get("divisor_override"):
        return "average pooling with a divisor of its own"
    if more.get("ceil_mode"):
        rests = zip(shape[1:], size, steps, pads, strict=True)
        if any((length + 2 * p - k) % s for length, k, s, p in rests):
            return "pooling with ceil_mode whose last window sticks out"
    return [Pool(name="", op=op, kernel=size, stride=steps, padding=pads)]


def adaptive(op: Any, shape: Shape, output_size: Any) -> Made:
    """Adaptive pooling, where the output divides the input."""
    n = len(shape) - 1
    given = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * n
    sizes = [full if s is None else int(s) for s, full in zip(given, shape[1:], strict=True)]
    if any(full % s for s, full in zip(sizes, shape[1:], strict=True)):
        return f"adaptive pooling of {shape[1:]} to {tuple(sizes)}, which does not divide it"
    kernel = tuple(full // s for s, full in zip(sizes, shape[1:], strict=True))
    return [Pool(name="", op=op, kernel=kernel, stride=kernel, padding=(0,) * n)]


def upsample(shape: Shape, out: Shape, mode: str) -> Made:
    if not mode.startswith("nearest"):
        return f"interpolation '{mode}'; nearest is known"
    if any(o % s for o, s in zip(out[1:], shape[1:], strict=True)):
        return f"upsampling of {shape[1:]} to {out[1:]}, which is no whole factor"
    return [
        Upsample(name="", factor=tuple(o // s for o, s in zip(out[1:], shape[1:], strict=True)))
    ]


def merging(shape: Shape, out: Shape) -> Made:
    """The Flatten nodes that lead from `shape` to `out`, where merging neighbours does."""
    groups = _merged(shape, out)
    if groups is None:
        return f"a reshape of {shape} to {out}, which does more than merge neighbouring axes"
    made: list[Node] = []
    for place, length in reversed(list(enumerate(groups))):
        if length > 1:
            start = sum(groups[:place])
            made.append(Flatten(name="", start=start, end=start + length - 1))
    return made


def _merged(shape: Shape, out: Shape) -> list[int] | None:
    """How many axes of `shape` make up each axis of `out`; None where that does not work."""
    if not shape or not out:
        return [] if shape == out else None
    groups, i = [], 0
    for place, size in enumerate(out):
        n, product = 0, 1
        last = place == len(out) - 1
        while i < len(shape) and (n == 0 or product < size or (last and shape[i] == 1)):
            product *= shape[i]
            i, n = i + 1, n + 1
        if product != size or n == 0:
            return None
        groups.append(n)
    return groups if i == len(shape) else None


def module_nodes(module: nn.Module, shape: Shape, out: Shape) -> Made | None:
    """The nodes of a leaf module on samples of `shape`; None where its class is unknown."""
    from torch import nn

    m: Any = module
    if isinstance(m, nn.Linear):
        return dense(m.weight, m.bias)
    if isinstance(m, (nn.Conv1d, nn.Conv2d)):
        if m.padding_mode != "zeros" and m.padding not in (0, "valid") and any(pads(m)):
            return f"padding_mode '{m.padding_mode}'; zeros is known"
        return conv(m.weight, m.bias, m.stride, m.padding, m.dilation, m.groups)
    if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
        gamma = getattr(m, "effective_weight", m.weight)
        return norm(m.running_mean, m.running_var, gamma, m.bias, m.eps)
    if isinstance(m, (nn.AvgPool1d, nn.AvgPool2d)):
        override = getattr(m, "divisor_override", None)
        return pool(
            "avg",
            shape,
            m.kernel_size,
            m.stride,
            m.padding,
            ceil_mode=m.ceil_mode,
            count_include_pad=m.count_include_pad,
            divisor_override=override,
        )
    if isinstance(m, (nn.MaxPool1d, nn.MaxPool2d)):
        options = {k: getattr(m, k) for k in ("dilation", "ceil_mode", "return_indices")}
        return pool("max", shape, m.kernel_size, m.stride, m.padding, **options)
    if isinstance(m, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)):
        return adaptive("avg", shape, m.output_size)
    if isinstance(m, (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)):
        if m.return_indices:
            return "pooling that returns indices"
        return adaptive("max", shape, m.output_size)
    if isinstance(m, nn.Upsample):
        return upsample(shape, out, m.mode)
    if isinstance(m, (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)):
        return []
    return None


def pads(module: Any) -> tuple[int, ...]:
    return (1,) if isinstance(module.padding, str) else pair(module.padding, 1)


LEAVES = (
    "Linear Conv1d Conv2d BatchNorm1d BatchNorm2d AvgPool1d AvgPool2d MaxPool1d MaxPool2d "
    "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveMaxPool1d AdaptiveMaxPool2d Upsample "
    "UpsamplingNearest2d Identity Dropout Dropout1d Dropout2d AlphaDropout"
).split()
