"""The border to lava-dl's netx (HDF5, `.net`): `read_net`; `netx_write` has the other way.

netx is a chain of LIF layers in integers. Names and units that are converted: du = iDecay - 1,
dv = vDecay, vth = vThMant, bias = mantissa * 2**6. Lava's u and v count in 2**-6 of a weight, so
that floats here are Lava's integers divided by 64.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np

from ranvier.export.graph import Graph
from ranvier.export.netx_layers import NetxLayer, read_layers
from ranvier.export.neurons import LIF, CubaLI, CubaLIF, NeuronModel
from ranvier.export.nodes import (
    Conv,
    Delay,
    Dense,
    Flatten,
    Input,
    Join,
    Neuron,
    Node,
    Output,
    Scale,
)
from ranvier.train.errors import UnsupportedError


def read_net(path: str | os.PathLike[str]) -> Graph:
    """The float Graph of the netx file at `path`, its weights and thresholds the file's integers.

    It rounds nothing, where Lava rounds decays and saturates v; for the integers as Lava computes
    them there is `ranvier.deploy.netx_file.read_program`. Nodes are named layer0, layer1 ... after
    the file's layers.
    Raises FormatError where it is no netx file; UnsupportedError, naming the layer, for what netx
    cannot run or runs differently from what the file says.
    """
    file = read_layers(path)
    low, high = (-256.0, 255.0) if file.graded else (0.0, 1.0)
    nodes: list[Node] = [Input(name="input", shape=file.input_shape, lo=low, hi=high, integer=True)]
    shape: tuple[int, ...] = file.input_shape
    for layer in file.layers:
        nodes += _nodes(layer, nodes[-1].name, shape, path)
        shape = layer.shape
    reduce: Literal["last", "mean"] = "last" if file.layers[-1].neuron.silent else "mean"
    nodes.append(Output(name="output", inputs=(nodes[-1].name,), reduce=reduce))
    return Graph.of(nodes, steps=file.steps, meta={"source": "netx"})


def _nodes(
    layer: NetxLayer, before: str, shape: tuple[int, ...], path: str | os.PathLike[str]
) -> list[Node]:
    """The nodes of one layer: maps, their sum, the neurons."""
    name = layer.name
    nodes: list[Node] = []
    bias = None if layer.bias is None else layer.bias.astype(np.float64)
    model, bias = _model(layer, bias, path)
    if layer.kind == "input":
        whole = np.array(float(layer.weight))
        nodes.append(Scale(name=f"{name}.in", inputs=(before,), scale=whole, shift=bias))
    elif layer.kind == "conv":
        nodes.append(
            Conv(
                name=f"{name}.in",
                inputs=(before,),
                weight=layer.weight.astype(np.float64),
                bias=None if bias is None else _spread(bias.reshape(-1), layer.shape[:1]),
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
            )
        )
    else:
        nodes += _dense(layer, before, shape, bias)
    last = nodes[-1].name
    return [*nodes, Neuron(name=name, inputs=(last,), model=model)]


def _dense(
    layer: NetxLayer, before: str, shape: tuple[int, ...], bias: np.ndarray | None
) -> list[Node]:
    """The maps of a dense layer, one for each of its delays, and of its recurrence, summed."""
    name, weight = layer.name, layer.weight.astype(np.float64)
    nodes: list[Node] = []
    if len(shape) > 1:
        nodes.append(Flatten(name=f"{name}.flat", inputs=(before,)))
        before = nodes[-1].name
    delay = np.zeros_like(layer.weight) if layer.delay is None else layer.delay
    terms: list[str] = []
    for steps in np.unique(delay):
        source, terms = before, [*terms, f"{name}.in{steps}"]
        if steps:
            source, n = f"{name}.delay{steps}", (layer.weight.shape[1],)
            nodes.append(Delay(name=source, inputs=(before,), steps=int(steps), shape=n))
        part = np.where(delay == steps, weight, 0.0)
        more = None if bias is None or len(terms) > 1 else _spread(bias, layer.shape)
        nodes.append(Dense(name=terms[-1], inputs=(source,), weight=part, bias=more))
    if layer.weight_rec is not None:
        nodes.append(Delay(name=f"{name}.past", inputs=(name,), steps=1, shape=layer.shape))
        back = layer.weight_rec.astype(np.float64)
        nodes.append(Dense(name=f"{name}.back", inputs=(f"{name}.past",), weight=back))
        terms.append(f"{name}.back")
    if len(terms) > 1:
        nodes.append(Join(name=f"{name}.sum", inputs=tuple(terms), op="add"))
    return nodes


def _model(
    layer: NetxLayer, bias: np.ndarray | None, path: str | os.PathLike[str]
) -> tuple[NeuronModel, np.ndarray | None]:
    """(the neurons in floats, the bias that is left to add to what arrives).

    Lava adds the bias to v, past the current. Where the current has no memory that is the same;
    otherwise the resting value of a leaky v says it.
    """
    n = layer.neuron
    alpha = _plain(1 - (np.asarray(n.du) + 1) / 4096)
    beta = _plain(1 - np.asarray(n.dv) / 4096)
    leak: Any = 0.0
    if layer.kind == "input":
        alpha = 0.0
    if bias is not None and np.any(alpha):
        if np.any(np.asarray(beta) == 1.0):
            raise UnsupportedError(
                f"netx file '{path}': layer {layer.index}: its bias acts past a current with "
                "memory, on a v without leak, which a float graph cannot say; use "
                "ranvier.deploy.netx_file.read_program"
            )
        leak, bias = _plain(bias / (1 - np.asarray(beta))), None
    if n.silent:
        return CubaLI(alpha=alpha, beta=beta, v_leak=leak), bias
    rest: dict[str, Any] = {"beta": beta, "v_threshold": _plain(n.vth), "v_leak": leak}
    return CubaLIF(alpha=alpha, **rest) if np.any(alpha) else LIF(**rest), bias


def _spread(bias: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(bias, shape).copy()


def _plain(value: Any) -> Any:
    """A float, or an array of floats where there are several."""
    array = np.asarray(value, np.float64)
    return float(array.reshape(())) if array.size == 1 else array
