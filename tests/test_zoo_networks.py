"""The zoo's networks: published counts, SynA's gates and pruning, SSNN's shrinking, events."""

from __future__ import annotations

import pytest
import snntorch
import torch
from torch import nn

from ranvier.train import create_model
from ranvier.train import models as registry
from ranvier.train.errors import RangeError, ShapeError, UnsupportedError
from ranvier.train.models import flops, n_parameters, operations
from ranvier.train.models_ghost import ChannelCat
from ranvier.train.models_ssnn import TemporalTransformer, average_steps, stage_loss
from ranvier.train.models_syna import Attention, Unit, prune_shortcuts, shortcut_rates
from ranvier.train.multistep import set_multi_step


def lively(name, **options):
    """A network in float64 whose running statistics are those of one batch; in eval mode."""
    torch.manual_seed(0)
    net = create_model(name, **{"threshold": 0.4, **options}).double()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    net.train()(inputs(net, 8))
    return net.eval()


def inputs(net, batch=2, steps=None, seed=1):
    g = torch.Generator().manual_seed(seed)
    lead = (batch,) if steps is None else (steps, batch)
    return torch.rand(*lead, *net.input_shape, generator=g, dtype=torch.float64) * 2


def assert_steps_equal_the_whole(net, x):
    with torch.no_grad():
        whole = net(x)
        net.reset()
        sequence = x if x.ndim == 5 else [x] * net.steps
        steps = torch.stack([net.step(x_t) for x_t in sequence])
    torch.testing.assert_close(steps.mean(0), whole, rtol=1e-8, atol=1e-10)
    assert whole.std() > 0


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("ghostnet", {}, 3_914_318),
        ("ghostnet-dfc", {}, 4_888_718),
        ("ghostnet-mlp", {}, 4_682_318),
        ("ghostnet", {"num_classes": 1000, "image_size": 224}, 5_182_508),
        (
            "ghostnet-dfc",
            {"num_classes": 1000, "image_size": 224, "dfc_half": True},
            6_156_908,
        ),
        ("syna-resnet18", {"attention": ""}, 11_173_962),
        ("sequential", {"neuron": "lif"}, 513_418),
        ("sequential", {"neuron": "psn"}, 520_810),
        ("sequential", {"neuron": "masked-psn", "order": 32}, 520_810),
        ("sequential", {"neuron": "sliding-psn", "order": 32}, 513_418 + 7 * 33),
    ],
)
def test_parameter_counts(name, options, expected, monkeypatch):
    module = registry._load(registry.MODELS[name].network).__module__
    monkeypatch.setattr(f"{module}.initialize", lambda net: None)
    assert n_parameters(create_model(name, **options)) == expected


@pytest.mark.parametrize(
    ("name", "macs", "printed"),
    [("ghostnet", 5_539_376, "6.42"), ("ghostnet-dfc", 7_826_672, "9.73")],
)
def test_ghost_operations(name, macs, printed):
    """Millions of operations as published: 6.4 and 9.7."""
    net = create_model(name, steps=1)
    assert operations(net)[0] == macs
    assert f"{flops(net) / 1e6:.2f}" == printed


# ---- GhostNet

SMALL_ROWS = ((3, 16, 16, 0, 1), (3, 48, 24, 0, 2), (5, 40, 24, 1, 1))


@pytest.mark.parametrize(
    "options",
    [{"join": "vanilla"}, {"join": "ms", "dfc": True}, {"join": "ms", "channel_mlp": True}],
)
def test_ghost_steps_equal_the_whole(options):
    net = lively("ghostnet", rows=SMALL_ROWS, image_size=8, steps=3, **options)
    assert_steps_equal_the_whole(net, inputs(net))


def test_ghost_channels_are_cut_to_fit():
    a = torch.arange(3.0).view(1, 3, 1, 1)
    assert ChannelCat(5)(a, a + 10).flatten().tolist() == [0, 1, 2, 10, 11]


