"""Fields of NIR nodes as checked numbers and shapes, and the signs of old dialects."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ranvier.export.neurons import Decay
from ranvier.export.nir_raw import RawNode
from ranvier.export.nodes import Shape
from ranvier.train.errors import FormatError, RangeError, ShapeError

NEURONS = ("I", "IF", "LI", "LIF", "CubaLI", "CubaLIF", "Threshold")
STATEFUL = (*NEURONS, "Delay")
STATELESS = ("Affine", "Linear", "Scale", "Conv1d", "Conv2d", "AvgPool2d", "SumPool2d", "Flatten")
LARGEST = 2**31  # of any size in a file


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
                f"nir: Delay '{name}' has a delay of {float(np.ravel(seconds)[0]):g} s, no "
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


def uniform(array: np.ndarray) -> Any:
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
        said = source.data.get("shape") if source.type == "Input" else None
        shape = [] if said is None else np.ravel(said).tolist()
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
