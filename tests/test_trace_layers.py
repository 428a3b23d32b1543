"""Every layer and operation that the graph has a word for: its node, and equal values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ranvier.export import trace
from ranvier.export.graph import Graph
from ranvier.export.nodes import (
    Conv,
    Dense,
    Flatten,
    Join,
    Neuron,
    Norm,
    Opaque,
    Pool,
    Scale,
    Subsample,
    Upsample,
)
from ranvier.train.blocks import And, Iand, Or, ShortcutA
from ranvier.train.norms import ScaledTdBN2d, TdBN2d


class Fn(nn.Module):
    """A function as a step module."""

    def __init__(self, f: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.f = f
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def image(*shape: int) -> Tensor:
    return torch.rand(2, *(shape or (3, 8, 8)), generator=torch.Generator().manual_seed(1)) - 0.3


def check(net: nn.Module, x: Tensor | None = None) -> Graph:
    """The graph of the step module; its values are the module's to single precision."""
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) and m.running_mean is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    x = image() if x is None else x
    graph = trace(net, x, steps=1)
    with torch.no_grad():
        expected = net.eval()(x)
    assert torch.allclose(graph.run(x)[0], expected.to(x.dtype), atol=1e-5, rtol=1e-5)
    return graph


def kinds(graph: Graph) -> list[str]:
    return [type(n).__name__ for n in graph][1:-1]


CONVS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(3, 4, 3), (3, 8, 8)),
    (nn.Conv2d(3, 4, (3, 5), stride=(2, 1), padding=(1, 2), bias=False), (3, 8, 9)),
    (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 9, 9)),
    (nn.Conv2d(3, 4, 3, padding="same"), (3, 8, 8)),
    (nn.Conv2d(3, 4, 4, padding="same"), (3, 8, 8)),
    (nn.Conv2d(3, 4, (2, 5), padding="same"), (3, 7, 8)),
    (nn.Conv2d(3, 4, 4, padding="same", dilation=3), (3, 12, 12)),
    (nn.Conv2d(3, 4, 4, padding="same", dilation=2), (3, 12, 12)),
    (nn.Conv2d(3, 4, 3, padding="valid"), (3, 8, 8)),
    (nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 11)),
    (nn.Conv1d(3, 4, 6, padding="same"), (3, 11)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVS)
def test_convolutions(layer: nn.Module, shape: tuple[int, ...]) -> None:
    assert kinds(check(nn.Sequential(layer), image(*shape))) == ["Conv"]


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(5, 3), (5,), ["Dense"]),
        (nn.Linear(5, 3, bias=False), (5,), ["Dense"]),
        (nn.BatchNorm2d(3), (3, 4, 4), ["Norm"]),
        (nn.BatchNorm2d(3, affine=False, eps=1e-3), (3, 4, 4), ["Norm"]),
        (nn.BatchNorm1d(3), (3,), ["Norm"]),
        (nn.BatchNorm1d(3), (3, 4), ["Norm"]),
        (TdBN2d(3, v_threshold=0.5), (3, 4, 4), ["Norm"]),
        (ScaledTdBN2d(3, v_threshold=0.5), (3, 4, 4), ["Norm"]),
        (nn.AvgPool2d(2), (3, 8, 8), ["Pool"]),
        (nn.AvgPool2d((2, 3), stride=(1, 2), padding=(1, 1)), (3, 8, 8), ["Pool"]),
        (nn.AvgPool2d(3, ceil_mode=True), (3, 9, 9), ["Pool"]),
        (nn.MaxPool2d(3, 2, 1), (3, 8, 8), ["Pool"]),
        (nn.AvgPool1d(2), (3, 8), ["Pool"]),
        (nn.MaxPool1d(2), (3, 8), ["Pool"]),
        (nn.AdaptiveAvgPool2d(1), (3, 8, 8), ["Pool"]),
        (nn.AdaptiveAvgPool2d((2, None)), (3, 8, 8), ["Pool"]),
        (nn.AdaptiveMaxPool2d(4), (3, 8, 8), ["Pool"]),
        (nn.AdaptiveAvgPool1d(2), (3, 8), ["Pool"]),
        (nn.Upsample(scale_factor=2), (3, 4, 4), ["Upsample"]),
        (nn.UpsamplingNearest2d(scale_factor=2), (3, 4, 4), ["Upsample"]),
        (nn.Flatten(), (3, 4, 4), ["Flatten"]),
        (nn.Flatten(2), (3, 4, 4), ["Flatten"]),
        (nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.Dropout2d()), (3, 4, 4), []),
        (ShortcutA(2, 3, 8), (3, 8, 8), ["Subsample"]),
    ],
)
def test_layers(layer: nn.Module, shape: tuple[int, ...], expected: list[str]) -> None:
    assert kinds(check(nn.Sequential(layer), image(*shape))) == expected


