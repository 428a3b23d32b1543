"""Every snntorch neuron that has a model: spikes equal to snntorch's, membranes within 1e-5.

One layer at a time on the same currents, in single precision: no sum is taken in another order, so
equal means equal.
"""

from __future__ import annotations

from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

from ranvier.export import trace
from ranvier.export.graph import Graph
from ranvier.export.neurons import LIF, CubaLIF
from ranvier.export.nodes import Join, Neuron, Opaque, Scale
from ranvier.train import neurons as ours

RESETS = ("zero", "subtract", "none")
T, B, N = 15, 3, 16


class Loop(nn.Module):
    """A neuron in a loop that hands its states on: (spikes, ..., membrane), each stacked."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = self.neuron.reset_mem()
        states = states if isinstance(states, tuple) else (states,)
        steps = []
        for x_t in x:
            out = self.neuron(x_t, *states)
            states = out if len(out) == len(states) else out[1:]
            steps.append(out)
        return tuple(torch.stack(s) for s in zip(*steps, strict=True))


def currents(*shape: int, seed: int = 0) -> Tensor:
    """Random input around the threshold: neurons fire often, and sometimes twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(T, B, *(shape or (N,)), generator=generator) * 3.0 - 0.8


def check(neuron: nn.Module, x: Tensor | None = None, membrane: int = -1) -> Graph:
    """Traces spikes and membrane of the loop; compares both with the neuron itself."""
    x = currents() if x is None else x
    with torch.no_grad():
        out = Loop(neuron)(x)
    graph = trace(Loop(neuron), x)
    assert torch.equal(graph.run(x), out[0])
    assert 0 < out[0].mean() < 1
    seen = trace(Loop(neuron), x, output=membrane, verify=False)
    assert torch.allclose(seen.run(x), out[membrane], atol=1e-5, rtol=0)
    assert seen.outputs[0].observe == "v"
    return graph


def population(graph: Graph) -> Neuron:
    (found,) = graph.populations
    return found


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("delay", [True, False])
def test_leaky(reset: str, delay: bool) -> None:
    graph = check(snn.Leaky(beta=0.8, reset_mechanism=reset, reset_delay=delay))
    model = population(graph).model
    assert isinstance(model, LIF)
    assert model.reset == reset
    assert model.timing == ("delayed" if delay else "carry")


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("delay", [True, False])
def test_synaptic(reset: str, delay: bool) -> None:
    neuron = snn.Synaptic(alpha=0.6, beta=0.7, reset_mechanism=reset, reset_delay=delay)
    graph = check(neuron)
    assert isinstance(population(graph).model, CubaLIF)


def test_synaptic_current_can_be_observed() -> None:
    neuron, x = snn.Synaptic(alpha=0.6, beta=0.7), currents()
    graph = trace(Loop(neuron), x, output=1)
    assert graph.outputs[0].observe == "u"
    with torch.no_grad():
        assert torch.allclose(graph.run(x), Loop(neuron)(x)[1], atol=1e-5)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("options", [{"beta": 0.8}, {"R": 2.0, "C": 3.0}, {"beta": 0.7, "R": 2.0}])
def test_lapicque(reset: str, options: dict[str, float]) -> None:
    check(snn.Lapicque(**options, reset_mechanism=reset, threshold=0.3))


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("linear", [True, False])
def test_rleaky(reset: str, delay: bool, linear: bool) -> None:
    torch.manual_seed(0)
    where: dict[str, Any] = {"linear_features": N}
    if not linear:
        where = {"all_to_all": False, "V": torch.rand(N) - 0.5}
    neuron = snn.RLeaky(beta=0.8, reset_mechanism=reset, reset_delay=delay, **where)
    graph = check(neuron)
    assert graph.recurrent


def test_rleaky_with_a_convolution() -> None:
    torch.manual_seed(0)
    neuron = snn.RLeaky(beta=0.8, conv2d_channels=3, kernel_size=3)
    check(neuron, currents(3, 5, 5))


@pytest.mark.parametrize("reset", RESETS)
def test_rsynaptic(reset: str) -> None:
    torch.manual_seed(0)
    neuron = snn.RSynaptic(alpha=0.6, beta=0.7, reset_mechanism=reset, linear_features=N)
    assert check(neuron).recurrent


