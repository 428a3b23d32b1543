"""A Program as ONNX, in integers: equal to the reference engine bit for bit.

Weights are int8 (a factor of two, or the parity of odd 9-bit weights, is taken out). Messages and
states are int32; a current that the worst input could drive past 24 bits, and arithmetic whose
products pass 32 bits, are int64. Spikes go through ConvInteger and MatMulInteger. A graded message
meets a convolution in limbs of seven bits: on processors without VNNI, ONNX Runtime adds two 8-bit
products in 16 bits, which seven bits cannot overflow. Division truncates, as decays round; Mod and
a division make the floor shift.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from ranvier.deploy.cells import SHIFT, V_MAX, Cell
from ranvier.deploy.program import ConvMap, DenseMap, OneToOne, Population, Program, Projection
from ranvier.export.onnx_build import BOOL, INT64, Body
from ranvier.export.onnx_model import Network, Port, add_reduction
from ranvier.train.errors import UnsupportedError

INT32, UINT8, DOUBLE = TensorProto.INT32, TensorProto.UINT8, TensorProto.DOUBLE
LIMB = 7  # bits of a message that one ConvInteger takes
Shape = tuple[int, ...]


def program_network(program: Program) -> Network:
    """The Program as a step with named ends.

    "input" takes `program.encode(x)`, int32; "output" is what the readout watches (spikes, payload
    or v), int32; "readout" is `[batch, n]` in float units, double. States are "<population>.u",
    ".v" and, where a projection lags, ".<age>": what the population sent `age` steps ago.
    """
    entry = program.input
    states = _states(program)
    end = Port(program.output.shape, INT32)

    def step(body: Body, values: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        made, new = _Step(body, program).run(values["input"])
        return {"output": made}, new

    return Network(
        inputs={"input": Port(entry.shape, INT32)},
        states=states,
        outputs={"output": end},
        step=step,
        readouts=lambda outer: [_readout(outer, program)],
    )


def _lag(program: Program, name: str) -> int:
    """How many steps back what `name` sends is still needed."""
    return max((p.lag for p in program.out_of(name)), default=0)


def _states(program: Program) -> dict[str, Port]:
    found: dict[str, Port] = {}
    for p in program:
        if p.cell is not None and p.cell.kind == "cuba":
            found[f"{p.name}.u"] = Port(p.shape, INT32 if _fits(program, p.name) else INT64)
            found[f"{p.name}.v"] = Port(p.shape, INT32)
        for age in range(1, _lag(program, p.name) + 1):
            found[f"{p.name}.{age}"] = Port(p.shape, INT32)
    return found


def _fits(program: Program, name: str) -> bool:
    """Whether the current stays in 24 bits at the worst: it is folded only once, and else grows."""
    worst = 0
    for p in program.into(name):
        source = program.populations[p.source]
        rows = np.abs(p.map.weight.astype(np.int64))
        if not isinstance(p.map, OneToOne):
            rows = rows.reshape(len(rows), -1).sum(axis=1)
        peak = max(abs(source.lo), abs(source.hi)) if source.cell is None or source.graded else 1
        worst += (int(rows.max(initial=0)) * peak) << p.exponent
    return worst <= 2**18


def _readout(outer: Body, program: Program) -> str:
    """(value * scale + offset), reduced over time; one row a sample."""
    readout, shape = program.readout, program.output.shape
    lead = ("time", "batch")
    wide = outer.op("Cast", ["output"], shape, to=DOUBLE, dtype=DOUBLE, lead=lead)
    scale, offset = (outer.constant(a, np.float64) for a in (readout.scale, readout.offset))
    scaled = outer.op("Mul", [wide, scale], shape, dtype=DOUBLE, lead=lead)
    series = outer.op("Add", [scaled, offset], shape, dtype=DOUBLE, lead=lead)
    size = program.output.size
    if readout.reduce == "none":
        rows = outer.constant([0, 0, size], np.int64)
        return outer.op("Reshape", [series, rows], (size,), "readout", dtype=DOUBLE, lead=lead)
    once = add_reduction(outer, series, "readout/whole", readout.reduce, Port(shape, DOUBLE))
    rows = outer.constant([0, size], np.int64)
    return outer.op("Reshape", [once, rows], (size,), "readout", dtype=DOUBLE)


class _Step:
    """One algorithmic step of a Program; values are int64 inside."""

    def __init__(self, body: Body, program: Program) -> None:
        self.body, self.program = body, program

    # arithmetic

    def num(self, value: object) -> str:
        return self.body.constant(value, np.int64)

    def op(self, kind: str, inputs: list[str], shape: Shape, **attributes: object) -> str:
        options = {"dtype": INT64, **attributes}
        return self.body.op(kind, inputs, shape, **options)  # type: ignore[arg-type]

    def cast(self, x: str, to: int, shape: Shape) -> str:
        return self.op("Cast", [x], shape, to=to, dtype=to)

    def where(self, mask: str, a: str, b: str, shape: Shape) -> str:
        return self.op("Where", [mask, a, b], shape)

    def wrap(self, x: str, bits: int, shape: Shape) -> str:
        half, whole = self.num(1 << (bits - 1)), self.num(1 << bits)
        up = self.op("Add", [x, half], shape)
        return self.op("Sub", [self.op("Mod", [up, whole], shape), half], shape)

    def decay(self, x: str, d: object, shape: Shape) -> str:
        kept = self.op("Mul", [x, self.num(4096 - np.asarray(d, np.int64))], shape)
        return self.op("Div", [kept, self.num(4096)], shape)

    def fold(self, u: str, shape: Shape) -> str:
        for kind, edge, move in (("Greater", 2**23, -(2**24)), ("LessOrEqual", -(2**23), 2**24)):
            out = self.op(kind, [u, self.num(edge)], shape, dtype=BOOL)
            u = self.where(out, self.op("Add", [u, self.num(move)], shape), u, shape)
        return u

    def clip(self, v: str, shape: Shape) -> str:
        """By comparisons: ONNX Runtime's Min, Max and Clip go wrong on int64 beyond 32 bits."""
        for kind, edge in (("Greater", V_MAX), ("Less", -V_MAX)):
            out = self.op(kind, [v, self.num(edge)], shape, dtype=BOOL)
            v = self.where(out, self.num(edge), v, shape)
        return v

    # the step

    def run(self, entry: str) -> tuple[str, dict[str, str]]:
        """(what the readout watches, state -> new value)."""
        sent: dict[str, str] = {}
        new: dict[str, str] = {}
        watched = ""
        for p in self.program:
            if p.cell is None:
                sent[p.name] = self.cast(entry, INT64, p.shape)
            else:
                total = self.total(p, sent)
                sent[p.name], v = self.cell(p, p.cell, total, new)
                if p.name == self.program.readout.population:
                    watched = v if self.program.readout.kind == "membrane" else sent[p.name]
            self.remember(p, sent[p.name], new)
        watched = watched or sent[self.program.readout.population]
        return self.cast(watched, INT32, self.program.output.shape), new

    def remember(self, p: Population, sent: str, new: dict[str, str]) -> None:
        for age in range(1, _lag(self.program, p.name) + 1):
            before = self.cast(sent, INT32, p.shape) if age == 1 else f"{p.name}.{age - 1}"
            new[f"{p.name}.{age}"] = before

    def total(self, target: Population, sent: dict[str, str]) -> str:
        """The arriving sum, wrapped at 32 bits."""
        total = ""
        for p in self.program.into(target.name):
            source = self.program.populations[p.source]
            if p.lag:
                message = self.cast(f"{p.source}.{p.lag}", INT64, source.shape)
            else:
                message = sent[p.source]
            part = self.arriving(p, source, message)
            part = self.reshape(part, target.shape)
            total = self.op("Add", [total, part], target.shape) if total else part
        if not total:
            return self.num(np.zeros((1, *target.shape)))
        return self.wrap(total, 32, target.shape)

    def reshape(self, x: str, shape: Shape) -> str:
        return self.op("Reshape", [x, self.num([-1, *shape])], shape)

    def arriving(self, p: Projection, source: Population, message: str) -> str:
        plain = not source.cell.graded if source.cell else 0 <= source.lo <= source.hi < 1 << LIMB
        x = self.reshape(message, p.map.in_shape)
        match p.map:
            case ConvMap():
                moved = self.shifted(self.conv(p.map, x, plain), p)
                return self.wrap(moved, 24, p.map.out_shape)
            case DenseMap():
                return self.shifted(self.dense(p.map, x, plain), p)
            case OneToOne():
                weight = self.num(p.map.weight)
                return self.shifted(self.op("Mul", [x, weight], p.map.out_shape), p)

    def shifted(self, x: str, p: Projection) -> str:
        if p.exponent == 0:
            return x
        return self.op("Mul", [x, self.num(1 << p.exponent)], p.map.out_shape)

    def cell(self, p: Population, c: Cell, a: str, new: dict[str, str]) -> tuple[str, str]:
        """(what is sent, v) after one step of `Cell.step`."""
        shape = p.shape
        if c.kind == "relay":
            return self.halved(a, c.shift, shape), ""
        if c.kind == "logic":
            fired = self.op("Greater", [a, self.num(c.gate)], shape, dtype=BOOL)
            return self.cast(fired, INT64, shape), ""
        u, v = (self.cast(f"{p.name}.{s}", INT64, shape) for s in ("u", "v"))
        scaled = self.wrap(self.op("Mul", [a, self.num(1 << SHIFT)], shape), 32, shape)
        kept = self.decay(u, np.asarray(c.du, np.int64) + 1, shape)
        u = self.fold(self.wrap(self.op("Add", [kept, scaled], shape), 32, shape), shape)
        theta, jump = self.num(c.theta), self.num(c.theta + (0 if c.strict else 1))
        late = self.op("Greater", [v, theta], shape, dtype=BOOL)
        to = self.num(c.v_reset)
        if c.reset == "zero" and c.timing == "delayed":
            v = self.where(late, to, v, shape)
        h = self.op("Add", [self.decay(v, c.dv, shape), u], shape)
        h = self.op("Add", [h, self.num(c.bias)], shape)
        if c.reset == "subtract" and c.timing != "immediate":
            h = self.op("Sub", [h, self.where(late, jump, self.num(0), shape)], shape)
        if c.reset == "zero" and c.timing == "discard":
            h = self.where(late, to, h, shape)
        h = self.clip(h, shape)
        fired = self.op("Greater", [h, theta], shape, dtype=BOOL)
        after = self.after(c, h, fired, late, jump, shape)
        wide = not _fits(self.program, p.name)
        new[f"{p.name}.u"] = u if wide else self.cast(u, INT32, shape)
        new[f"{p.name}.v"] = self.cast(after, INT32, shape)
        return self.cast(fired, INT64, shape), after

    def after(self, c: Cell, h: str, fired: str, late: str, jump: str, shape: Shape) -> str:
        if c.reset == "none" or c.timing in ("delayed", "discard"):
            return h
        if c.reset == "zero":
            return self.where(fired, self.num(c.v_reset), h, shape)
        h = self.op("Sub", [h, self.where(fired, jump, self.num(0), shape)], shape)
        if c.timing == "carry":
            h = self.op("Add", [h, self.where(late, jump, self.num(0), shape)], shape)
        return self.clip(h, shape)

    def halved(self, a: str, shift: int, shape: Shape) -> str:
        """round(a / 2**shift), halves upwards: a floor shift, which ONNX has for unsigned only."""
        if shift == 0:
            return a
        up = self.op("Add", [a, self.num(1 << (shift - 1))], shape)
        whole = self.num(1 << shift)
        rest = self.op("Mod", [up, whole], shape)
        return self.op("Div", [self.op("Sub", [up, rest], shape), whole], shape)

    # maps

    def dense(self, m: DenseMap, x: str, plain: bool) -> str:
        shape = m.out_shape
        parts = []
        for plane in planes(m.weight.T):
            weight = self.body.constant(plane.mantissa, np.int8)
            if plain:
                small = self.cast(x, UINT8, m.in_shape)
                found = self.op("MatMulInteger", [small, weight], shape, dtype=INT32)
                parts.append((self.cast(found, INT64, shape), plane.factor))
            else:
                wide = self.body.op(
                    "Cast", [weight], m.weight.T.shape, dtype=INT64, lead=(), to=INT64
                )
                parts.append((self.op("MatMul", [x, wide], shape), plane.factor))
        return self.weighted(parts, shape)

    def conv(self, m: ConvMap, x: str, plain: bool) -> str:
        limbs = [(x, 0)] if plain else self.limbs(x, m.in_shape)
        parts = []
        for plane in planes(m.weight):
            weight = self.body.constant(plane.mantissa, np.int8)
            for limb, bit in limbs:
                small = self.cast(limb, UINT8, m.in_shape)
                found = self.op(
                    "ConvInteger",
                    [small, weight],
                    m.out_shape,
                    dtype=INT32,
                    strides=list(m.stride),
                    pads=[*m.padding, *m.padding],
                    dilations=list(m.dilation),
                    group=m.groups,
                    kernel_shape=list(m.weight.shape[2:]),
                )
                parts.append((self.cast(found, INT64, m.out_shape), plane.factor << bit))
        return self.weighted(parts, m.out_shape)

    def limbs(self, x: str, shape: Shape) -> list[tuple[str, int]]:
        """x modulo 2**24 in digits of seven bits; a convolution wraps there and needs no more."""
        rest = self.op("Mod", [x, self.num(1 << 24)], shape)
        found = []
        for bit in range(0, 24, LIMB):
            found.append((self.op("Mod", [rest, self.num(1 << LIMB)], shape), bit))
            rest = self.op("Div", [rest, self.num(1 << LIMB)], shape)
        return found

    def weighted(self, parts: list[tuple[str, int]], shape: Shape) -> str:
        total = ""
        for value, factor in parts:
            part = value if factor == 1 else self.op("Mul", [value, self.num(factor)], shape)
            total = self.op("Add", [total, part], shape) if total else part
        return total


@dataclass(frozen=True)
class Plane:
    """factor * mantissa, an int8 array, is a share of a weight."""

    mantissa: np.ndarray
    factor: int


def planes(weight: np.ndarray) -> list[Plane]:
    """Weights of up to 9 bits and sign as int8: one plane where they are even or small, else two.

    Raises UnsupportedError for weights outside -256..255.
    """
    w = np.ascontiguousarray(weight, np.int64)
    if w.size and (w.min() < -256 or w.max() > 255):
        raise UnsupportedError(
            f"onnx: weights reach {w.min()}..{w.max()}; the chip holds -256..255"
        )
    if not w.size or (w.min() >= -128 and w.max() <= 127):
        return [Plane(w.astype(np.int8), 1)]
    half, odd = w >> 1, w & 1
    planes = [Plane(half.astype(np.int8), 2)]
    return planes + [Plane(odd.astype(np.int8), 1)] if odd.any() else planes
