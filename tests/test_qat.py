"""Quantization-aware training computes with the Program's own numbers and leaves the net as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ranvier.deploy import LOIHI2, compile
from ranvier.deploy.options import Thresholds
from ranvier.deploy.qat import FakeQuant, fine_tune, make_grid
from ranvier.export import trace
from ranvier.sim import run
from ranvier.train import create_model, evaluate, fit, load_dataset
from ranvier.train.errors import RangeError, UnsupportedError


def trained(join: str = "vanilla"):
    torch.manual_seed(0)
    net = create_model("resnet-digits", join=join, steps=4)
    fit(net, load_dataset("digits", split="train", limit=512), epochs=1, lr=5e-3, progress=False)
    return net


@pytest.mark.parametrize("join", ["vanilla", "ms"])
def test_rounded_weights_are_the_programs(join: str) -> None:
    net, x = trained(join), load_dataset("digits", split="train").x[:64]
    graph = trace(net, x[:4])
    program = compile(graph, calibration=x.numpy(), weight_bits=4)
    grid = make_grid(net, 4, x, LOIHI2)
    same = total = 0
    with FakeQuant(4, calibration=x)(net):
        for name, layer in grid.layers.items():
            weight = dict(net.named_modules())[name].weight.detach().double().numpy()
            whole = np.rint(weight * layer.factor)
            wanted = program.projections[layer.projection].map.weight.astype(float)
            wanted = wanted.reshape(*whole.shape[:2], -1)[..., : whole[0, 0].size].reshape(
                whole.shape
            )
            same, total = same + int((whole == wanted).sum()), total + whole.size
    assert len(grid.layers) == 8 and same / total > 0.995  # float32 folding may move a rounding


def test_a_layer_with_several_targets_is_rounded_as_its_finest_copy() -> None:
    """MS: the stem feeds neurons and the residual stream, on a grid each. Rounded as the coarsest,
    training for 4 bits spoiled a CIFAR-10 network that the chip ran well.
    """
    net, data = trained("ms"), load_dataset("digits", split="train")
    grid = make_grid(net, 4, data.x[:64], LOIHI2)
    chosen = grid.layers["conv"]
    copies = {
        name: p.map.weight
        for name, p in grid.program.projections.items()
        if name.split("[")[0] == "conv"
    }
    rows = len(net.get_submodule("conv").weight)
    assert len(copies) == 4 and {len(w) for w in copies.values()} == {rows, 2 * rows}
    assert len(copies[chosen.projection]) == rows  # not one with channels added for a shortcut
    finest = [np.abs(w).max() for w in copies.values() if len(w) == rows]
    assert np.abs(copies[chosen.projection]).max() == max(finest) > min(finest)


@pytest.mark.parametrize("thresholds", ["population", "channel"])
def test_a_tuned_program_says_which_thresholds_it_has(thresholds: Thresholds) -> None:
    net, data = trained(), load_dataset("digits", split="train", limit=64)
    program = fine_tune(net, data, 4, calibration=data.x, thresholds=thresholds)
    assert program.meta["thresholds"] == thresholds
    n = np.size(program.populations["stage1.0.neuron1"].scale)
    assert (n > 1) == (thresholds == "channel")


def test_layers_behind_pooling_are_rounded_too() -> None:
    torch.manual_seed(0)
    net = create_model("cnn", in_channels=1, image_size=28, steps=2).eval()
    x = torch.rand(8, 1, 28, 28)
    grid = make_grid(net, 4, x, LOIHI2)
    program = compile(trace(net, x[:2]), calibration=x.numpy(), weight_bits=4)
    assert set(grid.layers) == set(program.projections)
    with FakeQuant(4, calibration=x)(net):
        for name, layer in grid.layers.items():
            weight = dict(net.named_modules())[name].weight.detach().double().numpy()
            mine = np.unique(np.rint(weight * layer.factor))
            theirs = np.unique(program.projections[name].map.weight)
            assert np.isin(mine, np.append(theirs, 0)).mean() > 0.9, name


@pytest.mark.parametrize(
    "options", [{}, {"decay_input": True}, {"neuron": "cuba"}, {"neuron": "paralif-t"}], ids=str
)
def test_a_neurons_own_gain_is_part_of_the_factor(options: dict) -> None:
    """Input times 1 - beta: the chip's weights hold that factor, and so must the grid. 4 bits; the control is
    the float network, from which both are far.
    """
    torch.manual_seed(0)
    net = create_model("cnn", image_size=8, threshold=0.4, **options)
    x = torch.rand(16, *net.input_shape)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            torch.nn.init.uniform_(module.bias, -0.3, 0.3)
    with torch.no_grad():
        net.train()(x)
        exact = net.eval()(x).numpy()
        hook = FakeQuant(4, calibration=x)
        with hook(net):
            mine = net(x).numpy()
    program = compile(
        trace(net, x[:2]), calibration=x.numpy(), weight_bits=4, like=hook.program(net)
    )
    found = run(program, x.numpy(), engine="dense").output

    def alike(a, b):
        return np.corrcoef((a - a.mean(0)).ravel(), (b - b.mean(0)).ravel())[0, 1]

    assert alike(found, mine) > 0.9 > 0.8 > alike(found, exact)


def test_the_taps_of_a_window_are_refused() -> None:
    net = create_model("cnn", image_size=8, neuron="sliding-psn").eval()
    with pytest.raises(UnsupportedError, match="into 'neuron1' are rounded anew"):
        make_grid(net, 4, torch.rand(8, *net.input_shape), LOIHI2)


def test_the_net_is_left_as_it_was_even_after_an_error() -> None:
    net = trained()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    hook = FakeQuant(3)
    with pytest.raises(RuntimeError, match="boom"), hook(net):
        assert not torch.equal(net.fc.weight, before["fc.weight"])
        raise RuntimeError("boom")
    after = net.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    assert isinstance(net.fc.weight, torch.nn.Parameter)


def test_gradients_reach_the_float_weights() -> None:
    net = trained()
    net.train()
    with FakeQuant(4)(net):
        net(torch.rand(4, 1, 8, 8)).sum().backward()
    assert net.fc.weight.grad is not None and net.conv.weight.grad.abs().sum() > 0


def test_training_at_two_bits_recovers_what_rounding_loses() -> None:
    train, test = (load_dataset("digits", split=s) for s in ("train", "test"))
    torch.manual_seed(0)
    net = create_model("mlp", hidden=(32,), in_channels=1, image_size=8, steps=2)
    fit(net, train, epochs=6, lr=5e-3, progress=False, batch_size=64)
    hook = FakeQuant(2, calibration=train.x[:64])
    rounded = evaluate(net, test, qat=hook)["accuracy"]
    fit(net, train, epochs=2, lr=2e-3, progress=False, batch_size=64, qat=hook)
    assert evaluate(net, test, qat=FakeQuant(2, calibration=train.x[:64]))["accuracy"] > rounded


def test_bits_that_the_chip_lacks_are_refused() -> None:
    with pytest.raises(RangeError, match="9 weight bits"):
        FakeQuant(9)