_W = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))
_M = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))

FUNCTIONS: list[tuple[Callable[[Tensor], Tensor], list[str]]] = [
    (lambda x: F.conv2d(x, _W, padding=1), ["Conv"]),
    (lambda x: F.conv2d(x, _W, None, 2), ["Conv"]),
    (lambda x: F.linear(x, _M.T), ["Dense"]),
    (lambda x: x @ _M, ["Dense"]),
    (lambda x: F.avg_pool2d(x, 2), ["Pool"]),
    (lambda x: F.max_pool2d(x, 2, 2), ["Pool"]),
    (lambda x: F.max_pool2d(x, kernel_size=2, stride=1), ["Pool"]),
    (lambda x: F.adaptive_avg_pool2d(x, 1), ["Pool"]),
    (lambda x: F.adaptive_max_pool2d(x, (2, 2)), ["Pool"]),
    (lambda x: F.interpolate(x, scale_factor=2), ["Upsample"]),
    (lambda x: F.interpolate(x, size=(16, 24)), ["Upsample"]),
    (lambda x: F.dropout(x, 0.5, False), []),
    (lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3) * 2), ["Norm"]),
    (lambda x: x.flatten(1), ["Flatten"]),
    (lambda x: torch.flatten(x, 2), ["Flatten"]),
    (lambda x: x.view(x.size(0), -1), ["Flatten"]),
    (lambda x: x.reshape(len(x), 3, 64), ["Flatten"]),
    (lambda x: x.mean((2, 3)), ["Pool", "Flatten"]),
    (lambda x: x.mean((2, 3), keepdim=True), ["Pool"]),
    (lambda x: x.mean([-1, -2]), ["Pool", "Flatten"]),
    (lambda x: x.sum(-1), ["Pool", "Flatten"]),
    (lambda x: x.amax(dim=(2, 3)), ["Pool", "Flatten"]),
    (lambda x: x.mean(2).mean(2), ["Pool", "Flatten", "Pool", "Flatten"]),
    (lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(), ["Pool", "Flatten"]),
    (lambda x: x[:, :, ::2, ::2], ["Subsample"]),
    (lambda x: x[..., ::2, ::2], ["Subsample"]),
    (lambda x: x[:, :3], []),
    (lambda x: x[:, 1:], ["Conv"]),
    (lambda x: x[:, ::2, 1:-1, 2:], ["Conv", "Conv"]),
    (lambda x: x[:, :, 1::2, :], ["Conv"]),
    (lambda x: x.flatten(1)[:, 5:9], ["Flatten", "Dense"]),
    (lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2)), ["Subsample"]),
    (lambda x: F.pad(x, (0, 0, 0, 0, 0, 4)), ["Subsample"]),
    (lambda x: torch.cat([x, torch.zeros_like(x)], 1), ["Subsample"]),
    (lambda x: torch.cat([x, x], 1), ["Join"]),
    (lambda x: torch.cat((x, x * 2), dim=-1), ["Scale", "Join"]),
    (lambda x: x * 2, ["Scale"]),
    (lambda x: 2 * x + 1, ["Scale", "Scale"]),
    (lambda x: 1 - x, ["Scale"]),
    (lambda x: -x / 3, ["Scale"]),
    (lambda x: x * torch.arange(3.0).view(1, 3, 1, 1), ["Scale"]),
    (lambda x: x + torch.arange(8.0), ["Scale"]),
    (lambda x: x + 0, []),
    (lambda x: x * 1.0, []),
    (lambda x: x + x, ["Join"]),
    (lambda x: torch.add(x, x, alpha=2), ["Scale", "Join"]),
    (lambda x: x - x * 0.5, ["Scale", "Scale", "Join"]),
    (lambda x: x * x, ["Join"]),
    (lambda x: torch.maximum(x, -x), ["Scale", "Join"]),
    (lambda x: torch.max(x, x * 2), ["Scale", "Join"]),
    (lambda x: sum([x, x, x]), ["Join", "Join"]),
    (lambda x: (x > 0.1).float(), ["Neuron"]),
    (lambda x: (x >= 0.1).to(torch.float32), ["Neuron"]),
    (lambda x: x.clone().detach().contiguous(), []),
    (lambda x: x.clone().add_(x).mul_(2), ["Join", "Scale"]),
]