def test_ghost_refuses_what_does_not_fit():
    with pytest.raises(RangeError, match="vanilla"):
        create_model("ghostnet", join="or")
    with pytest.raises(RangeError, match="64 pixels"):
        create_model("ghostnet-dfc", dfc_half=True)


# ---- SynA


def syna(**options):
    sizes = {"widths": (8, 8, 12, 12), "steps": 8, "image_size": 8, "in_channels": 2}
    return lively("syna-resnet18", **{**sizes, **options})


@pytest.mark.parametrize("attention", ["", "t", "c", "s", "tcs"])
def test_syna_convolutions_see_spikes_alone(attention):
    net = syna(attention=attention, reduction=2, c_reduction=4)
    found = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and name != "conv" and ".space" not in name:
            module.register_forward_pre_hook(
                lambda _, a, name=name: found.append((name, set(a[0].unique().tolist())))
            )
    net(inputs(net))
    assert len(found) == 19 and all(values <= {0.0, 1.0} for _, values in found)
    assert any(values == {0.0, 1.0} for _, values in found)


def test_syna_without_attention_runs_step_by_step():
    net = syna(attention="")
    assert_steps_equal_the_whole(net, inputs(net))
    with pytest.raises(UnsupportedError, match="attention"):
        other = syna(attention="t")
        other.step(inputs(other))


def test_attention_is_built_for_its_steps():
    net = syna(attention="t")
    with pytest.raises(ShapeError, match="built for 8"):
        net(inputs(net, steps=5))


def test_the_gate_over_time_by_hand():
    """g = sigmoid(M(mean) + M(max)) with M of ones halves: T = 2, reduced to 1."""
    config = create_model("syna-resnet18", steps=2, reduction=2, image_size=16).config
    ma = Attention(config, 1, inhibit=False).double()
    with torch.no_grad():
        for p in ma.time.parameters():
            p.fill_(0.5)
    set_multi_step(ma, True)
    x = torch.tensor([[1.0, 3.0], [0.0, -2.0]]).double().view(2, 1, 1, 1, 2)
    # means 2, -1 -> 0.5 each step; maxima 3, 0 -> 1.5; M gives 0.25 and 0.75 after its halves
    gate = torch.sigmoid(torch.tensor(0.5 * 0.5 * 1 + 0.5 * 0.5 * 3).double())
    torch.testing.assert_close(ma(x), torch.relu(gate * x), rtol=1e-12, atol=0)


def test_the_inhibitory_gate_is_binary_and_silences():
    net = syna(attention="t", reduction=2)
    unit = net.unit2_1
    ia = unit.shortcut.attention
    gates = []
    ia.gate_t.register_forward_hook(lambda *a: gates.append(a[2]))
    x = inputs(net)
    net(x)
    assert set(gates[0].unique().tolist()) <= {0.0, 1.0}
    with torch.no_grad():  # weights that keep the gate shut
        for p in ia.time.parameters():
            p.zero_()
    outputs, backbone = [], []
    unit.register_forward_hook(lambda *a: outputs.append(a[2]))
    unit.neuron2.register_forward_hook(lambda *a: backbone.append(a[2]))
    net(x)
    assert gates[1].sum() == 0
    # a shut gate leaves the shortcut's neuron without input, so the unit is its backbone
    assert unit.shortcut.norm.bias.abs().sum() == 0
    torch.testing.assert_close(outputs[0], backbone[0], rtol=0, atol=0)


