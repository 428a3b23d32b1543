"""Single NIR nodes -> ours: discretisation, old dialects, and a reason where neither is clear.

Discretisation of a graph in seconds, with steps of dt:

    euler        beta = 1 - dt/tau,    gain = dt/tau * r    (what NIR's discrete tools do)
    exponential  beta = exp(-dt/tau),  gain = (1 - beta) * r

    LIF      v = v_leak + beta * (v - v_leak) + gain * x;  fires where v > v_threshold;  v = v_reset
    CubaLIF  the same for the current, with w_in in r's place, then for v
    IF, I    v = v + r * x: a spike is a unit impulse, so that dt does not enter (as Sinabs and
             snntorch have it)

Source: Pedersen et al. 2024, Nature Communications 15, 8122 (the equations); nir 1.0.8 (the fields).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ranvier.export.neurons import (
    IF,
    LI,
    LIF,
    CubaLI,
    CubaLIF,
    Decay,
    Membrane,
    NeuronModel,
    Threshold,
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

NEURONS = ("I", "IF", "LI", "LIF", "CubaLI", "CubaLIF", "Threshold")
STATEFUL = (*NEURONS, "Delay")
STATELESS = ("Affine", "Linear", "Scale", "Conv1d", "Conv2d", "AvgPool2d", "SumPool2d", "Flatten")
LARGEST = 2**31  # of any size in a file
MAX_DELAYS = 64  # different delays in one Delay node


@dataclass
class Context:
    """How a file is read; what was migrated is noted."""

    dt: float
    decay: Decay
    spyx: bool = False  # weights are [in, out], tau is in steps, r repeats beta
    batched: bool = False  # shapes start with a batch axis of 1
    oblong: bool = False  # nir 1.0.8 infers shapes as if every kernel were square; this has others
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def note_dialects(self) -> None:
        if self.spyx:
            self.note(
                "old Spyx: weights are [in, out] and r repeats the decay; read as beta = r, gain 1"
            )
        if self.batched:
            self.note("shapes carry a batch axis of 1; it was taken off")

    def steps_of(self, name: str, data: dict[str, Any]) -> np.ndarray:
        """The delays of a Delay node in whole steps."""
        seconds = number(name, data, "delay")
        steps = np.rint(seconds / self.dt)
        if np.any(seconds < 0) or np.any(np.abs(steps * self.dt - seconds) > 1e-3 * self.dt):
            raise RangeError(
                f"nir: Delay '{name}' has a delay of {float(np.ravel(seconds)[0]):g} s, which is no "
                f"whole number of steps of {self.dt:g} s; give the file's own dt"
            )
        if np.any(steps > 10**6):
            raise RangeError(f"nir: Delay '{name}' is longer than a million steps of {self.dt:g} s")
        return steps.astype(np.int64)


# fields


def number(name: str, data: dict[str, Any], key: str, default: Any = None) -> np.ndarray:
    """The field as a float64 array, finite (a threshold may be infinite)."""
    value = data.get(key, default)
    if value is None:
        raise FormatError(f"nir: '{name}' has no field '{key}'")
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" or not array.size:
        raise FormatError(f"nir: '{name}': '{key}' holds {array.dtype} {array.shape}, not numbers")
    array = array.astype(np.float64)
    if np.isnan(array).any() or (key != "v_threshold" and np.isinf(array).any()):
        raise RangeError(f"nir: '{name}': '{key}' holds values that are not finite")
    return array


def weights(name: str, data: dict[str, Any], key: str, ndim: int) -> np.ndarray:
    """The field as a float array of at least `ndim` axes, in its own precision."""
    exact = number(name, data, key)
    array = np.asarray(data[key])
    if exact.ndim < ndim:
        raise ShapeError(f"nir: '{name}': '{key}' has shape {exact.shape}; it takes {ndim} axes")
    return array if array.dtype in (np.float32, np.float64) else exact.astype(np.float32)


def integers(
    name: str, data: dict[str, Any], key: str, n: int, least: int, default: Any = None
) -> Shape:
    """n whole numbers; one number stands for all."""
    found = number(name, data, key, default)
    if np.any(found != np.rint(found)) or np.any(found < least) or np.any(found > LARGEST):
        raise RangeError(
            f"nir: '{name}': '{key}' is {found.tolist()}; whole numbers from {least} on"
        )
    values = [int(v) for v in found.ravel()]
    if len(values) not in (1, n):
        raise ShapeError(f"nir: '{name}': '{key}' has {len(values)} numbers; it takes {n}")
    return tuple(values * n if len(values) == 1 else values)


def shape_field(name: str, value: Any, context: Context) -> Shape:
    """A declared shape, without the batch axis of old files."""
    if value is None:
        raise FormatError(f"nir: '{name}' does not say its shape")
    shape = integers(name, {"shape": value}, "shape", np.size(value), 1)
    return shape[1:] if context.batched and len(shape) > 1 else shape


def stripped(a: np.ndarray, ndim: int) -> np.ndarray:
    """a without leading axes of 1 beyond `ndim`."""
    while a.ndim > ndim and a.shape[0] == 1:
        a = a[0]
    return a


def param(
    name: str, data: dict[str, Any], key: str, shape: Shape, default: Any = None
) -> np.ndarray:
    """A neuron's parameter, broadcastable to the population's shape; 0-d where it is uniform."""
    array = stripped(number(name, data, key, default), len(shape))
    if array.size > 1 and array.ndim == 1 and len(shape) > 1 and array.shape[0] == shape[0]:
        if shape[0] not in shape[1:]:  # one value a channel
            array = array.reshape(-1, *[1] * (len(shape) - 1))
    if array.size == 1:
        return array.reshape(())
    try:
        fits = np.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError(f"nir: '{name}': '{key}' has shape {array.shape}, its input {shape}")
    return array.ravel()[0].reshape(()) if np.all(array == array.ravel()[0]) else array


def plain(array: np.ndarray) -> Any:
    """A float where uniform, else float32; both at single precision, which files keep."""
    rounded = np.asarray(array, np.float64).astype(np.float32)
    return float(rounded) if rounded.ndim == 0 else rounded


def in_shape(raw: RawNode) -> Shape | None:
    """What a node takes, where it says so by itself."""
    try:
        if raw.type in ("Affine", "Linear"):
            weight = np.asarray(raw.data["weight"])
            return tuple(weight.shape[:-2]) + tuple(weight.shape[-1:])
        if raw.type in ("Conv1d", "Conv2d") and raw.data.get("input_shape") is not None:
            weight, groups = np.asarray(raw.data["weight"]), int(raw.data["groups"])
            return (weight.shape[1] * groups, *(int(n) for n in np.ravel(raw.data["input_shape"])))
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return out_shape(raw)


def out_shape(raw: RawNode) -> Shape | None:
    """What a node sends, where its parameters say so."""
    if raw.type in ("Affine", "Linear"):
        weight = np.asarray(raw.data.get("weight", 0.0))
        return tuple(weight.shape[:-1]) if weight.ndim >= 2 else None
    if raw.type in STATEFUL or raw.type == "Scale":
        shapes = [np.shape(v) for v in raw.data.values() if isinstance(v, np.ndarray) and v.ndim]
        return max(shapes, key=math.prod, default=None)
    return None


# dialects


def spyx_dialect(flat: Any) -> bool:
    """Spyx before 1.0 wrote tau = 1 / (1 - beta) in steps, r = beta, and [in, out] weights."""
    leaky = [n.data for n in flat.nodes.values() if n.type in ("LIF", "LI")]
    found = False
    for data in leaky:
        tau, r = np.ravel(data.get("tau", np.nan)), np.ravel(data.get("r", np.nan))
        if tau.shape != r.shape or tau.dtype.kind != "f" or r.dtype.kind != "f" or not np.all(tau):
            return False
        if not np.allclose(r, 1.0 - 1.0 / tau, rtol=0, atol=1e-5):
            return False
        found = found or not np.allclose(r, 1.0)
    return found


def batch_axis(flat: Any) -> bool:
    """Whether the Input's shape starts with a batch axis of 1, as its first taker tells."""
    for (a, b), _ in flat.edges.items():
        source, target = flat.nodes[a], flat.nodes[b]
        shape = np.ravel(source.data.get("shape", ())) if source.type == "Input" else ()
        takes = {"Conv1d": 2, "Conv2d": 3, "AvgPool2d": 3, "SumPool2d": 3}.get(target.type)
        if target.type in ("Affine", "Linear"):
            takes = max(1, np.ndim(target.data.get("weight", 0)) - 1)
        if takes is not None and len(shape) == takes + 1 and shape[0] == 1:
            return True
    return False


