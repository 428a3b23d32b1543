"""Neurons: hand traces, snntorch as the oracle, and every scan against the step loop."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import snntorch
import snntorch.surrogate
import snntorch.utils
import torch

from ranvier.train.errors import RangeError
from ranvier.train.multistep import seq, set_multi_step
from ranvier.train.neurons import CUBA, IF, LIF, PLIF
from ranvier.train.scan import RESETS, use_backend
from ranvier.train.surrogates import DEFAULT_ALPHA, KINDS, Surrogate, surrogate

SHAPE = (7, 3, 4, 5)  # time, batch, two axes of neurons


def drive(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64):
    """Random currents strong enough for spikes in most steps."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=dtype) + 0.4).requires_grad_()


def weights(x: torch.Tensor) -> torch.Tensor:
    g = torch.Generator().manual_seed(99)
    return torch.randn(x.shape, generator=g, dtype=x.dtype)


def by_steps(neuron, x):
    """Spikes of the neuron run one step at a time."""
    neuron.multi_step = False
    neuron.reset_mem()
    return torch.stack([neuron(x_t) for x_t in x])


def at_once(neuron, x, backend="numba"):
    neuron.multi_step = True
    with use_backend(backend):
        return neuron(x)


def gradients(spikes, x, parameters):
    """Gradients of a random weighting of the spikes, of x first."""
    wanted = [x, *parameters]
    return torch.autograd.grad((spikes * weights(spikes)).sum(), wanted)


# ---- one neuron by hand


@pytest.mark.parametrize(
    ("reset", "third"), [("subtract", 0.95), ("zero", 0.90), ("none", 0.9 + 0.55)]
)
def test_hand_trace(reset, third):
    neuron = LIF(0.5, 1.0, reset_mechanism=reset).double()
    mem = torch.zeros(1, dtype=torch.float64)
    seen = []
    for x in (0.6, 0.8, 0.9):
        before = 0.5 * mem + x
        spike, mem = neuron(torch.tensor([x], dtype=torch.float64), mem)
        seen.append((before.item(), spike.item()))
    np.testing.assert_allclose([h for h, _ in seen], [0.6, 1.1, third], rtol=1e-12)
    assert [s for _, s in seen] == [0, 1, float(third > 1)]


def test_a_membrane_at_the_threshold_does_not_fire():
    x = torch.tensor([[1.0, math.nextafter(1.0, 2.0)]], dtype=torch.float64)
    for backend in ("numba", "torch", "loop"):
        assert at_once(IF().double(), x[None], backend).tolist() == [[[0.0, 1.0]]]


def test_v_reset_is_where_the_membrane_starts_again():
    neuron = LIF(0.5, 1.0, v_reset=-0.5).double()
    x = torch.tensor([[2.0], [1.2]], dtype=torch.float64)
    assert by_steps(neuron, x).flatten().tolist() == [1.0, 0.0]  # -0.25 + 1.2 < 1
    assert neuron.mem.item() == pytest.approx(0.95)


def test_scaled_input_is_a_higher_threshold():
    """Form 2 with weights W is form 3 with weights W and threshold tau theta."""
    x = drive(3)
    scaled = LIF(0.75, 1.0, decay_input=True).double()
    plain = LIF(0.75, 4.0).double()
    torch.testing.assert_close(at_once(scaled, 4 * x), at_once(plain, 4 * x))


# ---- surrogates


@pytest.mark.parametrize("kind", KINDS)
def test_surrogate_closed_form(kind):
    a = DEFAULT_ALPHA[kind]
    closed = {
        "atan": lambda v: a / (2 * (1 + (math.pi * a * v / 2) ** 2)),
        "sigmoid": lambda v: a * math.exp(-a * v) / (1 + math.exp(-a * v)) ** 2,
        "rectangle": lambda v: 1 / (2 * a) if abs(v) < a else 0.0,
        "triangle": lambda v: max(0.0, a - a * a * abs(v)),
        "fast_sigmoid": lambda v: 1 / (1 + a * abs(v)) ** 2,
    }[kind]
    x = torch.tensor([0.0, 0.25, -0.25, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    spikes = surrogate(kind)(x)
    assert spikes.tolist() == [0, 1, 0, 1, 0]
    (grad,) = torch.autograd.grad(spikes.sum(), x)
    np.testing.assert_allclose(grad.numpy(), [closed(v) for v in x.tolist()], rtol=1e-12)
    assert grad[0] == grad.max(), "the peak is at the threshold"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (surrogate("atan", 2.0), snntorch.surrogate.atan(alpha=2.0)),
        (surrogate("sigmoid", 4.0), snntorch.surrogate.sigmoid(slope=4)),
        (surrogate("fast_sigmoid", 25.0), snntorch.surrogate.fast_sigmoid(slope=25)),
    ],
)
def test_surrogates_shared_with_snntorch(ours, theirs):
    x = torch.linspace(-2, 2, 41, dtype=torch.float64).requires_grad_()
    (a,) = torch.autograd.grad(ours(x).sum(), x)
    (b,) = torch.autograd.grad(theirs(x).sum(), x)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", [("step", 1.0), ("atan", 0.0), ("atan", -1.0)])