def test_natural_pruning():
    """Silent shortcuts go without a trace; control: an active one does not."""
    net = syna(attention="t", reduction=2)
    with torch.no_grad():
        for unit, weight in ((net.unit2_1, 1.0), (net.unit3_1, 0.0)):  # gates open, and shut
            for p in unit.shortcut.attention.time.parameters():
                p.fill_(weight)
    batches = [inputs(net, seed=s) for s in range(3)]
    rates = shortcut_rates(net, batches)
    assert set(rates) == {"unit2_1", "unit3_1", "unit4_1"} and rates["unit3_1"] == 0
    before = [net(x) for x in batches]
    assert prune_shortcuts(net, rates) == [k for k, v in rates.items() if v == 0]
    for x, y in zip(batches, before, strict=True):
        assert torch.equal(net(x), y)
    active = max(rates, key=rates.__getitem__)
    assert rates[active] > 0
    prune_shortcuts(net, {active: 0.0})
    assert not all(torch.equal(net(x), y) for x, y in zip(batches, before, strict=True))


def test_each_branch_of_an_or_is_evaluated_once():
    net = syna(attention="")
    calls = {}
    for name, module in net.named_modules():
        if isinstance(module, snntorch.SpikingNeuron):
            module.register_forward_hook(
                lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})
            )
    net(inputs(net))
    assert set(calls.values()) == {1}
    assert sum(isinstance(m, Unit) and m.shortcut is not None for m in net.modules()) == 3


# ---- SSNN


def ssnn(**options):
    sizes = {"units": ((8, 8), (8, 8), (8, 8), (8, 8)), "image_size": 16, "num_classes": 4}
    return lively("ssnn-vgg9", **{**sizes, **options})


def test_average_steps():
    assert average_steps(ssnn()) == 5
    assert average_steps(ssnn(stage_steps=(5, 5, 5, 5), steps=5)) == 5
    uneven = ssnn(units=((8,), (8, 8, 8)), stage_steps=(8, 4), steps=8)
    assert average_steps(uneven) == (8 * 1 + 4 * 3) / 4


