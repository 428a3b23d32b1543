"""Calibration data, and what every population sends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ranvier.deploy.quantize import Incoming, Moments
from ranvier.export.graph import Graph
from ranvier.export.nodes import Input, Neuron
from ranvier.train.errors import RangeError

CALIBRATION_SAMPLES = 128
ROUNDING_SAMPLES = 16


@dataclass(frozen=True, eq=False)
class Measured:
    """What each input and population sends in float: its moments, and a part of it as it is.

    series  name -> `[time, samples, *shape]`, empty without calibration data
    """

    moments: dict[str, Moments]
    series: dict[str, np.ndarray]

    def sent(self, i: Incoming) -> np.ndarray:
        """What a source sent on a part of the calibration data, `[samples, *shape]`, in its units."""
        held = self.series.get(i.source.name, np.zeros((0, 0)))
        if i.source.message_scale.size > 1:
            held = held * np.asarray(i.source.message_scale, np.float32)
        return held.reshape(-1, *held.shape[2:])


def sample_of(graph: Graph, calibration: Any) -> np.ndarray:
    """The calibration data as floats `[time, batch, *shape]`, thinned to CALIBRATION_SAMPLES."""
    from ranvier.export.interpret import with_time

    x = np.asarray(calibration.detach().cpu() if hasattr(calibration, "detach") else calibration)
    (entry,) = graph.inputs
    series = with_time(x.astype(np.float32, copy=False), entry.shape, graph.steps, "compile")
    if not np.isfinite(series).all():
        raise RangeError("compile: the calibration data holds values that are not finite")
    every = max(1, series.shape[1] // CALIBRATION_SAMPLES)
    return np.asarray(series[:, ::every][:, :CALIBRATION_SAMPLES])


def measure(graph: Graph, x: np.ndarray | None) -> Measured:
    """Of a lowered graph; without data every message is taken to be a half."""
    names = [n.name for n in graph if isinstance(n, (Input, Neuron))]
    if x is None:
        half = {n: np.full(graph.shapes[n][0], 0.5) for n in names}
        return Measured({n: Moments(v, v, v) for n, v in half.items()}, {})
    _, series = graph.run(x, record=tuple(names))
    kept = {n: np.asarray(s[:, :ROUNDING_SAMPLES], np.float32) for n, s in series.items()}
    return Measured({n: _moments(np.asarray(s, np.float64)) for n, s in series.items()}, kept)


def _moments(sent: np.ndarray) -> Moments:
    axes = (0, 1, *range(3, sent.ndim))
    return Moments(sent.mean(axes), (sent**2).mean(axes), (sent != 0).mean(axes))