@pytest.mark.parametrize(("f", "expected"), FUNCTIONS)
def test_functions_and_operators(f: Callable[[Tensor], Tensor], expected: list[str]) -> None:
    assert kinds(check(Fn(lambda net, x: f(x)))) == expected


OPAQUE: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (F.relu, "relu"),
    (torch.sigmoid, "sigmoid"),
    (lambda x: torch.softmax(x, -1), "softmax"),
    (lambda x: x @ x.transpose(-1, -2), "matmul"),
    (lambda x: F.layer_norm(x, (8,)), "layer_norm"),
    (lambda x: torch.einsum("bchw,bcvw->bchv", x, x), "einsum"),
    (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), "interpolate"),
    (lambda x: x * x.mean((2, 3), keepdim=True), "mul"),
    (lambda x: x.mean(1), "mean"),
    (lambda x: x[:, 1], "getitem"),
    (lambda x: x.permute(0, 2, 3, 1), "permute"),
    (lambda x: x.view(len(x), 3, 4, 16), "view"),
    (lambda x: x**2, "pow"),
    (lambda x: torch.where(x > 0, x, 0.1 * x), "where"),
    (lambda x: x.chunk(4, -1)[2], "chunk"),
    (lambda x: x.max(1).values, "max"),
    (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), "avg_pool2d"),
    (lambda x: F.adaptive_avg_pool2d(x, 3), "adaptive_avg_pool2d"),
]


@pytest.mark.parametrize(("f", "kind"), OPAQUE)
def test_what_no_chip_can_say_is_opaque_and_still_runs(
    f: Callable[[Tensor], Tensor], kind: str
) -> None:
    graph = check(Fn(lambda net, x: f(x)))
    found = {n.kind: n for n in graph if isinstance(n, Opaque)}
    assert kind in found
    assert found[kind].reason


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.ReLU(), "ReLU"),
        (nn.Softmax(-1), "Softmax"),
        (nn.LayerNorm(8), "LayerNorm"),
        (nn.GELU(), "GELU"),
        (nn.ConvTranspose2d(3, 2, 2), "ConvTranspose2d"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), "Conv2d"),
        (nn.BatchNorm2d(3, track_running_stats=False), "BatchNorm2d"),
        (nn.MaxPool2d(2, dilation=2), "MaxPool2d"),
        (nn.AvgPool2d(3, 2, ceil_mode=True), "AvgPool2d"),
    ],
)
def test_unknown_modules_are_opaque_under_their_name(layer: nn.Module, kind: str) -> None:
    graph = trace(Fn(lambda net, x: net.odd(x), odd=layer), image())
    (node,) = (n for n in graph if isinstance(n, Opaque))
    assert (node.name, node.kind) == ("odd", kind)
    assert node.reason
    assert node.source.startswith("tests/test_trace_layers.py:")


# joins of spikes


def spiking(f: Callable[[Tensor, Tensor], Tensor]) -> Graph:
    """f of two spike trains, a and s."""
    torch.manual_seed(0)
    net = Fn(
        lambda net, x: f(net.a(net.conv_a(x)), net.s(net.conv_s(x))),
        conv_a=nn.Conv2d(3, 4, 3),
        conv_s=nn.Conv2d(3, 4, 3),
        a=snn.Leaky(beta=0.9, init_hidden=True, threshold=0.1),
        s=snn.Leaky(beta=0.8, init_hidden=True, threshold=0.1),
    )
    return trace(net, torch.rand(6, 2, 3, 8, 8))