@pytest.mark.parametrize("softmax_of", ["none", "relu"])
def test_the_transformer_conserves_what_comes(softmax_of):
    torch.manual_seed(0)
    shrink = TemporalTransformer(8, 3, softmax_of).double()
    x = (torch.rand(8, 4, 2, 5, 5) > 0.6).double()
    y = shrink(x)
    assert y.shape == (3, 4, 2, 5, 5)
    torch.testing.assert_close(y.sum(0), x.sum(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shrink.shares(x).sum(0), torch.ones(4).double())
    with pytest.raises(ShapeError, match="takes 8 to 3"):
        shrink(x[:5])


def test_a_uniform_transformer_is_the_mean():
    shrink = TemporalTransformer(4, 4).double()
    with torch.no_grad():
        shrink.weight.fill_(0.3)  # equal scores for all steps
    x = torch.rand(4, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(shrink(x), x.mean(0).expand(4, 2, 3, 3))


def test_stages_run_their_own_steps():
    net = ssnn()
    seen = {}
    for i in range(1, 5):
        stage = getattr(net, f"stage{i}")
        stage.register_forward_hook(lambda _, __, y, i=i: seen.update({i: len(y)}))
    assert net(inputs(net, steps=8)).shape == (2, 4)
    assert seen == {1: 8, 2: 6, 3: 4, 4: 2}


@pytest.mark.parametrize("name", ["ssnn-vgg9", "ssnn-resnet"])
def test_heads_and_loss(name):
    sizes = {"image_size": 16, "num_classes": 4}
    if name == "ssnn-vgg9":
        net = ssnn()
    else:
        net = lively(name, widths=(8, 8, 8, 8), **sizes)
    x = inputs(net)
    heads = net.heads(x)
    assert [h.shape for h in heads] == [(2, 4)] * 4
    torch.testing.assert_close(heads[-1], net(x))
    y = torch.tensor([1, 3])
    by_hand = [nn.functional.cross_entropy(h, y) for h in heads]
    wanted = 0.5 * (by_hand[0] + by_hand[1] + by_hand[2]) + by_hand[3]
    torch.testing.assert_close(stage_loss(heads, y), wanted)
    with pytest.raises(RangeError, match="3 weights for 4"):
        stage_loss(heads, y, [1, 1, 1])
    net.zero_grad()
    stage_loss(net.train().heads(x), y).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_inference_needs_no_early_classifier():
    net = ssnn()
    ran = set()
    for name, module in net.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    net(inputs(net))
    assert not any(name.startswith("early") for name in ran)
    kept = net.inference_state()
    again = ssnn()
    missing, unexpected = again.load_state_dict(kept, strict=False)
    assert all(k.startswith("early") for k in missing) and missing and not unexpected
    torch.testing.assert_close(again(inputs(net)), net(inputs(net)), rtol=0, atol=0)


def test_ssnn_refuses_what_it_cannot_do():
    net = ssnn()
    with pytest.raises(UnsupportedError, match="on the host"):
        net.step(inputs(net))
    for bad in ({"stage_steps": (4, 6, 4, 2)}, {"stage_steps": (8, 4)}, {"steps": 4}):
        with pytest.raises(RangeError):
            create_model("ssnn-vgg9", **bad)


# ---- event networks


@pytest.mark.parametrize("join", ["sew", "vanilla", "ms", "or"])
def test_sew7b_steps_equal_the_whole(join):
    net = lively("sew7b", join=join, widths=(8, 8, 12), image_size=16, steps=4)
    assert_steps_equal_the_whole(net, inputs(net, steps=4))


def test_sew7b_has_seven_blocks_and_a_convolution_where_the_width_changes():
    net = create_model("sew7b")
    ones = [
        n for n, m in net.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)
    ]
    assert ones == ["conv", "layer5.conv"]
    assert net.fc.in_features == 128 and net.steps == 16
    assert create_model("sew7b-gesture").fc.out_features == 11
    with pytest.raises(RangeError, match="at least 128"):
        create_model("sew7b", image_size=64)


def test_sew7b_neurons_learn_their_decay():
    net = create_model("sew7b", widths=(8, 8), image_size=8)
    assert [m.beta.item() for m in net.modules() if isinstance(m, snntorch.Leaky)] == [0.5] * 5


def test_the_event_pair_differs_in_the_neurons_alone():
    snn, cnn = create_model("dvs-snn"), create_model("dvs-cnn")
    assert n_parameters(snn) == n_parameters(cnn) == 113_450
    neurons = [m for m in snn.modules() if isinstance(m, snntorch.SpikingNeuron)]
    assert len(neurons) == 3 and all(n.beta == 1 and n.reset_mechanism == "zero" for n in neurons)
    assert sum(isinstance(m, nn.ReLU) for m in cnn.modules()) == 3
    assert snn.steps == 8 and cnn.steps == 1 and snn.fc1.in_features == 2048


def test_samples_do_not_mix():
    """[T, B, ...]: permuting samples permutes the outputs; permuting time does not leave them."""
    net = lively("dvs-snn", image_size=16)
    x = inputs(net, batch=4, steps=8) * torch.linspace(0.2, 2, 8).view(8, 1, 1, 1, 1)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(net(x[:, order]), net(x)[order])
    assert not torch.allclose(net(x.flip(0)), net(x))


@pytest.mark.parametrize("neuron", ["lif", "sliding-psn", "masked-psn", "psu"])
def test_columns_one_by_one(neuron):
    torch.manual_seed(0)
    net = create_model(
        "sequential", neuron=neuron, image_size=8, steps=8, channels=8, hidden=16, order=4
    )
    net = net.double()
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64) * 4
    net.train()(x)
    net.eval()
    with torch.no_grad():
        whole = net(x)
        net.reset()
        steps = torch.stack([net.step(x[..., t]) for t in range(8)])
    torch.testing.assert_close(steps.mean(0), whole, rtol=1e-8, atol=1e-10)
    with pytest.raises(RangeError, match="column"):
        create_model("sequential", steps=8)
