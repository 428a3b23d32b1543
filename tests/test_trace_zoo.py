"""The repository's other neurons and networks, and modules that only run over all steps at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

from ranvier.export import trace
from ranvier.export.graph import Graph
from ranvier.export.neurons import CubaLI, CubaLIF, SlidingWindow
from ranvier.export.nodes import Opaque
from ranvier.train import create_model, list_models
from ranvier.train import neurons_paralif as paralif
from ranvier.train import neurons_parallel as parallel
from ranvier.train.errors import UnsupportedError

T, B = 6, 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def opaque(graph: Graph) -> dict[str, Opaque]:
    return {n.name: n for n in graph if isinstance(n, Opaque)}


def stepped(neuron: nn.Module, x: Tensor) -> Tensor:
    neuron.eval().reset_mem()  # type: ignore[operator]
    with torch.no_grad():
        return torch.stack([neuron(x_t) for x_t in x])


def currents() -> Tensor:
    return torch.rand(T, B, 5) * 3


@pytest.mark.parametrize("order", [1, 3, 9])
def test_a_sliding_psn_is_a_sliding_window(order: int) -> None:
    x, neuron = currents(), parallel.SlidingPSN(order)
    graph = trace(nn.Sequential(neuron), x)
    (population,) = graph.populations
    assert isinstance(population.model, SlidingWindow)
    assert len(population.model.taps) == order
    assert torch.equal(graph.run(x), stepped(neuron, x))


def test_paralif_with_a_plain_threshold_is_a_cuba_lif_without_reset() -> None:
    x, neuron = currents(), paralif.ParaLIF("t", threshold=0.6)
    graph = trace(nn.Sequential(neuron), x)
    (population,) = graph.populations
    assert isinstance(population.model, CubaLIF)
    assert population.model.reset == "none"
    assert torch.equal(graph.run(x), stepped(neuron, x))


def test_the_readout_of_paralif_is_a_cuba_li() -> None:
    x, neuron = currents(), paralif.LI(0.5, 0.7)
    graph = trace(nn.Sequential(neuron), x)
    assert [type(p.model) for p in graph.populations] == [CubaLI]
    assert torch.allclose(graph.run(x), stepped(neuron, x), atol=1e-6)


def test_a_recurrent_lif_of_ours() -> None:
    x, neuron = currents(), paralif.RecurrentLIF(5, threshold=0.6)
    graph = trace(nn.Sequential(neuron), x)
    assert graph.recurrent
    assert torch.equal(graph.run(x), stepped(neuron, x))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("psu", "PSU"),
        ("ipsu", "IPSU"),
        ("rpsu", "RPSU"),
        ("masked-psn", "MaskedPSN"),
        ("psn", "PSN"),
    ],
)
def test_networks_of_parallel_neurons_are_opaque_there_alone(name: str, kind: str) -> None:
    net = create_model("resnet-digits", neuron=name, steps=4).eval()
    x = torch.rand(B, 1, 8, 8) * 3
    graph = trace(net, x)
    found = opaque(graph)
    assert {n.kind for n in found.values()} == {kind}
    assert all(f"{kind} has no model" in n.reason for n in found.values())
    with torch.no_grad():
        assert torch.allclose(graph.readout(graph.run(x)), net(x), atol=1e-5)


def test_a_psn_network_with_sliding_windows_has_no_opaque_node() -> None:
    net = create_model("resnet-digits", neuron="sliding-psn", join="or", steps=4)
    assert opaque(trace(net, torch.rand(B, 1, 8, 8) * 3)) == {}


def test_images_read_column_by_column() -> None:
    """Where PSN sees the future there is no step; both nets are traced by their sequence."""
    x = torch.rand(B, 3, 8, 8) * 3
    small = {"channels": 4, "hidden": 8, "image_size": 8, "steps": 8}
    for neuron, n_opaque in (("lif", 0), ("psn", 7)):
        net = create_model("sequential", neuron=neuron, **small).eval()
        graph = trace(net, x)
        assert graph["input"].shape == (3, 8)
        assert graph.steps == 8
        assert len(opaque(graph)) == n_opaque
        with torch.no_grad():
            out = graph.readout(graph.run(x.movedim(3, 0)))
            assert torch.allclose(out, net(x), atol=1e-5)


# What no chip can run, by model: its kinds of Opaque node. All other models have none.
OPAQUE = {
    "dvs-cnn": {"ReLU"},
    "ghostnet": {"Hardsigmoid", "mul"},
    "ghostnet-mlp": {"Hardsigmoid", "mul"},
    "ghostnet-dfc": {"Hardsigmoid", "Sigmoid", "mul"},
    "syna-resnet18": {"Attention"},
    "syna-resnet18-dvs": {"Attention"},
    "sequential": {"PSN"},
}
# Full size takes minutes for some; the layers are those of full size, the images smaller.
OPTIONS: dict[str, dict[str, Any]] = {
    **{n: {"image_size": 32, "steps": 2} for n in list_models("*resnet*")},
    **{n: {"steps": 2} for n in list_models("vgg*") + list_models("ghost*")},
    **{n: {"image_size": 128, "steps": 2} for n in list_models("sew7b*")},
    "resnet-digits": {"steps": 2},
    "dvs-snn": {"steps": 2},
    "syna-resnet18": {"image_size": 16, "steps": 4},
    "syna-resnet18-dvs": {"image_size": 16, "steps": 4},
}
REFUSED = ("ssnn-vgg9", "ssnn-resnet")  # as a whole: see tests/test_staged.py
QUICK = {"cnn", "mlp", "resnet-digits", "resnet8", "dvs-snn", "dvs-cnn", "sequential"}
MODELS = [
    n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
    for n in list_models()
    if n not in REFUSED
]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_registry(name: str) -> None:
    """All trace, with the Opaque nodes that OPAQUE says; the graph computes what the module does."""
    net = create_model(name, **OPTIONS.get(name, {})).eval()
    x = torch.rand(1, *net.input_shape)
    followed = "Attention" not in OPAQUE.get(name, set())  # it looks at all steps: no step to check
    graph = trace(net, x, verify=followed)
    assert {n.kind for n in opaque(graph).values()} == OPAQUE.get(name, set())
    if followed:
        given = x.movedim(3, 0) if name == "sequential" else x
        with torch.no_grad():
            assert torch.allclose(graph.readout(graph.run(given)), net(x), atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_models_refused_as_a_whole(name: str) -> None:
    net = create_model(name, image_size=16)
    with pytest.raises(UnsupportedError, match="mixes samples or steps"):
        trace(net, torch.rand(1, *net.input_shape))


def test_attention_over_time_is_opaque_as_a_module() -> None:
    small = {"image_size": 16, "steps": 4, "widths": (8, 8, 8, 8)}
    net = create_model("syna-resnet18", **small).eval()
    graph = trace(net, torch.rand(1, 3, 16, 16), verify=False)
    kinds = {n.kind for n in opaque(graph).values()}
    assert kinds == {"Attention"}
    reason = graph["unit1_1.attention2"].reason
    assert "computed from all steps" in reason


class Mixer(nn.Module):
    """A user's module that looks over the whole batch, and cannot be followed."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(8, 6), inner
        self.lif = snn.Leaky(beta=0.9, threshold=0.2, init_hidden=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.inner(self.fc(x)))


