"""SSNN on the chip: a program a stage, its temporal transformers on the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ranvier.deploy import LOIHI1
from ranvier.deploy.staged import Shrink, compile_staged
from ranvier.export import trace
from ranvier.sim.difference import n_different
from ranvier.sim.staged import run_staged
from ranvier.train import create_model
from ranvier.train.errors import ShapeError, UnsupportedError
from ranvier.train.models_ssnn import TemporalTransformer, parts

SMALL = {"stage_steps": (4, 2), "steps": 4, "image_size": 8, "threshold": 0.4}
NETS = {
    "vgg": ("ssnn-vgg9", {"units": ((8,), (8, 8)), **SMALL}),
    "resnet": ("ssnn-resnet", {"blocks": (1, 1), "widths": (8, 8), "strides": (1, 2), **SMALL}),
    "three stages": (
        "ssnn-vgg9",
        {"units": ((4,), (8,), (8,)), **SMALL, "stage_steps": (4, 3, 2), "softmax_of": "relu"},
    ),
}


def prepared(case):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    name, options = NETS[case]
    net = create_model(name, **options)
    x = torch.rand(32, *net.input_shape) * 2
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net.train().heads(x)
    return net.eval(), x


@pytest.mark.parametrize("case", NETS)
def test_parts_and_transformers_are_the_whole(case):
    net, x = prepared(case)
    stages = parts(net)
    given = x
    with torch.no_grad():
        for i, part in enumerate(stages, 1):
            assert part.input_shape == tuple(given.shape[-3:])
            out = part.sequence(given)
            given = net.get_submodule(f"shrink{i}")(out) if i < len(stages) else out
        torch.testing.assert_close(stages[-1].read_out(given), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("softmax_of", ["none", "relu"])
def test_the_host_computes_what_the_module_does(softmax_of):
    torch.manual_seed(0)
    module = TemporalTransformer(5, 3, softmax_of).double()
    x = torch.rand(5, 4, 2, 3, 3, dtype=torch.float64)
    host = Shrink(module.weight.detach().numpy(), softmax_of)
    out = host(x.numpy())
    np.testing.assert_allclose(out, module(x).detach(), rtol=1e-12)
    np.testing.assert_allclose(out.sum(0), x.sum(0), rtol=1e-12)
    with pytest.raises(ShapeError, match="4 steps came"):
        host(x.numpy()[:4])


def correlation(a, b):
    return np.corrcoef(a.ravel(), b.ravel())[0, 1]


# Lowest correlation of the logits over 8 seeds, each net: population 0.733, 0.763, 0.875; channel 0.772,
# 0.818, 0.907. What both lose is the stem's: 255 levels of input times its weights fill the 17 bits of the
# arriving sum, so that a scale for the whole population leaves most weights 5 bits; 127 levels leave one
# more (7 bits by channel: 0.86 at least, 4 seeds). Float weights rounded to 8 bits, nothing else: 0.866.
LOWEST = {
    "population": ({"thresholds": "population"}, 0.7),
    "channel": ({"thresholds": "channel"}, 0.75),
    "channel, 7 bits in": ({"thresholds": "channel", "input_bits": 7}, 0.83),
}


@pytest.mark.parametrize("options", LOWEST)
@pytest.mark.parametrize("case", NETS)
def test_staged_programs_follow_the_float_network(case, options):
    """Within quantization: random weights leave many membranes near the threshold, so that 1 spike of 100
    differs in the first population and more behind it; samples still tell themselves apart. Control: other
    samples' logits do not fit.
    """
    net, x = prepared(case)
    chosen, lowest = LOWEST[options]
    staged = compile_staged(net, x.numpy(), **chosen)
    assert len(staged.programs) == len(net.config.stage_steps) == len(staged.hosts) + 1
    assert [p.steps for p in staged.programs] == list(net.config.stage_steps)
    assert staged.latency > sum(p.latency for p in staged.programs)
    found = run_staged(staged, x.numpy())
    with torch.no_grad():
        wanted = net(x).numpy()
        first = parts(net)[0].sequence(x).numpy()
    assert correlation(found.stages[0].output_series, first) > 0.8
    logits, others = (y - y.mean(0) for y in (found.output, wanted))
    assert correlation(logits, others) > lowest
    assert abs(correlation(np.roll(logits, 1, 0), others)) < 0.4
    assert np.abs(found.output - wanted).max() < np.ptp(wanted) / 3
    assert found.n_saturated < 0.01 * sum(i.size for i in found.inputs[1:])


def test_engines_agree_on_every_stage():
    net, x = prepared("vgg")
    staged = compile_staged(net, x.numpy())
    states = ("spikes", "u", "v")
    reference = run_staged(staged, x[:2].numpy(), "reference", states)
    for engine in ("dense", "events"):
        other = run_staged(staged, x[:2].numpy(), engine, states)
        for a, b in zip(reference.stages, other.stages, strict=True):
            assert n_different(a, b)[1] == 0
        np.testing.assert_array_equal(reference.output, other.output)


@pytest.mark.lava
def test_lava_agrees_on_every_stage():
    net, x = prepared("vgg")
    staged = compile_staged(net, x.numpy())
    states = ("spikes", "u", "v")
    reference = run_staged(staged, x[:1].numpy(), "reference", states)
    lava = run_staged(staged, x[:1].numpy(), "lava", states)
    for a, b in zip(reference.stages, lava.stages, strict=True):
        compared, different = n_different(a, b)
        assert compared > 100 and different == 0


def test_what_has_no_stages_is_refused():
    with pytest.raises(UnsupportedError, match="is no SSNN; `ranvier.deploy.compile` takes"):
        compile_staged(create_model("mlp"), torch.rand(2, 1, 28, 28))
    net, x = prepared("vgg")
    with pytest.raises(UnsupportedError):
        trace(net, x[:2])  # as a whole it is still refused


def test_an_error_names_the_stage():
    net, x = prepared("vgg")
    with pytest.raises(UnsupportedError, match="ssnn-vgg9/stage1: compile: .*no graded spikes"):
        compile_staged(net, x.numpy(), LOIHI1)