def test_bad_surrogates(bad):
    with pytest.raises(RangeError):
        Surrogate(*bad)


# ---- snntorch as the oracle


def snntorch_loop(neuron, x):
    mem = torch.zeros_like(x[0])
    out = []
    for x_t in x:
        spikes, mem = neuron(x_t, mem)
        out.append(spikes)
    return torch.stack(out).to(x.dtype)  # snntorch's spikes are float32


@pytest.mark.parametrize("reset", ["zero", "none"])
@pytest.mark.parametrize("backend", ["numba", "torch", "loop"])
def test_equal_to_snntorch_in_spikes_and_gradients(reset, backend):
    """Its delayed reset to zero detaches the spikes and fires at the same steps as ours.

    Its own surrogates round spikes and their gradients to float32, so the spike function is ours.
    """
    x = drive(1)
    theirs = snntorch.Leaky(
        0.8,
        spike_grad=surrogate(),
        reset_mechanism=reset,
        learn_beta=True,
        learn_threshold=True,
    ).double()
    ours = LIF(0.8, reset_mechanism=reset, learn_beta=True, learn_threshold=True).double()
    a, b = snntorch_loop(theirs, x), at_once(ours, x, backend)
    assert a.mean() > 0.1
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    for left, right in zip(
        gradients(a, x, theirs.parameters()), gradients(b, x, ours.parameters()), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_control_an_attached_reset_has_other_gradients():
    x = drive(1)
    attached = snntorch.Leaky(0.8, reset_mechanism="zero", reset_delay=False).double()
    a, b = snntorch_loop(attached, x), at_once(LIF(0.8).double(), x)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.allclose(gradients(a, x, [])[0], gradients(b, x, [])[0])


def test_cuba_equals_snntorch_synaptic_without_reset():
    x = drive(2)
    theirs = snntorch.Synaptic(0.7, 0.8, reset_mechanism="none", init_hidden=True).double()
    ours = CUBA(0.7, 0.8, reset_mechanism="none").double()
    a = torch.stack([theirs(x_t) for x_t in x]).to(x.dtype)
    torch.testing.assert_close(a, at_once(ours, x), rtol=0, atol=0)
    torch.testing.assert_close(by_steps(ours, x), a, rtol=0, atol=0)


def test_subtract_takes_the_threshold_at_every_spike():
    """A current of 3.5 at threshold 1 is worth three spikes and leaves 0.5.

    snntorch 1.0 with reset_delay=False compares a membrane already above its threshold after that
    was taken off a second time: the third spike never comes, and 1.5 stays behind.
    """
    x = torch.tensor([[3.5], [0.0], [0.0], [0.0]], dtype=torch.float64)
    ours = IF(1.0, reset_mechanism="subtract").double()
    assert by_steps(ours, x).flatten().tolist() == [1, 1, 1, 0]
    assert ours.mem.item() == 0.5
    assert at_once(ours, x[..., None]).flatten().tolist() == [1, 1, 1, 0]
    theirs = snntorch.Leaky(1.0, reset_mechanism="subtract", reset_delay=False).double()
    assert snntorch_loop(theirs, x).flatten().tolist() == [1, 1, 0, 0]
    assert theirs.mem.item() == 1.5


# ---- the scans


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_scan_equals_loop(reset, kind, backend):
    x = drive(4)
    neuron = CUBA(
        0.6,
        0.8,
        0.9,
        spike_grad=surrogate(kind),
        reset_mechanism=reset,
        v_reset=0.3 if reset == "zero" else 0.0,
        learn_alpha=True,
        learn_beta=True,
        learn_threshold=True,
    ).double()
    a, b = at_once(neuron, x, "loop"), at_once(neuron, x, backend)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert 0.05 < a.mean() < 0.95
    for left, right in zip(
        gradients(a, x, neuron.parameters()), gradients(b, x, neuron.parameters()), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_one_parameter_a_neuron(backend):
    """Decays and thresholds that differ from neuron to neuron, and learn."""
    x = drive(5)
    g = torch.Generator().manual_seed(1)
    alpha, beta, threshold = torch.rand(3, 4, 1, generator=g, dtype=torch.float64)
    neuron = CUBA(
        alpha,
        beta.expand(4, 5).clone(),
        threshold + 0.5,
        learn_alpha=True,
        learn_beta=True,
        learn_threshold=True,
    )
    a, b = at_once(neuron, x, "loop"), at_once(neuron, x, backend)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    for left, right in zip(
        gradients(a, x, neuron.parameters()), gradients(b, x, neuron.parameters()), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LIF(0.9, reset_mechanism="subtract"),
        lambda: LIF(0.5, decay_input=True),
        lambda: LIF(0.5, v_reset=-0.2),
        lambda: IF(0.7),
        lambda: PLIF(0.6, reset_mechanism="none"),
        lambda: PLIF(0.6, decay_input=True),
        lambda: CUBA(0.4, 0.8, decay_input=True),
        lambda: LIF(0.5, spike_grad=snntorch.surrogate.atan()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multi_step_equals_single_step(make, dtype):
    neuron, x = make().to(dtype), drive(6, dtype=dtype)
    a, b = by_steps(neuron, x), at_once(neuron, x)
    assert a.mean() > 0.02
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    left = gradients(a, x, neuron.parameters())
    for one, other in zip(left, gradients(b, x, neuron.parameters()), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_more_neurons_than_a_chunk_and_two_threads():
    """The compiled scan cuts neurons into chunks, and runs them in parallel when torch may."""
    x = drive(7, (5, 2, 40_001), torch.float32)
    neuron, before = LIF(0.9), torch.get_num_threads()
    reference = at_once(neuron, x, "torch")
    (wanted,) = gradients(reference, x, [])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found = at_once(neuron, x)
            (grad,) = gradients(found, x, [])
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(found, reference, rtol=0, atol=0)
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


def test_half_precision_integrates_in_float32():
    x = drive(8).detach().bfloat16()
    spikes = at_once(LIF(0.9), x)
    assert spikes.dtype == torch.bfloat16
    torch.testing.assert_close(spikes.float(), at_once(LIF(0.9), x.float()), rtol=0, atol=0)


def test_no_graph_is_kept_without_gradients():
    with torch.no_grad():
        assert not at_once(LIF(0.9), drive(9)).requires_grad


# ---- state


def test_state_is_cleared_by_snntorch_and_by_us():
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), LIF(0.9))
    x = torch.ones(2, 4)
    first = net(x)
    assert net[1].mem.abs().sum() > 0
    snntorch.utils.reset(net)
    assert net[1].mem.abs().sum() == 0
    torch.testing.assert_close(net(x), first)
    set_multi_step(net, True)
    assert net[1].mem.numel() == 0 and net[1].multi_step


def test_multi_step_keeps_no_state():
    neuron, x = LIF(0.9), drive(10)
    torch.testing.assert_close(at_once(neuron, x), at_once(neuron, x), rtol=0, atol=0)
    assert neuron.mem.numel() == 0


def test_a_stateless_module_sees_time_folded_into_the_batch():
    conv = torch.nn.Conv2d(2, 3, 3, padding=1)
    x = torch.randn(4, 2, 2, 6, 6)
    torch.testing.assert_close(
        seq(conv, x), torch.stack([conv(x_t) for x_t in x]), rtol=1e-5, atol=1e-6
    )


def test_plif_reads_its_decay():
    neuron = PLIF(0.8)
    assert neuron.beta.item() == pytest.approx(0.8)
    assert [name for name, _ in neuron.named_parameters()] == ["w"]


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 1.5},
        {"beta": -0.1},
        {"reset_mechanism": "soft"},
        {"reset_mechanism": "subtract", "v_reset": 0.5},
    ],
)
def test_bad_parameters_are_refused(options):
    with pytest.raises(RangeError):
        LIF(**options)
    if "beta" in options:
        with pytest.raises(RangeError):
            PLIF(**options)