def test_a_module_that_cannot_be_followed_is_opaque_as_a_whole() -> None:
    net, x = Net(Mixer()), torch.rand(T, B, 8)
    graph = trace(net, x)
    (node,) = opaque(graph).values()
    assert (node.name, node.kind) == ("inner", "Mixer")
    assert "test_trace_zoo.py" in node.reason and "mean gives (6,)" in node.reason
    for m in net.modules():
        if hasattr(m, "reset_mem"):
            m.reset_mem()
    with torch.no_grad():
        assert torch.equal(graph.run(x), torch.stack([net(x_t) for x_t in x]))


def test_one_with_neurons_inside_is_refused() -> None:
    inner = nn.Sequential(Mixer(), snn.Leaky(beta=0.5, init_hidden=True))
    assert [n.name for n in trace(Net(inner), torch.rand(T, B, 8)) if isinstance(n, Opaque)] == [
        "inner.0"
    ]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = snn.Leaky(beta=0.5, init_hidden=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(x - x.mean(0))

    with pytest.raises(UnsupportedError, match="mean gives"):
        trace(Net(Both()), torch.rand(T, B, 8))


def test_opaque_modules_run_in_any_precision() -> None:
    graph = trace(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.rand(B, 4))
    x = np.random.default_rng(0).random((T, B, 4))
    assert graph.run(x).dtype == np.float64
    assert np.allclose(graph.run(x), graph.run(x.astype(np.float32)), atol=1e-5)


def test_a_graph_with_opaque_nodes_is_saved_without_their_functions(tmp_path: Any) -> None:
    graph = trace(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), torch.rand(B, 4))
    graph.save(tmp_path / "graph.h5")
    back = Graph.load(tmp_path / "graph.h5")
    assert graph.diff(back) == []
    with pytest.raises(UnsupportedError, match="'1' \\(Sigmoid\\) cannot be run"):
        back.run(np.zeros((1, 1, 4), np.float32))
