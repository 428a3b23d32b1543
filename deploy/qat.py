"""Quantization-aware training: the network computes with the weights and thresholds of its Program.

`fit(..., qat=True)` takes 8 bits; `fit(..., qat=FakeQuant(bits=4))` another number. Every so many training
steps the network is traced and compiled as it stands; from the Program come, for each layer, the factor
between its float weights and the chip's whole numbers (batch norm, pooling and the population's scale
included) and, for each population, its scale. In between, every forward pass rounds by these factors, with
the compiler's own rounding and clipping; gradients pass straight through what was not clipped. Batch norm
keeps its running statistics meanwhile, as the chip does, and the scales stay those of the first compilation:
`compile(graph, like=hook.program(net))` gives the program that the network was trained for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ranvier.deploy.chip import LOIHI2, Chip
from ranvier.train.errors import RangeError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ranvier.deploy.program import Program
    from ranvier.export.graph import Graph

REFRESH = 100


@dataclass(frozen=True, eq=False)
class LayerGrid:
    """Whole numbers of a layer: weight * factor, rounded to multiples of step, clipped to low..high."""

    factor: np.ndarray  # [C_out, 1, ...]
    low: int
    high: int
    step: int


@dataclass(frozen=True, eq=False)
class NetGrid:
    """layer -> LayerGrid, and population -> scale, both by module path."""

    layers: dict[str, LayerGrid]
    scales: dict[str, float]
    program: Program


@dataclass(frozen=True, eq=False)
class Swapped:
    """A parameter or buffer that was taken out of its module for a while."""

    module: nn.Module
    name: str
    store: dict[str, Any]
    before: dict[str, Any]


class FakeQuant:
    """A hook for `fit` and `evaluate`.

    bits         weight bits, 1..8
    calibration  real input `[batch, *shape]` or `[time, batch, *shape]`, for the range of the input and
                 the choice of scales; None: uniform values in 0..1
    refresh      training steps between two compilations
    Raises RangeError for bits that the chip does not have; what cannot be compiled raises as
    `compile` does.
    """

    def __init__(
        self, bits: int = 8, calibration: Any = None, refresh: int = REFRESH, chip: Chip = LOIHI2
    ) -> None:
        if not 1 <= bits <= 8:
            raise RangeError(f"qat: {bits} weight bits; the chip holds 1..8")
        self.bits, self.calibration, self.refresh, self.chip = bits, calibration, refresh, chip
        self._grids: WeakKeyDictionary[nn.Module, tuple[NetGrid, int]] = WeakKeyDictionary()

    @contextmanager
    def __call__(self, net: nn.Module) -> Iterator[None]:
        grid = self._grid(net)
        swapped: list[Swapped] = []
        modules = dict(net.named_modules())
        norms = [m for m in modules.values() if m.training and _is_norm(m)]
        try:
            for norm in norms:  # the factors hold its running statistics: they must stay
                norm.training = False
            for name, layer in grid.layers.items():
                weight = modules[name]._parameters["weight"]
                assert weight is not None
                _swap(modules[name], "weight", _rounded(weight, layer), swapped)
            for name, scale in grid.scales.items():
                threshold = getattr(modules[name], "threshold", None)
                if threshold is not None:
                    _swap(modules[name], "threshold", _nearest(threshold, scale), swapped)
                beta = getattr(modules[name], "beta", None)
                if beta is not None and "beta" in _held(modules[name]):
                    _swap(modules[name], "beta", _nearest(beta, 4096.0), swapped)
            yield
        finally:
            for norm in norms:
                norm.training = True
            for place in reversed(swapped):
                del place.module.__dict__[place.name]
                place.store.clear()  # put back whole: the order is what state_dict and optimizers see
                place.store.update(place.before)

    def _grid(self, net: nn.Module) -> NetGrid:
        known = self._grids.get(net)
        if known is None or (net.training and known[1] >= self.refresh):
            like = None if known is None else known[0].program
            known = (make_grid(net, self.bits, self.calibration, self.chip, like), 0)
        self._grids[net] = (known[0], known[1] + net.training)
        return known[0]

    def program(self, net: nn.Module) -> Program:
        """The program whose scales the network was trained for: `compile(graph, like=...)`."""
        return self._grid(net).program


def fake_quant(net: nn.Module) -> Any:
    """The hook of `fit(qat=True)`: 8 bits."""
    return _EIGHT(net)


_EIGHT = FakeQuant()


def make_grid(
    net: nn.Module, bits: int, calibration: Any, chip: Chip, like: Program | None = None
) -> NetGrid:
    """The grids of a network as it stands, from its Program; `like` keeps another program's scales."""
    import torch

    from ranvier.deploy.compiler import compile
    from ranvier.export.tracer import trace

    x = calibration
    if x is None:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(8, *net.input_shape, generator=generator)  # type: ignore[misc]
    sample = x if torch.is_tensor(x) else torch.from_numpy(np.asarray(x))
    was_training = net.training
    with torch.no_grad():
        graph = trace(net, sample, verify=False)
    net.train(was_training)
    x = sample.cpu().numpy()
    program = compile(graph, chip=chip, calibration=x, weight_bits=bits, like=like)
    lowered = graph.lower(str(program.meta["joins"]))
    modules = dict(net.named_modules())
    layers = {
        name: _layer_grid(program, lowered, name, modules[name], bits)
        for name in program.projections
        if name in modules and "weight" in modules[name]._parameters
    }
    scales = {
        name: float(np.max(p.scale))
        for name, p in program.populations.items()
        if name in modules and p.cell is not None and p.cell.kind == "cuba"
    }
    return NetGrid(layers, scales, program)


