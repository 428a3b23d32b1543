"""The three kinds of module that can be traced, and every way in which a loop ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import snntorch as snn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ranvier.export import trace
from ranvier.export.graph import Graph
from ranvier.export.nodes import Delay, Join, Opaque
from ranvier.train import create_model

T, B = 6, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Tutorial(nn.Module):
    """The fully connected network of snntorch's tutorial 5, its loop in forward."""

    def __init__(self, end: Callable[[list[Tensor], list[Tensor]], Any], steps: int = T) -> None:
        super().__init__()
        self.fc1 = nn.Linear(20, 30)
        self.lif1 = snn.Leaky(beta=0.95, threshold=0.5)
        self.fc2 = nn.Linear(30, 10)
        self.lif2 = snn.Leaky(beta=0.95, threshold=0.5)
        self.end, self.steps = end, steps

    def forward(self, x: Tensor) -> Any:
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        spk2_rec = []
        mem2_rec = []
        for step in range(self.steps):
            cur1 = self.fc1(x[step] if x.ndim == 3 else x)
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            spk2, mem2 = self.lif2(cur2, mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return self.end(spk2_rec, mem2_rec)


def both(spikes: list[Tensor], membranes: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.stack(spikes, dim=0), torch.stack(membranes, dim=0)


def series(seed: int = 0) -> Tensor:
    return torch.rand(T, B, 20, generator=torch.Generator().manual_seed(seed)) * 2


def equal(graph: Graph, net: nn.Module, x: Tensor, output: int = 0) -> None:
    """The readout of the graph is what the module returns."""
    with torch.no_grad():
        expected = net.eval()(x)
    expected = expected[output] if isinstance(expected, tuple) else expected
    assert torch.allclose(graph.readout(graph.run(x)), expected, atol=1e-5)


def test_the_tutorial_on_a_static_image() -> None:
    net, x = Tutorial(both), torch.rand(B, 20)
    graph = trace(net, x)
    assert list(graph.nodes) == ["input", "fc1", "lif1", "fc2", "lif2", "output"]
    assert graph.steps == T
    assert graph["input"].shape == (20,)
    assert graph.meta["verified"]["spikes"] > 0
    equal(graph, net, x)
    with torch.no_grad():
        assert torch.equal(graph.run(x), net(x)[0])


def test_the_tutorial_on_a_sequence() -> None:
    net, x = Tutorial(both), series()
    graph = trace(net, x)
    assert graph["input"].shape == (20,)
    equal(graph, net, x)


def test_output_picks_what_is_returned() -> None:
    net, x = Tutorial(both), series()
    graph = trace(net, x, output=1)
    assert graph.outputs[0].observe == "v"
    equal(graph, net, x, output=1)
    named = Tutorial(lambda s, m: {"spikes": torch.stack(s), "mem": torch.stack(m)})
    assert trace(named, x, output="mem").outputs[0].observe == "v"


ENDS: list[tuple[str, str, Callable[[list[Tensor], list[Tensor]], Tensor]]] = [
    ("none", "out", lambda s, m: torch.stack(s)),
    ("sum", "out", lambda s, m: torch.stack(s).sum(0)),
    ("sum", "out", lambda s, m: torch.stack(s).sum(dim=0)),
    ("sum", "out", lambda s, m: sum(s)),  # type: ignore[arg-type,return-value]
    ("mean", "out", lambda s, m: torch.stack(s).mean(0)),
    ("mean", "out", lambda s, m: torch.mean(torch.stack(s, 1), dim=1)),
    ("mean", "out", lambda s, m: torch.stack(s).sum(0) / len(s)),
    ("mean", "out", lambda s, m: sum(s) / len(s)),  # type: ignore[arg-type]
    ("mean", "v", lambda s, m: torch.stack(m).mean(0)),
    ("sum", "v", lambda s, m: torch.stack(m).sum(0)),
    ("max", "v", lambda s, m: torch.stack(m).max(0)[0]),
    ("max", "v", lambda s, m: torch.stack(m).amax(0)),
    ("max", "v", lambda s, m: torch.max(torch.stack(m), 0).values),
    ("last", "v", lambda s, m: m[-1]),
    ("last", "v", lambda s, m: torch.stack(m)[-1]),
    ("last", "out", lambda s, m: s[-1]),
    ("none", "out", lambda s, m: torch.cat([x.unsqueeze(0) for x in s])),
    ("none", "out", lambda s, m: torch.stack(s, 1).permute(1, 0, 2)),
    ("sum", "out", lambda s, m: 0.5 * torch.stack(s).sum(0)),
]


@pytest.mark.parametrize(("reduce", "observe", "end"), ENDS)
def test_ends_of_a_loop(reduce: str, observe: str, end: Any) -> None:
    net, x = Tutorial(end), series()
    graph = trace(net, x)
    assert (graph.outputs[0].reduce, graph.outputs[0].observe) == (reduce, observe)
    equal(graph, net, x)


class Body(nn.Module):
    """A network whose forward is given: f(net, x)."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], hidden: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(20, 30)
        self.lif1 = snn.Leaky(beta=0.9, threshold=0.4, init_hidden=hidden)
        self.fc2 = nn.Linear(30, 10)
        self.rec = nn.Linear(30, 30)
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def accumulating(net: Any, x: Tensor) -> Tensor:
    mem, total = net.lif1.reset_mem(), torch.zeros(x.shape[1], 10)
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t), mem)
        total += net.fc2(spk)
    return total / len(x)


def prepared(net: Any, x: Tensor) -> Tensor:
    mem, record = net.lif1.reset_mem(), torch.zeros(*x.shape[:2], 30)
    for t in range(x.size(0)):
        record[t], mem = net.lif1(net.fc1(x[t]), mem)
    return record


def batch_first(net: Any, x: Tensor) -> Tensor:
    mem, record = net.lif1.reset_mem(), []
    for t in range(x.shape[1]):
        spk, mem = net.lif1(net.fc1(x[:, t]), mem)
        record.append(spk)
    return torch.stack(record, dim=1)


def swapped(net: Any, x: Tensor) -> Tensor:
    return prepared(net, x.permute(1, 0, 2)).transpose(0, 1)


def mean_then_linear(net: Any, x: Tensor) -> Tensor:
    mem, record = net.lif1.reset_mem(), []
    for x_t in x.unbind(0):
        spk, mem = net.lif1(net.fc1(x_t), mem)
        record.append(spk)
    return net.fc2(torch.stack(record).mean(0))


def sum_then_linear(net: Any, x: Tensor) -> Tensor:
    mem, total = net.lif1.reset_mem(), 0
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t), mem)
        total = total + spk
    return net.fc2(total)


def last_then_linear(net: Any, x: Tensor) -> Tensor:
    mem = net.lif1.reset_mem()
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t), mem)
    return net.fc2(spk)


def hidden(net: Any, x: Tensor) -> Tensor:
    net.lif1.reset_mem()
    return torch.stack([net.lif1(net.fc1(x_t)) for x_t in x])


def layer_by_layer(net: Any, x: Tensor) -> Tensor:
    current = net.fc1(x.flatten(0, 1)).view(*x.shape[:2], 30)
    mem, record = net.lif1.reset_mem(), []
    for c in current:
        spk, mem = net.lif1(c, mem)
        record.append(spk)
    return net.fc2(torch.stack(record))


def fed_back(net: Any, x: Tensor) -> Tensor:
    mem, spk, record = net.lif1.reset_mem(), torch.zeros(x.shape[1], 30), []
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t) + net.rec(spk), mem)
        record.append(spk)
    return torch.stack(record)


def fed_back_later(net: Any, x: Tensor) -> Tensor:
    mem, record = net.lif1.reset_mem(), []
    for t, x_t in enumerate(x):
        current = net.fc1(x_t)
        if t > 0:
            current = current + net.rec(spk)  # noqa: F821
        spk, mem = net.lif1(current, mem)
        record.append(spk)
    return torch.stack(record)


def two_steps_back(net: Any, x: Tensor) -> Tensor:
    mem, record = net.lif1.reset_mem(), []
    before = last = torch.zeros(x.shape[1], 30)
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t) + 0.1 * before, mem)
        before, last = last, spk
        record.append(net.fc2(spk))
    return torch.stack(record)


FORWARDS = [
    (accumulating, "mean"),
    (prepared, "none"),
    (mean_then_linear, "mean"),
    (sum_then_linear, "mean"),
    (last_then_linear, "last"),
    (layer_by_layer, "none"),
    (fed_back, "none"),
    (fed_back_later, "none"),
    (two_steps_back, "none"),
]


@pytest.mark.parametrize(("forward", "reduce"), FORWARDS)
def test_loops_of_users(forward: Any, reduce: str) -> None:
    net, x = Body(forward), series()
    graph = trace(net, x)
    assert graph.steps == T
    assert graph.outputs[0].reduce == reduce
    assert graph["input"].shape == (20,)
    assert not any(isinstance(n, Opaque) for n in graph)
    equal(graph, net, x)


@pytest.mark.parametrize("forward", [batch_first, swapped])
def test_batch_first_samples(forward: Any) -> None:
    net, x = Body(forward), series().transpose(0, 1).contiguous()
    graph = trace(net, x)
    assert graph.steps == T
    with torch.no_grad():
        assert torch.equal(graph.run(x.transpose(0, 1)), net(x).transpose(0, 1))


def time_last(net: Any, x: Tensor) -> Tensor:
    mem, record = net.lif1.reset_mem(), []
    for t in range(x.shape[-1]):
        spk, mem = net.lif1(net.fc1(x[..., t]), mem)
        record.append(spk)
    return torch.stack(record)


def test_samples_with_time_last() -> None:
    net, x = Body(time_last), series().movedim(0, -1).contiguous()
    graph = trace(net, x)
    assert graph.steps == T
    with torch.no_grad():
        assert torch.equal(graph.run(x.movedim(-1, 0)), net(x))


def listed(net: Any, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    mem, spikes, membranes = net.lif1.reset_mem(), [], []
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t), mem)
        spikes.append(spk)
        membranes.append(mem)
    return spikes, membranes


def test_lists_of_steps_are_series() -> None:
    net, x = Body(listed), series()
    assert trace(net, x, output=1).outputs[0].observe == "v"
    with torch.no_grad():
        assert torch.equal(trace(net, x).run(x), torch.stack(net(x)[0]))


def shared(net: Any, x: Tensor) -> Tensor:
    a, b, record = torch.zeros(B, 30), torch.zeros(B, 30), []
    for x_t in x:
        spk, a = net.lif1(net.fc1(x_t), a)
        spk, b = net.lif1(net.rec(spk), b)
        record.append(spk)
    return torch.stack(record)


def test_one_neuron_module_for_two_populations() -> None:
    net, x = Body(shared), series()
    graph = trace(net, x)
    assert [p.name for p in graph.populations] == ["lif1", "lif1_1"]
    assert graph.steps == T
    equal(graph, net, x)


def windowed(net: Any, x: Tensor) -> Tensor:
    mem, last, record = net.lif1.reset_mem(), torch.zeros(B, 30), []
    for x_t in x:
        spk, mem = net.lif1(net.fc1(x_t), mem)
        record.append(net.fc2(spk + last))
        last = spk
    return torch.stack(record)


def test_a_sum_over_a_window_of_steps() -> None:
    net, x = Body(windowed), series()
    graph = trace(net, x)
    assert [n.steps for n in graph if isinstance(n, Delay)] == [1]
    equal(graph, net, x)


def test_hidden_states_in_a_loop() -> None:
    net, x = Body(hidden, hidden=True), series()
    equal(trace(net, x), net, x)


def test_feedback_goes_through_a_delay_at_the_population() -> None:
    graph = trace(Body(fed_back), series())
    assert graph.recurrent
    assert graph["lif1.delay1"].inputs == ("lif1",)
    assert graph["rec"].inputs == ("lif1.delay1",)
    assert [n.steps for n in trace(Body(two_steps_back), series()) if isinstance(n, Delay)] == [2]


def test_a_loop_that_begins_without_a_past_delays_the_current() -> None:
    """With `if t > 0` the bias of the recurrent layer must not act at step 0."""
    graph = trace(Body(fed_back_later), series())
    (delay,) = (n for n in graph if isinstance(n, Delay))
    assert delay.inputs == ("rec",)


# one step a call


class ConvStep(nn.Module):
    """A step module that returns (spikes, membrane), states hidden."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 5)
        self.lif1 = snn.Leaky(beta=0.5, threshold=0.2, init_hidden=True)
        self.conv2 = nn.Conv2d(4, 8, 3)
        self.lif2 = snn.Leaky(beta=0.5, threshold=0.2, init_hidden=True)
        self.fc = nn.Linear(32, 10)
        self.lif3 = snn.Leaky(beta=0.5, threshold=0.2, init_hidden=True, output=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spk1 = self.lif1(F.max_pool2d(self.conv1(x), 2))
        spk2 = self.lif2(F.max_pool2d(self.conv2(spk1), 2))
        return self.lif3(self.fc(spk2.view(x.size(0), -1)))


def run_steps(net: nn.Module, x: Tensor, output: int = 0) -> Tensor:
    snn.utils.reset(net) if hasattr(snn, "utils") else None
    for m in net.modules():
        if hasattr(m, "reset_mem"):
            m.reset_mem()
    with torch.no_grad():
        outs = [net(x_t) for x_t in x]
    return torch.stack([o[output] if isinstance(o, tuple) else o for o in outs])


@pytest.mark.parametrize("output", [0, 1])
def test_a_step_module(output: int) -> None:
    net, x = ConvStep().eval(), torch.rand(T, B, 1, 16, 16)
    graph = trace(net, x[0], steps=T, output=output)
    assert graph.steps == T
    assert graph.outputs[0].observe == ("out", "v")[output]
    assert torch.allclose(graph.run(x), run_steps(net, x, output), atol=1e-5)
    assert trace(net, x[0]).steps is None
    assert trace(net, x).steps == T  # [time, batch, ...]: the number of steps is the sample's


def test_sequential_with_hidden_states() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 5),
        nn.MaxPool2d(2),
        snn.Leaky(beta=0.5, threshold=0.2, init_hidden=True),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 10),
        snn.Leaky(beta=0.5, threshold=0.2, init_hidden=True, output=True),
    ).eval()
    x = torch.rand(T, B, 1, 16, 16)
    graph = trace(net, x[0])
    assert list(graph.nodes) == ["input", *"012345", "output"]
    assert torch.equal(graph.run(x), run_steps(net, x))


