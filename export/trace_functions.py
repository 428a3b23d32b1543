"""The handlers: one for each torch function or operator that the graph has a word for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ranvier.export import trace_layers as layers
from ranvier.export.neurons import Threshold
from ranvier.export.nodes import Join, JoinOp, Neuron, Pool, Scale, Subsample
from ranvier.export.trace_ops import (
    DONE,
    Answer,
    Handler,
    affine,
    align,
    apply_nodes,
    constant,
    join,
    operand,
    reshape,
)
from ranvier.export.trace_record import Recorder, TimeAxis
from ranvier.export.trace_values import At, Final, Series, Sum, Value

HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def known(rec: Recorder, x: Any) -> bool:
    return rec.value(x) is not None


# the value itself


@handles(
    *"clone detach contiguous float double half to type type_as cpu cuda requires_grad alias "
    "positive data dropout dropout1d dropout2d alpha_dropout feature_dropout view_as".split()
)
def same(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not known(rec, x) or out.shape != x.shape:
        return None
    narrows = x.is_floating_point() and not out.is_floating_point()
    return None if narrows and not _binary(rec, x) else rec.value(x)


@handles("bool", "int", "long", "byte")
def same_spikes(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    return rec.value(args[0]) if _binary(rec, args[0]) else None


def _binary(rec: Recorder, x: Any) -> bool:
    value = rec.value(x)
    return value is not None and value.port == "out" and rec.builder.is_binary(value.node)


# arithmetic


@handles("add")
def add(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    a, b = _two(args, kwargs)
    alpha = kwargs.get("alpha", 1)
    if known(rec, a) and known(rec, b) and alpha == 1:
        summed = _over_steps(rec, rec.value(a), rec.value(b))
        if summed is not None:
            return summed
        return join(rec, "add", a, b, rec.name("add")) if a.shape == b.shape else None
    return _affine_two(rec, a, b, 1.0, float(alpha), out, "add")


@handles("sub")
def sub(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    a, b = _two(args, kwargs)
    return _affine_two(rec, a, b, 1.0, -float(kwargs.get("alpha", 1)), out, "sub")


@handles("rsub")
def rsub(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    b, a = _two(args, kwargs)
    return _affine_two(rec, a, b, 1.0, -float(kwargs.get("alpha", 1)), out, "sub")


def _two(args: Any, kwargs: Any) -> tuple[Any, Any]:
    a = args[0] if args else kwargs["input"]
    return a, (args[1] if len(args) > 1 else kwargs["other"])


def _affine_two(
    rec: Recorder, a: Any, b: Any, ka: float, kb: float, out: Tensor, kind: str
) -> Answer:
    """ka * a + kb * b, where either may be a constant."""
    if known(rec, a) and known(rec, b):
        if a.shape != b.shape:
            return None
        value = operand(rec, rec.value(b))
        assert value is not None
        name = rec.name(kind)
        minus = Scale(name=name, inputs=(value.node,), scale=np.asarray(kb), source=rec.line())
        helper = b.clone()
        rec.know(helper, replace(value, node=rec.builder.add(minus)))
        return join(rec, "add", a, helper, name)
    x, c, kx, kc = (a, b, ka, kb) if known(rec, a) else (b, a, kb, ka)
    if out.shape != x.shape:
        return None
    shift = constant(rec, x, c)
    return None if shift is None else affine(rec, x, np.asarray(kx), kc * shift, kind)


def _over_steps(rec: Recorder, a: Value | None, b: Value | None) -> Sum | None:
    """The sum of one node's values at different steps."""
    if isinstance(b, Sum) and isinstance(a, At):
        a, b = b, a
    if not isinstance(b, At) or b.t is None or not isinstance(a, (At, Sum)):
        return None
    if a.node != b.node or a.port != b.port:
        return None
    if isinstance(a, At):
        both = a.t is not None and a.t != b.t
        return Sum(a.node, frozenset({a.t, b.t}), port=a.port) if both else None  # type: ignore[arg-type]
    fresh = b.t not in a.steps and a.scale == 1.0
    return replace(a, steps=a.steps | {b.t}) if fresh else None


