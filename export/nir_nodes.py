"""Single NIR nodes -> ours: discretisation, old dialects, and a reason where neither is clear.

Discretisation of a graph in seconds, with steps of dt:

    euler        beta = 1 - dt/tau,    gain = dt/tau * r    (what NIR's discrete tools do)
    exponential  beta = exp(-dt/tau),  gain = (1 - beta) * r

    LIF      v = v_leak + beta * (v - v_leak) + gain * x;  fires where v > v_threshold;  v = v_reset
    CubaLIF  the same for the current, with w_in in r's place, then for v
    IF, I    v = v + r * x: a spike is a unit impulse, so that dt does not enter (as Sinabs and
             snntorch have it)

Source: Pedersen et al. 2024, Nature Communications 15, 8122 (the equations); nir 1.0.8 (the
fields).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ranvier.export.neurons import (
    IF,
    LI,
    LIF,
    CubaLI,
    CubaLIF,
    Membrane,
    NeuronModel,
    Threshold,
)
from ranvier.export.nir_fields import (
    NEURONS,
    Context,
    integers,
    number,
    param,
    stripped,
    uniform,
    weights,
)
from ranvier.export.nir_raw import RawNode
from ranvier.export.nodes import (
    Conv,
    Delay,
    Dense,
    Flatten,
    Join,
    Neuron,
    Node,
    Pool,
    Scale,
    Shape,
)
from ranvier.train.errors import FormatError, RangeError, ShapeError, UnsupportedError

MAX_DELAYS = 64  # different delays in one Delay node

# conversion


def convert(name: str, raw: RawNode, source: str, shape: Shape, context: Context) -> list[Node]:
    """Our nodes for one NIR node that takes `source` of `shape`; the last one sends its value.

    Raises FormatError, ShapeError, RangeError or UnsupportedError naming the node.
    """
    if raw.type in NEURONS:
        model = _MODELS[raw.type](name, raw.data, shape, context)
        return [Neuron(name=name, inputs=(source,), model=_told(raw, model))]
    return _MAPS[raw.type](name, raw.data, source, shape, context)


def _told(raw: RawNode, model: NeuronModel) -> NeuronModel:
    """The model with the reset rule of our metadata, in a file that another tool changed since."""
    try:
        said = json.loads(raw.meta["ranvier"])["fields"]["model"]
        kept = {k: said[k] for k in ("reset", "timing", "strict") if k in said}
    except (KeyError, TypeError, ValueError):
        return model
    if not isinstance(model, Membrane):
        return model
    if kept.get("strict") is False:  # the file holds the value just below
        level = np.nextafter(np.asarray(model.v_threshold, np.float32), np.float32(np.inf))
        kept["v_threshold"] = uniform(level)
    return replace(model, **kept)


Maker = Callable[[str, "dict[str, Any]", str, Shape, Context], "list[Node]"]


def _linear(
    name: str, data: dict[str, Any], source: str, shape: Shape, context: Context
) -> list[Node]:
    weight = weights(name, data, "weight", 2)
    if context.spyx:
        weight = weight.swapaxes(-1, -2)
    bias = None if _no_bias(data) else weights(name, data, "bias", 1)
    lead = weight.shape[:-2]
    if lead:
        if _diagonal(weight):
            scale = np.diagonal(weight, axis1=-2, axis2=-1)
            return [Scale(name=name, inputs=(source,), scale=scale, shift=bias)]
        if lead != shape[:-1]:
            raise ShapeError(f"nir: '{name}': weight {weight.shape} does not fit its input {shape}")
        weight, bias = _shared(name, weight, 2), None if bias is None else _shared(name, bias, 1)
    if weight.shape[1] != shape[-1]:
        raise ShapeError(
            f"nir: '{name}' has weight {weight.shape} [out, in]; its input has shape {shape}"
        )
    return [Dense(name=name, inputs=(source,), weight=weight, bias=bias)]


def _diagonal(weight: np.ndarray) -> bool:
    if weight.shape[-1] != weight.shape[-2]:
        return False
    return not np.any(weight * (1 - np.eye(weight.shape[-1], dtype=weight.dtype)))


def _no_bias(data: dict[str, Any]) -> bool:
    """Linear has none; some files write bias = False, which is torch's word for none."""
    bias = data.get("bias")
    return bias is None or (np.ndim(bias) == 0 and not bias)


def _shared(name: str, array: np.ndarray, ndim: int) -> np.ndarray:
    rows = array.reshape(-1, *array.shape[array.ndim - ndim :])
    if not np.all(rows == rows[0]):
        raise UnsupportedError(f"nir: '{name}' has different weights along its leading axes")
    return rows[0]


def _scale(
    name: str, data: dict[str, Any], source: str, shape: Shape, context: Context
) -> list[Node]:
    scale = uniform(param(name, data, "scale", shape))
    return [Scale(name=name, inputs=(source,), scale=np.asarray(scale, np.float32))]


