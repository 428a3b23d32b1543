"""What cannot be traced is refused with a reason, a place and a way out; nothing is dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import snntorch as snn
import torch
from torch import Tensor, nn

from ranvier.export import trace
from ranvier.export.neurons import LIF
from ranvier.export.nodes import Neuron
from ranvier.train.errors import RangeError, RanvierError, ShapeError, UnsupportedError

T, B = 5, 3


class Net(nn.Module):
    """A loop over time whose body is given: f(net, x) ."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(8, 6)
        self.lif1 = snn.Leaky(beta=0.9, threshold=0.3, **options)
        self.fc2 = nn.Linear(6, 6)
        self.lif2 = snn.Leaky(beta=0.9, threshold=0.3, **options)
        self.body = forward

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def loop(step: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Any, Tensor], Tensor]:
    """A loop in which `step(net, x_t, mem, t)` runs lif1."""

    def forward(net: Any, x: Tensor) -> Tensor:
        mem, record = torch.zeros(x.shape[1], 6), []
        for t, x_t in enumerate(x):
            spk, mem = step(net, x_t, mem, t)
            record.append(spk)
        return torch.stack(record)

    return forward


def sample() -> Tensor:
    return torch.rand(T, B, 8, generator=torch.Generator().manual_seed(0)) * 2


def refused(forward: Any, message: str, **options: Any) -> str:
    with pytest.raises(RanvierError, match=message) as caught:
        trace(Net(forward, **options), sample())
    return str(caught.value)


def test_the_plain_loop_traces() -> None:
    """The control: what the tests below change is what is refused."""
    assert trace(Net(loop(lambda net, x, mem, t: net.lif1(net.fc1(x), mem))), sample()).steps == T


def test_a_changed_state_names_the_line() -> None:
    text = refused(
        loop(lambda net, x, mem, t: net.lif1(net.fc1(x), mem * 0.5)),
        "'v' of 'lif1' is used outside its neuron",
    )
    assert "tests/test_trace_errors.py:" in text
    assert "pass it on unchanged" in text


def test_a_value_that_mixes_samples_is_refused_where_it_is_used() -> None:
    text = refused(
        loop(lambda net, x, mem, t: net.lif1(net.fc1(x) / x.sum(), mem)), "mixes samples or steps"
    )
    assert "sum gives ()" in text
    watched = loop(lambda net, x, mem, t: net.lif1(net.fc1(x * (1 if x.max() < 9 else 2)), mem))
    assert trace(Net(watched), sample()).steps == T  # only looking is fine


def test_the_state_of_another_layer() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        mem, out = torch.zeros(B, 6), []
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t), mem)
            spk, mem = net.lif2(net.fc2(spk), mem)
            out.append(spk)
        return torch.stack(out)

    refused(forward, "'lif2' is given a state that is not its own")


def test_a_state_that_starts_above_zero() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        mem, out = torch.ones(B, 6), []
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t), mem)
            out.append(spk)
        return torch.stack(out)

    refused(forward, "starts from a state that is not zero")


def test_random_numbers_inside() -> None:
    text = refused(
        loop(lambda net, x, mem, t: net.lif1(net.fc1((torch.rand_like(x) < x).float()), mem)),
        "random numbers",
    )
    assert "give the module spikes" in text
    refused(
        loop(lambda net, x, mem, t: net.lif1(net.fc1(torch.bernoulli(x.clamp(0, 1))), mem)),
        "random numbers",
    )


def test_rate_encoding_inside() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return loop(lambda n, x, mem, t: n.lif1(n.fc1(x), mem))(net, snn.spikegen.rate(x, 4))

    from snntorch import spikegen  # noqa: F401  makes snn.spikegen

    with pytest.raises(UnsupportedError, match="random numbers \\(bernoulli\\)"):
        trace(Net(forward), sample()[0])


def test_a_neuron_made_by_hand() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.v = nn.Linear(8, 6), None

        def forward(self, x: Tensor) -> Tensor:
            current = self.fc(x)
            v = current if self.v is None else 0.9 * self.v + current
            spikes = (v > 0.5).float()
            self.v = v - 0.5 * spikes
            return spikes

    with pytest.raises(UnsupportedError, match="A state that no snntorch neuron holds"):
        trace(Own(), sample()[0])