@handles("mul")
def mul(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    a, b = _two(args, kwargs)
    if known(rec, a) and known(rec, b):
        return join(rec, "mul", a, b, rec.name("mul")) if a.shape == b.shape else None
    x, c = (a, b) if known(rec, a) else (b, a)
    if out.shape != x.shape:
        return None
    scale = constant(rec, x, c)
    return None if scale is None else affine(rec, x, scale, None, "mul")


@handles("div")
def div(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    a, b = _two(args, kwargs)
    if known(rec, b) or kwargs.get("rounding_mode") or out.shape != a.shape:
        return None
    divisor = constant(rec, a, b)
    if divisor is None:
        return None
    return affine(rec, a, 1.0 / np.asarray(divisor, np.float64), None, "div")


@handles("neg")
def neg(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    return affine(rec, args[0], np.asarray(-1.0), None, "neg")


# logic


def _logic(op: JoinOp, spikes_only: bool) -> Handler:
    def handler(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
        a, b = _two(args, kwargs)
        if not (known(rec, a) and known(rec, b)) or a.shape != b.shape:
            return None
        if spikes_only and not (_binary(rec, a) and _binary(rec, b)):
            return None
        return join(rec, op, a, b, rec.name("or" if op == "max" and not spikes_only else op))

    return handler


HANDLERS["logical_or"] = _logic("or", True)
HANDLERS["logical_and"] = _logic("and", True)
HANDLERS["minimum"] = HANDLERS["fmin"] = _logic("and", True)


@handles("min")
def minimum(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    two = len(args) > 1 and isinstance(args[1], Tensor)
    return HANDLERS["minimum"](rec, args, kwargs, out) if two else None


HANDLERS["maximum"] = HANDLERS["fmax"] = _logic("max", False)


@handles("logical_not")
def logical_not(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    if not _binary(rec, args[0]):
        return None
    return affine(rec, args[0], np.asarray(-1.0), np.asarray(1.0), "not")


def _compare(strict: bool) -> Handler:
    def handler(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
        a, b = _two(args, kwargs)
        if not known(rec, a) or known(rec, b) or out.shape != a.shape:
            return None
        threshold = constant(rec, a, b)
        if threshold is None:
            return None
        level: Any = float(threshold) if threshold.ndim == 0 else threshold
        model = Threshold(v_threshold=level, strict=strict)
        return _stateless_neuron(rec, a, model)

    return handler


def _stateless_neuron(rec: Recorder, x: Tensor, model: Threshold) -> Answer:
    value = operand(rec, rec.value(x))
    if value is None or isinstance(value, Final):
        return None
    node = Neuron(name=rec.name("fires"), inputs=(value.node,), model=model, source=rec.line())
    return replace(value, node=rec.builder.add(node))


HANDLERS["gt"], HANDLERS["ge"] = _compare(True), _compare(False)


@handles("clamp", "clip", "clamp_max")
def clamp(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    """A sum of spikes cut at 1 is their OR."""
    bounds = {**dict(zip(("min", "max"), args[1:], strict=False)), **kwargs}
    if len(args) == 2 and not kwargs and bounds.get("max") is None:
        bounds = {"max": args[1]}  # clamp_max(x, 1)
    value = rec.value(args[0])
    if bounds.get("max") != 1 or bounds.get("min") not in (None, 0) or not isinstance(value, At):
        return None
    node = rec.builder.nodes[value.node]
    if not isinstance(node, Join) or node.op != "add" or value.port != "out":
        return None
    if not all(rec.builder.is_binary(i) for i in node.inputs):
        return None
    made = Join(name=rec.name("or"), inputs=node.inputs, op="or", source=rec.line())
    return replace(value, node=rec.builder.add(made))


# layers


def _layer(build: Callable[..., layers.Made], constants: tuple[str, ...]) -> Handler:
    """A handler for f(x, *parameters): `build` gets x's sample shape and torch's arguments."""

    def handler(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
        x = args[0] if args else kwargs.pop("input", None)
        more = list(args[1:])
        rest = {k: v for k, v in kwargs.items() if k != "input"}
        if not known(rec, x) or any(known(rec, p) for p in (*more, *rest.values())):
            return None
        shape, after = _shapes(rec, x, out)
        made = build(shape, after, **dict(zip(constants, more, strict=False)), **rest)
        name = rec.name(build.__name__.strip("_"))
        return apply_nodes(rec, made, x, name) if isinstance(made, list) else None

    return handler


def _shapes(rec: Recorder, x: Tensor, out: Any) -> tuple[Any, Any]:
    value = rec.value(x)
    assert value is not None
    shape = rec.builder.shapes[value.node]
    first = out[0] if isinstance(out, tuple) else out
    return shape, tuple(first.shape)[x.ndim - len(shape) :]


def linear(shape: Any, after: Any, weight: Any, bias: Any = None) -> layers.Made:
    return layers.dense(weight, bias)


def conv(shape: Any, after: Any, weight: Any, bias: Any = None, *more: Any, **k: Any) -> Any:
    return layers.conv(weight, bias, *more, **k)


def batch_norm(
    shape: Any,
    after: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **_: Any,
) -> layers.Made:
    if training:
        return "batch normalization with the batch's own statistics"
    return layers.norm(running_mean, running_var, weight, bias, eps)


def avg_pool(shape: Any, after: Any, kernel_size: Any, **k: Any) -> layers.Made:
    return layers.pool("avg", shape, kernel_size, k.pop("stride", None), k.pop("padding", 0), **k)


def max_pool(shape: Any, after: Any, kernel_size: Any, **k: Any) -> layers.Made:
    return layers.pool("max", shape, kernel_size, k.pop("stride", None), k.pop("padding", 0), **k)


def adaptive_avg_pool(shape: Any, after: Any, output_size: Any) -> layers.Made:
    return layers.adaptive("avg", shape, output_size)


def adaptive_max_pool(shape: Any, after: Any, output_size: Any, **k: Any) -> layers.Made:
    return "indices" if k.get("return_indices") else layers.adaptive("max", shape, output_size)


def upsample(shape: Any, after: Any, *_: Any, mode: str = "nearest", **k: Any) -> layers.Made:
    return layers.upsample(shape, after, mode)


_CONV = ("weight", "bias", "stride", "padding", "dilation", "groups")
_AVG = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_BN = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
HANDLERS["linear"] = _layer(linear, ("weight", "bias"))
HANDLERS["batch_norm"] = _layer(batch_norm, _BN)
HANDLERS["interpolate"] = _layer(upsample, ("size", "scale_factor", "mode"))
for _n in (1, 2):
    HANDLERS[f"conv{_n}d"] = _layer(conv, _CONV)
    HANDLERS[f"avg_pool{_n}d"] = _layer(avg_pool, _AVG)
    HANDLERS[f"max_pool{_n}d"] = _layer(max_pool, _MAX)
    HANDLERS[f"adaptive_avg_pool{_n}d"] = _layer(adaptive_avg_pool, ("output_size",))
    HANDLERS[f"adaptive_max_pool{_n}d"] = _layer(adaptive_max_pool, ("output_size",))


@handles("matmul")
def matmul(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    """x @ W with a constant matrix W."""
    x, w = _two(args, kwargs)
    if not known(rec, x) or known(rec, w) or w.ndim != 2:
        return None
    made = layers.dense(w.T)
    return apply_nodes(rec, made, x, rec.name("matmul")) if isinstance(made, list) else None


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


# shapes


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
    place = index if isinstance(index, tuple) else (index,)
    if isinstance(value, At) and value.t is None and rec.can_restart:
        if _whole(place[0]):
            raise TimeAxis(0)
        if len(place) > 1 and _full(place[0]) and _whole(place[1]):
            raise TimeAxis(1)
    if isinstance(value, Series) and value.layout in ("time", "batch"):
        return _pick_steps(rec, value, place, x)
    return _subsample(rec, x, place) if isinstance(value, At) else None


def _whole(i: Any) -> bool:
    return isinstance(i, (int, np.integer)) and not isinstance(i, bool)


def _full(s: Any) -> bool:
    return isinstance(s, slice) and s == slice(None)


def _pick_steps(rec: Recorder, value: Series, place: tuple[Any, ...], x: Tensor) -> Answer:
    axis = 0 if value.layout == "time" else 1
    if Ellipsis in [p for p in place if p is Ellipsis] or len(place) <= axis:
        return None
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
    if Ellipsis in [p for p in place if p is Ellipsis]:
        i = next(k for k, p in enumerate(place) if p is Ellipsis)
        fill = x.ndim - (len(place) - 1)
        place = (*place[:i], *[slice(None)] * fill, *place[i + 1 :])
    place = (*place, *[slice(None)] * (x.ndim - len(place)))
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