def test_vectors_over_time_in_a_step_module() -> None:
    net = nn.Sequential(nn.Linear(20, 5), snn.Leaky(beta=0.5, threshold=0.2, init_hidden=True))
    graph = trace(net, series())
    assert graph["input"].shape == (20,)
    assert graph.steps == T


class Remembers(nn.Module):
    """A step module that keeps its last spikes itself and feeds them back."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rec = nn.Linear(20, 10), nn.Linear(10, 10, bias=False)
        self.lif = snn.Leaky(beta=0.9, threshold=0.4, init_hidden=True)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        current = self.fc(x)
        if self.last is not None:
            current = current + self.rec(self.last)
        self.last = self.lif(current)
        return self.last


def test_feedback_in_a_step_module() -> None:
    graph = trace(Remembers(), torch.rand(B, 20))
    assert graph.recurrent
    assert graph.meta["verified"]["spikes"] > 0


def test_a_module_without_memory_between_calls_is_one_step() -> None:
    def once(net: Any, x: Tensor) -> Tensor:
        spk, mem = net.lif1(net.fc1(x), net.lif1.reset_mem())
        return spk

    assert trace(Body(once), torch.rand(B, 20)).steps == 1


# residual networks, ours and users'


class ResidualNet(nn.Module):
    """A user's residual block in a loop of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.lif0 = snn.Leaky(beta=0.5, threshold=0.2)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.lif1 = snn.Leaky(beta=0.5, threshold=0.2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        mem0, mem1, out = self.lif0.reset_mem(), self.lif1.reset_mem(), []
        for x_t in x:
            h, mem0 = self.lif0(self.stem(x_t), mem0)
            a, mem1 = self.lif1(self.bn(self.conv(h)), mem1)
            h = a + h
            h = h + h
            out.append(self.fc(F.avg_pool2d(h, 2).flatten(1)))
        return torch.stack(out).mean(0)