def test_a_layer_that_changes_over_time() -> None:
    def step(net: Any, x: Tensor, mem: Tensor, t: int) -> tuple[Tensor, Tensor]:
        return net.lif1(net.fc2(net.fc1(x)) if t % 2 else net.fc1(x), mem)

    text = refused(loop(step), "'lif1' takes '.*' at step .* and '.*' at step")
    assert "every step must do the same" in text


def test_a_neuron_that_skips_steps() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        mem, mem2, out = torch.zeros(B, 6), torch.zeros(B, 6), []
        for t, x_t in enumerate(x):
            spk, mem = net.lif1(net.fc1(x_t), mem)
            if t % 2 == 0:
                spk2, mem2 = net.lif2(net.fc2(spk), mem2)
            out.append(spk2)
        return torch.stack(out)

    with pytest.raises(UnsupportedError):
        trace(Net(forward), sample())


def test_steps_out_of_order() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        mem, out = torch.zeros(B, 6), []
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t), mem)
            out.append(spk)
        return torch.stack(out[::-1])

    refused(forward, "not of all steps in order")


def test_an_output_of_some_steps() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        mem, out = torch.zeros(B, 6), []
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t), mem)
            out.append(spk)
        return torch.stack(out[1:]).sum(0)

    refused(forward, "uses only some of the 5 steps of 'lif1'")


def test_what_stands_after_the_readout() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        mem, out = torch.zeros(B, 6), []
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t), mem)
            out.append(spk)
        return torch.softmax(torch.stack(out).mean(0), -1)

    text = refused(forward, "softmax stands after the reduction over time")
    assert "outside the module" in text


def test_a_membrane_of_a_resetting_neuron_into_a_layer() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        mem, out = torch.zeros(B, 6), []
        for x_t in x:
            spk, mem = net.lif1(net.fc1(x_t), mem)
            out.append(net.fc2(mem))
        return torch.stack(out)

    refused(forward, "the state 'v' of 'lif1' is used outside")
    graph = trace(Net(forward, reset_mechanism="none"), sample())
    assert [type(n.model).__name__ for n in graph.populations] == ["LI"]


def test_a_feedback_that_no_neuron_holds() -> None:
    """A membrane of the user's own, without an snntorch neuron."""

    def forward(net: Any, x: Tensor) -> Tensor:
        v, mem, out = torch.zeros(B, 6), torch.zeros(B, 6), []
        for x_t in x:
            v = 0.9 * v + net.fc1(x_t)
            spk, mem = net.lif1(v, mem)
            out.append(spk)
        return torch.stack(out)

    refused(forward, "A state that no snntorch neuron holds cannot be followed")


def test_numpy_on_the_way() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        mem, out = torch.zeros(B, 6), []
        for x_t in x:
            spk, mem = net.lif1(torch.from_numpy(net.fc1(x_t).numpy().copy()), mem)
            out.append(spk)
        return torch.stack(out)

    refused(forward, "does not come from the input")


def test_a_state_kept_behind_torchs_back_is_found_by_verification() -> None:
    """A value of the data, read as a number: the trace must take it for a constant."""

    def forward(net: Any, x: Tensor) -> Tensor:
        mem, out = torch.zeros(B, 6, dtype=x.dtype), []
        for x_t in x:
            gain = 0.1 + float(x[0, 0, 0])
            spk, mem = net.lif1(net.fc1(x_t) * gain, mem)
            out.append(spk)
        return torch.stack(out)

    text = refused(forward, r"graph and module part at 'lif1'.*step \d")
    assert "spikes differ" in text
    assert (
        trace(Net(forward), sample(), verify=False).steps == T
    )  # the control: only verify sees it