def test_per_neuron_and_learned_parameters() -> None:
    torch.manual_seed(0)
    neuron = snn.Leaky(
        beta=torch.rand(N), threshold=torch.rand(N) + 0.5, learn_beta=True, learn_threshold=True
    )
    model = population(check(neuron)).model
    assert isinstance(model, LIF)
    assert model.beta.shape == model.v_threshold.shape == (N,)


def test_per_channel_parameters_reach_over_the_image() -> None:
    torch.manual_seed(0)
    neuron = snn.Leaky(beta=torch.rand(3, 1, 1), threshold=torch.rand(1, 3, 1, 1) + 0.5)
    model = population(check(neuron, currents(3, 4, 4))).model
    assert model.v_threshold.shape == (3, 1, 1)


@pytest.mark.parametrize("beta", [1.5, -0.5])
def test_beta_is_clamped_as_snntorch_does(beta: float) -> None:
    model = population(check(snn.Leaky(beta=beta))).model
    assert model.beta == min(max(beta, 0.0), 1.0)


def test_graded_spikes_become_a_scale() -> None:
    neuron = snn.Leaky(beta=0.8, graded_spikes_factor=2.5)
    x = currents()
    graph = trace(Loop(neuron), x)
    assert any(isinstance(n, Scale) for n in graph)
    with torch.no_grad():
        assert torch.equal(graph.run(x), Loop(neuron)(x)[0])


def test_hidden_states_equal_explicit_ones() -> None:
    x = currents()
    net = snn.Leaky(beta=0.8, init_hidden=True)
    graph = trace(nn.Sequential(net), x)
    with torch.no_grad():
        assert torch.equal(graph.run(x), Loop(snn.Leaky(beta=0.8))(x)[0])


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("cls", [ours.LIF, ours.PLIF, ours.CUBA])
@pytest.mark.parametrize("decay_input", [True, False])
def test_our_neurons(reset: str, cls: Any, decay_input: bool) -> None:
    x = currents()
    neuron = cls(beta=0.7, reset_mechanism=reset, decay_input=decay_input, threshold=0.4)
    graph = trace(nn.Sequential(neuron), x)
    assert population(graph).model.timing == "immediate"
    with torch.no_grad():
        neuron.reset_mem()
        assert torch.equal(graph.run(x), torch.stack([neuron(x_t) for x_t in x]))


def test_our_v_reset() -> None:
    x = currents()
    neuron = ours.LIF(beta=0.7, v_reset=-0.3)
    graph = trace(nn.Sequential(neuron), x)
    assert population(graph).model.v_reset == -0.3
    with torch.no_grad():
        neuron.reset_mem()
        assert torch.equal(graph.run(x), torch.stack([neuron(x_t) for x_t in x]))


def test_if_has_no_leak() -> None:
    graph = trace(nn.Sequential(ours.IF()), currents())
    assert population(graph).model.beta == 1.0


@pytest.mark.parametrize(
    ("neuron", "reason"),
    [
        (snn.Alpha(alpha=0.9, beta=0.5, init_hidden=True), "Alpha has no model"),
        (snn.Leaky(beta=0.5, inhibition=True, init_hidden=True), "inhibition"),
        (snn.SLSTM(N, N, init_hidden=True), "SLSTM has no model"),
    ],
)
def test_neurons_without_a_model_are_opaque_and_still_run(neuron: Any, reason: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, N), neuron, nn.Linear(N, 3))
    x = torch.rand(5, 2, 8)
    graph = trace(net, x)
    (odd,) = (n for n in graph if isinstance(n, Opaque))
    assert odd.name == "1"
    assert reason in odd.reason
    assert graph.run(x).shape == (5, 2, 3)


def test_a_quantized_state_is_opaque() -> None:
    neuron = snn.Leaky(beta=0.5, init_hidden=True, state_quant=lambda m: torch.round(m * 8) / 8)
    graph = trace(nn.Sequential(nn.Linear(8, N), neuron), torch.rand(5, 2, 8))
    assert [n.kind for n in graph if isinstance(n, Opaque)] == ["Leaky"]


def test_recurrence_is_a_delay_of_one_step_into_a_sum() -> None:
    torch.manual_seed(0)
    graph = trace(Loop(snn.RLeaky(beta=0.8, linear_features=N)), currents())
    total = graph[population(graph).inputs[0]]
    assert isinstance(total, Join) and total.op == "add"
    assert graph["neuron.delay1"].inputs == ("neuron",)
    assert graph["neuron.recurrent"].inputs == ("neuron.delay1",)
