"""The float interpreter: what a Graph means. Slow and plain; torch kernels node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import assert_never

from ranvier.export.nodes import (
    Conv,
    Delay,
    Dense,
    Flatten,
    Input,
    Join,
    Neuron,
    Node,
    Norm,
    Opaque,
    Output,
    Pool,
    Reduce,
    Scale,
    Shape,
    Subsample,
    Upsample,
)
from ranvier.train.errors import RangeError, ShapeError, UnsupportedError

if TYPE_CHECKING:
    import torch

    from ranvier.export.graph import Graph

    Tensor = torch.Tensor


def with_time(x: Any, shape: Shape, steps: int | None, where: str) -> Any:
    """x `[time, batch, *shape]`, or `[batch, *shape]` held for `steps` steps.

    Raises ShapeError, also for what is no array, or RangeError for no step or an empty batch.
    """
    x = x if hasattr(x, "detach") else np.asarray(x)
    if not hasattr(x, "detach") and x.dtype.kind not in "biuf":
        raise ShapeError(f"{where}: x is no array of real numbers, but of {x.dtype}")
    if tuple(x.shape[2:]) == shape and x.ndim == len(shape) + 2:
        series = x
    elif tuple(x.shape[1:]) == shape and x.ndim == len(shape) + 1:
        if steps is None:
            raise ShapeError(
                f"{where}: x {tuple(x.shape)} has no time axis and no number of steps is set"
            )
        series = x[None].repeat(steps, *[1] * x.ndim) if hasattr(x, "detach") else held(x, steps)
    else:
        raise ShapeError(
            f"{where}: x has shape {tuple(x.shape)}; it takes [time, batch, {', '.join(map(str, shape))}]"
        )
    if series.shape[0] == 0 or series.shape[1] == 0:
        raise RangeError(f"{where}: x has {series.shape[0]} steps and {series.shape[1]} samples")
    return series


def held(x: np.ndarray, steps: int) -> np.ndarray:
    """x as a view `[steps, *x.shape]` that takes no memory."""
    return np.broadcast_to(x, (steps, *x.shape))


def run(graph: Graph, x: Any, record: tuple[str, ...] = ()) -> Any:
    """See `Graph.run`. Nodes without state are computed for all steps at once where no cycle is."""
    import torch

    (entry,) = graph.inputs
    series = with_time(x, entry.shape, graph.steps, "graph")
    as_numpy = not torch.is_tensor(series)
    tensor = torch.from_numpy(np.array(series)) if as_numpy else series
    if not tensor.is_floating_point():
        tensor = tensor.float()
    missing = [name for name in record if name not in graph.nodes]
    if missing:
        raise ShapeError(f"graph: nothing to record: no node is named '{missing[0]}'")
    with torch.no_grad():
        values = _run_by_step(graph, tensor) if graph.recurrent else _run_by_layer(graph, tensor)
    out: Any = values[graph.outputs[0].name]
    kept: dict[str, Any] = {name: values[name] for name in record}
    if as_numpy:
        out, kept = out.numpy(), {k: v.numpy() for k, v in kept.items()}
    return (out, kept) if record else out


def _run_by_layer(graph: Graph, x: Tensor) -> dict[str, Tensor]:
    import torch

    values: dict[str, Tensor] = {}
    observed = {o.inputs[0]: o for o in graph.outputs if o.observe != "out"}
    for node in graph:
        sources = [values[i] for i in node.inputs]
        match node:
            case Input():
                values[node.name] = x
            case Neuron():
                values[node.name], seen = _scan(node, sources[0], observed.get(node.name))
                if seen is not None:
                    values[f"{node.name}/observed"] = seen
            case Output():
                key = node.inputs[0] if node.observe == "out" else f"{node.inputs[0]}/observed"
                values[node.name] = values[key]
            case Delay():
                quiet = torch.zeros_like(sources[0][: node.steps])
                values[node.name] = torch.cat([quiet, sources[0]])[: len(sources[0])]
            case Opaque() if node.meta.get("over_time"):
                values[node.name] = _opaque(node, sources)
            case Opaque():  # step by step: it may look at the whole batch
                each = [_opaque(node, [s[t] for s in sources]) for t in range(len(x))]
                values[node.name] = torch.stack(each)
            case _:
                flat = [s.flatten(0, 1) for s in sources]
                values[node.name] = apply(node, flat).unflatten(0, x.shape[:2])
    return values


def _scan(node: Neuron, x: Tensor, output: Output | None) -> tuple[Tensor, Tensor | None]:
    import torch

    if node.bias is not None:
        x = x + _tensor(node.bias, x)
    state, sent, seen = node.model.initial(x[0]), [], []
    for t in range(len(x)):
        out, state = node.model.step(state, x[t])
        sent.append(out)
        if output is not None:
            seen.append(state[output.observe])
    return torch.stack(sent), torch.stack(seen) if seen else None


def _run_by_step(graph: Graph, x: Tensor) -> dict[str, Tensor]:
    import torch

    states: dict[str, Any] = {}
    series: dict[str, list[Tensor]] = {name: [] for name in graph.nodes}
    for t in range(len(x)):
        values: dict[str, Tensor] = {}
        for node in graph:
            if isinstance(node, Input):
                value = x[t]
            elif isinstance(node, Delay):
                past = series[node.inputs[0]]
                value = (
                    past[t - node.steps]
                    if t >= node.steps
                    else x.new_zeros(x.shape[1], *node.shape)
                )
            elif isinstance(node, Neuron):
                value = _step_neuron(node, values[node.inputs[0]], states)
            elif isinstance(node, Output):
                source = node.inputs[0]
                value = values[source] if node.observe == "out" else states[source][node.observe]
            else:
                value = apply(node, [values[i] for i in node.inputs])
            values[node.name] = value
            series[node.name].append(value)
    return {name: torch.stack(s) for name, s in series.items()}


def _step_neuron(node: Neuron, x: Tensor, states: dict[str, Any]) -> Tensor:
    if node.bias is not None:
        x = x + _tensor(node.bias, x)
    state = states.get(node.name) or node.model.initial(x)
    out, states[node.name] = node.model.step(state, x)
    return out


def _opaque(node: Opaque, sources: list[Tensor]) -> Tensor:
    if node.function is None:
        raise UnsupportedError(f"graph: '{node.name}' ({node.kind}) cannot be run: {node.reason}")
    return node.function(*sources)


def _tensor(a: np.ndarray | None, like: Tensor, tail: int = 0) -> Any:
    """a as a tensor like `like`, with `tail` axes of 1 appended."""
    import torch

    if a is None:
        return None
    own = np.require(a, requirements="W")  # torch warns of arrays that cannot be written to
    t = torch.as_tensor(own, dtype=like.dtype, device=like.device)
    return t.reshape((*t.shape, *[1] * tail))


def apply(node: Node, sources: list[Tensor]) -> Tensor:
    """One stateless node on one step's values `[batch, *shape]`."""
    import torch
    from torch.nn import functional as F

    match node:
        case Conv():
            x = sources[0]
            conv = F.conv1d if node.weight.ndim == 3 else F.conv2d
            weight, bias = _tensor(node.weight, x), _tensor(node.bias, x)
            return conv(x, weight, bias, node.stride, node.padding, node.dilation, node.groups)
        case Dense():
            x = sources[0]
            y = F.linear(x, _tensor(node.weight, x), _tensor(node.bias, x))
            return y if node.out_shape is None else y.unflatten(-1, node.out_shape)
        case Pool():
            return pool(node, sources[0])
        case Flatten():
            end = node.end + 1 if node.end >= 0 else node.end
            return sources[0].flatten(node.start + 1, end)
        case Norm():
            x, params = sources[0], (node.mean, node.var, node.gamma, node.beta)
            mean, var, gamma, beta = (_tensor(p, x) for p in params)
            return F.batch_norm(x, mean, var, gamma, beta, False, 0.0, node.eps)
        case Scale():
            scaled = sources[0] * _tensor(node.scale, sources[0])
            return scaled if node.shift is None else scaled + _tensor(node.shift, sources[0])
        case Subsample():
            return subsample(node, sources[0])
        case Upsample():
            return F.interpolate(
                sources[0], scale_factor=[float(f) for f in node.factor], mode="nearest"
            )
        case Join():
            return join(node, sources)
        case Opaque():
            return _opaque(node, sources)
        case Input() | Neuron() | Delay() | Output():
            raise UnsupportedError(
                f"graph: '{node.name}' has state; it is not applied step by step"
            )
        case _:
            assert_never(node)
    return torch.empty(0)


