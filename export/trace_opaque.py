"""Calls that the graph has no word for: Opaque nodes that make the recorded call again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ranvier.export.nodes import Opaque
from ranvier.export.trace_ops import align, operand, tensors_in
from ranvier.export.trace_record import Recorder
from ranvier.export.trace_values import Final, Series, array, frozen


def opaque(
    rec: Recorder,
    kind: str,
    reason: str,
    call: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
    name: str,
    identity: Any,
) -> None:
    """Every tensor of `out` as an Opaque node that makes the recorded call again."""
    known = [x for x in tensors_in((args, kwargs)) if rec.value(x) is not None]
    values = [v for v in (operand(rec, rec.value(x)) for x in known) if v is not None]
    if any(isinstance(v, Final) for v in values):
        raise rec.refuse(
            f"{kind} stands after the reduction over time, for which the graph has no word",
            "return the value before it, and do the rest outside the module",
        )
    nodes, made = align(rec, values)
    over_time = isinstance(values[0], Series) and values[0].layout != "folded"
    lead = 2 if over_time else 1
    frozen = _frozen_call(rec, (args, kwargs), x=known)
    for i, result in enumerate(tensors_in(out)):
        if tuple(result.shape[:lead]) != tuple(known[0].shape[:lead]):
            shapes = f"{tuple(result.shape)} for {tuple(known[0].shape)}"
            what = f"{kind} gives {shapes}: it mixes samples or steps"
            rec.lose(result, rec.refuse(what, "keep [batch, ...] first"))
            continue
        node = Opaque(
            name=name,
            inputs=tuple(nodes),
            kind=kind,
            reason=reason,
            shape=tuple(result.shape[lead:]),
            function=_replay(rec, call, args, kwargs, i),
            source=rec.line(),
            meta={"over_time": True} if over_time else {},
        )
        key = ("opaque", kind, identity, tuple(nodes), frozen, i)
        rec.know(result, made(rec.builder.add(node, key)))


def _frozen_call(rec: Recorder, values: Any, x: list[Tensor]) -> Any:
    """The call's arguments as a key, without the traced tensors."""
    if isinstance(values, Tensor):
        return "traced" if rec.value(values) is not None else frozen(array(values), {})
    if isinstance(values, (tuple, list)):
        return tuple(_frozen_call(rec, v, x) for v in values)
    if isinstance(values, dict):
        return tuple((k, _frozen_call(rec, v, x)) for k, v in values.items())
    return repr(values)


def _replay(
    rec: Recorder, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], i: int
) -> Callable[..., Any]:
    """The recorded call on other tensors; its constants take their dtype and device."""
    traced = {
        id(x): n
        for n, x in enumerate(x for x in tensors_in((args, kwargs)) if rec.value(x) is not None)
    }

    def fill(value: Any, given: tuple[Tensor, ...]) -> Any:
        if isinstance(value, Tensor):
            if id(value) in traced:
                found = given[traced[id(value)]]
                return found if value.is_floating_point() else found.to(value.dtype)
            like = given[0]
            dtype = like.dtype if value.is_floating_point() else value.dtype
            return value.to(device=like.device, dtype=dtype)
        if isinstance(value, (tuple, list)):
            return type(value)(fill(v, given) for v in value)
        if isinstance(value, dict):
            return {k: fill(v, given) for k, v in value.items()}
        return value

    def run(*given: Tensor) -> Tensor:
        with torch.no_grad():
            out = call(*fill(args, given), **fill(kwargs, given))
        return list(tensors_in(out))[i]

    return run
