"""The same network as a plain snntorch step loop in float: the other side of the benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ranvier.deploy.cells import Cell
from ranvier.deploy.program import ConvMap, DenseMap, LinearMap, OneToOne, Population, Program
from ranvier.train.errors import RanvierError, UnsupportedError

FEW = 2  # samples that are compared
ROUNDING = 0.02  # share of spikes that rounding may change: 0.01 measured (MS, 20 %); of wrong layers: 0.05


class StepLoop:
    """A Program of `bench_nets` as torch layers and `snn.Leaky`, run step by step.

    Weights are divided by the threshold, which is 1 then. Sources that share a map are added before
    it, populations of logic are max-pools and maxima, relays are currents: as one would write it.
    """

    def __init__(self, program: Program, device: str = "cpu") -> None:
        import torch

        self.program, self.device = program, torch.device(device)
        self.neurons: dict[str, Any] = {}
        self.logic = {p.name for p in program if is_logic(program, p)}
        self.biases: dict[str, Any] = {}
        self.maps: dict[str, list[tuple[list[str], LinearMap, Any]]] = {}
        for population in program:
            if population.cell is None:
                continue
            self.maps[population.name] = self._maps(population)
            self.biases[population.name] = self._bias(population)
            if not population.cell.graded and population.name not in self.logic:
                self.neurons[population.name] = self._leaky(population)

    def _leaky(self, population: Population) -> Any:
        import snntorch as snn

        cell = population.cell
        assert cell is not None
        beta = float((4096 - np.asarray(cell.dv).max()) / 4096)
        return snn.Leaky(beta=beta, threshold=1.0, reset_mechanism=cell.reset).to(self.device)

    def _maps(self, population: Population) -> list[tuple[list[str], LinearMap, Any]]:
        shared: dict[tuple[int, int], tuple[list[str], LinearMap, Any]] = {}
        for p in self.program.into(population.name):
            key = (id(p.map), p.exponent)
            if key not in shared:
                weight = self._weight(population, p.map, p.exponent)
                shared[key] = ([], p.map, weight)
            shared[key][0].append(p.source)
        return list(shared.values())

    def _weight(self, population: Population, linear: LinearMap, exponent: int) -> Any:
        import torch

        cell, weight = population.cell, linear.weight
        assert cell is not None
        one = 1.0 if cell.graded else threshold(cell)
        if np.ndim(one) and not isinstance(linear, OneToOne):
            # a threshold for each channel of a convolution, for each neuron of a dense layer
            size = (population.shape[0], -1) if isinstance(linear, ConvMap) else (-1, 1)
            each = np.broadcast_to(one, population.shape).reshape(size)[:, 0]
            one = each.reshape(-1, *[1] * (weight.ndim - 1))
        scaled = weight * float(2**exponent / 2**cell.shift) / one
        return torch.as_tensor(scaled, dtype=torch.float32, device=self.device)

    def _bias(self, population: Population) -> Any:
        """What is added to the membrane each step, in thresholds; None for nothing."""
        import torch

        cell = population.cell
        assert cell is not None
        if cell.graded or not np.any(cell.bias):
            return None
        bias = cell.bias / 64 / threshold(cell)
        return torch.as_tensor(bias, dtype=torch.float32, device=self.device)

    def __call__(self, x: np.ndarray) -> tuple[Any, dict[str, float]]:
        """(output spikes summed over time, last step's rates by population) for x `[time, batch, ...]`."""
        import torch

        series = torch.as_tensor(np.array(x, np.float32), device=self.device)
        membranes = {n: neuron.init_leaky() for n, neuron in self.neurons.items()}
        total: Any = 0
        values: dict[str, Any] = {}
        with torch.no_grad():
            for step in series:
                values = {self.program.input.name: step}
                for name in self.maps:
                    values[name] = self._drive(name, values, membranes)
                total = total + values[self.program.readout.population]
        return total, {n: float((v != 0).float().mean()) for n, v in values.items()}

    def differing(self, series: dict[str, np.ndarray]) -> tuple[int, int]:
        """(spikes compared, spikes that differ), every layer given the messages of an exact run.

        series  population -> what it sent there, `[time, batch, *shape]`. Layer by layer, since one
        spike more behind the first layer makes others everywhere: networks are chaotic
        """
        compared = different = 0
        for name, found in self.driven(series).items():
            compared += found.size
            different += int((found.reshape(series[name].shape) != series[name]).sum())
        return compared, different

    def driven(self, series: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What each neuron layer sends when its sources send `series`, step by step."""
        import torch

        membranes = {n: neuron.init_leaky() for n, neuron in self.neurons.items()}
        sent: dict[str, list[Any]] = {name: [] for name in self.neurons}
        floats = {n: torch.as_tensor(np.array(s, np.float32)) for n, s in series.items()}
        with torch.no_grad():
            for step in range(len(next(iter(floats.values())))):
                values = {name: s[step].to(self.device) for name, s in floats.items()}
                for name in self.neurons:
                    sent[name].append(self._drive(name, values, membranes).cpu())
        return {name: torch.stack(steps).numpy() for name, steps in sent.items()}

    def _drive(self, name: str, values: dict[str, Any], membranes: dict[str, Any]) -> Any:
        current = self.current(name, values)
        if name not in self.neurons:
            return current
        spikes, membranes[name] = self.neurons[name](current, membranes[name])
        return spikes

    def current(self, name: str, values: dict[str, Any]) -> Any:
        """What reaches a population; of one of logic, its spikes."""
        import torch

        population = self.program.populations[name]
        if name in self.logic:
            sources = [values[s] for names, _, _ in self.maps[name] for s in names]
            linear = self.maps[name][0][1]
            if isinstance(linear, ConvMap):
                window = linear.weight.shape[2:]
                pool = torch.nn.functional.max_pool2d
                return pool(sources[0], window, linear.stride, linear.padding)
            return torch.stack(sources).amax(0) if len(sources) > 2 else torch.maximum(*sources)
        current: Any = None
        for names, linear, weight in self.maps[name]:
            source = values[names[0]]
            for other in names[1:]:
                source = source + values[other]
            part = apply(linear, weight, source)
            part = part.reshape(len(part), *population.shape)
            current = part if current is None else current + part
        bias = self.biases[name]
        return current if bias is None else current + bias


def agreement(loop: StepLoop, program: Program, x: np.ndarray) -> str:
    """What differs between a float loop and the exact engine on whole numbers x, in words.

    Raises RanvierError where so much differs that it is another network.
    """
    from ranvier.sim.runner import engines

    trace = engines()["dense"](program, x[:, :FEW], ("spikes",)).trace
    compared, different = loop.differing({n: np.asarray(trace[n].spikes) for n in trace})
    if different > ROUNDING * compared:
        raise RanvierError(
            f"bench: {type(loop).__name__} and the program differ in {different} of {compared} spikes"
        )
    return f"{different} of {compared} spikes differ layer by layer (floats)"


def threshold(cell: Cell) -> Any:
    """What a float loop divides by; whole numbers without memory pass vth where they pass vth + 1/2."""
    vth = np.asarray(cell.vth, float)
    return vth + 0.5 if np.all(np.asarray(cell.dv) == 4096) else np.maximum(1, vth)


def is_logic(program: Program, population: Population) -> bool:
    """Whether a population only takes the OR of spikes, or of a window of them, and forgets."""
    cell = population.cell
    if cell is None or cell.graded or np.any(cell.bias) or np.any(np.asarray(cell.dv) != 4096):
        return False
    into = program.into(population.name)
    least = np.max(np.asarray(cell.vth)) + 1
    enough = all((p.map.weight.astype(np.int64) << p.exponent).min() >= least for p in into)
    plain = all(isinstance(p.map, OneToOne) for p in into)
    window = (
        len(into) == 1 and isinstance(into[0].map, ConvMap) and into[0].map.weight.shape[1] == 1
    )
    depthwise = (
        window and into[0].map.weight.shape[0] == population.shape[0] == into[0].map.in_shape[0]
    )
    return bool(enough and (depthwise or (plain and len(into) > 1)))


def apply(linear: LinearMap, weight: Any, x: Any) -> Any:
    from torch.nn import functional as F

    match linear:
        case ConvMap():
            return F.conv2d(
                x.reshape(len(x), *linear.in_shape),
                weight,
                None,
                linear.stride,
                linear.padding,
                linear.dilation,
                linear.groups,
            )
        case DenseMap():
            return F.linear(x.flatten(1), weight)
        case OneToOne():
            return x.reshape(len(x), *linear.shape) * weight
    raise UnsupportedError(f"bench: {type(linear).__name__}")
