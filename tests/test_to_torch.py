"""Graph -> torch: the step module fires as the graph does, and so does what comes back from NIR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snntorch as snn
import torch
from graphs import GRAPHS, MODELS, neuron_graph, recurrent_graph
from torch import nn

from ranvier.export import read_nir, to_snntorch, trace, write_nir
from ranvier.export.graph import Graph
from ranvier.export.neurons import LIF, CubaLIF
from ranvier.export.nodes import Dense, Input, Neuron, Opaque, Output
from ranvier.export.to_torch import Cell, Population
from ranvier.train import create_model
from ranvier.train import neurons as ours
from ranvier.train.errors import UnsupportedError

T, B = 9, 2
RESETS = ("zero", "subtract", "none")


def sample(graph: Graph, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, B, *graph.inputs[0].shape, generator=generator)


def run(net: Any, x: torch.Tensor) -> torch.Tensor:
    net.reset()
    with torch.no_grad():
        return torch.stack([net(x_t) for x_t in x])


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_runs_as_it_is(name: str) -> None:
    """Layers, models, joins, cycles, observed states and biases: equal to the interpreter.

    Layers may round differently by the batch that they see; what fires must be equal.
    """
    graph = GRAPHS[name]
    net, x = to_snntorch(graph), sample(graph)
    out, expected = run(net, x), graph.run(x)
    assert torch.allclose(out, expected, atol=1e-5)
    if all(isinstance(graph[o.inputs[0]], Neuron) for o in graph.outputs):
        binary = graph[graph.outputs[0].inputs[0]].model.binary  # type: ignore[union-attr]
        if binary and graph.outputs[0].observe == "out":
            assert torch.equal(out, expected)


def test_a_second_run_starts_from_rest() -> None:
    graph = recurrent_graph(2)
    net, x = to_snntorch(graph), sample(graph)
    assert torch.equal(run(net, x), run(net, x))
    with torch.no_grad():  # the control: without reset() the states go on
        assert not torch.equal(torch.stack([net(x_t) for x_t in x]), run(net, x))


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (LIF(beta=0.5, reset="zero", timing="delayed"), snn.Leaky),
        (LIF(beta=0.5, reset="subtract", timing="delayed"), snn.Leaky),
        (LIF(beta=0.5, reset="none"), snn.Leaky),
        (LIF(beta=0.5, reset="subtract", timing="carry"), snn.Leaky),
        (LIF(beta=0.5, reset="subtract"), ours.LIF),
        (LIF(beta=0.5, v_reset=-0.5), ours.LIF),
        (LIF(beta=0.5, r=0.25, timing="delayed"), snn.Leaky),
        (CubaLIF(alpha=0.5, beta=0.5, reset="subtract", timing="delayed"), snn.Synaptic),
        (CubaLIF(alpha=0.5, beta=0.5, reset="zero", timing="discard"), snn.Synaptic),
        (CubaLIF(alpha=0.5, beta=0.5, reset="zero", timing="delayed"), Cell),
        (CubaLIF(alpha=0.5, beta=0.5), ours.CUBA),
        (LIF(beta=0.5, v_leak=0.1), Cell),
        (LIF(beta=0.5, strict=False), Cell),
        (LIF(beta=0.5, v_reset=0.2, timing="delayed"), Cell),
    ],
)
def test_snntorch_neurons_where_it_has_the_word(model: Any, kind: type[nn.Module]) -> None:
    net = to_snntorch(neuron_graph(model))
    (population,) = (m for m in net.modules() if isinstance(m, Population))
    assert type(population.neuron) is kind


def test_modules_bear_the_names_of_the_nodes() -> None:
    graph = trace(create_model("resnet-digits", steps=2), torch.rand(1, 1, 8, 8))
    net = to_snntorch(graph)
    named = dict(net.named_modules())
    assert isinstance(named["stage1.0.conv1"], nn.Conv2d)
    assert isinstance(named["stage1.0.norm1"], nn.BatchNorm2d)
    assert isinstance(named["fc"], nn.Linear)
    assert net.steps == 2
    assert net.readout == "mean"


def test_names_that_torch_keeps_for_itself() -> None:
    nodes = [
        Input(name="x", shape=(3,)),
        Dense(name="forward", inputs=("x",), weight=np.ones((2, 3), np.float32)),
        Dense(name="train.", inputs=("forward",), weight=np.ones((2, 2), np.float32)),
        Output(name="out", inputs=("train.",)),
    ]
    net = to_snntorch(Graph.of(nodes))
    assert torch.equal(net(torch.ones(1, 3)), torch.full((1, 2), 6.0))


def test_weights_learn() -> None:
    net = to_snntorch(neuron_graph(LIF(beta=0.9, timing="delayed", v_threshold=0.2)))
    net.train()
    out = sum(net(x_t).sum() for x_t in torch.rand(T, B, 5))
    out.backward()
    weight = dict(net.named_parameters())["fc.weight"]
    assert weight.grad is not None and bool((weight.grad != 0).any())


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("kind", ["leaky", "synaptic"])
def test_snntorch_to_nir_and_back_fires_the_same(
    reset: str, delay: bool, kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "threshold": 0.4,
        "init_hidden": True,
        "reset_mechanism": reset,
        "reset_delay": delay,
    }

    def neuron() -> nn.Module:
        if kind == "leaky":
            return snn.Leaky(beta=0.8, **options)
        return snn.Synaptic(alpha=0.5, beta=0.8, **options)

    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), neuron(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 5), neuron()
    )
    nn.init.uniform_(net[4].weight, -0.2, 0.25)
    x = torch.rand(T, B, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    graph = trace(net, x)
    write_nir(graph, tmp_path / "net.nir")
    back = to_snntorch(read_nir(tmp_path / "net.nir"))
    for m in net.modules():
        if hasattr(m, "reset_mem"):
            m.reset_mem()
    with torch.no_grad():
        expected = torch.stack([net(x_t) for x_t in x])
    assert 0 < expected.mean() < 1
    assert torch.equal(run(back, x), expected)


def test_a_traced_step_net_is_the_graph_again() -> None:
    graph = neuron_graph(LIF(beta=0.9, timing="delayed", v_threshold=0.5))
    again = trace(to_snntorch(graph), torch.rand(B, 5))
    x = sample(graph)
    assert torch.equal(again.run(x), graph.run(x))
    assert again.steps == graph.steps
    assert again.outputs[0].reduce == graph.outputs[0].reduce


def test_an_opaque_node_that_cannot_run_is_refused() -> None:
    odd = Opaque(name="odd", inputs=("x",), kind="softmax", reason="no word", shape=(3,))
    nodes = [Input(name="x", shape=(3,)), odd, Output(name="out", inputs=("odd",))]
    with pytest.raises(UnsupportedError, match="'odd' \\(softmax\\).*no word"):
        to_snntorch(Graph.of(nodes))


def test_an_opaque_node_that_can_run_does() -> None:
    graph = trace(nn.Sequential(nn.Linear(5, 5), nn.Sigmoid()), torch.rand(B, 5))
    x = torch.rand(T, B, 5)
    assert torch.allclose(run(to_snntorch(graph), x), graph.run(x), atol=1e-6)


def test_all_shared_models_are_covered() -> None:
    """A control: the first test above really goes through every neuron model."""
    assert all(f"model {name}" in GRAPHS for name in MODELS)