def test_unknown_backend_is_refused():
    with pytest.raises(RangeError, match="numba"), use_backend("cuda"):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_equals_torch(reset, kind):
    """On a CUDA device; or anywhere in Triton's own interpreter, with TRITON_INTERPRET=1."""
    pytest.importorskip("triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        pytest.skip("no CUDA device")
    device = "cpu" if interpreted else "cuda"
    x = drive(11).detach().float().to(device).requires_grad_()
    neuron = CUBA(
        0.6,
        0.8,
        spike_grad=surrogate(kind),
        reset_mechanism=reset,
        learn_alpha=True,
        learn_beta=True,
        learn_threshold=True,
    ).to(device)
    a, b = at_once(neuron, x, "torch"), at_once(neuron, x, "triton")
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    w = weights(x.cpu()).to(device)
    left = torch.autograd.grad((a * w).sum(), [x, *neuron.parameters()])
    right = torch.autograd.grad((b * w).sum(), [x, *neuron.parameters()])
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# ---- a static image: the same currents at every step


def mixed():
    return LIF(torch.tensor([0.3, 0.5, 0.8]).view(3, 1, 1), v_reset=0.25)


@pytest.mark.parametrize(
    "make", [lambda: LIF(0.5), lambda: PLIF(0.5), lambda: CUBA(0.3, 0.5), mixed]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_expanded_currents_give_what_repeated_ones_give(make, layout):
    neuron = make().double()
    x = drive(3, (2, 3, 4, 4)).detach().to(memory_format=layout).requires_grad_()
    still = at_once(neuron, x.unsqueeze(0).expand(5, *x.shape))
    repeated = at_once(neuron, x.repeat(5, 1, 1, 1, 1))
    parameters = [p for p in neuron.parameters() if p.requires_grad]
    torch.testing.assert_close(still, repeated, rtol=0, atol=0)
    assert 0 < still.mean() < 1
    for a, b in zip(
        gradients(still, x, parameters), gradients(repeated, x, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
