"""`run`: a Program on an engine; what every engine gives back has one form."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ranvier.deploy.program import Program
from ranvier.sim.ledger import Counter, Ledger, Record, Trace
from ranvier.train.errors import RangeError, expect

STATES = ("spikes", "u", "v")


@dataclass(frozen=True, eq=False)
class Result:
    """What a run gave.

    output         floats `[batch, n_out]`: the readout; its argmax is the class
    output_series  floats `[time, batch, *shape]`: the readout before it is reduced over time
    output_spikes  whole numbers `[time, batch, *shape]`: what the output population sent
    trace          what was asked for with `record`
    ledger         the counts
    engine         the engine that ran
    """

    output: np.ndarray
    output_series: np.ndarray
    output_spikes: np.ndarray
    trace: Trace
    ledger: Ledger
    engine: str


Engine = Callable[..., Result]


def message_dtype(program: Program, name: str) -> Any:
    """uint8 for plain spikes, int32 for graded messages."""
    return np.int32 if program.populations[name].graded else np.uint8


def finish(
    program: Program,
    sent: dict[str, np.ndarray],
    states: dict[str, dict[str, np.ndarray]],
    record: tuple[str, ...],
    ledger: Ledger,
    engine: str,
) -> Result:
    """A Result from what populations sent and the known states, all `[time, batch, *shape]`.

    states  "u" and "v" -> name -> series, where recorded (v of the output for a membrane readout)
    """
    readout, out = program.readout, program.readout.population
    values = states["v"][out] if readout.kind == "membrane" else sent[out]
    series = readout.series(np.asarray(values, np.int64))
    records = {}
    for name in program.populations if record else ():
        records[name] = Record(
            sent[name].astype(message_dtype(program, name)) if "spikes" in record else None,
            states["u"].get(name) if "u" in record else None,
            states["v"].get(name) if "v" in record else None,
        )
    spikes = sent[out].astype(message_dtype(program, out))
    return Result(readout.reduced(series), series, spikes, Trace(records), ledger, engine)


def run_plain(program: Program, x: np.ndarray, record: tuple[str, ...] = ()) -> Result:
    """The reference engine's Result of whole numbers x `[time, batch, *shape]`."""
    from ranvier.sim.reference import run_reference

    series = run_reference(program, x)
    counter = Counter(program, *x.shape[:2])
    for name in program.populations:
        counter.add(name, series.sent[name])
    states = {"u": series.u, "v": series.v}
    return finish(program, series.sent, states, record, counter.ledger(), "reference")


# engine -> (module, function), imported when first used
_ENGINES = {
    "reference": ("ranvier.sim.runner", "run_plain"),
    "dense": ("ranvier.sim.dense", "run_dense"),
    "events": ("ranvier.sim.events", "run_events"),
    "auto": ("ranvier.sim.auto", "run_auto"),
    "lava": ("ranvier.sim.lava_engine", "run_on_lava"),
}


def engines() -> dict[str, Engine]:
    """name -> engine; each takes (program, whole-number x, record, **options)."""

    def load(module: str, function: str) -> Engine:
        def engine(*args: Any, **options: Any) -> Result:
            return getattr(importlib.import_module(module), function)(*args, **options)

        return engine

    return {name: load(*place) for name, place in _ENGINES.items()}


def run(
    program: Program,
    x: Any,
    engine: str = "auto",
    record: str | Sequence[str] = (),
    *,
    steps: int | None = None,
    **options: Any,
) -> Result:
    """The Result of x on an engine.

    x       floats `[time, batch, *shape]`, or `[batch, *shape]` held for `steps` steps (by default
            the program's own); numpy or torch
    engine  reference, dense, events, lava, or auto
    record  any of "spikes", "u", "v": kept for every population in `Result.trace`
    Raises RangeError for an unknown engine or record, or values that the input cannot send;
    ShapeError for a wrong shape.
    """
    expect(program, Program, "run", "compile(graph, calibration=x) makes one of a Graph")
    known = engines()
    if engine not in known:
        raise RangeError(f"run: engine '{engine}' is none of {', '.join(known)}")
    record = (record,) if isinstance(record, str) else tuple(record)
    wrong = [r for r in record if r not in STATES]
    if wrong:
        raise RangeError(f"run: cannot record '{wrong[0]}'; any of {', '.join(STATES)}")
    return known[engine](program, program.encode(x, steps), tuple(record), **options)