def test_a_wrong_model_is_found_at_its_layer_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verification against a planted error: lif2 gets another decay than the module's."""
    from ranvier.export import trace_neurons

    right = trace_neurons.model_of

    def wrong(module: nn.Module, shape: tuple[int, ...]) -> Any:
        model = right(module, shape)
        assert isinstance(model, LIF)
        return replace(model, beta=0.7) if module.beta == 0.5 else model

    def forward(net: Any, x: Tensor) -> Tensor:
        a, b, out = torch.zeros(B, 6), torch.zeros(B, 6), []
        for x_t in x:
            spk, a = net.lif1(net.fc1(x_t), a)
            spk, b = net.lif2(net.fc2(spk), b)
            out.append(spk)
        return torch.stack(out)

    net = Net(forward)
    net.lif2.beta = torch.tensor(0.5)
    assert trace(net, sample()).steps == T
    monkeypatch.setattr(trace_neurons, "model_of", wrong)
    with pytest.raises(UnsupportedError, match="part at 'lif2'.*step [1-4]"):
        trace(net, sample())


def test_a_wrong_output_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from ranvier.export import trace_layers

    right = trace_layers.dense
    monkeypatch.setattr(trace_layers, "dense", lambda w, b=None: right(w * 1.01, b))
    with pytest.raises(UnsupportedError, match="outputs differ by"):
        trace(nn.Sequential(nn.Linear(8, 4)), torch.rand(B, 8))


def test_arguments() -> None:
    net = nn.Sequential(nn.Linear(8, 4), snn.Leaky(beta=0.5, init_hidden=True))
    with pytest.raises(UnsupportedError, match="no torch.nn.Module"):
        trace(lambda x: x, torch.rand(B, 8))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="the sample has the shape"):
        trace(net, torch.rand(8))
    with pytest.raises(ShapeError, match="nothing empty"):
        trace(net, torch.rand(0, 8))
    with pytest.raises(RangeError, match="steps is 0"):
        trace(net, torch.rand(B, 8), steps=0)
    with pytest.raises(RangeError, match="output=3"):
        trace(Net(lambda n, x: (n.fc1(x), n.fc1(x))), torch.rand(B, 8), output=3)
    with pytest.raises(UnsupportedError, match="the module itself fails"):
        trace(net, torch.rand(B, 9))
    with pytest.raises(RangeError, match="own loop runs 5"):
        trace(Net(loop(lambda n, x, m, t: n.lif1(n.fc1(x), m))), sample(), steps=7)


def test_a_constant_output_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="does not come from the sample"):
        trace(Net(lambda net, x: torch.ones(B, 2)), torch.rand(B, 8))


def test_a_reset_inside_forward_is_one_step() -> None:
    net = Net(lambda net, x: net.lif1(net.fc1(x), net.lif1.reset_mem())[0])
    with pytest.raises(RangeError, match="one step and no more"):
        trace(net, torch.rand(B, 8), steps=4)


def test_unused_populations_are_named() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        a, b, out = torch.zeros(B, 6), torch.zeros(B, 6), []
        for x_t in x:
            spk, a = net.lif1(net.fc1(x_t), a)
            _, b = net.lif2(net.fc2(spk), b)
            out.append(spk)
        return torch.stack(out)

    graph = trace(Net(forward), sample())
    assert graph.meta["unused"] == ["lif2"]
    assert [n.name for n in graph if isinstance(n, Neuron)] == ["lif1"]


def test_a_membrane_at_its_threshold_is_a_tie_not_an_error() -> None:
    """Ten tenths are one, or not quite: the order of the sum decides, and proves nothing."""
    from ranvier.export.trace_verify import _is_tie

    currents = torch.full((10, 1, 2), 0.1, dtype=torch.float64)
    currents[:, :, 1] = 0.2
    node = Neuron(name="n", inputs=("x",), model=LIF(beta=1.0, v_threshold=1.0, reset="subtract"))
    at = torch.tensor([[True, False]])
    assert _is_tie(node, currents, at, 1e-6)
    assert not _is_tie(node, currents[:9], at, 1e-6)  # 0.9 is no tie
    assert not _is_tie(node, currents[:7], ~at, 1e-6)  # 1.4 neither


def test_verification_says_what_it_saw() -> None:
    forward = loop(lambda net, x, mem, t: net.lif1(net.fc1(x), mem))
    verified = trace(Net(forward), sample()).meta["verified"]
    assert verified["spikes"] > 0 and verified["silent"] == 0 and verified["ties"] == 0
    assert verified["dtype"] == "float64"
