"""Parallel neurons: serial and parallel forms, causality by gradients, the matrices by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ranvier.train.errors import RangeError, ShapeError, UnsupportedError
from ranvier.train.neuron_speed import NEURONS as TIMED
from ranvier.train.neuron_speed import speed_table, speedup
from ranvier.train.neurons import CUBA, LIF
from ranvier.train.neurons_paralif import (
    FIRING,
    LI,
    ParaLIF,
    RecurrentLIF,
    RecurrentParaLIF,
    filter_fft,
    filter_sequential,
)
from ranvier.train.neurons_parallel import (
    IPSU,
    PSN,
    PSU,
    RPSU,
    MaskedPSN,
    SlidingPSN,
    decay_matrix,
    set_mask,
)

T = 8
DETERMINISTIC = [name for name, (_, rule) in FIRING.items() if rule in ("difference", "threshold")]


def currents(steps: int = T, seed: int = 0, shape: tuple[int, ...] = (3, 5)) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(steps, *shape, generator=g, dtype=torch.float64) * 1.5 + 0.7


def both_ways(neuron, x):
    """(spikes at once, spikes step by step)."""
    neuron = neuron.double().eval()
    neuron.multi_step = True
    whole = neuron(x)
    neuron.multi_step = False
    neuron.reset_mem()
    steps = torch.stack([neuron(x_t) for x_t in x])
    neuron.reset_mem()
    return whole, steps


def influence(neuron, steps: int = T) -> np.ndarray:
    """[t, j] True where the spike of step t has a gradient to the input of step j."""
    neuron = neuron.double().eval()
    neuron.multi_step = True
    x = currents(steps, shape=(1, 64)).requires_grad_()
    s = neuron(x)
    rows = [torch.autograd.grad(s[t].sum(), x, retain_graph=True)[0] for t in range(steps)]
    return torch.stack(rows).abs().amax((2, 3)).numpy() > 1e-12  # a transform leaves 1e-17


CAUSAL = {
    "masked": lambda: MaskedPSN(T, 3),
    "sliding-gemm": lambda: SlidingPSN(3),
    "sliding-conv": lambda: SlidingPSN(3, backend="conv", exp_init=False),
    "psu": lambda: PSU(0.6),
    "ipsu": lambda: IPSU(T, 0.6),
    "ipsu-raw": lambda: IPSU(T, 0.6, raw_reset=True),
    "rpsu": lambda: RPSU(T, 0.6),
    **{f"paralif-{name}": lambda name=name: ParaLIF(name, 0.6, 0.7) for name in DETERMINISTIC},
    "recurrent-paralif": lambda: RecurrentParaLIF(5, "t", 0.6, 0.7, threshold=0.4),
    "recurrent-paralif-sd": lambda: RecurrentParaLIF(5, "sd", 0.6, 0.7),
    "recurrent-paralif-relu": lambda: RecurrentParaLIF(5, "td", 0.6, 0.7, hidden="relu"),
    "recurrent-lif": lambda: RecurrentLIF(5, 0.6, 0.7, 0.6),
    "li": lambda: LI(0.6, 0.7),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_parallel_equals_step_by_step(name):
    torch.manual_seed(3)
    whole, steps = both_ways(CAUSAL[name](), currents())
    torch.testing.assert_close(whole, steps, rtol=1e-10, atol=1e-12)
    assert whole.std() > 0, "silent neurons would agree too"


@pytest.mark.parametrize("name", [n for n in CAUSAL if not n.startswith("recurrent")])
def test_no_gradient_from_the_future(name):
    torch.manual_seed(0)
    seen = influence(CAUSAL[name]())
    assert not np.triu(seen, 1).any()
    assert np.diag(seen).all()


def test_control_psn_sees_the_future():
    torch.manual_seed(0)
    assert influence(PSN(T))[np.triu_indices(T, 1)].all()
    with pytest.raises(UnsupportedError, match="later inputs"):
        PSN(T)(currents()[0])


def test_a_window_of_k_inputs():
    torch.manual_seed(0)
    for neuron in (MaskedPSN(T, 3), SlidingPSN(3, exp_init=False)):
        i = np.arange(T)
        gap = i[:, None] - i[None, :]
        assert (influence(neuron) == ((gap >= 0) & (gap < 3))).all()


# ---- PSN


@pytest.mark.parametrize("beta", [0.5, 0.8])
def test_psn_with_a_lif_matrix_is_a_lif_without_reset(beta):
    psn = PSN(T).double()
    psn.multi_step = True
    x = currents()
    with torch.no_grad():
        psn.weight.copy_((1 - beta) * decay_matrix(beta, T, x))
    lif = LIF(beta, 1.0, reset_mechanism="none", decay_input=True).double()
    lif.multi_step = True
    spikes = psn(x)
    assert 0.05 < spikes.mean() < 0.95
    torch.testing.assert_close(spikes, lif(x), rtol=0, atol=0)


def test_psn_thresholds_start_at_one():
    for neuron in (PSN(4), MaskedPSN(4, 2), SlidingPSN(2)):
        assert (neuron.threshold == 1).all()
    assert sum(p.numel() for p in PSN(32).parameters()) == 32 * 32 + 32
    assert sum(p.numel() for p in SlidingPSN(32).parameters()) == 33


def test_psn_is_built_for_its_steps():
    neuron = PSN(4)
    neuron.multi_step = True
    with pytest.raises(ShapeError, match="built for 4"):
        neuron(torch.zeros(5, 1, 1))


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_the_mask_closes(lam):
    neuron = MaskedPSN(4, 2, lam=lam)
    neuron.multi_step = True
    mask = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    wanted = neuron.weight * (lam * mask + (1 - lam))
    torch.testing.assert_close(neuron.train().matrix(), wanted)
    torch.testing.assert_close(neuron.eval().matrix(), neuron.weight * mask)


def test_the_mask_schedule():
    net = torch.nn.Sequential(MaskedPSN(4, 2))
    assert [set_mask(net, e, 65) for e in (0, 4, 8, 64)] == [0.0, 0.5, 1.0, 1.0]
    assert net[0].lam == 1 and set_mask(net, 0, 1) == 1


def test_sliding_backends_agree():
    torch.manual_seed(0)
    gemm, conv = SlidingPSN(5, exp_init=False).double(), SlidingPSN(5, backend="conv").double()
    conv.load_state_dict(gemm.state_dict())
    for neuron in (gemm, conv):
        neuron.multi_step = True
    for steps in (3, 5, 20):
        x = currents(steps, shape=(2, 3, 4)).requires_grad_()
        a, b = gemm(x), conv(x)
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        left, right = (torch.autograd.grad(s.sum(), x)[0] for s in (a, b))
        torch.testing.assert_close(left, right)


def test_sliding_by_hand():
    neuron = SlidingPSN(2).double()  # taps 0.5, 1 and threshold 1
    neuron.multi_step = True
    x = torch.tensor([0.9, 0.5, 0.9, 0.6]).double().view(4, 1, 1)
    # H = 0.9, 0.95, 1.15, 1.05
    assert neuron(x).flatten().tolist() == [0, 0, 1, 1]


# ---- PSU


def test_true_spikes_make_psu_the_serial_lif():
    """A X - B S with the true spikes is the membrane of a soft-reset LIF before its reset."""
    beta, theta = 0.6, 0.5
    x = currents()
    unit = PSU(beta, theta).double()
    mem, membranes, spikes = torch.zeros_like(x[0]), [], []
    for x_t in x:
        h = beta * mem + (1 - beta) * x_t
        s = (h > theta).double()
        mem = h - theta * s
        membranes.append(h), spikes.append(s)
    s = torch.stack(spikes).flatten(1)
    b = unit.reset_matrix(T, x)
    assert (torch.diagonal(b) == 0).all() and 0.1 < s.mean() < 0.9
    v = unit.charge(x).flatten(1) - b @ s
    torch.testing.assert_close(v.view(x.shape), torch.stack(membranes), rtol=1e-6, atol=1e-7)


def test_psu_without_resets_is_psn_with_lif_weights():
    x = currents()
    unit = PSU(0.6, 0.5).double()
    unit.reset_matrix = lambda steps, like: torch.zeros(steps, steps).double()
    psn = PSN(T).double()
    with torch.no_grad():
        psn.weight.copy_(unit.charge_matrix(T, x))
        psn.bias.fill_(-0.5)
    unit.multi_step = psn.multi_step = True
    torch.testing.assert_close(unit(x), psn(x), rtol=0, atol=0)


def test_a_silent_psu_drifts_below_zero():
    v = PSU(0.5, 1.0).double().membrane(torch.zeros(4, 1).double())
    assert v.flatten().tolist() == [0.0, -0.25, -0.375, -0.4375]


def test_psu_parameters():
    assert [sum(p.numel() for p in n.parameters()) for n in (PSU(), IPSU(8), RPSU(8))] == [
        0,
        72,
        72,
    ]
    neuron = RPSU(4)
    neuron.multi_step = True
    with pytest.raises(ShapeError, match="built for 4"):
        neuron(torch.zeros(5, 1))


# ---- ParaLIF


@pytest.mark.parametrize("per_neuron", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_fft_equals_the_recurrence(dtype, tolerance, per_neuron):
    g = torch.Generator().manual_seed(0)
    shape = (5,) if per_neuron else ()
    alpha, beta = torch.rand(2, *shape, generator=g, dtype=dtype) * 0.5 + 0.45
    x = currents(100).to(dtype)
    wanted, _ = filter_sequential(x, alpha, beta)
    torch.testing.assert_close(filter_fft(x, alpha, beta), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("padding", [1, 2])
def test_control_less_padding_wraps_round(padding):
    x = currents(16)
    decays = torch.tensor(0.9).double(), torch.tensor(0.8).double()
    wanted, _ = filter_sequential(x, *decays)
    assert (filter_fft(x, *decays, padding) - wanted).abs().max() > 1e-3


def test_backends_of_paralif_agree_in_gradients():
    x = currents(12).requires_grad_()
    grads = []
    for backend in ("fft", "sequential"):
        neuron = ParaLIF("td", 0.6, 0.7, learn=True, backend=backend).double()
        neuron.multi_step = True
        spikes = neuron(x)
        grads.append(torch.autograd.grad(spikes.square().sum(), [x, *neuron.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_paralif_t_is_a_lif_without_reset():
    x = currents()
    fast = ParaLIF("t", 0.0, 0.7).double()
    lif = LIF(0.7, reset_mechanism="none", decay_input=True).double()
    slow = ParaLIF("t", 0.6, 0.7).double()
    cuba = CUBA(0.6, 0.7, reset_mechanism="none", decay_input=True).double()
    for ours, theirs in ((fast, lif), (slow, cuba)):
        ours.multi_step = theirs.multi_step = True
        spikes = ours(x)
        assert 0.05 < spikes.mean() < 0.99
        torch.testing.assert_close(spikes, theirs(x), rtol=0, atol=0)


def test_learned_decays_start_where_they_are_told():
    neuron = LI(0.6, 0.9, learn=True)
    np.testing.assert_allclose([d.item() for d in neuron.decays()], [0.6, 0.9], rtol=1e-6)
    assert len(list(neuron.parameters())) == 2


def test_firing_rates_of_the_random_functions():
    """E[s] is sigmoid(u) for sb, ReLU(tanh u) for trb, sigmoid(2 u) for gs."""
    n = 200_000
    torch.manual_seed(0)
    for firing, rate in (
        ("sb", lambda u: torch.sigmoid(u)),
        ("trb", lambda u: torch.relu(torch.tanh(u))),
        ("gs", lambda u: torch.sigmoid(2 * u)),
    ):
        neuron = ParaLIF(firing).train()
        for value in (-0.5, 0.3, 1.2):
            u = torch.full((1, n), value)
            # three standard errors of a mean of n draws
            expected = rate(u)[0, 0].item()
            assert neuron.fire_from(u).mean().item() == pytest.approx(
                expected, abs=3 * 0.5 / n**0.5
            )


@pytest.mark.parametrize("firing", ["gs", "sb", "trb"])
def test_random_firing_repeats_in_eval_mode_alone(firing):
    neuron = ParaLIF(firing).double()
    neuron.multi_step = True
    x = currents(20)
    torch.testing.assert_close(neuron.eval()(x), neuron(x), rtol=0, atol=0)
    neuron.train()
    assert not torch.equal(neuron(x), neuron(x))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(neuron(x).sum(), x)
    assert grad.abs().max() > 0


def test_the_scaled_straight_through_gradient():
    u = torch.tensor([[0.4]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(ParaLIF("sb").double().fire_from(u).sum(), u)
    rho = torch.sigmoid(u)
    torch.testing.assert_close(grad, rho * rho * (1 - rho))


def test_sd_fires_at_the_first_step_for_nothing():
    neuron = ParaLIF("sd").double()
    neuron.multi_step = True
    assert neuron(torch.zeros(3, 1, 1).double()).flatten().tolist() == [1, 0, 0]


def test_squashed_thresholds_start_where_they_can_fire():
    x = currents() * 4
    for firing in ("st", "tt", "trt"):
        neuron = ParaLIF(firing).double()
        neuron.multi_step = True
        assert neuron(x).mean() > 0.2
        dead = ParaLIF(firing, threshold=1.0).double()
        dead.multi_step = True
        assert dead(x).sum() == 0


def test_recurrence_by_hand():
    """Two neurons, the first excites the second one step later."""
    neuron = RecurrentLIF(2, alpha=0.0, beta=0.0, threshold=0.5).double()
    with torch.no_grad():
        neuron.recurrent.weight.copy_(torch.tensor([[0.0, 0], [1, 0]]))
        neuron.recurrent.bias.zero_()
    neuron.multi_step = True
    x = torch.tensor([[[1.0, 0]], [[0, 0]], [[0, 0]]]).double()
    assert neuron(x)[:, 0].tolist() == [[1, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SlidingPSN(0),
        lambda: SlidingPSN(3, backend="fft"),
        lambda: MaskedPSN(4, 0),
        lambda: PSU(1.0),
        lambda: ParaLIF("xx"),
        lambda: LI(1.5),
        lambda: LI(backend="gemm"),
        lambda: RecurrentParaLIF(3, hidden="tanh"),
    ],
)
def test_bad_parameters_are_refused(make):
    with pytest.raises(RangeError):
        make()


def test_the_speed_table_has_a_cell_for_each_neuron_and_length():
    lines = speed_table(steps=(2, 4), values=64, repeats=1).splitlines()
    assert len(lines) == 3 + len(TIMED) and all(line.count("|") == 5 for line in lines)
    assert "up to 200" in lines[-2] and lines[2].count(" ms") == 2


def test_a_speedup_is_the_median_of_ratios_within_rounds():
    """A machine that slows down for one round slows both sides."""
    assert speedup((2.0, 20.0, 2.0), (1.0, 10.0, 0.5)) == 2.0