def pool(node: Pool, x: Tensor) -> Tensor:
    from torch.nn import functional as F

    one = len(node.kernel) == 1
    if node.op == "max":
        return (F.max_pool1d if one else F.max_pool2d)(x, node.kernel, node.stride, node.padding)
    mean: Any = (F.avg_pool1d if one else F.avg_pool2d)(x, node.kernel, node.stride, node.padding)
    return mean if node.op == "avg" else mean * float(np.prod(node.kernel))


def subsample(node: Subsample, x: Tensor) -> Tensor:
    from torch.nn import functional as F

    place: Any = (..., *(slice(None, None, s) for s in node.stride))
    picked = x[place]
    return F.pad(picked, [0, 0] * len(node.stride) + list(node.pad_channels))


def join(node: Join, sources: list[Tensor]) -> Tensor:
    import torch

    first, *rest = sources
    if node.op == "cat":
        return torch.cat(sources, 1 + node.axis)
    for other in rest:
        if node.op == "add":
            first = first + other
        elif node.op in ("and", "mul"):
            first = first * other
        elif node.op == "iand":
            first = (1 - first) * other
        else:  # of spikes, or is the maximum
            first = torch.maximum(first, other)
    return first


def reduce_time(series: Any, how: Reduce) -> Any:
    """`[time, batch, ...]` -> `[batch, ...]`; "none" leaves the series."""
    if how == "mean":
        return series.mean(0)
    if how == "sum":
        return series.sum(0)
    if how == "last":
        return series[-1]
    if how == "max":
        return series.max(0) if isinstance(series, np.ndarray) else series.amax(0)
    return series
