"""`compile`: a Graph -> an integer Program for one chip."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from ranvier.deploy.align import align
from ranvier.deploy.bounds import Bound, arriving, prove
from ranvier.deploy.cells import VTH_MAX, Cell
from ranvier.deploy.channel_scale import choose_scales, fits, largest_rows, largest_scales
from ranvier.deploy.chip import LOIHI1, LOIHI2, Chip
from ranvier.deploy.currents import (
    by_row,
    gain_of,
    in_units,
    logic_scale,
    message_units,
    total_bias,
    whole_threshold,
)
from ranvier.deploy.encoding import input_population
from ranvier.deploy.fan_out import fan_out
from ranvier.deploy.program import Population, Program, Projection, Readout
from ranvier.deploy.quantize import (
    MARGIN,
    Incoming,
    Moments,
    Scaled,
    along_rows,
    at_scale,
    choose_scale,
    int_map,
    largest_scale,
    mean_shift,
    neuron_cell,
)
from ranvier.deploy.rounding import refine
from ranvier.export.graph import Graph
from ranvier.export.neurons import LI, CubaLI, CubaLIF, Membrane, Relay, Threshold
from ranvier.export.nodes import Conv, Delay, Dense, Flatten, Input, Neuron, Node, Scale
from ranvier.train.errors import CapacityError, RangeError, UnsupportedError

Joins: TypeAlias = Literal[
    "auto", "linear", "graded", "unrolled", "relay", "logic", "linear+logic", "graded+logic"
]
JOINS = {
    "auto": "auto",
    "linear": "linear",
    "unrolled": "linear",
    "graded": "graded",
    "relay": "graded",
    "logic": "auto",
    "linear+logic": "linear",
    "graded+logic": "graded",
}
Thresholds: TypeAlias = Literal["population", "channel"]
Rounding: TypeAlias = Literal["nearest", "together"]
CALIBRATION_SAMPLES = 128
MARGIN_TRIES = 4
ROUNDED_TOGETHER = 6  # up to so many bits, the weights of a row are rounded together
ROUNDING_SAMPLES = 16
ONE_TO_ONE_PAYLOAD = 2**15  # of relays that only pass values on, into sums below 2**17
WEIGHTED_PAYLOAD = 2**10  # of relays whose value is multiplied by the weights of a convolution


def compile(
    graph: Graph,
    chip: Chip = LOIHI2,
    calibration: Any = None,
    weight_bits: int = 8,
    joins: Joins = "auto",
    *,
    input_bits: int = 8,
    search: bool = True,
    bias_correction: bool = True,
    thresholds: Thresholds = "population",
    rounding: Rounding = "nearest",
    like: Program | None = None,
) -> Program:
    """The integer Program of a graph.

    calibration  floats `[time, batch, *shape]` or `[batch, *shape]`: real input, from which the range
                 of the input, the scales and the rounding correction are chosen; up to 128 samples
                 are used. None: the input's declared range, and no correction
    weight_bits  1..8, sign included; wires without parameters (shortcuts, pooling) always have 8
    joins        linear (SEW: each source projects separately; MS: unrolled): binary messages, more
                 synapses; graded (relay): sums are sent as values; auto: the cheaper by counted cost.
                 OR, AND and IAND are stock LIFs without memory; logic, alone or as in linear+logic,
                 makes them neurons of our own without a membrane (custom: Loihi 2 microcode)
    input_bits   of an analog input. Its levels and the first layer's weights share the 17 bits of a sum:
                 with a wide fan-in fewer input bits can be nearer to float, so measure
    thresholds   population: one scale and one threshold for each population; channel: each channel has
                 its own, so that its weights fill their range. Fewer bits gain more from it; which is
                 better differs from network to network, so measure both
    rounding     nearest, or together: up to 6 bits the weights of a row are rounded so that their sum
                 errs little on the calibration data (`ranvier.deploy.rounding`)
    like         a program of the same network whose scales, exponents and joins are kept: what a
                 network was trained for (`ranvier.deploy.qat`); its biases are then not corrected for
                 rounding, since the training already did
    search       choose the scale of each population by search; False: the largest that is proved safe
    Raises UnsupportedError naming a node that the chip cannot run, RangeError for parameters that it
    cannot hold, CapacityError where no scale is proved safe.
    Source: models.md 15 equations; the limits are those of lava-nc 0.10's fixed-point models.
    """
    if joins not in JOINS:
        raise RangeError(f"compile: joins '{joins}' is none of {', '.join(JOINS)}")
    for name, found, known in (
        ("thresholds", thresholds, get_args(Thresholds)),
        ("rounding", rounding, get_args(Rounding)),
    ):
        if found not in known:
            raise RangeError(f"compile: {name} '{found}' is none of {', '.join(known)}")
    if not 1 <= weight_bits <= 8 or not 1 <= input_bits <= 16:
        raise RangeError(
            f"compile: weight_bits {weight_bits} (1..8) or input_bits {input_bits} (1..16) is out of range"
        )
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise UnsupportedError(
            f"compile: the graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; exactly "
            "one of each is mapped. Concatenate the inputs into one"
        )
    x = None if calibration is None else _sample(graph, calibration)
    wanted = JOINS[joins] if like is None else str(like.meta["joins"])
    if wanted == "graded" and not chip.graded:
        raise UnsupportedError(
            f"compile: {chip.name} has no graded spikes, so joins='{joins}' cannot run; use 'linear'"
        )
    choices = [wanted] if wanted != "auto" else ["linear", "graded"] if chip.graded else ["linear"]
    corrected = bias_correction and like is None
    logic = joins.endswith("logic") if like is None else bool(like.meta.get("logic"))
    if logic and not chip.custom:
        raise UnsupportedError(
            f"compile: {chip.name} has one fixed compartment, so joins='{joins}' cannot run; without "
            "'logic' OR, AND and IAND are plain LIFs"
        )
    options = _Options(
        chip,
        weight_bits,
        input_bits,
        search,
        corrected,
        thresholds == "channel",
        rounding == "together" and like is None and x is not None,
        logic,
        like,
    )
    lowered = {c: graph.lower(c) for c in choices}
    if len(lowered) == 2 and len(lowered["linear"].populations) == len(
        lowered["graded"].populations
    ):
        del lowered["graded"]  # no join asks for relays
    programs, failures = [], []
    for choice, each in lowered.items():
        try:
            programs.append(_Compiler(each, x, options, choice).program())
        except CapacityError as error:  # the other mapping may still fit
            failures.append(error)
    if not programs:
        raise failures[0]
    return min(programs, key=lambda p: p.meta["cost_pj"])


@dataclass(frozen=True)
class _Options:
    chip: Chip
    weight_bits: int
    input_bits: int
    search: bool
    bias_correction: bool
    by_channel: bool
    together: bool
    logic: bool
    like: Program | None = None


def _sample(graph: Graph, calibration: Any) -> np.ndarray:
    """The calibration data as floats `[time, batch, *shape]`, thinned to CALIBRATION_SAMPLES."""
    from ranvier.export.interpret import with_time

    x = np.asarray(calibration.detach().cpu() if hasattr(calibration, "detach") else calibration)
    (entry,) = graph.inputs
    series = with_time(x.astype(np.float32, copy=False), entry.shape, graph.steps, "compile")
    if not np.isfinite(series).all():
        raise RangeError("compile: the calibration data holds values that are not finite")
    every = max(1, series.shape[1] // CALIBRATION_SAMPLES)
    return np.asarray(series[:, ::every][:, :CALIBRATION_SAMPLES])


class _Compiler:
    def __init__(self, graph: Graph, x: np.ndarray | None, options: _Options, joins: str) -> None:
        self.graph, self.options, self.joins = graph, options, joins
        self.x = x
        self.moments = self._measure(x)
        self.margin: dict[str, float] = {}
        self.populations: dict[str, Population] = {}
        self.projections: dict[str, Projection] = {}
        self.offset: np.ndarray = np.zeros(())

    @property
    def integrates(self) -> bool:
        """Whether the readout piles up in a membrane, for a chip that cannot send values."""
        (output,) = self.graph.outputs
        node = self.graph[output.inputs[0]]
        if self.options.chip.graded or not (
            isinstance(node, Neuron) and isinstance(node.model, Relay)
        ):
            return False
        if output.reduce not in ("mean", "sum") or self.graph.steps is None:
            raise UnsupportedError(
                f"compile: {self.options.chip.name} cannot send values, and output '{output.name}' is "
                "no mean or sum over a known number of steps; read spikes out, or use loihi2"
            )
        return True

    def _measure(self, x: np.ndarray | None) -> dict[str, Moments]:
        """What each input and population sends on the calibration data, a mean a channel."""
        names = [n.name for n in self.graph if isinstance(n, (Input, Neuron))]
        self.series: dict[str, np.ndarray] = {}
        if x is None:
            half = {n: np.full(self.graph.shapes[n][0], 0.5) for n in names}
            return {n: Moments(v, v, v) for n, v in half.items()}
        _, series = self.graph.run(x, record=tuple(names))
        found = {}
        for name, s in series.items():
            flat = np.asarray(s, np.float64)
            self.series[name] = np.asarray(s[:, :ROUNDING_SAMPLES], np.float32)
            axes = (0, 1, *range(3, flat.ndim))
            found[name] = Moments(flat.mean(axes), (flat**2).mean(axes), (flat != 0).mean(axes))
        return found

    def program(self) -> Program:
        """The aligned Program. Rounding can carry a sum past what was planned for: then again, finer."""
        for _ in range(MARGIN_TRIES):
            program = self._attempt()
            tight = [bound for bound in prove(program).values() if bound.wraps]
            if not tight:
                return program
            for bound in tight:
                self.margin[bound.population] = self.margin.get(bound.population, 1.0) * 0.9
        raise _wraps(tight[0])

    def _attempt(self) -> Program:
        self.populations, self.projections = {}, {}
        for node in self.graph:
            if isinstance(node, Input):
                self.populations[node.name] = input_population(
                    node, self.x, self.options.input_bits, self.options.chip
                )
        order = [n for n in self.graph if isinstance(n, Neuron)]
        for node in order:
            self.population(node, order)
        readout = self.readout()
        return align(
            Program(
                populations=self.populations,
                projections=self.projections,
                readout=readout,
                steps=self.graph.steps,
                meta=self.meta(),
            ),
            int(self.options.chip.max_delay.value),
        )

    def meta(self) -> dict[str, Any]:
        o = self.options
        return {
            "chip": o.chip.name,
            "weight_bits": o.weight_bits,
            "joins": self.joins,
            "logic": o.logic,
            "thresholds": "channel" if o.by_channel else "population",
            "calibration_samples": 0 if self.x is None else int(self.x.shape[1]),
            "cost_pj": self.cost(),
            "cost_model": "modelled: Davies 2018 per-event costs on the calibration data, per sample",
        }

    def cost(self) -> float:
        """Modelled energy of a sample in pJ, from mean activity: what `joins="auto"` compares."""
        energy = LOIHI1.energy_pj
        synops = updates = active = 0.0
        for p in self.projections.values():
            share = self.moments[p.source].active
            used, _ = fan_out(p.map)
            synops += float(np.repeat(share, len(used) // len(share)) @ used)
        for population in self.populations.values():
            if not population.is_input:
                updates += population.size
                active += population.size * float(self.moments[population.name].active.mean())
        total = (
            synops * energy["synop"].value
            + active * energy["update_active"].value
            + (updates - active) * energy["update_inactive"].value
        )
        return total * (self.graph.steps or 1)

    def incoming(self, node: Neuron) -> list[Incoming]:
        joined = self.graph[node.inputs[0]]
        gain = gain_of(node.model)
        found = []
        for branch in joined.inputs:
            linear = self.graph[branch]
            if isinstance(linear, Flatten):
                linear = self.graph[linear.inputs[0]]
            assert isinstance(linear, (Conv, Dense, Scale))
            name, lag = self._emitter(linear.inputs[0])
            source = self.populations.get(name)
            if source is None:
                source = self._ahead(name)
            weight = linear.scale if isinstance(linear, Scale) else linear.weight
            weight = np.asarray(weight, np.float64)
            if isinstance(linear, Scale):
                weight = np.broadcast_to(weight, self.graph.shapes[name])
            if np.size(gain) == 1:
                weight = weight * float(np.reshape(gain, ()))
            elif isinstance(linear, Scale):
                weight = weight * gain
            else:
                weight = weight * by_row(gain, weight, self.graph.shapes[node.name])
            found.append(
                Incoming(
                    linear.name,
                    source,
                    lag,
                    linear,
                    weight / message_units(linear, weight, source),
                    self.graph.shapes[node.name],
                    in_units(self.moments[name], source),
                    self.options.weight_bits if linear.meta.get("weighted", True) else 8,
                )
            )
        return found

    def _sent(self, i: Incoming) -> np.ndarray:
        """What a source sent on a part of the calibration data, `[samples, *shape]`, in its units."""
        held = self.series.get(i.source.name, np.zeros((0, 0)))
        if i.source.message_scale.size > 1:
            held = held * np.asarray(i.source.message_scale, np.float32)
        return held.reshape(-1, *held.shape[2:])

    def _emitter(self, name: str) -> tuple[str, int]:
        """(population, lag) behind a Flatten or a Delay."""
        lag = 0
        node = self.graph[name]
        while isinstance(node, (Flatten, Delay)):
            lag += node.steps if isinstance(node, Delay) else 0
            node = self.graph[node.inputs[0]]
        return node.name, lag

    def _ahead(self, name: str) -> Population:
        """A population that a recurrent edge takes before it is made: only spikes can go back."""
        node = self.graph[name]
        assert isinstance(node, Neuron)
        if not node.model.binary:
            raise UnsupportedError(f"compile: '{name}' feeds back a value; only spikes can go back")
        return Population(name=name, shape=self.graph.shapes[name], cell=Cell())

    def population(self, node: Neuron, order: list[Neuron]) -> None:
        incoming = self.incoming(node)
        shape = self.graph.shapes[node.name]
        model = node.model
        if isinstance(model, (LI, CubaLI)) and self.graph.consumers[node.name] != [
            self.graph.outputs[0].name
        ]:
            raise UnsupportedError(
                f"compile: '{node.name}' sends its membrane to other neurons; only a readout may. "
                "Put a spiking neuron behind it"
            )
        bias = total_bias(node)
        relay = isinstance(model, Relay)
        logic = logic_scale(model, incoming)
        scaled = logic or self._scale(node, incoming, bias)
        if self.options.together and not logic:
            few = [i for i in incoming if i.bits <= ROUNDED_TOGETHER]
            if few:
                scaled = refine(incoming, scaled, {i.source.name: self._sent(i) for i in few})
        passes_on = relay and node.name != self.graph.outputs[0].inputs[0]
        if self.options.bias_correction and self.x is not None and not logic and not passes_on:
            bias = bias - mean_shift(incoming, scaled, shape)
        scale = along_rows(scaled.q, len(shape))
        if relay:
            cell = Cell(kind="relay", shift=self._shift(node, incoming, scaled))
            if not passes_on:
                self.offset = bias
                if self.integrates:
                    cell, relay = Cell(vth=VTH_MAX), False  # it is proved that this never fires
            elif np.any(bias):
                raise UnsupportedError(
                    f"compile: relay '{node.name}' has a bias, which it cannot hold"
                )
        else:
            cell = neuron_cell(whole_threshold(node) if logic else node, scale, bias)
            if logic and self.options.logic and isinstance(model, Threshold) and not np.any(bias):
                cell = replace(cell, kind="logic")
        for i, w, e in zip(incoming, scaled.weights, scaled.exponents, strict=True):
            self.projections[i.name] = Projection(
                name=i.name,
                source=i.source.name,
                target=node.name,
                map=int_map(i, w),
                exponent=e,
                lag=i.lag,
                bits=i.bits,
                origin=i.name,
            )
        lo, hi = 0, 1
        if relay:
            into = [self.projections[i.name] for i in incoming]
            lo, hi = arriving(into, self.populations, shape)
            lo, hi = lo >> cell.shift, -(-hi >> cell.shift)
        self.populations[node.name] = Population(
            name=node.name,
            shape=shape,
            cell=cell,
            scale=np.array(scale),
            lo=lo,
            hi=hi,
            origin=node.name,
        )

    def _shift(self, node: Neuron, incoming: list[Incoming], scaled: Scaled) -> int:
        """How far a relay shifts its payload, so that what takes it has room for its own weights."""
        if node.name == self.graph.outputs[0].inputs[0]:
            return 0
        size = math.prod(self.graph.shapes[node.name])

        def each(rows: np.ndarray | float) -> np.ndarray:  # a channel's value for its neurons
            return np.repeat(np.ravel(rows), size // np.size(rows))

        low = np.min(sum(each(i.extent_rows()[0]) for i in incoming) * each(scaled.q))
        high = np.max(sum(each(i.extent_rows()[1]) for i in incoming) * each(scaled.q))
        wide = all(_single(self.graph[c]) for c in self.graph.consumers[node.name])
        limit = ONE_TO_ONE_PAYLOAD if wide else WEIGHTED_PAYLOAD
        return max(0, int(np.ceil(np.log2(max(-low, high, 1.0) / limit))))

    def _scale(self, node: Neuron, incoming: list[Incoming], bias: np.ndarray) -> Scaled:
        model = node.model
        theta = getattr(model, "v_threshold", 0.0)
        memory = 1.0
        if isinstance(model, (CubaLIF, CubaLI)):
            memory = 1.0 / max(1.0 - float(np.max(np.asarray(model.alpha))), 1e-6)
        q_max = largest_scale(
            incoming,
            isinstance(model, Relay),
            float(np.abs(np.asarray(theta)).max()),
            float(np.abs(bias).max(initial=0.0)),
            memory,
        )
        if isinstance(model, Relay) and self.integrates:
            # the sum over all steps stays below the highest threshold
            low, high = (abs(sum(i.extent()[k] for i in incoming)) for k in (0, 1))
            q_max = VTH_MAX * MARGIN / max(low, high, 1e-30) / (self.graph.steps or 1)
        like = self.options.like
        if like is not None and node.name in like.populations:
            exponents = [like.projections[i.name].exponent for i in incoming]
            kept = like.populations[node.name].scale
            return at_scale(incoming, kept.reshape(-1) if kept.size > 1 else float(kept), exponents)
        if self._by_channel(node, incoming):
            return self._channel_scales(node, incoming, bias, memory)
        q_max *= self.margin.get(node.name, 1.0)
        _require_room(node.name, q_max, max((i.top for i in incoming), default=0.0))
        return choose_scale(incoming, q_max, theta, self.options.search)

    def _by_channel(self, node: Neuron, incoming: list[Incoming]) -> bool:
        """Whether a population takes a scale a channel."""
        model = node.model
        plain = isinstance(model, Relay) or (
            isinstance(model, Membrane) and not np.any(np.asarray(model.v_reset))
        )
        channels = self.graph.shapes[node.name][0]
        return (
            self.options.by_channel
            and not (isinstance(model, Relay) and self.integrates)
            and plain
            and fits(incoming, channels)
        )

    def _channel_scales(
        self, node: Neuron, incoming: list[Incoming], bias: np.ndarray, memory: float
    ) -> Scaled:
        shape = self.graph.shapes[node.name]

        def each(value: Any) -> np.ndarray:
            full = np.broadcast_to(np.abs(np.asarray(value, np.float64)), shape)
            return np.asarray(full.reshape(shape[0], -1).max(1))

        theta = each(getattr(node.model, "v_threshold", 0.0))
        relay = isinstance(node.model, Relay)
        limit = largest_scales(incoming, relay, theta, each(bias), memory)
        limit = limit * self.margin.get(node.name, 1.0)
        widest = int(np.argmax(limit * largest_rows(incoming)))
        _require_room(node.name, float(limit[widest]), float(largest_rows(incoming)[widest]))
        return choose_scales(incoming, limit, theta, self.options.search)

    def readout(self) -> Readout:
        (output,) = self.graph.outputs
        name = output.inputs[0]
        node = self.graph[name]
        assert isinstance(node, Neuron)
        q = self.populations[name].scale
        one = np.ones(())
        if isinstance(node.model, Relay) and self.integrates:
            steps = (self.graph.steps or 1) if output.reduce == "mean" else 1
            offset = np.asarray(self.offset, np.float64) * (
                1 if steps > 1 else self.graph.steps or 1
            )
            return Readout(
                population=name,
                kind="membrane",
                reduce="last",
                scale=one / (64 * q * steps),
                offset=offset,
            )
        if isinstance(node.model, Relay):
            return Readout(
                population=name,
                kind="current",
                reduce=output.reduce,
                scale=one / q,
                offset=np.asarray(self.offset, np.float64),
            )
        if isinstance(node.model, (LI, CubaLI)) or output.observe == "v":
            return Readout(
                population=name, kind="membrane", reduce=output.reduce, scale=one / (64 * q)
            )
        if output.observe == "u":
            raise UnsupportedError(
                f"compile: output '{output.name}' observes a current; only v is read"
            )
        return Readout(population=name, kind="spikes", reduce=output.reduce)


def _single(node: Node) -> bool:
    """Whether a map takes at most one source neuron for each target: no sum can pile up in it."""
    if isinstance(node, Conv):
        return int((node.weight != 0).reshape(len(node.weight), -1).sum(1).max()) <= 1
    return isinstance(node, Scale)


def _require_room(name: str, q_max: float, top: float) -> None:
    if 0 < q_max * top < 1:  # nothing arrives where all weights are zero
        raise CapacityError(
            f"compile: '{name}' has no scale at which its sums are proved to fit the chip: "
            f"at most {q_max:.3g} units per 1.0. Lower its fan-in, its inputs' range, or its threshold"
        )


def _wraps(bound: Bound) -> CapacityError:
    return CapacityError(
        f"compile: the sum that arrives at '{bound.population}' can reach {bound.a_lo}..{bound.a_hi}, "
        "which wraps on the chip; use fewer weight_bits or input_bits, or split its fan-in"
    )
