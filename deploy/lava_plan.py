"""A Program as a plan for Lava: which Processes, how they are wired, how many steps. Plain data.

Made without Lava, so that what would run there can be looked at anywhere; `lava_build` makes it
real.

The stream: sample k starts at chip step k * interval, counted from 0 at the input; a population of
depth d works on it in Lava's steps k * interval + d + 1 and following (Lava counts from 1).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ranvier.deploy.cells import Cell, IntParam
from ranvier.deploy.program import ConvMap, DenseMap, OneToOne, Population, Program, Projection
from ranvier.train.errors import UnsupportedError

MAX_GROUPS = 127
MAX_DELAY = 62  # 6 bits on the chip, of which lava-dl uses 0..62
# DelayDense and DelaySparse build all their delayed matrices anew in every step: how many weights
# in them are still cheap. Beyond, a delay of our own stands in front of a plain matrix.
_DELAYED_MAX = {DenseMap: 2**18, OneToOne: 2**14}
_FLIP = ("transpose", (2, 1, 0))


@dataclass(frozen=True)
class Node:
    """One Process: its kind is a key of `lava_build.MAKERS`, args are what that maker takes."""

    name: str
    kind: str
    args: dict[str, Any]


@dataclass(frozen=True)
class Edge:
    """From the out port of one Process to the in port of another, through views of the message.

    views  ("reshape", shape) or ("transpose", axes), in order
    """

    source: str
    target: str
    views: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass
class Plan:
    """What `lava_build.execute` takes.

    steps   Lava steps to run
    record  population -> what is kept of it: "sent", "u", "v"
    """

    steps: int
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    record: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "nodes": [[n.name, n.kind, n.args] for n in self.nodes],
            "edges": [[e.source, e.target, e.views] for e in self.edges],
            "record": self.record,
        }


@dataclass(frozen=True)
class Stream:
    """n samples of `length` steps, one every `interval` steps."""

    length: int
    interval: int
    n: int

    @staticmethod
    def of(program: Program, length: int, n: int) -> Stream:
        return Stream(length, length + program.max_lag, n)

    def total(self, program: Program) -> int:
        return self.interval * self.n + max(p.depth for p in program)

    def lay_out(self, x: np.ndarray, depth: int, total: int) -> np.ndarray:
        """x `[time, sample, *shape]` as one stream `[total, *shape]`, int32."""
        out = np.zeros((total, *x.shape[2:]), np.int32)
        for k in range(self.n):
            start = depth + k * self.interval
            out[start : start + self.length] = x[:, k]
        return out

    def cut(self, rows: np.ndarray, depth: int) -> np.ndarray:
        """Rows `[total, *shape]` of a population as `[time, sample, *shape]`."""
        starts = [depth + k * self.interval for k in range(self.n)]
        return np.stack([rows[s : s + self.length] for s in starts], axis=1)


def shift(program: Program, p: Projection) -> int:
    """How many steps of its sample the source is ahead of the target when its message arrives."""
    return p.delay + 1 + program.populations[p.source].depth - program.populations[p.target].depth


def must_hold(program: Program, name: str) -> bool:
    """Whether what a population would send outside its windows arrives inside one of a target's."""
    return any(shift(program, p) != 0 for p in program.out_of(name))


def why_custom(program: Program, population: Population, states: bool = False) -> str | None:
    """None where a stock Process computes this population; otherwise what that cannot.

    states  whether v is looked at: a delayed reset shows only there
    """
    cell = population.cell
    if cell is None:
        return None
    if reason := cell.why_custom():
        return reason
    if states and cell.kind == "cuba" and cell.timing == "delayed":
        return "reset in the step after the spike"
    return "silent outside its samples" if must_hold(program, population.name) else None


def why_custom_projection(p: Projection) -> str | None:
    """None where a stock Process computes this projection; otherwise what that cannot."""
    if p.delay == 0 or _has_own_delay(p):
        return None
    return f"delay of {p.delay} before a {type(p.map).__name__.removesuffix('Map').lower()}"


def _has_own_delay(p: Projection) -> bool:
    """Whether Lava's own delayed matrix is taken."""
    if isinstance(p.map, ConvMap):
        return False
    n = p.map.weight.size if isinstance(p.map, DenseMap) else int(np.prod(p.map.shape))
    return n * (p.delay + 1) <= _DELAYED_MAX[type(p.map)]


