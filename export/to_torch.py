"""Graph -> torch: a step module with snntorch's neurons, for any loop over time.

snntorch has no word for some models (a leak towards another value, v_reset, >= for >, a sliding
window, ...); those run by the NeuronModel itself, inside `Cell`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import snntorch
import torch
from torch import Tensor, nn

from ranvier.export.graph import Graph
from ranvier.export.interpret import apply
from ranvier.export.neurons import IF, LIF, CubaLIF, Membrane, NeuronModel, Param
from ranvier.export.nodes import (
    Conv,
    Delay,
    Dense,
    Flatten,
    Input,
    Neuron,
    Node,
    Norm,
    Opaque,
    Output,
    Pool,
)
from ranvier.train import neurons as ours
from ranvier.train.errors import UnsupportedError


def to_snntorch(graph: Graph) -> StepNet:
    """The graph as a torch module: `net(x_t)` is one time step, x_t [batch, *shape] -> the output.

    Its states stay inside; `net.reset()` clears them. `net.steps` and `net.readout` are the
    graph's. Modules bear the nodes' names; weights are Parameters. The module is in eval mode.
    Raises UnsupportedError for an Opaque node that cannot be run, or only over all steps.
    """
    for node in graph:
        if isinstance(node, Opaque) and (node.function is None or node.meta.get("over_time")):
            raise UnsupportedError(
                f"to_snntorch: '{node.name}' ({node.kind}) cannot run step by step: {node.reason}"
            )
    return StepNet(graph).eval()


class StepNet(nn.Module):
    """One step of a graph; made by `to_snntorch`."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.steps = graph.steps
        self.readout = graph.outputs[0].reduce
        self._parts: dict[str, str] = {}
        self._past: dict[str, list[Tensor]] = {}
        for node in graph:
            if not isinstance(node, (Input, Output, Delay)):
                self._parts[node.name] = place(self, node.name, module_of(graph, node))

    def reset(self) -> None:
        """Clears all states."""
        self._past = {}
        for module in self.modules():
            if isinstance(module, Cell):
                module.state = {}
            elif isinstance(module, snntorch.SpikingNeuron):
                module.reset_mem()

    def step(self, x: Tensor) -> Tensor:
        """As `net(x)`."""
        out: Tensor = self(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Tensor] = {}
        for node in self.graph:
            if isinstance(node, Input):
                values[node.name] = x
            elif isinstance(node, Delay):
                past = self._past.get(node.name, [])
                full = len(past) == node.steps
                values[node.name] = past[0] if full else x.new_zeros(len(x), *node.shape)
            elif isinstance(node, Output):
                values[node.name] = self._observed(node, values)
            else:
                part = self.get_submodule(self._parts[node.name])
                values[node.name] = part(*(values[i] for i in node.inputs))
        for node in self.graph:
            if isinstance(node, Delay):
                kept = [*self._past.get(node.name, []), values[node.inputs[0]]]
                self._past[node.name] = kept[-node.steps :]
        return values[self.graph.outputs[0].name]

    def _observed(self, node: Output, values: dict[str, Tensor]) -> Tensor:
        source = node.inputs[0]
        if node.observe == "out":
            return values[source]
        population = self.get_submodule(self._parts[source])
        assert isinstance(population, Population)
        return population.observe(node.observe)


def place(root: nn.Module, name: str, module: nn.Module) -> str:
    """Puts `module` under its dotted name, and returns where it stands."""
    *path, last = name.split(".")
    here = root
    for part in path:
        if not isinstance(getattr(here, part, None), nn.Module):
            if hasattr(here, part) or not part:
                return _flat(root, name, module)
            here.add_module(part, nn.Module())
        here = getattr(here, part)
    if hasattr(here, last) or not last:
        return _flat(root, name, module)
    here.add_module(last, module)
    return name


def _flat(root: nn.Module, name: str, module: nn.Module) -> str:
    """Under the name without dots, for names that a module already uses for something else."""
    flat = "node_" + name.replace(".", "_")
    while hasattr(root, flat):
        flat += "_"
    root.add_module(flat, module)
    return flat


# layers


def tensor(a: Any) -> Tensor:
    """A copy as a float tensor."""
    made = torch.tensor(np.asarray(a))
    return made if made.dtype in (torch.float32, torch.float64) else made.float()


def module_of(graph: Graph, node: Node) -> nn.Module:
    """The torch module of one node."""
    match node:
        case Conv():
            return conv(node)
        case Dense() if node.out_shape is None:
            layer = nn.Linear(node.weight.shape[1], node.weight.shape[0], node.bias is not None)
            return filled(layer, node.weight, node.bias)
        case Norm():
            return norm(graph, node)
        case Pool() if node.op != "sum":
            kinds = {
                ("avg", 1): nn.AvgPool1d,
                ("avg", 2): nn.AvgPool2d,
                ("max", 1): nn.MaxPool1d,
                ("max", 2): nn.MaxPool2d,
            }
            return kinds[node.op, len(node.kernel)](node.kernel, node.stride, node.padding)
        case Flatten():
            end = node.end + 1 if node.end >= 0 else node.end
            return nn.Flatten(node.start + 1, end)
        case Neuron():
            return Population(node)
        case _:
            return Operation(node)


