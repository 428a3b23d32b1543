"""The same network as a plain snntorch step loop in float: the other side of the benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ranvier.deploy.program import ConvMap, DenseMap, LinearMap, OneToOne, Population, Program
from ranvier.train.errors import UnsupportedError


class StepLoop:
    """A Program of `bench_nets` as torch layers and `snn.Leaky`, run step by step.

    Weights are divided by the threshold, which is 1 then. Sources that share a map are added before
    it, populations of logic are max-pools and maxima, relays are currents: as one would write it.
    """

    def __init__(self, program: Program, device: str = "cpu") -> None:
        import torch

        self.program, self.device = program, torch.device(device)
        self.neurons: dict[str, Any] = {}
        self.maps: dict[str, list[tuple[list[str], LinearMap, Any]]] = {}
        for population in program:
            if population.cell is None:
                continue
            self.maps[population.name] = self._maps(population)
            if not population.cell.graded and not is_logic(population):
                self.neurons[population.name] = self._leaky(population)

    def _leaky(self, population: Population) -> Any:
        import snntorch as snn

        assert population.cell is not None
        beta = float((4096 - np.asarray(population.cell.dv)) / 4096)
        return snn.Leaky(beta=beta, threshold=1.0, reset_mechanism="zero").to(self.device)

    def _maps(self, population: Population) -> list[tuple[list[str], LinearMap, Any]]:
        shared: dict[int, tuple[list[str], LinearMap, Any]] = {}
        for p in self.program.into(population.name):
            key = id(p.map)
            if key not in shared:
                shared[key] = ([], p.map, self._weight(population, p.map))
            shared[key][0].append(p.source)
        return list(shared.values())

    def _weight(self, population: Population, linear: LinearMap) -> Any:
        import torch

        assert population.cell is not None
        scale = 1.0 if population.cell.graded else 1.0 / max(1, int(np.max(population.cell.vth)))
        return torch.as_tensor(linear.weight * scale, dtype=torch.float32, device=self.device)

    def __call__(self, x: np.ndarray) -> tuple[Any, dict[str, float]]:
        """(output spikes summed over time, last step's rates by population) for x `[time, batch, ...]`."""
        import torch

        series = torch.as_tensor(x, dtype=torch.float32, device=self.device)
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

    def _drive(self, name: str, values: dict[str, Any], membranes: dict[str, Any]) -> Any:
        import torch

        population = self.program.populations[name]
        if is_logic(population):
            sources = [values[s] for names, _, _ in self.maps[name] for s in names]
            linear = self.maps[name][0][1]
            if isinstance(linear, ConvMap):
                return torch.nn.functional.max_pool2d(sources[0], 2)
            return torch.stack(sources).amax(0) if len(sources) > 2 else torch.maximum(*sources)
        current: Any = None
        for names, linear, weight in self.maps[name]:
            source = values[names[0]]
            for other in names[1:]:
                source = source + values[other]
            part = apply(linear, weight, source)
            current = part if current is None else current + part
        if name not in self.neurons:
            return current
        spikes, membranes[name] = self.neurons[name](current, membranes[name])
        return spikes


def is_logic(population: Population) -> bool:
    """Whether a population only takes the OR of spikes: no memory, and one spike is enough."""
    cell = population.cell
    return cell is not None and not cell.graded and bool(np.all(np.asarray(cell.dv) == 4096))


def apply(linear: LinearMap, weight: Any, x: Any) -> Any:
    from torch.nn import functional as F

    match linear:
        case ConvMap():
            return F.conv2d(
                x, weight, None, linear.stride, linear.padding, linear.dilation, linear.groups
            )
        case DenseMap():
            return F.linear(x.flatten(1), weight)
        case OneToOne():
            return x * weight
    raise UnsupportedError(f"bench: {type(linear).__name__}")