SPIKES: list[tuple[Callable[[Tensor, Tensor], Tensor], str, tuple[str, ...]]] = [
    (lambda a, s: a * s, "and", ("a", "s")),
    (lambda a, s: torch.logical_and(a, s).float(), "and", ("a", "s")),
    (lambda a, s: (a.bool() & s.bool()).float(), "and", ("a", "s")),
    (lambda a, s: torch.minimum(a, s), "and", ("a", "s")),
    (lambda a, s: (1 - a) * s, "iand", ("a", "s")),
    (lambda a, s: s * (1.0 - a), "iand", ("a", "s")),
    (lambda a, s: (-a + 1) * s, "iand", ("a", "s")),
    (lambda a, s: torch.logical_not(a) * s, "iand", ("a", "s")),
    (lambda a, s: a + s - a * s, "or", ("a", "s")),
    (lambda a, s: s + a - a * s, "or", ("a", "s")),
    (lambda a, s: a + (s - s * a), "or", ("s", "a")),
    (lambda a, s: 1 - (1 - a) * (1 - s), "or", ("a", "s")),
    (lambda a, s: torch.maximum(a, s), "or", ("a", "s")),
    (lambda a, s: torch.max(a, s), "or", ("a", "s")),
    (lambda a, s: torch.logical_or(a, s).float(), "or", ("a", "s")),
    (lambda a, s: (a.bool() | s.bool()).float(), "or", ("a", "s")),
    (lambda a, s: torch.clamp(a + s, max=1), "or", ("a", "s")),
    (lambda a, s: (a + s).clamp(0, 1), "or", ("a", "s")),
    (Or("or"), "or", ("a", "s")),
    (And("sew-and"), "and", ("a", "s")),
    (Iand("sew-iand"), "iand", ("a", "s")),
    (lambda a, s: a + s, "add", ("a", "s")),
]


@pytest.mark.parametrize(("f", "op", "inputs"), SPIKES)
def test_joins_of_spikes(f: Any, op: str, inputs: tuple[str, ...]) -> None:
    graph = spiking(f)
    last = graph[graph.outputs[0].inputs[0]]
    assert isinstance(last, Join)
    assert last.op == op
    assert set(last.inputs) == set(inputs)
    if op == "iand":
        assert last.inputs == inputs
    assert len(graph.nodes) == 7  # nothing of the arithmetic is left


def test_logic_holds_through_pooling_and_joins() -> None:
    graph = spiking(lambda a, s: F.max_pool2d(a * s, 2) * F.max_pool2d(s, 2))
    assert [n.op for n in graph if isinstance(n, Join)] == ["and", "and"]


def test_products_of_what_is_not_binary_stay_products() -> None:
    graph = spiking(lambda a, s: F.avg_pool2d(a, 2) * F.avg_pool2d(s, 2))
    assert [n.op for n in graph if isinstance(n, Join)] == ["mul"]
    graph = spiking(lambda a, s: (a + s) * s)
    assert [n.op for n in graph if isinstance(n, Join)] == ["add", "mul"]


def test_our_or_of_sums_keeps_its_arithmetic() -> None:
    graph = spiking(lambda a, s: Or("or")(a + s, s))
    assert "or" not in [n.op for n in graph if isinstance(n, Join)]


def test_h_plus_h_is_two_h() -> None:
    graph = spiking(lambda a, s: s + s)
    last = graph[graph.outputs[0].inputs[0]]
    assert isinstance(last, Join)
    assert last.inputs == ("s", "s")


def test_names_follow_the_modules() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 3, 3, padding=1)
            self.bn1 = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(self.bn1(self.conv1(x)) + x, 2)

    net = nn.Sequential()
    net.add_module("layer1", nn.Sequential(Block()))
    graph = check(net)
    names = ["input", "layer1.0.conv1", "layer1.0.bn1", "layer1.0.add", "layer1.0.max_pool"]
    assert list(graph.nodes) == [*names, "output"]


def test_one_module_used_twice_makes_two_nodes() -> None:
    graph = check(Fn(lambda net, x: net.conv(net.conv(x)), conv=nn.Conv2d(3, 3, 3)))
    assert list(graph.nodes)[1:-1] == ["conv", "conv_1"]


def test_lines_are_the_users() -> None:
    graph = check(Fn(lambda net, x: F.max_pool2d(x, 2)))
    (pool,) = (n for n in graph if isinstance(n, Pool))
    assert pool.source.startswith("tests/test_trace_layers.py:")


def test_later_training_leaves_the_graph_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 2))
    graph = trace(net, torch.rand(3, 4))
    before = graph["0"].weight.copy()
    with torch.no_grad():
        net[0].weight.add_(1)
    assert (graph["0"].weight == before).all()


def test_node_types_are_what_the_lists_above_say() -> None:
    """A control: `kinds` reads real node types."""
    known = {Conv, Dense, Flatten, Join, Neuron, Norm, Pool, Scale, Subsample, Upsample}
    named = {k for _, names in FUNCTIONS for k in names}
    assert named <= {t.__name__ for t in known}
