"""Shapes, indices, time and reductions while a network is traced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ranvier.export import trace_layers as layers
from ranvier.export.nodes import Join, Pool, Subsample
from ranvier.export.trace_ops import (
    DONE,
    HANDLERS,
    Answer,
    Handler,
    align,
    apply_nodes,
    handles,
    known,
    operand,
)
from ranvier.export.trace_record import Recorder, TimeAxis
from ranvier.export.trace_values import At, Final, Series, Sum, Value


def reshape(rec: Recorder, x: Tensor, out: Tensor, name: str) -> Answer:
    """view, flatten, squeeze ...: merging axes of a sample, or time with the batch."""
    value = rec.value(x)
    assert value is not None
    shape = rec.builder.shapes[value.node]
    if isinstance(value, Series):
        return _reshape_series(rec, value, x, out, name)
    if tuple(out.shape) == tuple(x.shape):
        return value
    if out.ndim == x.ndim + 1 and out.shape[0] == 1 and out.shape[1:] == x.shape:
        if isinstance(value, At) and value.t is not None:
            return Series(value.node, (value.t,), value.port)
    if out.shape[:1] != x.shape[:1]:
        if isinstance(value, At) and value.t is None and rec.can_restart:
            raise TimeAxis(0)  # time folded into the batch
        return None
    made = layers.merging(shape, tuple(out.shape[1:]))
    return apply_nodes(rec, made, x, name) if isinstance(made, list) else None


def _reshape_series(rec: Recorder, value: Series, x: Tensor, out: Tensor, name: str) -> Answer:
    n = len(value.steps)
    folded = value.layout == "folded"
    batch = x.shape[0] // n if folded else x.shape[1 if value.layout == "time" else 0]
    lead = tuple(x.shape[: 1 if folded else 2])
    unfolds = folded and tuple(out.shape[:2]) == (n, batch)
    if tuple(out.shape[: len(lead)]) == lead and not (unfolds and out.ndim > x.ndim):
        layout, rest = value.layout, tuple(out.shape[len(lead) :])
    elif unfolds:
        layout, rest = "time", tuple(out.shape[2:])
    elif out.shape[0] == n * batch and value.layout == "time":
        layout, rest = "folded", tuple(out.shape[1:])
    else:
        return None
    made = layers.merging(rec.builder.shapes[value.node], rest)
    if not isinstance(made, list):
        return None
    moved = apply_nodes(rec, made, x, name)
    return replace(moved, layout=layout) if isinstance(moved, Series) else None


@handles("pad")
def pad(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    """Zero channels before and after."""
    options = {**dict(zip(("input", "pad", "mode", "value"), args, strict=False)), **kwargs}
    x, widths = options["input"], list(options["pad"])
    value = rec.value(x)
    if value is None or options.get("mode", "constant") != "constant" or options.get("value"):
        return None
    n = len(rec.builder.shapes[value.node]) - 1
    if not any(widths):
        return value
    if n < 1 or len(widths) != 2 * n + 2 or any(widths[:-2]) or min(widths) < 0:
        return None
    return _padded(rec, x, (int(widths[-2]), int(widths[-1])), n)


def _padded(rec: Recorder, x: Tensor, channels: tuple[int, int], n: int) -> Answer:
    """Zero channels around x; one Subsample with the subsampling before it."""
    value = operand(rec, rec.value(x))
    assert value is not None
    node = rec.builder.nodes[value.node]
    if isinstance(node, Subsample) and node.pad_channels == (0, 0):
        made = replace(node, pad_channels=channels, name=rec.name("shortcut"))
        return replace(value, node=rec.builder.add(made))
    only = Subsample(name="", stride=(1,) * n, pad_channels=channels)
    return apply_nodes(rec, [only], x, rec.name("shortcut"))


@handles(*"flatten view reshape squeeze unsqueeze unflatten ravel".split())
def shaped(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    return reshape(rec, args[0] if args else kwargs["input"], out, rec.name("flatten"))


@handles("permute", "transpose", "movedim")
def permute(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    """Time and batch swapped; all else is no chip's."""
    x = args[0]
    swap = list(range(x.ndim))
    swap[:2] = [1, 0]
    given = args[1:] or tuple(kwargs.values())
    dims = list(given[0]) if given and isinstance(given[0], (tuple, list)) else list(given)
    dims = [d % x.ndim for d in dims]
    swaps = sorted(dims) == [0, 1] if len(dims) == 2 else dims == swap
    value = rec.value(x)
    if not swaps or value is None:
        return _last_to_front(rec, x, dims)
    if isinstance(value, Series) and value.layout in ("time", "batch"):
        return replace(value, layout="batch" if value.layout == "time" else "time")
    if isinstance(value, At) and value.t is None and value.node == rec.entry.name:
        raise TimeAxis(1)
    return None


