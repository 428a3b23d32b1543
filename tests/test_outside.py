"""What somebody from outside does with networks and files of their own."""

from __future__ import annotations

import numpy as np
import pytest
import snntorch as snn
import torch
from snntorch import utils
from torch import nn

from ranvier.deploy import compile
from ranvier.export import trace
from ranvier.sim import run
from ranvier.sim.reference import run_chip_time, run_reference


class Line(nn.Module):
    """Convolutions along one axis, strided, grouped and dilated, in a loop of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(2, 6, 5, stride=2, padding=2)
        self.n1 = snn.Leaky(beta=0.9, init_hidden=True, reset_mechanism="zero")
        self.c2 = nn.Conv1d(6, 6, 3, padding=2, dilation=2, groups=3)
        self.n2 = snn.Leaky(beta=0.7, init_hidden=True, reset_mechanism="zero")
        self.fc = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        utils.reset(self)
        steps = [self.n2(self.c2(self.n1(self.c1(frame)))) for frame in x]
        return torch.stack([self.fc(nn.functional.avg_pool1d(s, 2).flatten(1)) for s in steps])


@pytest.fixture(scope="module")
def line() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = Line().eval()
    for layer in (net.c1, net.c2):
        layer.weight.data *= 3  # so that both populations fire
    return net, (torch.rand(6, 4, 2, 32) < 0.3).float()


@pytest.mark.parametrize("engine", ["dense", "events", "auto"])
def test_a_line_of_convolutions_runs_alike_everywhere(
    line: tuple[nn.Module, torch.Tensor], engine: str
) -> None:
    net, x = line
    program = compile(trace(net, x), calibration=x)
    wanted = run(program, x, engine="reference", record=("spikes", "v"))
    found = run(program, x, engine=engine, record=("spikes", "v"))
    np.testing.assert_array_equal(found.output, wanted.output)
    for name, record in wanted.trace.items():
        np.testing.assert_array_equal(found.trace[name].spikes, record.spikes, err_msg=name)
        if record.v is not None:
            np.testing.assert_array_equal(found.trace[name].v, record.v, err_msg=name)
    assert wanted.trace["n2"].spikes.any(), "a silent network would prove nothing"


def test_a_line_of_convolutions_in_chip_time(line: tuple[nn.Module, torch.Tensor]) -> None:
    net, x = line
    program = compile(trace(net, x), calibration=x)
    sent = program.encode(x)
    wanted = run_reference(program, sent)
    for found in run_chip_time(program, [sent, sent]):
        for name in wanted.sent:
            np.testing.assert_array_equal(found.sent[name], wanted.sent[name], err_msg=name)


def test_a_trace_names_what_it_holds(line: tuple[nn.Module, torch.Tensor]) -> None:
    net, x = line
    result = run(compile(trace(net, x), calibration=x), x, record=("spikes",))
    assert list(result.trace) == list(result.trace.keys()) and "n1" in result.trace
    with pytest.raises(KeyError, match="no population 'c1' was recorded, only input, n1, n2"):
        result.trace["c1"]
