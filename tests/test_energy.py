"""Algorithmic operations, NeuroBench parity, and the energy models' arithmetic and boundaries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from random_programs import random_input, random_program
from torch import nn

from ranvier.export.graph import Graph
from ranvier.export.neurons import LIF
from ranvier.export.nodes import Conv, Dense, Flatten, Input, Neuron, Output, Scale
from ranvier.sim.energy_models import MODELS, ann, energy, published, read_model
from ranvier.sim.operations import algorithmic
from ranvier.sim.runner import run
from ranvier.train.errors import FormatError, RangeError


def small_graph(seed: int = 0, groups: int = 1, sparse: float = 0.2) -> Graph:
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        w = rng.normal(0, 1, shape).astype(np.float32)
        return np.where(rng.random(shape) < sparse, 0, w).astype(np.float32)

    lif = LIF(beta=0.8, v_threshold=0.5)
    return Graph.of(
        [
            Input(name="x", shape=(2, 7, 6)),
            Conv(name="c1", inputs=("x",), weight=weight(4, 2, 3, 3), padding=(1, 1)),
            Neuron(name="n1", inputs=("c1",), model=lif),
            Conv(
                name="c2", inputs=("n1",), weight=weight(6, 4 // groups, 3, 2), stride=(2, 1),
                padding=(1, 0), dilation=(1, 2), groups=groups, bias=weight(6),
            ),
            Neuron(name="n2", inputs=("c2",), model=lif),
            Scale(name="s", inputs=("n2",), scale=np.array([2.0], np.float32)),
            Flatten(name="f", inputs=("s",)),
            Dense(name="d", inputs=("f",), weight=weight(5, 6 * 4 * 4), bias=weight(5)),
            Neuron(name="n3", inputs=("d",), model=lif),
            Output(name="y", inputs=("n3",)),
        ]
    )  # fmt: skip


def net_of(graph: Graph) -> nn.Module:
    """The graph's layers in torch, one step a call, with the graph's own neurons between them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for node in graph:
                if isinstance(node, Conv):
                    c_out, per_in, *k = node.weight.shape
                    layer = nn.Conv2d(
                        per_in * node.groups, c_out, tuple(k), node.stride, node.padding,
                        node.dilation, node.groups, bias=node.bias is not None,
                    )  # fmt: skip
                elif isinstance(node, Dense):
                    layer = nn.Linear(*node.weight.shape[::-1], bias=node.bias is not None)
                else:
                    continue
                layer.weight.data = torch.from_numpy(node.weight)
                if node.bias is not None:
                    layer.bias.data = torch.from_numpy(node.bias)
                self.add_module(node.name, layer)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            states: dict = {}
            for x in batch.transpose(0, 1):
                for node in graph:
                    if isinstance(node, (Conv, Dense)):
                        x = getattr(self, node.name)(x)
                    elif isinstance(node, Neuron):
                        state = states.get(node.name) or node.model.initial(x)
                        x, states[node.name] = node.model.step(state, x)
                    elif isinstance(node, Scale):
                        x = x * torch.as_tensor(node.scale)
                    elif isinstance(node, Flatten):
                        x = x.flatten(1)
            return x

    return Net()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("real", [False, True])
def test_counts_equal_neurobench(groups: int, real: bool) -> None:
    metric = pytest.importorskip(
        "neurobench.metrics.workload",
        reason="neurobench is not installed: pip install --no-deps neurobench==2.3.0",
    )
    from neurobench.hooks.layer import LayerHook
    from neurobench.models import TorchModel

    graph = small_graph(seed=groups, groups=groups)
    rng = np.random.default_rng(1)
    x = (rng.random((5, 3, 2, 7, 6)) < 0.4).astype(np.float32)
    x = x * rng.random(x.shape).astype(np.float32) if real else x
    model = TorchModel(net_of(graph))
    model.connection_hooks = [LayerHook(layer) for layer in model.connection_layers()]
    batch = torch.from_numpy(x).transpose(0, 1)
    theirs = metric.SynapticOperations()
    with torch.no_grad():
        found = theirs(model, model(batch), (batch, None))
    ours = algorithmic(graph, x).neurobench()
    assert {k: float(v) for k, v in found.items()} == ours
    assert ours["Effective_ACs"] > 0 and (ours["Effective_MACs"] > 0)
    control = algorithmic(graph, np.roll(x, 1, axis=3)).neurobench()
    assert control != ours