def oblong_kernels(flat: Any) -> bool:
    """Whether nir's own shape inference goes wrong here: it takes every kernel for square."""
    found = [np.shape(n.data.get("weight")) for n in flat.nodes.values() if n.type == "Conv2d"]
    return any(len(s) == 4 and s[2] != s[3] for s in found)


def declared_shape_fits(name: str, raw: RawNode, shape: Shape, context: Context) -> None:
    """Compares an Output's declared shape with ours. Raises ShapeError where they do not agree."""
    if raw.data.get("shape") is None:
        return
    said = integers(name, raw.data, "shape", np.size(raw.data["shape"]), 1)
    if said == shape:
        return
    if (
        len(said) > len(shape)
        and said[len(said) - len(shape) :] == shape
        and math.prod(said) == math.prod(shape)
    ):
        context.note(f"'{name}' declares {said} for {shape}; leading axes of 1 were taken off")
        return
    if not context.oblong:
        raise ShapeError(f"nir: '{name}' declares shape {said}; its input has {shape}")
    context.note(f"'{name}' declares {said}, which nir inferred wrongly; it is {shape}")


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
        kept["v_threshold"] = plain(level)
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
    scale = plain(param(name, data, "scale", shape))
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
            f"nir: '{name}' has padding 'same' with stride {stride}; tools disagree on what that is "
            "(nir infers an output as large as the input). Write the padding as numbers"
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
    """Compares the declared input_shape with ours; a wrong one means another wiring or nir's own slip."""
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
        return plain(beta), 1.0
    if np.any(tau <= 0):
        worst = float(np.min(tau))
        raise RangeError(f"nir: '{name}': '{key}' holds {worst:g}; a time constant is above 0 s")
    share = c.dt / tau
    if c.decay == "exponential":
        share = -np.expm1(-share)
    elif np.any(share > 1.0 + 1e-6):
        raise RangeError(
            f"nir: '{name}': '{key}' holds {float(np.min(tau)):g} s, less than a step of {c.dt:g} s; "
            "an Euler step would overshoot. Give a smaller dt, or decay='exponential'"
        )
    factor = share * gain
    if np.all(np.abs(factor - 1.0) < 1e-5):  # tau was made from a decay, in single precision
        factor = np.asarray(1.0)
    return plain(1.0 - share), plain(factor)