def _layer_grid(
    program: Program, lowered: Graph, name: str, module: nn.Module, bits: int
) -> LayerGrid:
    from ranvier.deploy.quantize import grid

    projection = program.projections[name]
    source = program.populations[projection.source]
    target = program.populations[projection.target]
    weight = module._parameters["weight"]
    assert weight is not None
    own = weight.detach().cpu().double().numpy()
    folded = np.asarray(lowered[name].weight, np.float64)  # type: ignore[union-attr]
    share = _share(own.reshape(len(own), -1), folded.reshape(len(own), -1))
    units = float(np.max(target.scale)) / (
        2**projection.exponent * float(np.max(source.message_scale))
    )
    low, high, step = grid(folded, bits)
    factor = (share * units).reshape(-1, *[1] * (own.ndim - 1))
    return LayerGrid(factor, low, high, step)


def _share(own: np.ndarray, folded: np.ndarray) -> np.ndarray:
    """What batch norm and pooling make of each output's weights: folded holds share * own, perhaps
    several times over; by their extremes, since pooling changes how many there are."""
    top, low = own.max(1), own.min(1)
    size = np.abs(folded).max(1) / np.maximum(np.abs(own).max(1), 1e-30)
    kept = np.abs(folded.max(1) - size * top) <= np.abs(folded.max(1) + size * low)
    share = np.where(kept, size, -size)
    return np.where(size < 1e-12, 1.0, share)


def _rounded(weight: torch.Tensor, grid: LayerGrid) -> torch.Tensor:
    """The weight on its grid; the gradient of what was clipped is zero."""
    import torch

    factor = torch.as_tensor(grid.factor, dtype=weight.dtype, device=weight.device)
    scaled = torch.clamp(weight * factor, grid.low, grid.high)
    whole = torch.round(scaled / grid.step) * grid.step
    return (scaled + (whole - scaled).detach()) / factor


def _nearest(value: torch.Tensor, scale: float) -> torch.Tensor:
    """value rounded to multiples of 1 / scale, gradient straight through."""
    import torch

    return value + (torch.round(value.detach() * scale) / scale - value.detach())


def _is_norm(module: nn.Module) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm)


def _held(module: nn.Module) -> dict[str, Any]:
    return {**module._parameters, **module._buffers}


def _swap(module: nn.Module, name: str, value: Any, swapped: list[Swapped]) -> None:
    """Puts a plain tensor in the place of a parameter or buffer, and remembers what stood there."""
    for store in (module._parameters, module._buffers):
        if name in store:
            swapped.append(Swapped(module, name, store, dict(store)))
            del store[name]
            module.__dict__[name] = value
            return
