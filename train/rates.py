"""Firing rates of a running network, by forward hooks on its snntorch neurons."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn


class FiringRates:
    """Counts spikes while it is entered; works for step-by-step and multi-step networks.

    >>> with FiringRates(net) as rates: net(x)      # doctest: +SKIP
    >>> rates.mean(), rates.by_layer()              # doctest: +SKIP

    keep_graph   keep each layer's mean as a tensor with gradient, for the rate penalty (`tensors`)
    """

    def __init__(self, net: nn.Module, keep_graph: bool = False) -> None:
        self.enabled = True
        self.keep_graph = keep_graph
        self._net = net
        self._handles: list[Any] = []
        self._sums: dict[str, list[Tensor]] = {}
        self._counts: dict[str, int] = {}

    def __enter__(self) -> FiringRates:
        for name, module in self._net.named_modules():
            if _spikes(module):
                hook = self._hook(name or type(module).__name__)
                self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Any:
        def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not self.enabled:
                return
            spikes: Tensor = output[0] if isinstance(output, tuple) else output
            counted = spikes if self.keep_graph else spikes.detach()
            self._sums.setdefault(name, []).append(counted.float().sum())
            self._counts[name] = self._counts.get(name, 0) + spikes.numel()

        return count

    def clear(self) -> None:
        self._sums.clear()
        self._counts.clear()

    def tensors(self) -> list[Tensor]:
        """Each layer's spikes per neuron and step, as tensors."""
        return [sum(sums[1:], sums[0]) / self._counts[name] for name, sums in self._sums.items()]

    def by_layer(self) -> dict[str, float]:
        """Layer -> spikes per neuron and step."""
        return {name: self._total(name) / count for name, count in self._counts.items()}

    def mean(self) -> float:
        """Spikes per neuron and step over all layers; 0 where nothing ran."""
        n = sum(self._counts.values())
        return sum(map(self._total, self._counts)) / n if n else 0.0

    def _total(self, name: str) -> float:
        return sum(float(spikes.detach()) for spikes in self._sums[name])


def _spikes(module: nn.Module) -> bool:
    """snntorch neurons, save those that give out their membrane (a readout without spikes)."""
    import snntorch

    return isinstance(module, snntorch.SpikingNeuron) and getattr(module, "spiking", True)
