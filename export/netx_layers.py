"""lava-dl's netx files (HDF5, `.net`) as plain values: the integers that each layer computes with.

A netx network is a chain: layer i takes layer i - 1. Shapes are (C, H, W), as in the file. What
`lava.lib.dl.netx` 0.6 skips, ignores or changes without a word is refused here, with the layer.
Files are data: nothing in them is executed, and links out of the file are not followed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ranvier.export.hdf5_guard import check_heaps, is_plain
from ranvier.export.hdf5_reader import Group
from ranvier.export.netx_weights import applied_weights
from ranvier.train.errors import FormatError, RangeError, RanvierError, UnsupportedError

Kind = Literal["input", "conv", "dense", "dense_rec"]
BIAS_EXP = 6  # netx takes a bias as a mantissa with this exponent
MAX_DELAY = 62
NEVER = 2**17  # a threshold from here on is above all that v can hold
_ABSENT = ("pool", "convT", "unpool", "average", "concat", "dense_comp")


@dataclass(frozen=True, eq=False)
class NetxNeuron:
    """LIF parameters as Lava takes them: scalars, or arrays of one value a channel or neuron.

    silent  its threshold is out of reach: an integrator that is read by its v
    """

    du: Any
    dv: Any
    vth: Any
    silent: bool = False


@dataclass(frozen=True, eq=False)
class NetxLayer:
    """One layer that computes. Weights are as Lava applies them; bias is a mantissa (`BIAS_EXP`).

    delay  None, or `[out, in]`: steps that a spike takes on top of the one that every synapse takes
    """

    index: int
    kind: Kind
    in_shape: tuple[int, ...]
    shape: tuple[int, ...]
    weight: np.ndarray
    neuron: NetxNeuron
    bias: np.ndarray | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    delay: np.ndarray | None = None
    weight_rec: np.ndarray | None = None

    @property
    def name(self) -> str:
        return f"layer{self.index}"


@dataclass(frozen=True, eq=False)
class NetxFile:
    """A whole file: the input's shape, the layers in order, the steps of a sample if it says so."""

    input_shape: tuple[int, ...]
    layers: tuple[NetxLayer, ...]
    steps: int | None
    attributes: dict[str, str]

    @property
    def graded(self) -> bool:
        """Whether numbers come in, by way of an input layer's bias, rather than spikes."""
        return self.layers[0].kind == "input"


def read_layers(path: str | os.PathLike[str]) -> NetxFile:
    """The netx file at `path`.

    Raises FormatError where it is missing, no HDF5, damaged or no netx file; UnsupportedError,
    naming the layer, for what netx does not run, or runs differently from what the file says.
    """
    import h5py

    try:
        if not Path(path).is_file():
            raise FormatError("there is no such file")
        if not h5py.is_hdf5(path):
            raise FormatError("it is no HDF5 file, or it is cut off")
        check_heaps(Path(path))
        with h5py.File(path, "r") as file:
            return _network(Group(file, Path(path).stat().st_size))
    except RanvierError as error:
        raise type(error)(f"netx file '{path}': {error}") from error
    except Exception as error:  # h5py raises many kinds on damaged files
        reason = str(error).strip() or type(error).__name__
        raise FormatError(f"netx file '{path}': {reason}") from error


def _network(file: Group) -> NetxFile:
    if "layer" not in file:
        raise FormatError("it has no group 'layer'; a netx file keeps its layers there")
    listed = file.sub("layer", "layer")
    numbers = [str(i) for i in range(len(listed.keys()))]
    if not numbers or sorted(listed.keys()) != sorted(numbers):
        raise FormatError(
            f"its layers are {', '.join(listed.keys()[:8]) or 'none'}; not 0, 1, 2 ..."
        )
    layers = list(_layers([listed.sub(n, f"layer {n}") for n in numbers]))
    if not layers:
        raise FormatError("none of its layers computes anything")
    steps = None
    if "simulation" in file:
        times = file.sub("simulation", "simulation")
        steps = max(0, times.one("tSample", 0)) // max(1, times.one("Ts", 1)) or None
    said = {key: file.group.attrs[key] for key in file.group.attrs if is_plain(file.group, key)}
    text = {k: v for k, v in said.items() if isinstance(v, str) and len(v) < 1000}
    return NetxFile(layers[0].in_shape, tuple(layers), steps, text)


