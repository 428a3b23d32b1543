"""The catalog's verdicts: what is called deployable compiles and runs alike, the rest is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ranvier.deploy import LOIHI2, compile
from ranvier.export import trace
from ranvier.sim import run
from ranvier.train import create_model
from ranvier.train.errors import UnsupportedError

ROWS = ((3, 8, 8, 0, 1), (3, 16, 8, 0, 2))
NO_NORM = {"image_size": 8, "pool": "max", "norm": "none", "threshold": 1.0}

DEPLOYABLE = {
    "cnn": ("cnn", {"image_size": 8}),
    "plif": ("cnn", {"image_size": 8, "neuron": "plif"}),
    "soft reset": ("cnn", {"image_size": 8, "reset": "subtract", "decay_input": True}),
    "cuba": ("cnn", {**NO_NORM, "neuron": "cuba"}),
    "sliding psn": ("cnn", {**NO_NORM, "neuron": "sliding-psn"}),
    "paralif-t": ("cnn", {**NO_NORM, "neuron": "paralif-t"}),
    "cuba behind norms": ("cnn", {"image_size": 8, "neuron": "cuba"}),
    "vgg": ("vgg9", {"layers": (8, 0, 8, 0), "image_size": 8}),
    "event pair": ("dvs-snn", {"layers": (8, 0, 8, 0), "image_size": 8}),
    "sew7b": ("sew7b", {"widths": (8, 8), "image_size": 8, "steps": 4, "join": "or"}),
    "pools of sums": ("sew7b", {"widths": (8, 8), "image_size": 8, "steps": 4}),
    "ghost": ("ghostnet", {"rows": ROWS, "image_size": 8, "se": False, "steps": 3}),
    "syna": (
        "syna-resnet18",
        {"widths": (4, 4, 4, 4), "image_size": 8, "steps": 2, "attention": ""},
    ),
}

HOST_ONLY = {
    "squeeze and excite": ("ghostnet", {"rows": ((3, 8, 8, 1, 1),), "image_size": 8}),
    "dfc": ("ghostnet-dfc", {"rows": (*ROWS, (3, 16, 8, 0, 1)), "image_size": 8, "se": False}),
    "relu": ("dvs-cnn", {"layers": (8, 0), "image_size": 8}),
    "psn": ("cnn", {"image_size": 8, "neuron": "psn"}),
    "psu": ("cnn", {"image_size": 8, "neuron": "psu"}),
    "paralif-sd": ("cnn", {"image_size": 8, "neuron": "paralif-sd"}),
    "real pooling": ("sew7b", {"widths": (8, 8), "image_size": 8, "steps": 4, "join": "ms"}),
    "shrinking steps": (
        "ssnn-vgg9",
        {"units": ((8,), (8,)), "stage_steps": (4, 2), "steps": 4, "image_size": 8},
    ),
}


def prepared(name, options):
    """A network whose statistics are those of one batch, in eval mode; and the batch."""
    torch.manual_seed(0)
    net = create_model(name, **{"threshold": 0.4, **options})
    x = torch.rand(6, *net.input_shape)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net.train()(x)
    return net.eval(), x


@pytest.mark.parametrize("case", DEPLOYABLE)
def test_deployable_networks_run_alike_on_two_engines(case):
    net, x = prepared(*DEPLOYABLE[case])
    program = compile(trace(net, x[:2]), chip=LOIHI2, calibration=x)
    reference, dense = (run(program, x[:2], engine=e) for e in ("reference", "dense"))
    np.testing.assert_array_equal(reference.output, dense.output)


@pytest.mark.parametrize("case", HOST_ONLY)
def test_host_only_networks_are_refused(case):
    net, x = prepared(*HOST_ONLY[case])
    with pytest.raises(UnsupportedError):
        compile(trace(net, x[:2]), chip=LOIHI2, calibration=x)
