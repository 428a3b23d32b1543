"""`write_net`: a Program as a netx file (HDF5, `.net`) of lava-dl, for its `netx.hdf5.Network`.

The Program is only looked at, never imported: export comes before deploy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from ranvier.export.netx_layers import BIAS_EXP, MAX_DELAY
from ranvier.export.netx_weights import applied_weights
from ranvier.train.errors import UnsupportedError
from ranvier.train.files import atomic_write


def write_net(program: Any, path: str | os.PathLike[str]) -> None:
    """Writes a `ranvier.deploy.Program` as a netx file that lava-dl runs spike for spike.

    Atomically. What comes in is not in the file: `Network(path)` takes spikes at `net.inp`, and
    whole numbers when it is loaded with `input_message_bits`. Neither is the readout.
    Raises UnsupportedError, naming the population or projection, for what netx cannot say: anything
    but a chain of LIF populations that Lava's own LIF computes.
    """
    import h5py

    if not hasattr(program, "projections"):
        raise UnsupportedError(
            f"write_net: {type(program).__name__} is no Program; compile(graph, calibration=x) makes one"
        )
    layers = _layers(program)
    with atomic_write(path) as part, h5py.File(part, "w") as file:
        for i, layer in enumerate(layers):
            group = file.create_group(f"layer/{i}")
            group.create_dataset("type", (1,), "S10", [layer.pop("type").encode("ascii")])
            for key, value in layer.items():
                group.create_dataset(key, data=value)
        if program.steps:
            file["simulation/Ts"], file["simulation/tSample"] = 1, program.steps


def _layers(program: Any) -> list[dict[str, Any]]:
    """What stands under layer/0, layer/1 ...: path in the group -> value."""
    chain = _chain(program)
    first = chain[0][1]
    shape = program.input.shape if _is_dense(first) else _conv(first)[0]
    layers: list[dict[str, Any]] = [{"type": "input", "shape": np.array(shape)}]
    for population, into, back in chain:
        if _is_dense(into):
            if len(shape) > 1 and len(layers) > 1:
                layers.append({"type": "flatten", "shape": np.array([int(np.prod(shape)), 1, 1])})
            layer = _dense_layer(population, into, back)
        else:
            layer = _conv_layer(population, into, back, tuple(shape))
        layers.append(layer | _neuron(population))
        shape = population.shape
    return layers


def _chain(program: Any) -> list[tuple[Any, Any, Any]]:
    """(population, the projection into it, its recurrence or None) from the input on.

    Raises UnsupportedError naming what stands beside the chain.
    """
    before, chain, seen = program.input, [], {program.input.name}
    while onward := [p for p in program.out_of(before.name) if p.target != before.name]:
        if len(onward) > 1:
            raise _refused(
                before.name, f"feeds {' and '.join(p.target for p in onward)}; netx is a chain"
            )
        population = program.populations[onward[0].target]
        into = program.into(population.name)
        back = [p for p in into if p.source == population.name]
        if len(into) > 1 + len(back) or len(back) > 1 or population.name in seen:
            raise _refused(
                population.name,
                f"is fed by {' and '.join(p.source for p in into)}; netx is a chain",
            )
        chain.append((population, onward[0], back[0] if back else None))
        seen.add(population.name)
        before = population
    beside = [name for name in program.populations if name not in seen]
    if beside or not chain:
        raise _refused(
            beside[0] if beside else before.name, "is on no chain that starts at the input"
        )
    return chain


def _refused(name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"write_net: '{name}' {reason}. Run the program as Lava Processes instead (engine='lava')"
    )


def _kind(projection: Any) -> str:
    return type(projection.map).__name__


def _is_dense(projection: Any) -> bool:
    """Whether netx takes it as a dense layer: a matrix, or one to one on a vector."""
    return _kind(projection) == "DenseMap" or (
        _kind(projection) == "OneToOne" and len(projection.map.shape) != 3
    )


def _dense_layer(population: Any, into: Any, back: Any) -> dict[str, Any]:
    if len(population.shape) != 1:
        raise _refused(
            population.name, f"is {population.shape} behind a matrix; netx gives a vector"
        )
    weight = _shifted(into)
    if _kind(into) == "OneToOne":
        weight = np.diag(np.broadcast_to(weight, into.map.shape).reshape(-1))
    layer: dict[str, Any] = {"type": "dense", "shape": np.array(population.shape)}
    layer |= {"inFeatures": weight.shape[1], "outFeatures": weight.shape[0]}
    if into.lag:
        if into.lag > MAX_DELAY or back is not None:
            raise _refused(
                into.name,
                f"has a delay of {into.lag}; netx holds {MAX_DELAY}, and none beside a recurrence",
            )
        layer["delay"] = np.int64(into.lag)
    if back is None:
        return layer | {"weight": _held(into, weight, weight)}
    if _kind(back) != "DenseMap" or back.lag != 1:
        raise _refused(back.name, "is a recurrence that netx lacks: a matrix over one step only")
    past = _shifted(back)
    both = np.hstack([weight, past])
    layer |= {"type": "dense_rec", "weight_rec": _held(back, past, both)}
    return layer | {"weight": _held(into, weight, both)}


def _held(p: Any, part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The weights for the file, once it is known that netx keeps them."""
    applied = applied_weights(part, whole)
    if not whole.any() or applied is None or not np.array_equal(applied, part):
        raise _refused(
            p.name,
            f"has weights {part.min()}..{part.max()} (its exponent included), which netx changes",
        )
    return part.astype(np.float32)