def make_plan(
    program: Program, x: np.ndarray, states: tuple[str, ...] = (), readout_v: bool = False
) -> Plan:
    """The plan that runs x `[time, sample, *shape]`, samples back to back.

    states     of "u" and "v": which are kept for every population
    readout_v  whether v of the output population is kept in any case
    Raises UnsupportedError for what no Process of Lava or ours computes exactly.
    """
    stream = Stream.of(program, len(x), x.shape[1])
    plan = Plan(stream.total(program))
    for population in program:
        kept = tuple(s for s in ("u", "v") if s in states)
        if readout_v and population.name == program.readout.population and "v" not in kept:
            kept = (*kept, "v")
        plan.nodes.append(_population(program, population, x, stream, kept))
        if population.cell is not None:
            held = kept if population.cell.kind == "cuba" else ()
            plan.record[population.name] = ("sent", *held)
    for p in program.projections.values():
        _add_projection(plan, program, p)
    return plan


def _population(
    program: Program, population: Population, x: np.ndarray, stream: Stream, kept: tuple[str, ...]
) -> Node:
    name, cell = population.name, population.cell
    if cell is None:
        data = stream.lay_out(x, population.depth, stream.total(program))
        return Node(name, "source", {"data": data})
    custom = why_custom(program, population, states="v" in kept)
    window = {
        "start": population.depth + 1,
        "interval": stream.interval,
        "length": stream.length,
        "n": stream.n,
    }
    shape = {"shape": population.shape}
    if cell.kind == "relay":
        rules = {"shift": cell.shift}
        return (
            Node(name, "relay", shape | rules | window) if custom else Node(name, "graded", shape)
        )
    if cell.kind == "logic":
        gate = np.ascontiguousarray(np.broadcast_to(cell.gate, population.shape), np.int32)
        return Node(name, "logic", shape | {"gate": gate} | window)
    params = shape | _parameters(cell, population.shape)
    if custom is None:
        timing = {"reset_interval": stream.interval, "reset_offset": population.depth + 1}
        return Node(name, "lif", params | timing)
    rules = {k: getattr(cell, k) for k in ("reset", "timing", "v_reset", "strict")}
    return Node(name, "compartment", params | rules | window)


def _parameters(cell: Cell, shape: tuple[int, ...]) -> dict[str, Any]:
    """du, dv, vth, bias as Lava takes them: plain ints, or int32 arrays of the full shape."""

    def whole(value: IntParam) -> Any:
        array = np.asarray(value)
        if array.size == 1:
            return int(array.reshape(()))
        return np.ascontiguousarray(np.broadcast_to(array, shape), np.int32)

    named = {name: whole(getattr(cell, name)) for name in ("du", "dv", "vth", "bias_mant")}
    return named | {"bias_exp": int(cell.bias_exp)}


def _add_projection(plan: Plan, program: Program, p: Projection) -> None:
    """Adds the Processes and edges of one projection."""
    if p.delay > MAX_DELAY:
        raise UnsupportedError(
            f"lava: projection '{p.name}' has a delay of {p.delay} steps; a synapse holds "
            f"0..{MAX_DELAY}. `ranvier.deploy.align.align` puts relays in between"
        )
    source, target = program.populations[p.source], program.populations[p.target]
    start = source.name if why_custom_projection(p) is None else _delayed(plan, source, p.delay)
    if isinstance(p.map, ConvMap):
        # Lava's convolutions are [x, y, channel]; [C, H, W] read backwards is just that.
        plan.nodes.append(Node(p.name, "conv", _conv(p.map, p.exponent, _message_bits(source))))
        plan.edges.append(Edge(start, p.name, (*_reshape(source.shape, p.map.in_shape), _FLIP)))
        back = (_FLIP, *_reshape(p.map.out_shape, target.shape))
        plan.edges.append(Edge(p.name, target.name, back))
        return
    for suffix, weight, mode, bits in by_sign(p):
        name = p.name + suffix
        plan.nodes.append(_matrix(p, name, weight, mode, bits, _message_bits(source)))
        plan.edges.append(Edge(start, name, _reshape(source.shape, (source.size,))))
        plan.edges.append(Edge(name, target.name, _reshape((target.size,), target.shape)))


