"""netx files as Programs: the integers as Lava applies them."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from ranvier.deploy.align import align
from ranvier.deploy.cells import BIAS_MANT_MAX, VTH_MAX, Cell
from ranvier.deploy.program import (
    ConvMap,
    DenseMap,
    LinearMap,
    OneToOne,
    Population,
    Program,
    Projection,
    Readout,
)
from ranvier.export.netx_layers import BIAS_EXP, NetxFile, NetxLayer, read_layers
from ranvier.train.errors import RangeError, RanvierError, UnsupportedError

INPUT_RANGE = (-256, 255)  # what an input layer's transform takes: pixels, signed or not


def read_program(path: str | os.PathLike[str]) -> Program:
    """The aligned Program that computes what lava-dl's netx makes of the file at `path`.

    Populations are named layer0, layer1 ... after the file's layers (a flatten has none), the input
    is "input". An input layer with neurons takes whole numbers, any other network plain spikes. A
    last layer whose threshold is out of reach is read by its membrane.
    Raises FormatError where it is no netx file; UnsupportedError, naming the layer, for what netx
    cannot run or runs differently from what the file says.
    """
    file = read_layers(path)
    populations = {"input": _input(file)}
    projections: dict[str, Projection] = {}
    before = "input"
    for layer in file.layers:
        try:
            populations[layer.name] = _population(layer)
            for p in _projections(layer, before):
                projections[p.name] = p
        except RanvierError as error:
            raise type(error)(f"netx file '{path}': layer {layer.index}: {error}") from error
        before = layer.name
    silent = file.layers[-1].neuron.silent
    return align(
        Program(
            populations=populations,
            projections=projections,
            readout=Readout(population=before, kind="membrane" if silent else "spikes"),
            steps=file.steps,
            meta={"source": "netx", "layers": len(file.layers)},
        )
    )


def _input(file: NetxFile) -> Population:
    low, high = INPUT_RANGE if file.graded else (0, 1)
    return Population(name="input", shape=file.input_shape, lo=low, hi=high)


def _population(layer: NetxLayer) -> Population:
    neuron = layer.neuron
    mantissa, exponent = _bias(layer)
    cell = Cell(
        # An input layer gets its numbers as a bias, past the current: as if that had no memory.
        du=4095 if layer.kind == "input" else neuron.du,
        dv=neuron.dv,
        vth=VTH_MAX if neuron.silent else neuron.vth,
        bias_mant=mantissa,
        bias_exp=exponent,
        reset="none" if neuron.silent else "zero",
    )
    return Population(name=layer.name, shape=layer.shape, cell=cell, origin=layer.name)


def _bias(layer: NetxLayer) -> tuple[np.ndarray | int, int]:
    """(mantissa, exponent) of the bias, with the largest exponent where 12 bits are too few."""
    if layer.bias is None:
        return 0, 0
    if np.abs(layer.bias).max() <= BIAS_MANT_MAX:
        return layer.bias, BIAS_EXP
    if (layer.bias % 2).any() or np.abs(layer.bias).max() > 2 * BIAS_MANT_MAX:
        raise UnsupportedError(
            f"its bias reaches {np.abs(layer.bias).max()} * 2**{BIAS_EXP}; the chip holds "
            f"{BIAS_MANT_MAX} * 2**7"
        )
    return layer.bias // 2, BIAS_EXP + 1


def _projections(layer: NetxLayer, before: str) -> list[Projection]:
    """The synapses into a layer; one projection for each of its delays."""
    name = f"{before}>{layer.name}"
    plain = Projection(name=name, source=before, target=layer.name, map=_map(layer))
    if layer.kind == "input":
        weight, exponent = _fitted(int(layer.weight))
        one = OneToOne(weight=np.array(weight, np.int16), shape=layer.shape)
        return [replace(plain, map=one, exponent=exponent)]
    found = [plain] if layer.delay is None else _by_delay(plain, layer.delay)
    if layer.weight_rec is not None:
        back = DenseMap(weight=layer.weight_rec.astype(np.int16))
        loop = f"{layer.name}>{layer.name}"
        found.append(Projection(name=loop, source=layer.name, target=layer.name, map=back, lag=1))
    return found


def _map(layer: NetxLayer) -> LinearMap:
    weight = layer.weight.astype(np.int16)
    if layer.kind == "input":
        return OneToOne(weight=np.ones((), np.int16), shape=layer.shape)
    if layer.kind != "conv":
        return DenseMap(weight=weight)
    return ConvMap(
        weight=weight,
        in_shape=(layer.in_shape[0], layer.in_shape[1], layer.in_shape[2]),
        out_shape=(layer.shape[0], layer.shape[1], layer.shape[2]),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )


def _fitted(weight: int) -> tuple[int, int]:
    """(mantissa, exponent) of the input layer's weight, which Lava holds in 16 bits."""
    exponent = 0
    while not -256 <= weight <= 255:
        if weight % 2 or exponent == 7:
            raise RangeError("its 'weight' needs more than 8 bits")
        weight, exponent = weight // 2, exponent + 1
    return weight, exponent


def _by_delay(p: Projection, delay: np.ndarray) -> list[Projection]:
    parts = []
    for steps in np.unique(delay):
        weight = np.where(delay == steps, p.map.weight, 0).astype(np.int16)
        if weight.any():
            parts.append(
                replace(p, name=f"{p.name}+{steps}", map=DenseMap(weight=weight), lag=int(steps))
            )
    return parts or [p]