def _layers(groups: list[Group]) -> Iterator[NetxLayer]:
    """The layers that compute, in order; `before` is the shape of the one before."""
    before: tuple[int, ...] | None = None
    flat = first = True
    for index, group in enumerate(groups):
        kind = group.text("type")
        group.where = f"layer {index} ({kind})"
        if kind == "flatten":
            flat = True
            continue
        if kind == "input" and "neuron" not in group:
            before = group.shape("shape") if "shape" in group else before
            continue
        layer = _layer(group, index, kind, before)
        if (
            not first
            and layer.kind != "conv"
            and before is not None
            and len(before) > 1
            and not flat
        ):
            raise group.error(f"it takes {before} without a 'flatten' in between; netx needs one")
        if layer.neuron.silent and index + 1 < len(groups):
            raise UnsupportedError(
                f"{group.where}: its threshold is out of reach, so nothing follows"
            )
        yield layer
        before, flat, first = layer.shape, False, False


def _layer(group: Group, index: int, kind: str, before: tuple[int, ...] | None) -> NetxLayer:
    match kind:
        case "input":
            if index:
                raise group.error("only the first layer can be an input with neurons")
            return _input(group, index)
        case "conv":
            return _conv(group, index, before)
        case "dense" | "dense_rec":
            return _dense(group, index, kind, before)
    why = "netx has no process for it" if kind in _ABSENT else "netx skips it without a word"
    raise UnsupportedError(f"{group.where}: {why}. Layers: input, conv, flatten, dense, dense_rec")


def _input(group: Group, index: int) -> NetxLayer:
    """Numbers x come in as the bias of LIF neurons: x * weight + bias, times 2**6, in each step."""
    shape = _image(group, group.shape("shape"))
    weight, bias = group.one("weight", 64), group.one("bias", 0)
    neuron = _neuron(group, shape)
    return NetxLayer(
        index, "input", shape, shape, np.array(weight), neuron, np.array([bias]) if bias else None
    )


def _image(group: Group, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) not in (1, 3):
        raise UnsupportedError(f"{group.where}: shape {shape}; (n,) or (C, H, W) is needed")
    return shape