def _reshape(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return () if tuple(old) == tuple(new) else (("reshape", tuple(new)),)


def _delayed(plan: Plan, source: Population, delay: int) -> str:
    """The name of the Process that sends what `source` sent `delay` steps ago; made once."""
    name = f"{source.name}~{delay}"
    if all(node.name != name for node in plan.nodes):
        plan.nodes.append(Node(name, "delay", {"shape": source.shape, "delay": delay}))
        plan.edges.append(Edge(source.name, name))
    return name


def _message_bits(source: Population) -> int:
    """0 for plain spikes; otherwise Lava takes the payload as it is, whatever the number."""
    if source.cell is not None and source.cell.kind == "relay":
        return 24
    return 24 if source.graded else 0


def few_groups(conv: ConvMap) -> ConvMap:
    """The same map in at most MAX_GROUPS groups: several become one, with zeros between them.

    Lava holds the number of groups in 8 bits, and beyond sends zeros without an error.
    """
    if conv.groups <= MAX_GROUPS:
        return conv
    groups = max(g for g in range(1, MAX_GROUPS + 1) if conv.groups % g == 0)
    merged = conv.groups // groups
    c_out, per_group = conv.weight.shape[:2]
    each = c_out // conv.groups
    wide = np.zeros((c_out, merged, per_group, *conv.weight.shape[2:]), conv.weight.dtype)
    rows = np.arange(c_out)
    wide[rows, rows // each % merged] = conv.weight
    weight = wide.reshape(c_out, merged * per_group, *conv.weight.shape[2:])
    return replace(conv, weight=weight, groups=groups)


def _conv(conv: ConvMap, exponent: int, message_bits: int) -> dict[str, Any]:
    """Lava's Conv is a true convolution over [x, y]: flipped. It ignores weight_exp: shifted."""
    conv = few_groups(conv)
    flipped = conv.weight.astype(np.int32)[:, :, ::-1, ::-1].transpose(0, 3, 2, 1) << exponent
    return {
        "weight": np.ascontiguousarray(flipped),
        "input_shape": conv.in_shape[::-1],
        "stride": conv.stride[::-1],
        "padding": conv.padding[::-1],
        "dilation": conv.dilation[::-1],
        "groups": conv.groups,
        "num_message_bits": message_bits,
    }


def _matrix(
    p: Projection, name: str, weight: np.ndarray, mode: str, bits: int, message_bits: int
) -> Node:
    args = {
        "weights": weight,
        "weight_exp": p.exponent,
        "num_weight_bits": bits,
        "sign_mode": mode.upper(),
        "num_message_bits": message_bits,
    }
    if p.delay and _has_own_delay(p):
        args["delays"] = p.delay
    if isinstance(p.map, OneToOne):
        # With message bits Lava multiplies; without, it cuts the matrix into columns: slow.
        return Node(name, "one_to_one", args | {"num_message_bits": max(1, message_bits)})
    return Node(name, "dense", args)


def by_sign(p: Projection) -> list[tuple[str, np.ndarray, str, int]]:
    """(suffix, weights, sign mode, bits) of the synapses that hold a matrix without truncation.

    Weights of mixed sign lose their last bit in Lava and on the chip. Where that would change one,
    the positive and the negative weights become a projection each.
    """
    weight = np.asarray(p.map.weight, np.int32)
    if isinstance(p.map, OneToOne):
        weight = np.broadcast_to(weight, p.map.shape).reshape(-1)
    modes: tuple[str, ...] = (p.sign, "mixed")
    for mode in modes:
        for bits in (p.bits, 8):
            if np.array_equal(kept_by_lava(weight, mode, bits), weight):
                return [("", weight, mode, bits)]
    if weight.min() < -255:
        raise UnsupportedError(
            f"lava: projection '{p.name}' has odd weights beside {weight.min()}; weights of mixed "
            "sign are even, others -255..255. Compile again, or write multiples of 2"
        )
    return [
        ("+", np.maximum(weight, 0), "excitatory", 8),
        ("-", np.minimum(weight, 0), "inhibitory", 8),
    ]


def kept_by_lava(weight: np.ndarray, mode: str, bits: int) -> np.ndarray:
    """What Lava's fixed-point Dense and Sparse make of integer weights."""
    mixed, sign = mode == "mixed", -1 if mode == "inhibitory" else 1
    low, cut = (-256 if mixed else 0), 8 - bits + mixed
    return sign * ((np.clip(sign * weight, low, 255) >> cut) << cut)
