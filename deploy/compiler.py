"""`compile`: a Graph -> an integer Program for one chip."""

from __future__ import annotations

from typing import Any

from ranvier.deploy.calibration import sample_of
from ranvier.deploy.chip import LOIHI2, Chip, chip_of
from ranvier.deploy.mapper import Mapper
from ranvier.deploy.options import InputBits, Joins, Rounding, Thresholds, checked
from ranvier.deploy.program import Program
from ranvier.export.graph import Graph
from ranvier.train.errors import CapacityError, UnsupportedError, expect


def compile(
    graph: Graph,
    chip: Chip | str = LOIHI2,
    calibration: Any = None,
    weight_bits: int = 8,
    joins: Joins = "auto",
    *,
    input_bits: InputBits = 8,
    search: bool = True,
    bias_correction: bool = True,
    thresholds: Thresholds = "population",
    rounding: Rounding = "nearest",
    like: Program | None = None,
) -> Program:
    """The integer Program of a graph.

    chip         a Chip, or the name of one: loihi1, loihi2
    calibration  floats `[time, batch, *shape]` or `[batch, *shape]`: real input, from which the range
                 of the input, the scales and the rounding correction are chosen; up to 128 samples
                 are used. None: the input's declared range, and no correction
    weight_bits  1..8, sign included; wires without parameters (shortcuts, pooling) always have 8
    joins        linear (SEW: each source projects separately; MS: unrolled): binary messages, more
                 synapses; graded (relay): sums are sent as values; auto: the cheaper by counted cost.
                 OR, AND and IAND are stock LIFs without memory; logic, alone or as in linear+logic,
                 makes them neurons of our own without a membrane (custom: Loihi 2 microcode)
    input_bits   of an analog input. Its levels and the first layer's weights share the 17 bits of a sum,
                 so that fewer levels leave the weights more room: auto takes 4 to 8, by the least expected
                 error of the first layer's current on the calibration data
    thresholds   population: one scale and one threshold for each population; channel: each channel has
                 its own, so that its weights fill their range. Fewer bits gain more from it; which is
                 better differs from network to network, so measure both
    rounding     nearest, or together: up to 6 bits the weights of a row are rounded so that their sum
                 errs little on the calibration data (`ranvier.deploy.rounding`)
    like         a program of the same network whose scales, exponents and joins are kept: what a
                 network was trained for (`ranvier.deploy.qat`); its biases are then not corrected for
                 rounding, since the training already did. A scale with which sums could wrap is not kept
    search       choose the scale of each population by search; False: the largest that is proved safe
    Raises UnsupportedError naming a node that the chip cannot run, RangeError for parameters that it
    cannot hold, CapacityError where no scale is proved safe.
    Source: models.md 15 equations; the limits are those of lava-nc 0.10's fixed-point models.
    """
    expect(graph, Graph, "compile", "make one with ranvier.export.trace(net, sample)")
    chip = chip_of(chip, "compile")
    options = checked(
        chip, weight_bits, joins, input_bits=input_bits, search=search, bias_correction=bias_correction,
        thresholds=thresholds, rounding=rounding, like=like, calibrated=calibration is not None,
    )  # fmt: skip
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise UnsupportedError(
            f"compile: the graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; exactly "
            "one of each is mapped. Concatenate the inputs into one"
        )
    x = None if calibration is None else sample_of(graph, calibration)
    programs, failures = [], []
    for choice, lowered in _lowered(graph, options.joins).items():
        try:
            programs.append(Mapper(lowered, x, options, choice).program())
        except CapacityError as error:  # the other mapping may still fit
            failures.append(error)
    if not programs:
        raise failures[0]
    return min(programs, key=lambda p: p.meta["cost_pj"])


def _lowered(graph: Graph, choices: tuple[str, ...]) -> dict[str, Graph]:
    """The graph lowered with each mapping of its joins, where they differ."""
    lowered = {c: graph.lower(c) for c in choices}
    if len({len(g.populations) for g in lowered.values()}) == 1:  # no join asks for relays
        return {choices[0]: lowered[choices[0]]}
    return lowered