def _conv(group: Group, index: int, before: tuple[int, ...] | None) -> NetxLayer:
    if before is None or len(before) != 3:
        raise UnsupportedError(
            f"{group.where}: its input is {before or 'unknown'}; put a layer of type 'input' with "
            "a 'shape' (C, H, W) before it"
        )
    weight = _real(group)
    if weight.ndim == 5 and weight.shape[4] == 1:
        weight = weight[..., 0]
    if weight.ndim != 4 or weight.size == 0:
        raise group.error(f"'weight' is {weight.shape}; [C_out, C_in/groups, kH, kW] is needed")
    if weight.min() < -256 or weight.max() > 255:
        raise UnsupportedError(
            f"{group.where}: weights reach {weight.min()}..{weight.max()}; 8 bits"
        )
    stride, dilation = group.pair("stride", 1, 1), group.pair("dilation", 1, 1)
    padding, groups = group.pair("padding", 0, 0), group.one("groups", 1)
    shape = group.shape("shape")
    if groups < 1 or weight.shape[1] * groups != before[0] or weight.shape[0] % groups:
        raise group.error(
            f"{groups} groups of weights {weight.shape} do not fit {before[0]} channels"
        )
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            before[1:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    if shape != (weight.shape[0], *size):
        raise group.error(f"its shape is {shape}; {before} through its weights gives {size}")
    if "delay" in group and group.whole("delay").any():
        raise UnsupportedError(f"{group.where}: netx ignores the delay of a convolution")
    return NetxLayer(
        index, "conv", before, shape, weight, _neuron(group, shape), _bias(group, shape), stride,
        padding, dilation, groups,
    )  # fmt: skip


def _dense(
    group: Group, index: int, kind: Literal["dense", "dense_rec"], before: tuple[int, ...] | None
) -> NetxLayer:
    n = math.prod(group.shape("shape"))
    weight = _matrix(group, "weight", n)
    if before is not None and math.prod(before) != weight.shape[1]:
        raise group.error(f"it takes {weight.shape[1]} inputs; the layer before has {before}")
    whole, recurrent = weight, None
    if kind == "dense_rec":
        recurrent = _matrix(group, "weight_rec", n)
        if recurrent.shape != (n, n):
            raise group.error(f"'weight_rec' is {recurrent.shape}; ({n}, {n}) is needed")
        if "delay" in group:
            raise UnsupportedError(f"{group.where}: netx changes the weights of one with delays")
        whole = np.hstack([weight, recurrent])
    neuron = _neuron(group, (n,))
    return NetxLayer(
        index, kind, before or (weight.shape[1],), (n,), _applied(group, weight, whole), neuron,
        _bias(group, (n,)), delay=_delay(group, weight.shape),
        weight_rec=None if recurrent is None else _applied(group, recurrent, whole),
    )  # fmt: skip


def _real(group: Group) -> np.ndarray:
    import h5py

    if "weight" in group and isinstance(group.group.get("weight"), h5py.Group):
        raise UnsupportedError(f"{group.where}: its weights are complex; only LIF layers are read")
    return group.whole("weight")


def _matrix(group: Group, key: str, n: int) -> np.ndarray:
    weight = _real(group) if key == "weight" else group.whole(key)
    if weight.ndim == 1 and weight.size % n == 0:
        weight = weight.reshape(n, -1)
    if weight.ndim != 2 or len(weight) != n or weight.size == 0:
        raise group.error(f"'{key}' is {weight.shape}; [{n}, inputs] is needed")
    return weight


def _applied(group: Group, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    made = applied_weights(part, whole)
    if made is None:
        raise UnsupportedError(
            f"{group.where}: weights of {whole.min()}..{whole.max()} are rounded in netx after the "
            "sum, which no weight expresses; use -255..0, 0..255, or even ones in -256..254"
        )
    return made


def _delay(group: Group, shape: tuple[int, ...]) -> np.ndarray | None:
    """Delays as `[out, in]`; netx takes a single vector as one a neuron where both fit."""
    if "delay" not in group:
        return None
    delay = np.minimum(group.whole("delay"), MAX_DELAY)
    if delay.size and delay.min() < 0:
        raise group.error("'delay' is negative")
    if delay.ndim == 1 and delay.size == shape[0]:
        delay = delay[:, None]
    if delay.ndim > 2 or any(
        a not in (1, b) for a, b in zip(delay.shape[::-1], shape[::-1], strict=False)
    ):
        raise group.error(f"'delay' is {delay.shape}; one, [out], [in] or {shape} are needed")
    return np.broadcast_to(delay, shape).copy() if delay.any() else None


def _bias(group: Group, shape: tuple[int, ...]) -> np.ndarray | None:
    """The bias as it broadcasts to `shape`: one, one a channel, or one a neuron."""
    if "bias" not in group:
        return None
    bias = group.whole("bias")
    if np.abs(bias).max(initial=0) > 2**15 - 1:
        raise UnsupportedError(f"{group.where}: its bias passes 16 bits, where Lava wraps it")
    if bias.shape == shape[::-1] and len(shape) == 3:
        return bias.transpose(2, 1, 0)
    if bias.size in (1, shape[0]) and bias.ndim <= 1:
        return bias.reshape(-1, *[1] * (len(shape) - 1))
    raise group.error(
        f"'bias' is {bias.shape}; one, {shape[0]} or {shape[::-1]} numbers are needed"
    )


def _neuron(group: Group, shape: tuple[int, ...]) -> NetxNeuron:
    if "neuron" not in group:
        # What netx' Dense does without one: it sums for ever and never fires.
        return NetxNeuron(-1, 4096, NEVER, silent=True)
    neuron = group.sub("neuron", f"{group.where} neuron")
    kind = neuron.text("type")
    if kind not in ("LOIHI", "CUBA"):
        raise UnsupportedError(f"{neuron.where}: type '{kind}'; only LOIHI and CUBA are read")
    for key, plain in (("refDelay", 1), ("wgtExp", 0), ("gradedSpike", 0), ("weight_exp", 0)):
        if neuron.one(key, plain) > plain:
            raise UnsupportedError(f"{neuron.where}: netx ignores {key} = {neuron.one(key)}")
    du, dv = _parameter(neuron, "iDecay", shape, 4096), _parameter(neuron, "vDecay", shape, 4096)
    vth = _parameter(neuron, "vThMant", shape, 2**18)
    reachable = np.asarray(vth) < NEVER
    if reachable.any() and not reachable.all():
        raise RangeError(f"{neuron.where}: some thresholds are out of reach (vThMant < {NEVER:,})")
    return NetxNeuron(du - 1, dv, vth, silent=not reachable.any())


def _parameter(neuron: Group, key: str, shape: tuple[int, ...], high: int) -> Any:
    value = neuron.whole(key)
    if value.size < 1 or value.min() < 0 or value.max() > high:
        raise RangeError(f"{neuron.where}: {key} is {value.tolist()}; 0..{high} is allowed")
    if value.size == 1:
        return int(value.reshape(()))
    if value.shape != shape[:1]:
        raise neuron.error(f"{key} is {value.shape}; one or {shape[0]} numbers are needed")
    return value.reshape(-1, *[1] * (len(shape) - 1))
