"""Quantization-aware training: the network computes with the weights and thresholds of its Program.

`fit(..., qat=True)` takes 8 bits; `fit(..., qat=FakeQuant(bits=4))` another number. It is meant for a
network that is trained already: `fine_tune` does all of it. On first use the network is traced and
compiled as it stands; from the Program come, for each layer, the factor between its float weights and
the chip's whole numbers (batch norm, pooling and the population's scales included) and, for each
population, its scales. Every forward pass then rounds by these factors, with the compiler's own rounding
and clipping; gradients pass straight through what was not clipped.

Batch norm keeps its statistics and its gain meanwhile, as the chip does: both stand in the factors, and
a weight that is rounded for one gain is off the grid for another. Its bias learns. So the scales stay
those of the first compilation, and `compile(graph, like=hook.program(net))` gives exactly the program
that the network was trained for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ranvier.deploy.chip import LOIHI2, Chip
from ranvier.train.errors import RangeError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ranvier.deploy.options import Thresholds
    from ranvier.deploy.program import Program
    from ranvier.export.graph import Graph


@dataclass(frozen=True, eq=False)
class LayerGrid:
    """Whole numbers of a layer: weight * factor, rounded to multiples of step, clipped to low..high.

    projection  whose they are; of a layer that feeds several targets, the copy with the finest grid:
                that of the residual stream, where a neuron behind it has a coarser one of its own
    """

    projection: str
    factor: np.ndarray  # [C_out, 1, ...]
    low: int
    high: int
    step: int

    def width(self) -> float:
        """The mean distance of two neighboring weights."""
        return float((self.step / np.abs(self.factor)).mean())


@dataclass(frozen=True, eq=False)
class NetGrid:
    """layer -> LayerGrid, and population -> scale (one, or one a channel), both by module path."""

    layers: dict[str, LayerGrid]
    scales: dict[str, np.ndarray]
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
    thresholds   as `compile` takes them
    Raises RangeError for bits that the chip does not have, UnsupportedError for sliding windows; what
    cannot be compiled raises as `compile` does.
    """

    def __init__(
        self,
        bits: int = 8,
        calibration: Any = None,
        chip: Chip = LOIHI2,
        thresholds: Thresholds = "population",
    ) -> None:
        if not 1 <= bits <= 8:
            raise RangeError(f"qat: {bits} weight bits; the chip holds 1..8")
        self.bits, self.calibration, self.chip = bits, calibration, chip
        self.thresholds: Thresholds = thresholds
        self._grids: WeakKeyDictionary[nn.Module, tuple[NetGrid, float]] = WeakKeyDictionary()

    @contextmanager
    def __call__(self, net: nn.Module) -> Iterator[None]:
        grid = self._grid(net)
        swapped: list[Swapped] = []
        modules = dict(net.named_modules())
        norms = [m for m in modules.values() if _is_norm(m)]
        learning = [m for m in norms if m.training]
        try:
            for norm in learning:  # the factors hold its statistics and its gain: they must stay
                norm.training = False
            for norm in (m for m in norms if m.weight is not None):
                _swap(norm, "weight", _held_still(norm.weight), swapped)
            for name, layer in grid.layers.items():
                weight = modules[name]._parameters["weight"]
                assert weight is not None
                _swap(modules[name], "weight", _rounded(weight, layer), swapped)
            for name, scale in grid.scales.items():
                threshold = getattr(modules[name], "threshold", None)
                if threshold is not None:
                    _swap(modules[name], "threshold", _threshold(threshold, scale), swapped)
                beta = getattr(modules[name], "beta", None)
                if beta is not None and "beta" in _held(modules[name]):
                    _swap(modules[name], "beta", _nearest(beta, 4096.0), swapped)
            yield
        finally:
            for norm in learning:
                norm.training = True
            for place in reversed(swapped):
                del place.module.__dict__[place.name]
                place.store.clear()  # put back whole: the order is what state_dict and optimizers see
                place.store.update(place.before)

    def _grid(self, net: nn.Module) -> NetGrid:
        """Made on first use, and again where batch norms have learned without this hook."""
        norms = sum(float(t.detach().sum()) for t in _norm_tensors(net))
        known = self._grids.get(net)
        if known is None or known[1] != norms:
            known = (make_grid(net, self.bits, self.sample(net), self.chip, self.thresholds), norms)
            self._grids[net] = known
        return known[0]

    def sample(self, net: nn.Module) -> torch.Tensor:
        """The calibration data, on the CPU."""
        import torch

        if self.calibration is None:
            generator = torch.Generator().manual_seed(0)
            return torch.rand(8, *net.input_shape, generator=generator)  # type: ignore[misc]
        x = self.calibration
        return x.detach().cpu() if torch.is_tensor(x) else torch.from_numpy(np.asarray(x))

    def program(self, net: nn.Module) -> Program:
        """The program whose scales the network was trained for: `compile(graph, like=...)`."""
        return self._grid(net).program


def fake_quant(net: nn.Module) -> Any:
    """The hook of `fit(qat=True)`: 8 bits."""
    return _EIGHT(net)


_EIGHT = FakeQuant()
FINE_TUNE: dict[str, Any] = {
    "epochs": 1, "batch_size": 64, "lr": 5e-4, "schedule": "cosine", "logit_scale": 8.0,
    "progress": False,
}  # fmt: skip
ALIKE = 1e-5  # of a threshold: thresholds that differ less are one


