"""Networks whose number of time steps shrinks inside: a Program a stage, the host in between.

An SSNN (`ranvier.train.models_ssnn`) shares the summed spikes of T1 steps over T2 steps by shares that
depend on all T1: no neuron can, since it would wait for the whole sample. So each stage is a Program of its
own, and the temporal transformer between two runs on the host, in floats, on the readout of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ranvier.deploy.chip import LOIHI2, Chip
from ranvier.deploy.program import Program
from ranvier.train.errors import ShapeError, UnsupportedError

if TYPE_CHECKING:
    from ranvier.train.models_ssnn import SSNN


@dataclass(frozen=True, eq=False)
class Shrink:
    """A temporal transformer on the host: I[t'] = d[t'] sum_t O[t], d = softmax(f(W o)).

    weight      [T2, T1]
    softmax_of  f: none or relu
    """

    weight: np.ndarray
    softmax_of: str = "none"

    def __call__(self, series: np.ndarray) -> np.ndarray:
        """O [T1, batch, ...] -> I [T2, batch, ...], floats; the sums over time are equal.

        Raises ShapeError for another number of steps than T1.
        """
        if len(series) != self.weight.shape[1]:
            raise ShapeError(
                f"staged: {len(series)} steps came to a temporal transformer from "
                f"{self.weight.shape[1]} to {self.weight.shape[0]}; run the stage before with its own steps"
            )
        means = series.reshape(*series.shape[:2], -1).mean(2)
        score = self.weight @ means
        if self.softmax_of == "relu":
            score = np.maximum(score, 0)
        share = np.exp(score - score.max(0))
        share /= share.sum(0)
        return np.asarray(share.reshape(*share.shape, *[1] * (series.ndim - 2)) * series.sum(0))


@dataclass(frozen=True, eq=False)
class StagedProgram:
    """programs: one a stage; hosts: what stands between two of them, one less."""

    programs: tuple[Program, ...]
    hosts: tuple[Shrink, ...]

    @property
    def latency(self) -> int:
        """Chip steps from the first input to the last output of a sample; the host waits for whole stages."""
        waits = sum(int(p.steps or 0) for p in self.programs[:-1])
        return waits + sum(p.latency for p in self.programs)


def compile_staged(
    net: SSNN, calibration: Any, chip: Chip = LOIHI2, **options: Any
) -> StagedProgram:
    """The StagedProgram of a network with temporal transformers, in eval mode.

    calibration  floats `[batch, *shape]` or `[time, batch, *shape]`: later stages are calibrated on what the
                 float network makes of it
    options      further arguments of `ranvier.deploy.compile`
    Raises UnsupportedError for another kind of network, and as `compile` does, naming the stage.
    """
    import torch

    from ranvier.train.models_ssnn import SSNN, TemporalTransformer, parts

    if not isinstance(net, SSNN):
        raise UnsupportedError(
            f"compile_staged: {type(net).__name__} is no SSNN; `ranvier.deploy.compile` takes whole networks"
        )
    given = torch.as_tensor(np.asarray(calibration), dtype=torch.float32)
    programs, hosts = [], []
    stages = [part.eval() for part in parts(net)]
    for i, part in enumerate(stages, 1):
        programs.append(_program(part, given, chip, options))
        if i < len(stages):
            shrink = net.get_submodule(f"shrink{i}")
            assert isinstance(shrink, TemporalTransformer)
            hosts.append(Shrink(shrink.weight.detach().double().numpy(), shrink.softmax_of))
            with torch.no_grad():
                given = shrink(part.sequence(given))
    return StagedProgram(tuple(programs), tuple(hosts))


def _program(part: Any, given: Any, chip: Chip, options: dict[str, Any]) -> Program:
    from ranvier.deploy.compiler import compile
    from ranvier.export import trace
    from ranvier.train.errors import RanvierError

    sample = given[:2] if given.ndim == 4 else given[:, :2]
    try:
        return compile(trace(part, sample), chip, given.numpy(), **options)
    except RanvierError as error:
        raise type(error)(f"{part.config.name}: {error}") from error