def _fire(name: str, data: dict[str, Any], shape: Shape, c: Context) -> dict[str, Any]:
    given = {
        "v_threshold": plain(param(name, data, "v_threshold", shape)),
        "v_reset": plain(param(name, data, "v_reset", shape, 0.0)),
    }
    if c.spyx:
        return {**given, "reset": "subtract", "timing": "delayed", "decay": "given", "dt": None}
    return {**given, "decay": c.decay, "dt": c.dt}


def _if(name: str, data: dict[str, Any], shape: Shape, c: Context) -> NeuronModel:
    r = plain(param(name, data, "r", shape))
    return IF(r=r, **{**_fire(name, data, shape, c), "decay": "given"})


def _i(name: str, data: dict[str, Any], shape: Shape, c: Context) -> NeuronModel:
    return LI(beta=1.0, r=plain(param(name, data, "r", shape)), dt=c.dt)


def _leak(name: str, data: dict[str, Any], shape: Shape, key: str, c: Context) -> dict[str, Any]:
    tau, r = param(name, data, key, shape), param(name, data, "r", shape)
    beta, gain = _decayed(name, key, tau, r, c)
    return {"beta": beta, "r": gain, "v_leak": plain(param(name, data, "v_leak", shape, 0.0))}


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
    return Threshold(v_threshold=plain(param(name, data, "threshold", shape)), dt=c.dt)


_MODELS: dict[str, Callable[[str, dict[str, Any], Shape, Context], NeuronModel]] = {
    "I": _i,
    "IF": _if,
    "LI": _li,
    "LIF": _lif,
    "CubaLI": _cuba_li,
    "CubaLIF": _cuba_lif,
    "Threshold": _threshold,
}