def test_a_residual_network_in_a_loop() -> None:
    net, x = ResidualNet(), torch.rand(T, B, 2, 8, 8)
    graph = trace(net, x)
    joins = [n for n in graph if isinstance(n, Join)]
    assert [n.inputs for n in joins] == [("lif1", "lif0"), ("add", "add")]
    equal(graph, net, x)


@pytest.mark.parametrize("join", ["vanilla", "sew", "sew-and", "sew-iand", "ms", "or"])
@pytest.mark.parametrize("shortcut", ["A", "conv"])
def test_our_residual_networks(join: str, shortcut: str) -> None:
    net = create_model("resnet-digits", join=join, shortcut=shortcut, norm="tdbn", steps=3)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.3, 0.3)
    x = torch.rand(2, 1, 8, 8)
    graph = trace(net, x)
    op = {"sew-and": "and", "sew-iand": "iand", "or": "or"}.get(join, "add")
    assert {n.op for n in graph if isinstance(n, Join)} == {op}
    assert graph.outputs[0].reduce == "mean"
    assert graph["stage2.0.conv1"].source.startswith("train/blocks.py:")
    equal(graph, net, x)


def test_the_module_is_left_as_it_was() -> None:
    net = ConvStep().train()
    x = torch.rand(B, 1, 16, 16)
    net(x)
    before = {k: v.clone() for k, v in net.lif1.named_buffers()}
    memory = net.lif1.mem.clone()
    assert net.lif1.mem.grad_fn is not None  # as after a training step
    trace(net, x)
    assert net.lif1.mem.grad_fn is not None
    assert net.training and net.lif1.training
    assert torch.equal(net.lif1.mem, memory)
    for k, v in net.lif1.named_buffers():
        assert torch.equal(v, before[k])
    assert next(net.parameters()).dtype == torch.float32


