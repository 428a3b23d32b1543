"""What the results of torch's functions and operators stand for while a network is traced.

`record` is told of every call. A handler (in `trace_functions`) returns the result's value; where
it returns None there is no word for the call, which becomes an Opaque node that runs it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from ranvier.export.nodes import (
    Conv,
    Dense,
    Flatten,
    Join,
    Node,
    Norm,
    Pool,
    Scale,
    Subsample,
    Upsample,
)
from ranvier.export.trace_record import Recorder
from ranvier.export.trace_values import At, Final, Series, Sum, Value, array
from ranvier.train.errors import UnsupportedError


class Done:
    """A handler's answer where it has said itself what the results stand for."""


DONE = Done()
Answer: TypeAlias = "Value | Done | None"
Handler: TypeAlias = "Callable[[Recorder, tuple[Any, ...], dict[str, Any], Any], Answer]"

HANDLERS: dict[str, Handler] = {}

CONSTANT = frozenset(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor "
    "argmax argmin".split()
)
RANDOM = frozenset(
    "rand randn randint rand_like randn_like randint_like bernoulli normal poisson multinomial "
    "uniform random exponential randperm".split()
)
NAMES = {
    "iadd": "add",
    "radd": "add",
    "isub": "sub",
    "subtract": "sub",
    "imul": "mul",
    "rmul": "mul",
    "multiply": "mul",
    "itruediv": "div",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "negative": "neg",
    "greater": "gt",
    "greater_equal": "ge",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "mm": "matmul",
    "or": "logical_or",
    "bitwise_or": "logical_or",
    "and": "logical_and",
    "bitwise_and": "logical_and",
    "invert": "logical_not",
    "bitwise_not": "logical_not",
}