def _last_to_front(rec: Recorder, x: Tensor, dims: list[int]) -> Answer:
    """The columns of an image as time steps."""
    value = rec.value(x)
    if dims != [x.ndim - 1, *range(x.ndim - 1)]:
        return None
    if isinstance(value, Series) and value.layout == "last":
        return replace(value, layout="time")
    if isinstance(value, At) and value.node == rec.entry.name and rec.can_restart:
        raise TimeAxis(x.ndim - 1)
    return None


@handles("getitem")
def getitem(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    x, index = args
    value = rec.value(x)
    place = _whole_index(x, index)
    if isinstance(value, At) and value.t is None and rec.can_restart:
        picked = [i for i, p in enumerate(place) if _whole(p)]
        rest = all(_full(p) for p in place if not _whole(p))
        if len(picked) == 1 and rest and picked[0] in (0, 1, x.ndim - 1):
            raise TimeAxis(picked[0])
    if isinstance(value, Series) and value.layout != "folded":
        return _pick_steps(value, place, x)
    return _subsample(rec, x, place) if isinstance(value, At) else None


def _whole_index(x: Tensor, index: Any) -> tuple[Any, ...]:
    """The index with an entry for each axis."""
    place = index if isinstance(index, tuple) else (index,)
    dots = [i for i, p in enumerate(place) if p is Ellipsis]
    at = dots[0] if dots else len(place)
    fill = [slice(None)] * (x.ndim - len(place) + len(dots))
    return (*place[:at], *fill, *place[at + len(dots) :])


def _whole(i: Any) -> bool:
    return isinstance(i, (int, np.integer)) and not isinstance(i, bool)


def _full(s: Any) -> bool:
    return isinstance(s, slice) and s == slice(None)


def _pick_steps(value: Series, place: tuple[Any, ...], x: Tensor) -> Answer:
    axis = {"time": 0, "batch": 1}.get(value.layout, x.ndim - 1)
    rest = [p for i, p in enumerate(place) if i != axis]
    if not all(_full(p) for p in rest):
        return None
    pick = place[axis]
    if _whole(pick):
        return At(value.node, value.steps[int(pick)], value.port)
    if isinstance(pick, slice):
        return replace(value, steps=value.steps[pick])
    return None


def _subsample(rec: Recorder, x: Tensor, place: tuple[Any, ...]) -> Answer:
    """x[:, :, ::s, ::s]."""
    value = rec.value(x)
    assert value is not None
    n = x.ndim - 2
    if len(place) != x.ndim or not all(isinstance(p, slice) for p in place):
        return None
    spans = [range(size)[p] for p, size in zip(place, x.shape, strict=True)]
    if all(len(r) == size for r, size in zip(spans, x.shape, strict=True)):
        return value
    if len(spans[0]) != x.shape[0] or 0 in map(len, spans):
        return None
    steps = tuple(r.step for r in spans[2:])
    whole = all(len(range(s)[:: r.step]) == len(r) for r, s in zip(spans, x.shape, strict=True))
    if n >= 1 and whole and len(spans[1]) == x.shape[1] and all(r.start == 0 for r in spans):
        node = Subsample(name="", stride=steps)
        return apply_nodes(rec, [node], x, rec.name("shortcut"))
    crop = layers.crop(rec.builder.shapes[value.node], spans[1:])
    return apply_nodes(rec, crop, x, rec.name("crop")) if isinstance(crop, list) else None


def setitem(rec: Recorder, base: Tensor, index: Any, given: Any) -> Value | None:
    """record[t] = value, as for a tensor prepared before the loop."""
    value, before = rec.value(given), rec.value(base)
    if value is None and before is None:
        return None
    place = index if isinstance(index, tuple) else (index,)
    started = before is None or isinstance(before, Series)
    if not started or not isinstance(value, At) or not _whole(place[0]) or len(place) > 1:
        raise rec.refuse(
            "values are written into a part of a tensor", "collect them in a list and stack it"
        )
    t = int(place[0]) % base.shape[0]
    steps = before.steps if isinstance(before, Series) else ()
    if value.t not in (None, t) or t != len(steps):
        raise rec.refuse(f"the value of step {value.t} is written to place {t}")
    return Series(value.node, (*steps, t), value.port)


# time


@handles("unbind")
def unbind(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    x = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.ndim
    value = rec.value(x)
    if isinstance(value, At) and value.t is None and rec.can_restart and dim in (0, 1):
        raise TimeAxis(dim)
    if not isinstance(value, Series) or dim != {"time": 0, "batch": 1}.get(value.layout):
        return None
    for t, part in zip(value.steps, out, strict=True):
        rec.know(part, At(value.node, t, value.port))
    return DONE


@handles("stack")
def stack(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    parts = args[0] if args else kwargs["tensors"]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    series = _series_of(rec, [rec.value(p) for p in parts])
    if series is None or dim > 1:
        return None
    return replace(series, layout="time" if dim == 0 else "batch")


def _series_of(rec: Recorder, values: list[Value | None]) -> Series | None:
    """The values of one node at steps in a row; the first step may lack what lies before it."""
    ats = [v for v in values if isinstance(v, At)]
    if not ats or len(ats) != len(values):
        return None
    last = ats[-1]
    steps = tuple(i if v.t is None else v.t for i, v in enumerate(ats))
    follow = steps == tuple(range(steps[0], steps[0] + len(steps)))
    alike = all(v.node == last.node for v in ats[1:]) and all(v.port == last.port for v in ats)
    if not follow or not alike or (len(ats) == 1 and last.t is None):
        raise rec.refuse(
            "values of different layers, or not of all steps in order, are put together",
            "collect one value a step, in the order of time",
        )
    return Series(last.node, steps, last.port)


@handles("cat")
def cat(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    parts = list(args[0] if args else kwargs.get("tensors", ()))
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    values = [rec.value(p) for p in parts]
    if dim == 0:
        return _cat_steps(values)
    if any(v is None for v in values):
        return _cat_zeros(rec, parts, dim)
    ready = [v for v in (operand(rec, v) for v in values) if v is not None]
    nodes, made = align(rec, ready)
    first = ready[0]
    lead = 2 if isinstance(first, Series) and first.layout != "folded" else 1
    if isinstance(first, Final) or dim < lead:
        return None
    node = Join(
        name=rec.name("cat"), inputs=tuple(nodes), op="cat", axis=dim - lead, source=rec.line()
    )
    return made(rec.builder.add(node))


def _cat_steps(values: list[Value | None]) -> Answer:
    """Series of few steps, one after the other."""
    series = [v for v in values if isinstance(v, Series) and v.layout == "time"]
    if not series or len(series) != len(values):
        return None
    first = series[0]
    if any((s.node, s.port) != (first.node, first.port) for s in series):
        return None
    return replace(first, steps=tuple(t for s in series for t in s.steps))


def _cat_zeros(rec: Recorder, parts: list[Tensor], dim: int) -> Answer:
    """Zero channels before or behind one traced tensor."""
    at = [i for i, p in enumerate(parts) if known(rec, p)]
    if len(at) != 1 or dim != 1 or parts[at[0]].ndim < 3:
        return None
    others = [p for i, p in enumerate(parts) if i != at[0]]
    if any(bool((p != 0).any()) for p in others):
        return None
    front = sum(int(p.shape[1]) for p in parts[: at[0]])
    back = sum(int(p.shape[1]) for p in parts[at[0] + 1 :])
    return _padded(rec, parts[at[0]], (front, back), parts[at[0]].ndim - 2)


# reductions


def _dims(x: Tensor, args: Any, kwargs: Any) -> list[int] | None:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    if dim is None:
        return None
    return sorted(int(d) % x.ndim for d in (dim if isinstance(dim, (tuple, list)) else (dim,)))


def _reduction(op: str) -> Handler:
    def handler(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
        x = args[0] if args else kwargs["input"]
        if op == "max" and len(args) > 1 and isinstance(args[1], Tensor):
            return HANDLERS["maximum"](rec, args, kwargs, out)
        dims, value = _dims(x, args, kwargs), rec.value(x)
        keepdim = bool(kwargs.get("keepdim", len(args) > 2 and args[2]))
        if dims is None or value is None or kwargs.get("dtype"):
            return None
        result = out[0] if isinstance(out, tuple) else out
        if isinstance(value, Series) and value.layout != "folded":
            return _reduce_series(rec, op, value, x, dims, keepdim)
        if isinstance(out, tuple):
            return None
        return _reduce_space(rec, op, x, dims, tuple(result.shape))

    return handler


def _reduce_series(
    rec: Recorder, op: str, value: Series, x: Tensor, dims: list[int], keepdim: bool
) -> Answer:
    axis = 0 if value.layout == "time" else 1
    if dims != [axis] or keepdim:
        return None
    if op == "max":
        return Final(value.node, "max", value.port)
    scale = 1.0 / len(value.steps) if op == "mean" else 1.0
    return Sum(value.node, frozenset(value.steps), scale, value.port)


def _reduce_space(
    rec: Recorder, op: Any, x: Tensor, dims: list[int], out: tuple[int, ...]
) -> Answer:
    """mean, sum or max over axes of the image."""
    value = rec.value(x)
    assert value is not None
    shape = rec.builder.shapes[value.node]
    lead = x.ndim - len(shape)
    axes = [d - lead for d in dims]
    if min(axes) < 1 or len(shape) < 2:
        return None
    kernel = tuple(n if i in axes else 1 for i, n in enumerate(shape) if i > 0)
    pooled = (shape[0], *(n // k for n, k in zip(shape[1:], kernel, strict=True)))
    merged = layers.merging(pooled, out[lead:])
    if not isinstance(merged, list):
        return None
    window = Pool(name="", op="avg" if op == "mean" else op, kernel=kernel, stride=kernel)
    only = replace(window, padding=(0,) * len(kernel))
    return apply_nodes(rec, [only, *merged], x, rec.name(op))


HANDLERS["mean"], HANDLERS["sum"] = _reduction("mean"), _reduction("sum")
HANDLERS["amax"] = HANDLERS["max"] = _reduction("max")
