"""Arithmetic, logic and layers: what torch's functions and operators mean to a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ranvier.export import trace_layers as layers
from ranvier.export.neurons import Threshold
from ranvier.export.nodes import Join, JoinOp, Neuron, Scale
from ranvier.export.trace_joins import affine, join
from ranvier.export.trace_ops import (
    HANDLERS,
    Answer,
    Handler,
    apply_nodes,
    constant,
    handles,
    is_binary,
    known,
    operand,
)
from ranvier.export.trace_record import Recorder
from ranvier.export.trace_values import At, Final, Sum, Value

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
    return None if narrows and not is_binary(rec, x) else rec.value(x)


@handles("bool", "int", "long", "byte")
def same_spikes(rec: Recorder, args: Any, kwargs: Any, out: Any) -> Answer:
    return rec.value(args[0]) if is_binary(rec, args[0]) else None


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
        if spikes_only and not (is_binary(rec, a) and is_binary(rec, b)):
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
    if not is_binary(rec, args[0]):
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