def record(
    rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Says what the result of one torch call stands for."""
    import ranvier.export.trace_functions  # noqa: F401  registers its handlers
    from ranvier.export import trace_opaque, trace_shapes

    name = plain_name(func)
    if name == "setitem":
        rec.know(args[0], trace_shapes.setitem(rec, *args))
        return
    results = list(tensors_in(out))
    if not results:
        return
    if name in RANDOM:
        rec.alive.extend(results)
        rec.random.update(map(id, results))
    given = list(tensors_in((args, kwargs)))
    known = [x for x in given if rec.value(x) is not None]
    lost = [x for x in given if id(x) in rec.lost]
    if lost and not known and name not in CONSTANT:
        why = _random(rec, name) if name in RANDOM else rec.lost[id(lost[0])]
        for result in results:
            rec.lose(result, why)
        return
    if not known or name in CONSTANT:
        for result in results:
            rec.know(result, None)
        return
    rec.check_followed(lost)
    if name in RANDOM or any(id(x) in rec.random for x in given):
        raise _random(rec, name)
    answer = HANDLERS[name](rec, args, kwargs, out) if name in HANDLERS else None
    if answer is None:
        reason = f"no chip has a word for {name} as it is used here"
        trace_opaque.opaque(rec, name, reason, func, args, kwargs, out, rec.name(name), name)
    elif not isinstance(answer, Done):
        rec.know(results[0], answer)


def _random(rec: Recorder, name: str) -> UnsupportedError:
    return rec.refuse(
        f"random numbers ({name}) meet the input inside the module",
        "draw them outside, and give the module spikes",
    )


def plain_name(func: Any) -> str:
    """The function's name without underscores, one for all spellings of the same thing."""
    name = str(getattr(func, "__name__", "function"))
    if name == "__get__":
        name = str(getattr(getattr(func, "__self__", None), "__name__", "get"))
    name = name.strip("_")
    return NAMES.get(name, name)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for v in values:
            yield from tensors_in(v)
    elif isinstance(values, dict):
        for v in values.values():
            yield from tensors_in(v)


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Registers the decorated handler for these functions."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def known(rec: Recorder, x: Any) -> bool:
    return rec.value(x) is not None


def is_binary(rec: Recorder, x: Any) -> bool:
    """Whether the tensor stands for spikes, 0 or 1."""
    value = rec.value(x)
    return value is not None and value.port == "out" and rec.builder.is_binary(value.node)


# operands


def operand(rec: Recorder, value: Value | None) -> Value | None:
    """`value` as something that nodes can take: At, Series or Final of a node's output."""
    from ranvier.export.trace_modules import membrane

    if value is None:
        return None
    if value.port != "out":
        value = replace(value, node=membrane(rec, value), port="out")
    if isinstance(value, Sum):
        value = _completed(rec, value) or _windowed(rec, value)
    return value


def _completed(rec: Recorder, value: Sum) -> Final | None:
    """The sum over all steps as a mean over time."""
    n = rec.total
    if n is None or n < 2 or value.steps != frozenset(range(n)):
        return None
    return Final(scaled(rec, value.node, value.scale * n), "mean")


def _windowed(rec: Recorder, value: Sum) -> At:
    """The sum over some steps as a sum of delayed values, at the last of them."""
    last = max(value.steps)
    nodes = [rec.builder.delayed(value.node, last - s) for s in sorted(value.steps, reverse=True)]
    total = rec.builder.add(
        Join(name=rec.name("add"), inputs=tuple(nodes), op="add", source=rec.line())
    )
    return At(scaled(rec, total, value.scale), last)


def scaled(rec: Recorder, node: str, factor: float) -> str:
    """The node times a number."""
    if factor == 1.0:
        return node
    scale = Scale(name=rec.name("mul"), inputs=(node,), scale=np.asarray(factor), source=rec.line())
    return rec.builder.add(scale)


def align(rec: Recorder, values: list[Value]) -> tuple[list[str], Callable[[str], Value]]:
    """The nodes of several operands at one time, and what their combination is a value of."""
    if all(isinstance(v, At) for v in values):
        ats = [v for v in values if isinstance(v, At)]
        steps = [v.t for v in ats if v.t is not None]
        t = max(steps) if steps else None
        nodes = [
            v.node if v.t is None or t is None else rec.builder.delayed(v.node, t - v.t)
            for v in ats
        ]
        return nodes, lambda node: At(node, t)
    series = [v for v in values if isinstance(v, Series)]
    if series and all(v == replace(series[0], node=v.node) for v in series):
        if all(isinstance(v, Series) or (isinstance(v, At) and v.t is None) for v in values):
            like = series[0]
            return [v.node for v in values], lambda node: replace(like, node=node)
    finals = [v for v in values if isinstance(v, Final)]
    if len(finals) == len(values) and len({v.how for v in finals}) == 1:
        how = finals[0].how
        return [v.node for v in values], lambda node: Final(node, how)
    raise rec.refuse(
        "values of single steps and of all steps are combined",
        "reduce over time once, after the loop",
    )


def apply_nodes(
    rec: Recorder, made: list[Node], x: Tensor, name: str, out: Tensor | None = None
) -> Value:
    """The nodes in a row on the value of x; none leaves it as it is."""
    value = rec.value(x)
    assert value is not None
    if not made:
        return value
    value = operand(rec, value)
    assert value is not None
    if isinstance(value, Final):
        _check_after(rec, value, made)
    if isinstance(value, Series) and value.layout != "folded":
        if not all(isinstance(n, (Dense, Scale, Flatten)) for n in made):
            raise rec.refuse("a layer is given all steps at once", "fold time into the batch")
        along_time = value.layout == "last" or not rec.builder.shapes[value.node]
        if along_time and any(isinstance(n, Dense) for n in made):
            raise rec.refuse(
                "a Linear weighs the time steps against each other, the later ones too",
                "weigh channels or neurons, or keep it on the host",
            )
    node = value.node
    for each in made:
        node = rec.builder.add(replace(each, name=name, inputs=(node,), source=rec.line()))
    return replace(value, node=node)


def _check_after(rec: Recorder, value: Final, made: list[Node]) -> None:
    """After the reduction over time only what commutes with it can stand."""
    affine = (Conv, Dense, Flatten, Norm, Scale, Subsample, Upsample)
    fine = all(isinstance(n, affine) or (isinstance(n, Pool) and n.op != "max") for n in made)
    plain = value.how == "last" or all(isinstance(n, Flatten) for n in made)
    if not (plain or (fine and value.how == "mean")):
        kind = type(made[0]).__name__
        raise rec.refuse(
            f"{kind} stands after the {value.how} over time, where it cannot be moved before it",
            "return the reduced value, and do the rest outside the module",
        )


def constant(rec: Recorder, x: Tensor, other: Any) -> np.ndarray | None:
    """A constant beside x as an array that broadcasts to one sample; None where it cannot."""
    if not isinstance(other, Tensor):
        return np.asarray(float(other))
    value = rec.value(x)
    assert value is not None
    shape = rec.builder.shapes[value.node]
    c = other.detach()
    if c.numel() == 1:
        return array(c).reshape(())
    while c.ndim > len(shape):
        if c.shape[0] != 1 and bool((c != c[:1]).any()):
            return None  # differs from sample to sample, or from step to step
        c = c[0]
    values = array(c)
    values = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
    try:
        fits = np.broadcast_shapes(values.shape, shape) == shape
    except ValueError:
        fits = False
    return values if fits else None