def test_numpy_and_integer_samples() -> None:
    net = ConvStep()
    assert trace(net, np.ones((B, 1, 16, 16), np.uint8), steps=2)["input"].shape == (1, 16, 16)


# random networks


@st.composite
def feed_forward(draw: st.DrawFn) -> nn.Module:
    """A random step network of convolutions, pools, norms, joins, neurons and a linear end."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    parts: list[nn.Module] = []
    channels, size = 2, 8
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.sampled_from([2, 3, 4]))
        kernel = draw(st.sampled_from([1, 2, 3]))
        keeps = size <= kernel or draw(st.booleans())
        parts.append(nn.Conv2d(channels, out, kernel, padding="same" if keeps else 0))
        size = size if keeps else size - kernel + 1
        channels = out
        if draw(st.booleans()):
            parts.append(nn.BatchNorm2d(channels))
        neuron = draw(st.sampled_from([snn.Leaky, snn.Synaptic]))
        options = {"alpha": 0.6} if neuron is snn.Synaptic else {}
        parts.append(
            neuron(
                beta=draw(st.sampled_from([0.5, 0.9, 1.0])),
                threshold=0.2,
                init_hidden=True,
                reset_mechanism=draw(st.sampled_from(["zero", "subtract", "none"])),
                reset_delay=draw(st.booleans()),
                **options,
            )
        )
        if size >= 4 and draw(st.booleans()):
            parts.append(draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2)])))
            size //= 2
        if draw(st.booleans()):
            parts.append(Doubled(draw(st.sampled_from(["add", "mul", "cat"]))))
            channels *= 2 if parts[-1].op == "cat" else 1
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(channels * size * size, 4))


class Doubled(nn.Module):
    """x joined with itself."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        if self.op == "cat":
            return torch.cat([x, x], 1)
        return x + x if self.op == "add" else x * x


@settings(max_examples=12, deadline=None)
@given(net=feed_forward())
def test_random_networks(net: nn.Module) -> None:
    x = torch.rand(4, 2, 2, 8, 8)
    graph = trace(net, x[0])
    assert torch.allclose(graph.run(x.double()).float(), run_steps(net.eval(), x), atol=1e-3)
    assert not any(isinstance(n, Opaque) for n in graph)
