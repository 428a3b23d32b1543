"""The scale of one population: what the chip holds, what a template keeps, what search finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ranvier.deploy.cells import VTH_MAX
from ranvier.deploy.channel_scale import choose_scales, fits, largest_rows, largest_scales
from ranvier.deploy.options import Options
from ranvier.deploy.program import Program, Shape
from ranvier.deploy.quantize import (
    MARGIN,
    Incoming,
    Scaled,
    at_scale,
    choose_scale,
    exponent_for,
    largest_scale,
)
from ranvier.export.neurons import CubaLI, CubaLIF, Membrane, Relay
from ranvier.export.nodes import Neuron
from ranvier.train.errors import CapacityError


@dataclass(frozen=True, eq=False)
class Need:
    """A population that wants a scale.

    margin    what part of the largest scale may be used: less than 1 where rounding carried it too far
    sums      steps over which a readout's membrane adds up what arrives; 0 where it does not
    """

    node: Neuron
    shape: Shape
    incoming: list[Incoming]
    bias: np.ndarray
    margin: float = 1.0
    sums: int = 0

    @property
    def relay(self) -> bool:
        return isinstance(self.node.model, Relay)

    @property
    def theta(self) -> Any:
        return getattr(self.node.model, "v_threshold", 0.0)

    @property
    def memory(self) -> float:
        """How far the current can pile up."""
        model = self.node.model
        if not isinstance(model, (CubaLIF, CubaLI)):
            return 1.0
        return 1.0 / max(1.0 - float(np.max(np.asarray(model.alpha))), 1e-6)


def scale_of(need: Need, options: Options) -> Scaled:
    """The population's scale, or a scale a channel; raises CapacityError where none is proved safe.

    A template's scale is kept unless sums were found to wrap with it, as when training has made the
    weights larger: then one is chosen anew.
    """
    like = options.like
    if like is not None and need.node.name in like.populations and need.margin == 1.0:
        return _kept(need, like)
    if options.by_channel and _has_channels(need):
        return _channel_scales(need, options.search)
    q_max = _largest(need) * need.margin
    _require_room(need.node.name, q_max, max((i.top for i in need.incoming), default=0.0))
    return choose_scale(need.incoming, q_max, need.theta, options.search)


def _largest(need: Need) -> float:
    if need.relay and need.sums:  # the sum over all steps stays below the highest threshold
        low, high = (abs(sum(i.extent()[k] for i in need.incoming)) for k in (0, 1))
        return VTH_MAX * MARGIN / max(low, high, 1e-30) / need.sums
    theta = float(np.abs(np.asarray(need.theta)).max())
    bias = float(np.abs(need.bias).max(initial=0.0))
    return largest_scale(need.incoming, need.relay, theta, bias, need.memory)


def _kept(need: Need, like: Program) -> Scaled:
    """The scale and the exponents of a template.

    A wire that it lacks, as that of a bias which was zero then, takes the exponent that holds it."""
    kept = like.populations[need.node.name].scale
    top = float(kept.max())
    exponents = [
        like.projections[i.name].exponent
        if i.name in like.projections
        else exponent_for(top, i.top, i.bits, i.mixed)
        for i in need.incoming
    ]
    return at_scale(need.incoming, kept.reshape(-1) if kept.size > 1 else float(kept), exponents)


def _has_channels(need: Need) -> bool:
    """Whether a population can take a scale a channel."""
    model = need.node.model
    plain = need.relay or (isinstance(model, Membrane) and not np.any(np.asarray(model.v_reset)))
    return plain and not (need.relay and need.sums) and fits(need.incoming, need.shape[0])


def _channel_scales(need: Need, search: bool) -> Scaled:
    def each(value: Any) -> np.ndarray:
        full = np.broadcast_to(np.abs(np.asarray(value, np.float64)), need.shape)
        return np.asarray(full.reshape(need.shape[0], -1).max(1))

    theta = each(need.theta)
    limit = largest_scales(need.incoming, need.relay, theta, each(need.bias), need.memory)
    limit = limit * need.margin
    rows = largest_rows(need.incoming)
    widest = int(np.argmax(limit * rows))
    _require_room(need.node.name, float(limit[widest]), float(rows[widest]))
    return choose_scales(need.incoming, limit, theta, search)


def _require_room(name: str, q_max: float, top: float) -> None:
    if 0 < q_max * top < 1:  # nothing arrives where all weights are zero
        raise CapacityError(
            f"compile: '{name}' has no scale at which its sums are proved to fit the chip: "
            f"at most {q_max:.3g} units per 1.0. Lower its fan-in, its inputs' range, or its threshold"
        )