def test_domains_and_unrolled_counts() -> None:
    graph = small_graph()
    spikes = (np.random.default_rng(0).random((4, 2, 2, 7, 6)) < 0.3).astype(np.float32)
    plain = algorithmic(graph, spikes)
    assert {n: m.domain for n, m in plain.maps.items()} == {
        "c1": "spikes", "c2": "spikes", "s": "spikes", "d": "integers"
    }  # fmt: skip
    dense = plain.maps["d"]
    assert (dense.n_unrolled == 2 * dense.n_synops).all() and dense.n_synops.sum() > 0
    assert plain.n_multiplications == 0
    total = plain.n_accumulates + plain.n_graded_accumulates
    assert total == plain.total("n_synops")
    pixels = algorithmic(graph, spikes * 0.5)
    assert pixels.maps["c1"].domain == "reals" and pixels.total("n_mults") > 0


def test_dense_operations_are_macs() -> None:
    graph = small_graph(sparse=0.0)
    ones = algorithmic(graph, np.ones((1, 1, 2, 7, 6), np.float32))
    first = ones.maps["c1"]
    inside = (3 * 7 - 2) * (3 * 6 - 2)  # kernel places that fall on the map, along each axis
    assert first.n_dense.tolist() == [inside * 2 * 4]
    assert first.n_synops.tolist() == first.n_dense.tolist()


def ledger():
    program = random_program(2)
    return run(program, random_input(program, 2), "dense").ledger


def test_horowitz() -> None:
    counts = ledger()
    e = energy(counts, "horowitz")
    want = (0.9 * (counts.n_synops - counts.n_mults) + 4.6 * counts.n_mults) / 3
    assert_allclose(e.total_pj, want, rtol=1e-12)
    assert e.kind == "modelled" and "no memory" in e.boundary and "45 nm" in e.source
    assert "modelled: horowitz" in str(e)


def test_loihi_davies() -> None:
    counts = ledger()
    e = energy(counts, "loihi-davies")
    idle = counts.n_updates - counts.n_spikes
    want = 23.6 * counts.n_synops + (81 + 1.7) * counts.n_spikes + 52 * idle
    assert_allclose(e.total_pj, want / 3, rtol=1e-12)
    assert_allclose(sum(e.parts_pj.values()), e.total_pj, rtol=1e-12)


def test_every_model_says_its_boundary_and_source() -> None:
    for model in MODELS.values():
        assert len(model.boundary) > 20 and len(model.source) > 20


def test_energy_reads_algorithmic_counts_too() -> None:
    x = (np.random.default_rng(0).random((4, 2, 2, 7, 6)) < 0.3).astype(np.float32)
    operations = algorithmic(small_graph(), x)
    want = 0.9 * operations.total("n_synops") / 2
    assert_allclose(energy(operations, "horowitz").total_pj, want, rtol=1e-12)


def test_published_formula() -> None:
    """Two layers by hand, and the network without spikes: 4.6 pJ a multiply-accumulate."""
    e = published(1e6, {"b": (0.25, 4e6), "c": (0.1, 1e6)}, steps=4)
    assert_allclose(e.total_pj, 4.6e6 + 0.9 * (0.25 * 4 * 4e6 + 0.1 * 4 * 1e6))
    assert_allclose(ann(2e6).total_pj, 9.2e6)
    with pytest.raises(RangeError, match="make no layer"):
        published(1.0, {"b": (-1, 1)}, 4)


def test_published_formula_equals_the_ledger_without_borders() -> None:
    """A 1x1 convolution and a dense layer have no borders: rate x T x FLOPs is then exact."""
    from ranvier.sim.bench_nets import mlp, random_spikes

    program = mlp(4, 0)
    r = run(program, random_spikes(program, 0.2, 8), "dense")
    p = program.projections["input->fc1"]
    rate = r.ledger.rate("input")
    counts = r.ledger.projections[p.name]
    exact = int((counts["n_synops"] + counts["n_synops_zero"]).sum()) / 8
    e = published(0.0, {"fc1": (rate, p.map.weight.size)}, 4)
    assert_allclose(e.total_pj, 0.9 * exact, rtol=1e-12)


def test_users_model(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nboundary: synapses alone\nsource: my desk\n"
        "costs_pj:\n  synapses: {count: n_synops, pj: 2}\n"
    )
    counts = ledger()
    e = energy(counts, path)
    assert_allclose(e.total_pj, 2 * counts.n_synops / 3)
    assert (e.model, e.boundary) == ("mine", "synapses alone")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: m\nsource: s\ncosts_pj: {a: {count: n_synops, pj: 1}}",
            "does not say its boundary",
        ),
        ("name: m\nsource: s\nboundary: b\ncosts_pj: {a: {count: x, pj: 1}}", "needs a count"),
        ("name: m\nsource: s\nboundary: b\ncosts_pj: {a: {count: n_synops, pj: -1}}", "needs pj"),
        ("- 1", "holds no mapping"),
        ("a: [", "cannot read"),
    ],
)
def test_users_models_that_are_wrong(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        read_model(path)


def test_unknown_model() -> None:
    with pytest.raises(RangeError, match="none of horowitz, loihi-davies"):
        energy(ledger(), "abacus")
