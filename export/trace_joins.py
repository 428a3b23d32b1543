"""Sums, products and logic: nodes that join tensors, and the patterns that are OR, AND, IAND."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ranvier.export.nodes import Join, JoinOp, Scale
from ranvier.export.trace_ops import align, apply_nodes, operand
from ranvier.export.trace_record import Recorder
from ranvier.export.trace_values import At, Final, Sum, Value


def affine(rec: Recorder, x: Tensor, scale: Any, shift: Any, kind: str) -> Value:
    """scale * x + shift, shift None for none; nothing where that changes nothing."""
    value = rec.value(x)
    assert value is not None
    no_shift = shift is None or not np.any(shift)
    if no_shift and np.all(scale == 1):
        return value
    if no_shift and isinstance(value, Sum) and scale.ndim == 0:
        return replace(value, scale=value.scale * float(scale))
    x, scale = _through_sign(rec, x, scale)
    node = Scale(name="", scale=scale, shift=None if no_shift else np.asarray(shift))
    if not no_shift and _negates(node):
        other = _or_of_complements(rec, x)
        if other is not None:
            return other
    return apply_nodes(rec, [node], x, rec.name(kind))


def _through_sign(rec: Recorder, x: Tensor, scale: Any) -> tuple[Tensor, Any]:
    """What -x stands on, and the scale with its sign turned, which is exact."""
    value = rec.value(x)
    node = rec.builder.nodes[value.node] if isinstance(value, At) else None
    if not isinstance(node, Scale) or node.shift is not None or np.any(node.scale != -1):
        return x, scale
    assert value is not None
    inner = x.clone()
    rec.know(inner, replace(value, node=node.inputs[0]))
    return inner, -scale


def _negates(node: Scale) -> bool:
    return bool(np.all(node.scale == -1) and np.all(node.shift == 1))


def _or_of_complements(rec: Recorder, x: Tensor) -> Value | None:
    """1 - (1 - a)(1 - s) is a OR s."""
    value = operand(rec, rec.value(x))
    if value is None:
        return None
    node = rec.builder.nodes[value.node]
    if not isinstance(node, Join) or node.op not in ("and", "iand") or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    kept = first if node.op == "iand" else rec.builder.complement(first)
    other = rec.builder.complement(second)
    if kept is None or other is None:
        return None
    name = rec.builder.add(
        Join(name=rec.name("or"), inputs=(kept, other), op="or", source=rec.line())
    )
    return replace(value, node=name)


def join(rec: Recorder, op: JoinOp, a: Tensor, b: Tensor, name: str) -> Value:
    """A Join of two known tensors of one shape; of spikes where it says so, else by arithmetic."""
    first, second = operand(rec, rec.value(a)), operand(rec, rec.value(b))
    assert first is not None and second is not None
    (x, y), made = align(rec, [first, second])
    if isinstance(first, Final) and not (op == "add" and first.how in ("mean", "sum", "last")):
        raise rec.refuse(f"'{op}' joins values that are reduced over time")
    build, source = rec.builder, rec.line()

    def node(kind: JoinOp, *inputs: str) -> str:
        return build.add(Join(name=name, inputs=inputs, op=kind, source=source))

    def negated(of: str, shift: float | None = None) -> str:
        more = None if shift is None else np.asarray(shift)
        minus = Scale(
            name=f"{name}.minus", inputs=(of,), scale=np.asarray(-1.0), shift=more, source=source
        )
        return build.add(minus)

    binary = build.is_binary(x) and build.is_binary(y)
    if op == "add":
        return made(_or_pattern(rec, [x, y], name) or node("add", x, y))
    if op == "mul" and binary:
        if build.complement(x) and not build.complement(y):
            return made(node("iand", build.complement(x) or x, y))
        if build.complement(y):
            return made(node("iand", build.complement(y) or y, x))
        return made(node("and", x, y))
    if binary or op in ("mul", "max"):
        return made(node("or" if op == "max" and binary else op, x, y))
    product = node("mul", negated(x, 1.0) if op == "iand" else x, y)
    if op in ("and", "iand"):
        return made(product)
    return made(node("add", node("add", x, y), negated(product)))


def _terms(rec: Recorder, node: str, sign: int = 1) -> list[tuple[int, str]]:
    """A node as a signed sum of nodes."""
    made = rec.builder.nodes[node]
    if isinstance(made, Join) and made.op == "add":
        return [t for i in made.inputs for t in _terms(rec, i, sign)]
    if isinstance(made, Scale) and made.shift is None and np.all(made.scale == -1):
        return _terms(rec, made.inputs[0], -sign)
    return [(sign, node)]


def _or_pattern(rec: Recorder, inputs: list[str], name: str) -> str | None:
    """a + s - a s, in any order, as one OR."""
    terms = [t for i in inputs for t in _terms(rec, i)]
    minus = [n for sign, n in terms if sign < 0]
    plus = sorted(n for sign, n in terms if sign > 0)
    if len(minus) != 1 or len(plus) != 2:
        return None
    node = rec.builder.nodes[minus[0]]
    if not isinstance(node, Join) or node.op != "and" or sorted(node.inputs) != plus:
        return None
    return rec.builder.add(Join(name=name, inputs=node.inputs, op="or", source=rec.line()))