def fine_tune(
    net: nn.Module,
    train: Any,
    bits: int = 4,
    *,
    calibration: Any,
    chip: Chip = LOIHI2,
    thresholds: Thresholds = "population",
    **options: Any,
) -> Program:
    """The Program of a network after quantization-aware training, which changes `net` in place.

    train        the Dataset to train on
    calibration  real input, as `compile` takes it
    options      of `fit`, over FINE_TUNE
    Raises as `fit` and `compile` do.
    """
    from ranvier.deploy.compiler import compile
    from ranvier.export.tracer import trace
    from ranvier.train.loop import fit

    hook = FakeQuant(bits, calibration, chip, thresholds)
    fit(net, train, qat=hook, **{**FINE_TUNE, **options})
    net.eval()
    sample = hook.sample(net)
    graph = trace(net, sample[:4])
    return compile(graph, chip, sample.numpy(), bits, like=hook.program(net))


def make_grid(
    net: nn.Module,
    bits: int,
    sample: torch.Tensor,
    chip: Chip,
    thresholds: Thresholds = "population",
) -> NetGrid:
    """The grids of a network as it stands, from its Program."""
    import torch

    from ranvier.deploy.compiler import compile
    from ranvier.export.tracer import trace

    was_training = net.training
    with torch.no_grad():
        graph = trace(net, sample, verify=False)
    net.train(was_training)
    _refuse_windows(graph)
    x = sample.cpu().numpy()
    program = compile(graph, chip, x, bits, thresholds=thresholds)
    lowered = graph.lower(str(program.meta["joins"]))
    modules = dict(net.named_modules())
    layers: dict[str, LayerGrid] = {}
    for name, projection in program.projections.items():
        own = name.split("[")[0]  # a layer that feeds several targets has a copy for each
        weight = modules[own]._parameters.get("weight") if own in modules else None
        if weight is None or own != name and len(projection.map.weight) != len(weight):
            continue  # no layer's, or a copy with channels added on the way
        found = _layer_grid(program, lowered, name, modules[own], bits)
        layers[own] = min(layers.get(own, found), found, key=LayerGrid.width)
    scales = {
        name: p.scale
        for name, p in program.populations.items()
        if name in modules and p.cell is not None and p.cell.kind == "cuba"
    }
    return NetGrid(layers, scales, program)


def _refuse_windows(graph: Graph) -> None:
    """Raises UnsupportedError for neurons whose taps multiply the weights before they are rounded."""
    from ranvier.export.neurons import SlidingWindow
    from ranvier.export.nodes import Neuron

    for node in graph:
        if isinstance(node, Neuron) and isinstance(node.model, SlidingWindow):
            raise UnsupportedError(
                f"qat: the weights into '{node.name}' are rounded anew for each tap of its window, which "
                "no one weight can stand for; train it in float and compile it, with 8 bits or "
                "thresholds='channel'"
            )


def _layer_grid(
    program: Program, lowered: Graph, name: str, module: nn.Module, bits: int
) -> LayerGrid:
    from ranvier.deploy.currents import by_row, gain_of, message_units
    from ranvier.deploy.quantize import grid
    from ranvier.export.nodes import Neuron

    projection = program.projections[name]
    source = program.populations[projection.source]
    target = program.populations[projection.target]
    weight = module._parameters["weight"]
    assert weight is not None
    own = weight.detach().cpu().double().numpy()
    folded = np.asarray(lowered[name].weight, np.float64)  # type: ignore[union-attr]
    share = _share(own.reshape(len(own), -1), folded.reshape(len(own), -1))
    scale = np.asarray(target.scale, np.float64).reshape(-1)
    rows = (share * scale / 2**projection.exponent).reshape(-1, *[1] * (own.ndim - 1))
    neuron = lowered[projection.target]
    gain = gain_of(neuron.model) if isinstance(neuron, Neuron) else 1.0
    rows = rows * (gain if np.size(gain) == 1 else by_row(gain, own, target.shape))
    low, high, step = grid(folded, bits)
    units = message_units(lowered[name], own, source)  # type: ignore[arg-type]
    return LayerGrid(name, rows / units, low, high, step)


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


def _nearest(value: torch.Tensor, scale: Any) -> torch.Tensor:
    """value rounded to multiples of 1 / scale, gradient straight through."""
    import torch

    return value + (torch.round(value.detach() * scale) / scale - value.detach())


def _threshold(value: torch.Tensor, scale: np.ndarray) -> torch.Tensor:
    """A threshold as the chip holds it; one for all channels where theirs come out alike."""
    import torch

    units = torch.as_tensor(scale, dtype=value.dtype, device=value.device)
    found = _nearest(value, units)
    alike = found.numel() > value.numel() and bool((found - value).abs().max() < ALIKE)
    return value if alike else found


def _held_still(value: torch.Tensor) -> torch.Tensor:
    """The same values with a gradient of zero, which every optimizer and process still sees."""
    return value.detach() + 0.0 * value


def _is_norm(module: nn.Module) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm)


def _norm_tensors(net: nn.Module) -> Iterator[torch.Tensor]:
    """What of the batch norms stands in the factors."""
    for module in net.modules():
        if _is_norm(module):
            held = _held(module)
            yield from (held[k] for k in ("weight", "running_var") if held.get(k) is not None)


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
