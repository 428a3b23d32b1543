"""Networks: published parameter and operation counts, joins, probes, and the two ways to run."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import snntorch
import torch
from torch import nn

from ranvier.train import create_model, list_models
from ranvier.train import models as registry
from ranvier.train.blocks import JOINS, Join, ResidualBlock, ShortcutA, make_join
from ranvier.train.errors import DataError, RangeError, ShapeError, UnsupportedError
from ranvier.train.models import flops, make_config, n_parameters
from ranvier.train.multistep import set_multi_step
from ranvier.train.networks import NEURONS
from ranvier.train.norms import ScaledTdBN2d, TdBN2d

ALL_JOINS = tuple(JOINS)


def images(batch: int = 2, net=None, seed: int = 0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shape = (1, 8, 8) if net is None else net.input_shape
    return torch.rand(batch, *shape, generator=g, dtype=dtype)


def small(**options):
    """A lively residual network for 8x8 images: low thresholds, statistics of a real batch."""
    torch.manual_seed(0)
    widths = {"widths": (16, 32, 32)}
    net = create_model("resnet-digits", **{"threshold": 0.3, **widths, **options}).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches seen
    net.train()(images(16, net) * 2)
    return net.eval()


# ---- counts


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet20", {}, 269_722),
        ("resnet32", {}, 464_154),
        ("resnet32", {"conv_bias": True}, 465_274),
        ("resnet32", {"conv_bias": True, "in_channels": 1}, 464_986),
        ("resnet56", {}, 853_018),
        ("resnet110", {}, 1_727_962),
        ("resnet482", {}, 7_755_354),
        ("resnet20", {"shortcut": "conv"}, 269_722 + 2_752),
        ("resnet", {"blocks": (5, 5, 5)}, 464_154),
        ("vgg16", {}, 14_785_866),
        ("vgg16", {"conv_bias": True}, 14_790_090),
        ("resnet18", {}, 11_689_512),
        ("resnet34", {}, 21_797_672),
        ("resnet50", {}, 25_557_032),
        ("resnet101", {}, 44_549_160),
        ("resnet152", {}, 60_192_808),
        ("ms-resnet18", {}, 11_693_736),
        ("ms-resnet34", {}, 21_801_896),
        ("ms-resnet104", {}, 77_350_504),
    ],
)
def test_parameter_counts(name, options, expected, monkeypatch):
    module = registry._load(registry.MODELS[name].network).__module__
    monkeypatch.setattr(f"{module}.initialize", lambda net: None)  # counting needs no numbers
    assert n_parameters(create_model(name, **options)) == expected


@pytest.mark.parametrize("join", ["vanilla", "sew", "ms", "or"])
def test_option_a_joins_add_no_parameters(join):
    assert n_parameters(create_model("resnet20", join=join)) == 269_722


@pytest.mark.parametrize(
    ("name", "in_channels", "expected"),
    [
        ("resnet32", 3, 72_500_608),
        ("resnet32", 1, 72_205_696),
        ("vgg16", 3, 316_955_904),
        ("vgg16", 1, 315_776_256),
    ],
)
def test_operations_by_the_fitted_rule(name, in_channels, expected):
    net = create_model(name, in_channels=in_channels, steps=1)  # the rule has its own six
    assert flops(net) == expected
    assert net.training, "counting leaves the mode as it was"


def test_control_conv_shortcuts_break_the_fitted_rule():
    assert flops(create_model("resnet32", shortcut="conv", steps=1)) != 72_500_608


def test_the_rule_does_not_look_at_the_steps():
    one, six = (create_model("resnet-digits", steps=n) for n in (1, 6))
    assert flops(one) == flops(six)


def test_neuron_layers():
    """SEW has 1 + 6 n, MS 6 n + 1."""
    for join in ("sew", "ms", "or", "vanilla"):
        net = create_model("resnet20", join=join)
        n = sum(isinstance(m, snntorch.SpikingNeuron) for m in net.modules())
        assert n == 19
    with_neurons = create_model("resnet20", join="sew", shortcut="conv")
    assert sum(isinstance(m, snntorch.SpikingNeuron) for m in with_neurons.modules()) == 21


# ---- joins


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("sew", [0, 1, 1, 2]),
        ("sew-and", [0, 0, 0, 1]),
        ("sew-iand", [0, 1, 0, 0]),
        ("or", [0, 1, 1, 1]),
    ],
)
def test_truth_tables(kind, table):
    a, s = torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 1]])
    assert make_join(kind)(a, s).tolist() == table


def test_or_gradients_are_those_of_each_side_alone():
    a, s = torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 1]]).requires_grad_()
    grads = torch.autograd.grad(make_join("or")(a, s).sum(), [a, s])
    assert grads[0].tolist() == (1 - s).tolist() and grads[1].tolist() == (1 - a).tolist()


def test_unknown_join_is_refused():
    with pytest.raises(RangeError, match="vanilla"):
        make_join("xor")


def conv_inputs(net, x):
    """Names of the convolutions after the stem that saw anything but 0 and 1."""
    offenders = set()
    hooks = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and name != "conv":

            def look(_, inputs, name=name):
                if not bool(((inputs[0] == 0) | (inputs[0] == 1)).all()):
                    offenders.add(name)

            hooks.append(module.register_forward_pre_hook(look))
    net(x)
    for hook in hooks:
        hook.remove()
    return offenders


@pytest.mark.parametrize("shortcut", ["A", "conv"])
@pytest.mark.parametrize("join", ALL_JOINS)
def test_which_convolutions_see_spikes_alone(join, shortcut):
    net = small(join=join, shortcut=shortcut, zero_init=False).train()
    offenders = conv_inputs(net, images(16) * 2)
    if join == "sew":
        assert offenders, "sums of spikes reach 2"
    elif join == "ms" and shortcut == "conv":
        assert offenders == {"stage2.0.shortcut.conv", "stage3.0.shortcut.conv"}
    else:
        assert not offenders


def test_sew_add_grows_by_one_a_block():
    """A stage of k blocks ends at 1 + k at most; the first of a stage at 2."""
    net = create_model("resnet20", join="sew").train()
    torch.manual_seed(0)
    highest = {}
    for name, module in net.named_modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(
                lambda _, __, y, name=name: highest.update({name: int(y.max())})
            )
    net(torch.rand(2, 3, 32, 32) * 3)
    for name, top in highest.items():
        stage, block = (int(part) for part in name.removeprefix("stage").split("."))
        # option A passes integers on, so that stages add up
        assert top <= 1 + 3 * (stage - 1) + block + 1
    assert max(highest.values()) >= 2


@pytest.mark.parametrize("multi_step", [True, False])
@pytest.mark.parametrize("join", ["sew", "sew-and", "sew-iand", "or", "ms"])
def test_zero_init_makes_a_block_its_shortcut(join, multi_step):
    net = create_model("resnet-digits", join=join, zero_init=True, blocks=(2, 1, 1)).double()
    block = net.stage1.get_submodule("1")
    set_multi_step(net, multi_step)
    x = (torch.rand(4, 3, 16, 8, 8, dtype=torch.float64) > 0.6).double()
    if join == "ms":
        x = x * 1.7 - 0.4
    x = x if multi_step else x[0]
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)


def test_control_without_zero_init_a_block_is_no_shortcut():
    torch.manual_seed(0)
    net = create_model("resnet-digits", join="ms", zero_init=False).double()
    x = torch.rand(3, 16, 8, 8, dtype=torch.float64) * 2
    assert not torch.allclose(net.stage1.get_submodule("0")(x), x)


def test_option_a_subsamples_and_pads():
    shortcut = ShortcutA(2, 2, 5)
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    y = shortcut(x)
    assert y.shape == (1, 5, 2, 2)
    assert y[0, :2].tolist() == x[0, :, ::2, ::2].tolist() and y[0, 2:].abs().sum() == 0
    with pytest.raises(ShapeError, match="conv"):
        ShortcutA(2, 8, 4)


# ---- tdBN


@pytest.mark.parametrize("kind", [TdBN2d, ScaledTdBN2d])
def test_tdbn_scales_to_the_threshold(kind):
    torch.manual_seed(0)
    norm = kind(3, alpha=0.5**0.5, v_threshold=0.5).double()
    x = torch.randn(6 * 8, 3, 5, 5, dtype=torch.float64) * 7 + 3  # time folded into the batch
    y = norm(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-10, rtol=0)
    wanted = torch.full((3,), 0.5**0.5 * 0.5).double()
    torch.testing.assert_close(y.std((0, 2, 3), unbiased=False), wanted, rtol=1e-5, atol=0)


def test_both_forms_of_tdbn_agree():
    torch.manual_seed(0)
    a, b = ScaledTdBN2d(3, v_threshold=0.5).double(), TdBN2d(3, v_threshold=0.5).double()
    with torch.no_grad():
        a.weight.copy_(torch.rand(3))
        b.weight.copy_(a.effective_weight)
    for _ in range(2):
        x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(a(x), b(x), rtol=1e-12, atol=1e-12)
    a.eval(), b.eval()
    torch.testing.assert_close(a(x), b(x), rtol=1e-12, atol=1e-12)


def test_tdbn_statistics_are_over_time_too():
    """A network's normalization sees [T B, ...]: one step's mean is not zero, all together are."""
    net = create_model("resnet-digits", norm="tdbn").double().train()
    seen = []
    net.stage1.get_submodule("0").norm1.register_forward_hook(lambda *a: seen.append(a[2]))
    net(torch.rand(4, 8, 1, 8, 8, dtype=torch.float64) * torch.arange(1.0, 5).view(4, 1, 1, 1, 1))
    y = seen[0].unflatten(0, (4, 8))
    assert y.mean((0, 1, 3, 4)).abs().max() < 1e-9
    assert y.mean((1, 3, 4)).abs().max() > 1e-2


# ---- multi-step and step by step


@pytest.mark.parametrize("shortcut", ["A", "conv"])
@pytest.mark.parametrize("join", ALL_JOINS)
def test_steps_equal_the_whole(join, shortcut):
    net = small(join=join, shortcut=shortcut)
    x = images(3, net) * 2
    with torch.no_grad():
        whole = net(x)
        net.reset()
        steps = torch.stack([net.step(x) for _ in range(net.steps)])
    torch.testing.assert_close(steps.mean(0), whole, rtol=1e-9, atol=1e-11)
    assert whole.std() > 0


@pytest.mark.parametrize("neuron", ["if", "lif", "plif", "cuba"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet-digits"])
def test_sequences_and_every_neuron(name, neuron):
    torch.manual_seed(0)
    net = create_model(name, neuron=neuron, image_size=8, in_channels=2, readout="sum")
    net = net.double().eval()
    x = torch.rand(6, 3, 2, 8, 8, dtype=torch.float64) * 4
    with torch.no_grad():
        whole = net(x)
        assert net.sequence(x).shape == (6, 3, 10)
        net.reset()
        steps = torch.stack([net.step(x_t) for x_t in x])
        torch.testing.assert_close(steps.sum(0), whole, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(net(x), whole, rtol=0, atol=0)  # no state is left behind


@pytest.mark.parametrize("neuron", sorted(NEURONS))
def test_every_neuron_in_a_network(neuron):
    """All train; those that are causal run step by step and equal the whole."""
    net = small(neuron=neuron, join="sew", threshold=0.3, beta=0.5)
    x = images(2, net)
    net.train()(x).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in net.stage1.parameters())
    with torch.no_grad():
        whole = net.eval()(x)
        net.reset()
        if neuron == "psn":
            with pytest.raises(UnsupportedError):
                net.step(x)
        elif neuron not in ("paralif-gs", "paralif-sb", "paralif-trb"):
            steps = torch.stack([net.step(x) for _ in range(net.steps)])
            torch.testing.assert_close(steps.mean(0), whole, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(net(x), whole, rtol=0, atol=0)


@pytest.mark.parametrize("join", ["ms", "sew"])
def test_gradients_of_steps_equal_the_whole(join):
    net = small(join=join)
    x = images(3, net) * 2
    net(x).square().sum().backward()
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net.reset()
    torch.stack([net.step(x) for _ in range(net.steps)]).mean(0).square().sum().backward()
    assert any(g.abs().max() > 0 for g in whole)
    for left, right in zip(whole, (p.grad for p in net.parameters()), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-9)


def test_a_static_image_is_the_same_image_at_every_step():
    net = small(join="or")
    x = images(2, net)
    shown = x.expand(net.steps, *x.shape)
    torch.testing.assert_close(net(x), net(shown), rtol=1e-9, atol=1e-12)


def test_readouts():
    x = images(2)
    y = small().sequence(x)
    for readout, wanted in (("mean", y.mean(0)), ("sum", y.sum(0)), ("last", y[-1])):
        torch.testing.assert_close(small(readout=readout)(x), wanted)


class StepTracer(torch.fx.Tracer):
    def is_leaf_module(self, m, qualified_name):
        leaf = isinstance(m, (snntorch.SpikingNeuron, Join, ShortcutA))
        return leaf or super().is_leaf_module(m, qualified_name)


@pytest.mark.parametrize("name", ["resnet-digits", "cnn", "mlp"])
def test_a_step_is_modules_alone(name):
    """What an exporter relies on: one step is a graph of modules without control flow."""
    net = create_model(name, image_size=8, in_channels=1).eval()

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net.step(x)

    graph = StepTracer().trace(Step())
    kinds = {node.op for node in graph.nodes}
    assert kinds == {"placeholder", "call_module", "output"}


# ---- the registry


def test_names_are_sorted_and_match_patterns():
    names = list_models()
    assert names == sorted(names) and {"resnet20", "vgg16", "mlp"} <= set(names)
    assert all("vgg" in n for n in list_models("vgg*")) and list_models("nothing*") == []


@pytest.mark.parametrize("name", list_models())
def test_a_configuration_survives_json(name):
    config = make_config(name, registry.MODELS[name], {})
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert make_config(stored.pop("name"), registry.MODELS[name], stored) == config


# What each of create_model's own keywords may be; a model says why where one does not fit it.
COMMON = {
    "join": registry.JOIN_NAMES, "neuron": tuple(NEURONS), "norm": registry.NORMS,
    "steps": (1, 6), "in_channels": (1, 2), "num_classes": (7,),
}  # fmt: skip
MISFITS = {
    ("ghostnet", "join"), ("ghostnet-dfc", "join"), ("ghostnet-mlp", "join"),
    ("syna-resnet18", "join"), ("syna-resnet18-dvs", "join"), ("sequential", "steps"),
    ("sequential", "norm"), ("ssnn-vgg9", "steps"), ("ssnn-resnet", "steps"),
}  # fmt: skip


@pytest.mark.parametrize("name", list_models())
def test_every_model_takes_the_common_keywords_or_says_why(name):
    misfits = set()
    for key, values in COMMON.items():
        for value in values:
            try:
                made = make_config(name, registry.MODELS[name], {key: value})
            except RangeError as error:
                assert name in str(error) and str(value) in str(error)
                misfits.add((name, key))
            else:
                assert getattr(made, key) == value
    assert misfits == {m for m in MISFITS if m[0] == name}


def test_keywords_left_out_keep_the_names_defaults():
    assert create_model("dvs-snn", neuron=None, steps=None).config == create_model("dvs-snn").config
    net = create_model("cnn", neuron="if", norm="tdbn", steps=2, in_channels=2, num_classes=3)
    assert net(torch.rand(1, 2, 28, 28)).shape == (1, 3) and net.steps == 2


def test_norm_of_the_sequential_network():
    small = {"channels": 4, "hidden": 4, "image_size": 8, "steps": 8, "neuron": "lif"}
    weights = [create_model("sequential", norm=n, threshold=0.3, **small) for n in ("bn", "tdbn")]
    assert [float(net.norm1.weight[0]) for net in weights] == pytest.approx([1.0, 0.3])
    assert isinstance(create_model("sequential", norm="none", **small).norm1, nn.Identity)


def test_a_network_is_rebuilt_from_its_configuration():
    net = small(join="or", neuron="plif", surrogate="triangle")
    again = create_model(**json.loads(json.dumps(dataclasses.asdict(net.config)))).double().eval()
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(images()), net(images()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"name": "resnet21"}, "Did you mean 'resnet"),
        ({"name": "mlp", "join": "swe"}, "Did you mean 'sew'"),
        ({"name": "mlp", "neuron": "lfi"}, "Did you mean 'lif'"),
        ({"name": "mlp", "step": 3}, "Did you mean 'steps'"),
        ({"name": "mlp", "norm": "layer"}, "tdbn"),
        ({"name": "mlp", "steps": 0}, "at least 1"),
        ({"name": "mlp", "num_classes": 0}, "0 classes; each must be at least 1"),
        ({"name": "mlp", "in_channels": 0}, "each must be at least 1"),
        ({"name": "mlp", "readout": "max"}, "mean, sum, last"),
        ({"name": "vgg16", "image_size": 16}, "at least 32"),
        ({"name": "resnet", "blocks": (1, 1)}, "one entry a stage"),
        ({"name": "resnet", "stem": "5x5"}, "7x7"),
        ({"name": "resnet8", "shortcut": "B"}, "A, conv"),
        ({"name": "cnn", "pool": "min"}, "max, avg"),
    ],
)
def test_what_is_unknown_is_refused_with_a_hint(options, hint):
    with pytest.raises(RangeError, match=hint):
        create_model(**options)


def test_an_input_of_another_shape_is_refused():
    with pytest.raises(ShapeError, match="1, 8, 8"):
        create_model("resnet-digits")(torch.zeros(2, 3, 8, 8))


def test_stored_weights(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    with pytest.raises(DataError, match="none at all"):
        create_model("cnn", pretrained="mnist")
    net = create_model("cnn")
    halves = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_file(halves, registry.weights_path("cnn", "vanilla", "mnist"))
    again = create_model("cnn", pretrained="mnist")
    torch.testing.assert_close(again.fc1.weight, net.fc1.weight.half().float(), rtol=0, atol=0)
    with pytest.raises(DataError, match="cnn-vanilla-mnist"):
        create_model("cnn", pretrained="cifar10")
    with pytest.raises(DataError, match="another configuration"):
        create_model("cnn", layers=(8, 0, 32, 0), pretrained="mnist")


def test_a_network_can_be_copied_after_use():
    net = create_model("resnet-digits")
    x = images(2, net, dtype=torch.float32)
    net(x).sum().backward()
    net.step(x)
    net.reset()
    torch.testing.assert_close(copy.deepcopy(net).eval()(x), net.eval()(x))