def _flatten(
    name: str, data: dict[str, Any], source: str, shape: Shape, context: Context
) -> list[Node]:
    start, end = (_axis(name, data, k, d) for k, d in (("start_dim", 1), ("end_dim", -1)))
    if context.batched:
        start, end = max(start - 1, 0) if start > 0 else start, end - 1 if end > 0 else end
    n = len(shape)
    if not (-n <= start < n and -n <= end < n and start % n <= end % n):
        raise ShapeError(f"nir: '{name}' flattens axes {start}..{end} of {shape}, which has {n}")
    return [Flatten(name=name, inputs=(source,), start=start % n, end=end if end < 0 else end)]


def _axis(name: str, data: dict[str, Any], key: str, default: int) -> int:
    value = float(number(name, data, key, default).ravel()[0])
    if value != int(value) or abs(value) > 64:
        raise RangeError(f"nir: '{name}': '{key}' is {value:g}; it is an axis")
    return int(value)


def _conv(n: int) -> Maker:
    def make(
        name: str, data: dict[str, Any], source: str, shape: Shape, context: Context
    ) -> list[Node]:
        weight = weights(name, data, "weight", n + 2)
        if weight.ndim != n + 2:
            raise ShapeError(
                f"nir: Conv{n}d '{name}' has weight {weight.shape}; it takes {n + 2} axes"
            )
        stride = integers(name, data, "stride", n, 1, 1)
        dilation = integers(name, data, "dilation", n, 1, 1)
        (groups,) = integers(name, data, "groups", 1, 1, 1)
        weight, padding = _padding(name, data, weight, stride, dilation, shape)
        bias = None if _no_bias(data) else weights(name, data, "bias", 1)
        node = Conv(
            name=name,
            inputs=(source,),
            weight=weight,
            bias=bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        _input_shape(name, data, shape[1:], context)
        return [node]

    return make


def _padding(
    name: str,
    data: dict[str, Any],
    weight: np.ndarray,
    stride: Shape,
    dilation: Shape,
    shape: Shape,
) -> tuple[np.ndarray, Shape]:
    """(weight, padding); `same` becomes numbers, an even kernel gets a row of zeros for it."""
    said, n = data.get("padding", 0), weight.ndim - 2
    if not isinstance(said, str):
        return weight, integers(name, data, "padding", n, 0, 0)
    if said == "valid":
        return weight, (0,) * n
    if said != "same":
        raise FormatError(f"nir: '{name}' has padding '{said}'; it is same, valid or numbers")
    if set(stride) != {1}:
        raise UnsupportedError(
            f"nir: '{name}' has padding 'same' with stride {stride}; tools disagree on what "
            "that is (nir infers an output as large as the input). Write the padding as numbers"
        )
    padding = []
    for axis, (k, d) in enumerate(zip(weight.shape[2:], dilation, strict=True)):
        if d * (k - 1) % 2:
            if d > 1:
                raise UnsupportedError(
                    f"nir: '{name}': 'same' for an even dilated kernel is lopsided"
                )
            front = [(0, 0)] * weight.ndim
            front[2 + axis] = (1, 0)
            weight = np.pad(weight, front)
            k += 1
        padding.append(d * (k - 1) // 2)
    return weight, tuple(padding)


def _input_shape(name: str, data: dict[str, Any], ours: Shape, context: Context) -> None:
    """Compares the declared input_shape with ours; a wrong one means another wiring or nir's own
    slip.
    """
    said = data.get("input_shape")
    if said is None:
        context.note("convolutions without input_shape: shapes are inferred from the Input")
        return
    declared = integers(name, data, "input_shape", len(ours), 0)
    if declared == ours:
        return
    if not context.oblong:
        raise ShapeError(f"nir: '{name}' declares input_shape {declared}; what arrives has {ours}")
    context.note(
        f"'{name}' declares input_shape {declared}, which nir inferred wrongly; it is {ours}"
    )


def _pool(op: Any) -> Maker:
    def make(
        name: str, data: dict[str, Any], source: str, shape: Shape, context: Context
    ) -> list[Node]:
        kernel = integers(name, data, "kernel_size", 2, 1)
        return [
            Pool(
                name=name,
                inputs=(source,),
                op=op,
                kernel=kernel,
                stride=integers(name, data, "stride", 2, 1, data["kernel_size"]),
                padding=integers(name, data, "padding", 2, 0, 0),
            )
        ]

    return make


def _delay(
    name: str, data: dict[str, Any], source: str, shape: Shape, context: Context
) -> list[Node]:
    steps = context.steps_of(name, data)
    values = sorted({int(v) for v in steps.ravel()})
    if len(values) == 1:
        return [_one_delay(name, source, values[0], shape)]
    if len(values) > MAX_DELAYS:
        raise UnsupportedError(
            f"nir: Delay '{name}' has {len(values)} different delays; {MAX_DELAYS} are read"
        )
    steps = np.broadcast_to(stripped(steps, len(shape)), shape)
    nodes: list[Node] = []
    for k in values:
        mask = Scale(
            name=f"{name}.only{k}", inputs=(source,), scale=(steps == k).astype(np.float32)
        )
        nodes += [mask, _one_delay(f"{name}.by{k}", mask.name, k, shape)]
    ends = tuple(n.name for n in nodes[1::2])
    return [*nodes, Join(name=name, inputs=ends, op="add")]


def _one_delay(name: str, source: str, steps: int, shape: Shape) -> Node:
    if steps == 0:
        return Scale(name=name, inputs=(source,), scale=np.ones((), np.float32))
    return Delay(name=name, inputs=(source,), steps=steps, shape=shape)


_MAPS: dict[str, Maker] = {
    "Affine": _linear,
    "Linear": _linear,
    "Scale": _scale,
    "Flatten": _flatten,
    "Conv1d": _conv(1),
    "Conv2d": _conv(2),
    "AvgPool2d": _pool("avg"),
    "SumPool2d": _pool("sum"),
    "Delay": _delay,
}


# neurons


def _decayed(name: str, key: str, tau: np.ndarray, gain: np.ndarray, c: Context) -> tuple[Any, Any]:
    """(decay a step, input gain) of a time constant and a resistance."""
    if c.spyx:
        beta = np.clip(1.0 - 1.0 / tau, 0.0, 1.0)  # Spyx clips it when it runs
        return uniform(beta), 1.0
    if np.any(tau <= 0):
        worst = float(np.min(tau))
        raise RangeError(f"nir: '{name}': '{key}' holds {worst:g}; a time constant is above 0 s")
    share = c.dt / tau
    if c.decay == "exponential":
        share = -np.expm1(-share)
    elif np.any(share > 1.0 + 1e-6):
        raise RangeError(
            f"nir: '{name}': '{key}' holds {float(np.min(tau)):g} s, less than a step of {c.dt:g} "
            "s; an Euler step would overshoot. Give a smaller dt, or decay='exponential'"
        )
    factor = share * gain
    if np.all(np.abs(factor - 1.0) < 1e-5):  # tau was made from a decay, in single precision
        factor = np.asarray(1.0)
    return uniform(1.0 - share), uniform(factor)


def _fire(name: str, data: dict[str, Any], shape: Shape, c: Context) -> dict[str, Any]:
    given = {
        "v_threshold": uniform(param(name, data, "v_threshold", shape)),
        "v_reset": uniform(param(name, data, "v_reset", shape, 0.0)),
    }
    if c.spyx:
        return {**given, "reset": "subtract", "timing": "delayed", "decay": "given", "dt": None}
    return {**given, "decay": c.decay, "dt": c.dt}


def _if(name: str, data: dict[str, Any], shape: Shape, c: Context) -> NeuronModel:
    r = uniform(param(name, data, "r", shape))
    return IF(r=r, **{**_fire(name, data, shape, c), "decay": "given"})


def _i(name: str, data: dict[str, Any], shape: Shape, c: Context) -> NeuronModel:
    return LI(beta=1.0, r=uniform(param(name, data, "r", shape)), dt=c.dt)


def _leak(name: str, data: dict[str, Any], shape: Shape, key: str, c: Context) -> dict[str, Any]:
    tau, r = param(name, data, key, shape), param(name, data, "r", shape)
    beta, gain = _decayed(name, key, tau, r, c)
    return {"beta": beta, "r": gain, "v_leak": uniform(param(name, data, "v_leak", shape, 0.0))}


def _synapse(name: str, data: dict[str, Any], shape: Shape, c: Context) -> dict[str, Any]:
    tau, w_in = param(name, data, "tau_syn", shape), param(name, data, "w_in", shape, 1.0)
    alpha, gain = _decayed(name, "tau_syn", tau, w_in, c)
    return {"alpha": alpha, "w_in": gain}


def _li(name: str, data: dict[str, Any], shape: Shape, c: Context) -> NeuronModel:
    return LI(**_leak(name, data, shape, "tau", c), decay=c.decay, dt=c.dt)


def _lif(name: str, data: dict[str, Any], shape: Shape, c: Context) -> NeuronModel:
    return LIF(**_leak(name, data, shape, "tau", c), **_fire(name, data, shape, c))


def _cuba_li(name: str, data: dict[str, Any], shape: Shape, c: Context) -> NeuronModel:
    leak = _leak(name, data, shape, "tau_mem", c)
    return CubaLI(**leak, **_synapse(name, data, shape, c), decay=c.decay, dt=c.dt)


def _cuba_lif(name: str, data: dict[str, Any], shape: Shape, c: Context) -> NeuronModel:
    leak = _leak(name, data, shape, "tau_mem", c)
    return CubaLIF(**leak, **_synapse(name, data, shape, c), **_fire(name, data, shape, c))


def _threshold(name: str, data: dict[str, Any], shape: Shape, c: Context) -> NeuronModel:
    return Threshold(v_threshold=uniform(param(name, data, "threshold", shape)), dt=c.dt)


_MODELS: dict[str, Callable[[str, dict[str, Any], Shape, Context], NeuronModel]] = {
    "I": _i,
    "IF": _if,
    "LI": _li,
    "LIF": _lif,
    "CubaLI": _cuba_li,
    "CubaLIF": _cuba_lif,
    "Threshold": _threshold,
}