def filled(layer: Any, weight: np.ndarray, bias: np.ndarray | None) -> nn.Module:
    layer.weight = nn.Parameter(tensor(weight))
    if bias is not None:
        layer.bias = nn.Parameter(tensor(bias))
    made: nn.Module = layer
    return made


def conv(node: Conv) -> nn.Module:
    kind: Any = nn.Conv1d if node.weight.ndim == 3 else nn.Conv2d
    made = kind(
        node.weight.shape[1] * node.groups,
        node.weight.shape[0],
        node.weight.shape[2:],
        node.stride,
        node.padding,
        node.dilation,
        node.groups,
        node.bias is not None,
    )
    return filled(made, node.weight, node.bias)


def norm(graph: Graph, node: Norm) -> nn.Module:
    image = len(graph.shapes[node.name]) == 3
    made: Any = (nn.BatchNorm2d if image else nn.BatchNorm1d)(len(node.mean), node.eps)
    made.running_mean, made.running_var = tensor(node.mean), tensor(node.var)
    return filled(made, node.gamma, node.beta)


class Operation(nn.Module):
    """A node without state and without parameters to learn."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, *sources: Tensor) -> Tensor:
        return apply(self.node, list(sources))

    def extra_repr(self) -> str:
        return f"{type(self.node).__name__} '{self.node.name}'"


# neurons


class Population(nn.Module):
    """A population: an optional constant current and gain, then an snntorch neuron or a Cell."""

    gain: Tensor | None
    bias: Tensor | None

    def __init__(self, node: Neuron) -> None:
        super().__init__()
        self.neuron, gain = neuron_of(node.model)
        self.register_buffer("gain", None if gain is None else tensor(gain))
        self.register_buffer("bias", None if node.bias is None else tensor(node.bias))

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            x = x + self.bias
        if self.gain is not None:
            x = self.gain * x
        out: Tensor = self.neuron(x)
        return out

    def observe(self, state: str) -> Tensor:
        """The membrane "v" or the current "u" after the last step."""
        if isinstance(self.neuron, Cell):
            return self.neuron.state[state]
        found: Tensor = getattr(self.neuron, {"v": "mem", "u": "syn"}[state])
        return found


class Cell(nn.Module):
    """A NeuronModel as a module; its state stays inside."""

    def __init__(self, model: NeuronModel) -> None:
        super().__init__()
        self.model = model
        self.state: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        out, self.state = self.model.step(self.state or self.model.initial(x), x)
        sent: Tensor = out
        return sent

    def extra_repr(self) -> str:
        return type(self.model).__name__


def neuron_of(model: NeuronModel) -> tuple[nn.Module, Param | None]:
    """(an snntorch neuron with hidden states, the gain of its input), or (a Cell, None)."""
    gain = _gain(model)
    if not isinstance(model, (IF, LIF, CubaLIF)) or gain is None or not _plain(model):
        return Cell(model), None
    beta, threshold = tensor(model.beta).float(), tensor(model.v_threshold).float()
    options: dict[str, Any] = {"threshold": threshold, "reset_mechanism": model.reset}
    cuba = isinstance(model, CubaLIF)
    if isinstance(model, CubaLIF):
        options["alpha"] = tensor(model.alpha).float()
    if model.timing == "immediate" and model.reset != "none":
        made: nn.Module = (ours.CUBA if cuba else ours.LIF)(
            beta=beta, v_reset=_number(model.v_reset), **options
        )
    else:
        delay = model.timing != "carry"
        kind = snntorch.Synaptic if cuba else snntorch.Leaky
        made = kind(beta=beta, init_hidden=True, reset_delay=delay, **options)
    return made, None if np.all(np.asarray(gain) == 1.0) else gain


def _gain(model: NeuronModel) -> Param | None:
    """What the input is multiplied by before the neuron; None where that does not say it all."""
    if isinstance(model, CubaLIF):
        return model.w_in if np.all(np.asarray(model.r) == 1.0) else None
    return model.r if isinstance(model, Membrane) else None


def _number(value: Param) -> float:
    return float(np.asarray(value).reshape(-1)[0]) if np.size(value) else 0.0


def _plain(model: Membrane) -> bool:
    """Whether snntorch (or our subclass of it) follows exactly this rule."""
    decays = [model.beta, *([model.alpha] if isinstance(model, CubaLIF) else [])]
    inside = all(np.all((np.asarray(d) >= 0) & (np.asarray(d) <= 1)) for d in decays)
    if not inside or not model.strict or np.any(np.asarray(model.v_leak) != 0):
        return False
    v_reset = np.asarray(model.v_reset)
    if model.reset != "zero":
        # snntorch does not know the field; it plays no part in these resets
        return model.timing != "discard" or model.reset == "none"
    if model.timing == "immediate":
        return v_reset.size == 1
    if np.any(v_reset != 0):
        return False
    if model.timing == "carry":  # below zero it would double the membrane
        return bool(np.all(np.asarray(model.v_threshold) >= 0))
    return model.timing == ("discard" if isinstance(model, CubaLIF) else "delayed")
