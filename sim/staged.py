"""`run_staged`: the programs of a StagedProgram one after the other, the host in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ranvier.deploy.program import Population
from ranvier.deploy.staged import StagedProgram
from ranvier.sim.runner import Result, run


@dataclass(frozen=True, eq=False)
class StagedResult:
    """What a run gave.

    output       the last stage's readout, [batch, n_out]
    stages       each stage's Result
    inputs       what went into each, in floats
    n_saturated  values from the host that lay outside a stage's calibrated range
    """

    output: np.ndarray
    stages: tuple[Result, ...]
    inputs: tuple[np.ndarray, ...]
    n_saturated: int = 0


def run_staged(
    staged: StagedProgram,
    x: Any,
    engine: str = "auto",
    record: tuple[str, ...] = (),
    **options: Any,
) -> StagedResult:
    """The StagedResult of x, as `ranvier.sim.run` takes it, on an engine; the host computes in floats."""
    results: list[Result] = []
    inputs: list[np.ndarray] = []
    given, n_saturated = np.asarray(x), 0
    for i, program in enumerate(staged.programs):
        inputs.append(given)
        results.append(run(program, given, engine, record, **options))
        if i < len(staged.hosts):
            sent = staged.hosts[i](results[-1].output_series)
            given = saturated(staged.programs[i + 1].input, sent)
            n_saturated += int((given != sent).sum())
    return StagedResult(results[-1].output, tuple(results), tuple(inputs), n_saturated)


def saturated(population: Population, values: np.ndarray) -> np.ndarray:
    """The values that the input population can send: above its calibrated range, the nearest."""
    scale = float(population.message_scale)
    return np.clip(values, population.lo / scale, population.hi / scale)