def _shifted(projection: Any) -> np.ndarray:
    return np.asarray(projection.map.weight, np.int64) << projection.exponent


def _conv(p: Any) -> tuple[tuple[int, ...], tuple[int, ...], np.ndarray, Mapping[str, Any]]:
    """(input shape, output shape, weight, geometry) of a convolution, or of one to one as one."""
    if _kind(p) == "OneToOne":
        c = p.map.shape[0]
        weight = np.asarray(p.map.weight)
        if weight.size != 1 and weight.shape != (c, 1, 1):
            raise _refused(p.name, "has a weight for each pixel, which no convolution has")
        kernel = np.broadcast_to(_shifted(p).reshape(-1, 1, 1, 1), (c, 1, 1, 1))
        return p.map.shape, p.map.shape, kernel, {"groups": c}
    m = p.map
    geometry = {
        "stride": m.stride,
        "padding": m.padding,
        "dilation": m.dilation,
        "groups": m.groups,
    }
    return m.in_shape, m.out_shape, _shifted(p), geometry


def _conv_layer(population: Any, into: Any, back: Any, before: tuple[int, ...]) -> dict[str, Any]:
    in_shape, out_shape, weight, geometry = _conv(into)
    if in_shape != before or out_shape != population.shape:
        raise _refused(
            into.name, f"maps {in_shape} to {out_shape} between {before} and {population.shape}"
        )
    if back is not None:
        raise _refused(back.name, "is a recurrence beside a convolution, which netx lacks")
    if into.lag:
        raise _refused(into.name, f"has a delay of {into.lag}, which netx ignores in convolutions")
    full = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), **geometry}
    layer = {k: np.array(v) for k, v in full.items() if k != "groups"}
    return {
        "type": "conv",
        "shape": np.array(population.shape),
        "inChannels": in_shape[0],
        "outChannels": out_shape[0],
        "kernelSize": np.array(weight.shape[2:]),
        "groups": full["groups"],
        "weight": weight.astype(np.float32),
        **layer,
    }


def _neuron(population: Any) -> dict[str, Any]:
    cell = population.cell
    reason = cell.why_custom() or ("is a relay" if cell.kind == "relay" else None)
    if reason:
        raise _refused(population.name, f"is no neuron of netx ({reason})")
    found = {
        "neuron/type": "CUBA",
        "neuron/iDecay": _by_channel(population, np.asarray(cell.du) + 1),
        "neuron/vDecay": _by_channel(population, cell.dv),
        "neuron/vThMant": _by_channel(population, cell.vth),
        "neuron/refDelay": 1,
        "neuron/gradedSpike": False,
    }
    bias = np.asarray(cell.bias)
    if not bias.any():
        return found
    if (bias % 2**BIAS_EXP).any() or np.abs(bias).max() >= 2 ** (15 + BIAS_EXP):
        raise _refused(
            population.name, f"has a bias that is no multiple of 2**{BIAS_EXP} in 16 bits"
        )
    mantissa = np.broadcast_to(bias >> BIAS_EXP, population.shape)
    whole = mantissa.reshape(population.shape[0], -1)
    even = (whole == whole[:, :1]).all()
    return found | {"bias": whole[:, 0] if even else mantissa.transpose(2, 1, 0)}


def _by_channel(population: Any, value: Any) -> Any:
    """A parameter as netx takes it: a number, or one a channel."""
    array = np.asarray(value)
    if array.size == 1:
        return int(array.reshape(()))
    rows = np.broadcast_to(array, population.shape).reshape(population.shape[0], -1)
    if (rows != rows[:, :1]).any():
        raise _refused(population.name, "has a parameter for each pixel; netx has one a channel")
    return np.ascontiguousarray(rows[:, 0], np.int64)
