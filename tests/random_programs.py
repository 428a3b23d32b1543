"""Random integer Programs that use everything a Program can say, and random input for them.

From a seed: `random_case` (with its input and what it makes use of), `random_program` (on request
cyclic, or hot: with sums that wrap, which Lava leaves undefined). By hypothesis: the strategy
`programs`, which makes failures small, and `drawn`, a number of them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ranvier.deploy.align import align
from ranvier.deploy.cells import Cell
from ranvier.deploy.program import (
    ConvMap,
    DenseMap,
    OneToOne,
    Population,
    Program,
    Projection,
    Readout,
)

RESETS = [
    ("zero", "immediate"),
    ("zero", "delayed"),
    ("subtract", "immediate"),
    ("subtract", "delayed"),
    ("subtract", "carry"),
    ("subtract", "discard"),
    ("zero", "discard"),
    ("none", "immediate"),
]
LOGIC = {"du": 4095, "dv": 4096}  # no memory at all: a gate
Case = tuple[Program, np.ndarray]
LIMIT = 2**30  # of what may arrive: beyond 32 bits Lava's arithmetic is undefined


class Drawn:
    """What of numpy's Generator a Sketch uses, with hypothesis drawing the numbers.

    Arrays are of one value, which is what they shrink to, or come from a drawn seed.
    """

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw

    def random(self, shape: Any = None) -> Any:
        if shape is None:
            return self.draw(st.integers(0, 999)) / 1000
        return self._seeded(lambda rng: rng.random(shape), lambda: np.full(shape, 0.5))

    def integers(self, low: int, high: int | None = None, shape: Any = None) -> Any:
        low, high = (0, low) if high is None else (low, high)
        if shape is None:
            return self.draw(st.integers(low, high - 1))
        return self._seeded(
            lambda rng: rng.integers(low, high, shape),
            lambda: np.full(shape, self.draw(st.integers(low, high - 1))),
        )

    def _seeded(self, many: Callable[[np.random.Generator], Any], one: Callable[[], Any]) -> Any:
        seed = self.draw(st.integers(-1, 2**32 - 1))
        return one() if seed < 1 else many(np.random.default_rng(seed))


@dataclass
class Sketch:
    """A Program being drawn, population by population; later ones are fed by earlier ones.

    hot  whether sums may pass what the chip's registers hold
    """

    rng: np.random.Generator | Drawn
    hot: bool = False
    populations: dict[str, Population] = field(default_factory=dict)
    projections: dict[str, Projection] = field(default_factory=dict)
    features: set[str] = field(default_factory=set)
    used: dict[str, int] = field(default_factory=dict)

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def whole(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    # Populations

    def input(self, shape: tuple[int, ...]) -> Population:
        low, high = self.pick((0, 1), (0, 1), (0, 255), (-128, 127))
        self.features.add("binary input" if high == 1 else "graded input")
        return self._put(Population(name="in", shape=shape, lo=low, hi=high))

    def neurons(self, shape: tuple[int, ...], reach: int) -> Population:
        """Spiking neurons of any kind; `reach` is about what arrives in a step."""
        reset, timing = self.pick(*RESETS, *[RESETS[0]] * 4)
        self.features.add(f"{reset} {timing}")
        strict = not self.chance(0.25)
        v_reset = self.whole(-3000, 3000) if reset == "zero" and self.chance(0.25) else 0
        self.features |= {"not strict"} if not strict else set()
        self.features |= {"v_reset"} if v_reset else set()
        cell = Cell(
            du=self.per(shape, *self.pick((4095, 4095), (0, 4095), (-1, -1), (0, 0))),
            dv=self.per(shape, *self.pick((0, 4096), (0, 0), (4096, 4096), (100, 1000))),
            vth=self.per(shape, *self.pick((0, 2), (reach // 4, reach), (reach // 2, 3 * reach))),
            bias_mant=self.per(shape, *self.pick((0, 0), (0, 0), (-200, 200), (-4095, 4095))),
            bias_exp=7 if self.hot else self.whole(0, 7),
            reset=reset,
            timing=timing,
            v_reset=v_reset,
            strict=strict,
        )
        return self._put(Population(name=self._name("n"), shape=shape, cell=cell))

    def per(self, shape: tuple[int, ...], low: int, high: int) -> Any:
        """A parameter of the whole population, of each channel, or of each neuron."""
        low, high = min(low, 2**17 - 1), min(high, 2**17 - 1)
        form = self.pick((), (), (shape[0], *[1] * (len(shape) - 1)), shape)
        if form == ():
            return self.whole(low, high)
        self.features.add("parameter arrays")
        return self.rng.integers(low, high + 1, form)

    def gate(self, shape: tuple[int, ...], vth: int) -> Population:
        """A gate, as a stock compartment without memory or as logic of our own."""
        kind = self.pick("cuba", "logic")
        self.features |= {"logic"} if kind == "logic" else set()
        cell = Cell(kind=kind, **LOGIC, vth=vth)
        return self._put(Population(name=self._name("gate"), shape=shape, cell=cell))

    def logic(self, shape: tuple[int, ...], reach: int) -> Population:
        """Logic behind any map, with thresholds of its own."""
        self.features.add("logic thresholds")
        vth, strict = self.per(shape, 0, reach), not self.chance(0.5)
        cell = Cell(kind="logic", vth=vth, strict=strict)
        return self._put(Population(name=self._name("logic"), shape=shape, cell=cell))

    def relay(self, shape: tuple[int, ...], reach: int) -> Population:
        shift = self.whole(1, 5) if self.chance(0.25) else 0
        self.features |= {"relay shift"} if shift else set()
        reach = min((reach >> shift) + 1, 2**23)
        cell, name = Cell(kind="relay", shift=shift), self._name("relay")
        return self._put(Population(name=name, shape=shape, cell=cell, lo=-reach, hi=reach))

    def _put(self, population: Population) -> Population:
        self.populations[population.name] = population
        return population

    def _name(self, stem: str) -> str:
        self.used[stem] = self.used.get(stem, 0) + 1
        return f"{stem}{self.used[stem]}"

    # Projections

    def project(self, source: Population, target: Population, linear: Any, **more: Any) -> None:
        name = self._name(f"{source.name}>{target.name}.")
        few = linear.weight.any() and not (linear.weight % 32).any()
        self.features |= {"4 bits"} if few else set()
        self.projections[name] = Projection(
            name=name, source=source.name, target=target.name, map=linear, bits=4 if few else 8,
            **more,
        )  # fmt: skip

    def weights(self, *shape: int, odd: bool = False) -> np.ndarray:
        """Random weights on the grid of the chip: of mixed sign they are even."""
        form = self.pick("mixed", "mixed", "mixed", "excitatory", "inhibitory", "few", "4 bits")
        w = self.rng.integers(0, 256, shape)
        if form == "mixed":
            w = 2 * self.rng.integers(-128, 128, shape)
        elif form == "inhibitory":
            w = -w
        elif form == "4 bits":
            w = 32 * self.rng.integers(-8, 8, shape)
        elif form == "few":
            w = np.where(self.rng.random(shape) < 0.2, 2 * self.rng.integers(-128, 128, shape), 0)
        if odd and self.chance(0.2):
            self.features.add("odd weights of mixed sign")
            w = self.rng.integers(-255, 256, shape)
        return w.astype(np.int16)

    def conv(self, shape: tuple[int, int, int]) -> ConvMap:
        """A convolution from `shape` of any geometry that fits."""
        (c, h, w), pick = shape, self.pick
        groups = pick(*[g for g in (1, 1, c, 2) if c % g == 0])
        kernel = (self.whole(1, min(3, h)), self.whole(1, min(3, w)))
        dilation = tuple(
            pick(1, 1, 2) if 2 * (k - 1) < n else 1 for k, n in zip(kernel, (h, w), strict=True)
        )
        stride, padding = (pick(1, 1, 2), pick(1, 1, 2)), (pick(0, 1), pick(0, 1, 2))
        c_out = groups * self.whole(1, 2)
        out = conv_size((h, w), kernel, stride, padding, dilation)
        self.features |= {"conv"} | ({"groups"} if groups > 1 else set())
        return ConvMap(
            weight=self.weights(c_out, c // groups, *kernel),
            in_shape=shape,
            out_shape=(c_out, *out),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )

    def pool(self, shape: tuple[int, int, int]) -> ConvMap:
        """A pool as a depthwise convolution of equal weights."""
        c, h, w = shape
        k = min(2, h, w)
        self.features.add("pool")
        return ConvMap(
            weight=np.full((c, 1, k, k), self.pick(1, 1, 64), np.int16),
            in_shape=shape,
            out_shape=(c, h // k, w // k),
            stride=(k, k),
            groups=c,
        )

    def same(self, shape: tuple[int, ...]) -> Any:
        """A map from a shape to itself."""
        if len(shape) == 3 and self.chance(0.6):
            c = shape[0]
            return ConvMap(
                weight=self.weights(c, c, 3, 3), in_shape=shape, out_shape=shape, padding=(1, 1)
            )
        if self.chance(0.5):
            weight = self.weights(*self.pick((1,) * len(shape), shape), odd=True)
            return OneToOne(weight=weight, shape=shape)
        n = int(np.prod(shape))
        return DenseMap(weight=self.weights(n, n, odd=True))

    def identity(self, shape: tuple[int, ...], weight: int = 1) -> OneToOne:
        return OneToOne(weight=np.full((), weight, np.int16), shape=shape)

    # Layers: each takes populations and gives the one that stands for its output

    def layer(self, source: Population) -> Population:
        """Neurons behind a convolution, a pool or a matrix."""
        if len(source.shape) == 3 and self.chance(0.8):
            linear: Any = self.pool(source.shape) if self.chance(0.2) else self.conv(source.shape)
            out: tuple[int, ...] = linear.out_shape
        else:
            out = (self.whole(1, 6),)
            linear = DenseMap(weight=self.weights(out[0], source.size, odd=True))
        return self._fed(source, linear, out)

    def block(self, source: Population) -> Population:
        """Neurons of the source's own shape, behind a map."""
        return self._fed(source, self.same(source.shape), source.shape)

    def _fed(self, source: Population, linear: Any, shape: tuple[int, ...]) -> Population:
        exponent = self.whole(0, 6) if self.chance(0.3) else 0
        while exponent and reach_of(linear, source) << exponent >= LIMIT:
            exponent -= 1
        exponent = self.whole(8, 15) if self.hot else exponent
        reach = min(typical(linear, source) << exponent, LIMIT)
        target = self.logic(shape, reach) if self.chance(0.08) else self.neurons(shape, reach)
        self.project(source, target, linear, exponent=exponent)
        return target

    def join(self, a: Population, b: Population) -> Population:
        """Any of the residual joins of two populations of one shape, as a population."""
        kind = self.pick("or", "and", "iand", "graded", "linear", "vanilla", "ms relay", "ms")
        plain = not (a.graded or b.graded)
        if kind in ("or", "and", "iand") and not plain:
            kind = "graded"
        if kind in ("ms", "ms relay", "graded") and max(a.hi, b.hi) > 2**12:
            kind = "vanilla"
        self.features.add(f"join {kind}")
        return getattr(self, "_" + kind.replace(" ", "_"))(a, b)

    def _or(self, a: Population, b: Population) -> Population:
        return self._logic(a, b, 0, 1, 1)

    def _and(self, a: Population, b: Population) -> Population:
        return self._logic(a, b, 1, 1, 1)

    def _iand(self, a: Population, b: Population) -> Population:
        return self._logic(a, b, 0, -1, 1)

    def _logic(self, a: Population, b: Population, vth: int, w_a: int, w_b: int) -> Population:
        gate = self.gate(a.shape, vth)
        self.project(a, gate, self.identity(a.shape, w_a))
        self.project(b, gate, self.identity(b.shape, w_b))
        return gate

    def _graded(self, a: Population, b: Population) -> Population:
        reach = max(abs(a.lo), a.hi) + max(abs(b.lo), b.hi)
        relay = self.relay(a.shape, reach)
        self.project(a, relay, self.identity(a.shape))
        self.project(b, relay, self.identity(b.shape))
        return relay

    def _linear(self, a: Population, b: Population) -> Population:
        """The sum is never formed: both project through the same map."""
        linear = self.same(a.shape)
        target = self.neurons(a.shape, typical(linear, a))
        for source in (a, b):
            self.project(source, target, linear)
        return target

    def _vanilla(self, a: Population, b: Population) -> Population:
        linear = self.same(a.shape)
        target = self.neurons(a.shape, typical(linear, a))
        self.project(a, target, linear)
        self.project(b, target, self.identity(b.shape, self.pick(1, 16, 254)))
        return target

    def _ms(self, a: Population, b: Population) -> Population:
        """Each branch's last map also projects to the neurons of the block behind."""
        first, second = self.same(a.shape), self.same(a.shape)
        inner = self.neurons(a.shape, typical(first, a))
        self.project(a, inner, first)
        self.project(b, inner, self.identity(b.shape, 2))
        outer = self.neurons(a.shape, typical(second, inner))
        self.project(inner, outer, second)
        self.project(a, outer, first)
        self.project(b, outer, self.identity(b.shape, 2))
        return outer

    def _ms_relay(self, a: Population, b: Population) -> Population:
        linear = self.same(a.shape)
        reach = reach_of(linear, a) + max(abs(b.lo), b.hi)
        relay = self.relay(a.shape, reach)
        self.project(a, relay, linear)
        self.project(b, relay, self.identity(b.shape))
        if relay.hi > 2**12:  # nothing but neurons may listen to so large a sum
            return self._fed(relay, self.identity(a.shape), a.shape)
        return relay

    # Time

    def recur(self) -> None:
        """A projection back, or onto itself, over as many steps as its cycle has synapses."""
        names = [p.name for p in self.populations.values() if p.cell and p.cell.kind == "cuba"]
        if not names:
            return
        end = self.populations[self.pick(*names)]
        start = self.populations[self.pick(*names)]
        place = list(self.populations).index
        if place(start.name) < place(end.name):
            start, end = end, start
        # The longest way from end to start has no more synapses than populations between them.
        lag = 1 + (place(start.name) - place(end.name))
        self.features.add("recurrence")
        n_out, n_in = end.size, start.size
        self.project(start, end, DenseMap(weight=self.weights(n_out, n_in, odd=True)), lag=lag)

    def delay(self) -> None:
        """Makes one projection that does not go back some algorithmic steps later."""
        forward = [p for p in self.projections.values() if p.lag == 0]
        chosen = forward[int(self.rng.integers(len(forward)))]
        self.features.add("delay")
        self.projections[chosen.name] = replace(chosen, lag=self.whole(1, 3))


def conv_size(
    size: tuple[int, ...], kernel: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[int, ...]:
    sides = zip(size, kernel, stride, padding, dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)


def reach_of(linear: Any, source: Population) -> int:
    """The most that can arrive through a map: the largest row of |w| times the largest message."""
    return _row(linear) * max(abs(source.lo), source.hi)


def typical(linear: Any, source: Population) -> int:
    """About what arrives when a part of the source's neurons fire."""
    return max(2, reach_of(linear, source) // 6)


def _row(linear: Any) -> int:
    weight = np.abs(linear.weight.astype(np.int64))
    match linear:
        case ConvMap():
            return int(weight.sum((1, 2, 3)).max())
        case DenseMap():
            return int(weight.sum(1).max())
        case _:
            return int(weight.max())


def random_case(seed: int) -> tuple[Program, np.ndarray, set[str]]:
    """(an aligned Program, whole-number input `[time, sample, *shape]`, what it makes use of)."""
    return _built(Sketch(np.random.default_rng(seed)))


def random_program(seed: int, *, cyclic: bool = False, hot: bool = False) -> Program:
    """A Program of 5 steps; `cyclic` adds two projections that go back, `hot` values that wrap."""
    sketch = Sketch(np.random.default_rng(seed), hot=hot)
    last = _wired(sketch, _shape(sketch))
    for _ in range(2 if cyclic else 0):
        sketch.recur()
    return replace(_timed(sketch, last), steps=5)


def random_input(program: Program, seed: int, steps: int = 5, batch: int = 3) -> np.ndarray:
    """Whole numbers in the input's range, `[steps, batch, *shape]`; some seeds hold in time."""
    rng, entry = np.random.default_rng(seed), program.input
    x = rng.integers(entry.lo, entry.hi + 1, (steps, batch, *entry.shape))
    x = np.where(rng.random(x.shape) < 0.3, x, 0)
    return np.broadcast_to(x[0], x.shape) if seed % 3 == 0 else x


@st.composite
def programs(draw: Any) -> Case:
    """Strategy: (an aligned Program, whole-number input `[time, sample, *shape]`)."""
    program, x, _ = _built(Sketch(Drawn(draw)))
    return program, x


def drawn(n: int, seed: int) -> list[tuple[str, Program, np.ndarray]]:
    """(name, Program, input) of exactly n Programs that hypothesis draws, no two of them alike.

    Hypothesis looks for variety by small changes, which often lead to a Program that was there
    before: it is asked again, with other seeds, until there are enough.
    """
    found: dict[str, tuple[str, Program, np.ndarray]] = {}
    for again in range(20):
        _draw(n - len(found), seed + again * 10**10, found)
        if len(found) >= n:
            return list(found.values())[:n]
    raise AssertionError(f"hypothesis drew {len(found)} different Programs, not {n}")


def _draw(n: int, seed: int, found: dict[str, Any]) -> None:
    @hypothesis.seed(seed)
    @settings(
        max_examples=max(n, 10),
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def collect(case: Case) -> None:
        name = f"drawn-{case[0].digest()[:12]}"
        found.setdefault(name, (name, *case))

    collect()


def _built(sketch: Sketch) -> tuple[Program, np.ndarray, set[str]]:
    shape = _shape(sketch)
    program = _timed(sketch, _wired(sketch, shape))
    x = sketch.rng.integers(
        program.input.lo,
        program.input.hi + 1,
        (sketch.whole(1, 7), sketch.whole(1, 3), *shape),
    )
    if sketch.chance(0.5):
        x = x * (sketch.rng.random(x.shape) < 0.4)
    return program, x, sketch.features


def _shape(sketch: Sketch) -> tuple[int, ...]:
    image = (sketch.whole(1, 4), sketch.whole(2, 7), sketch.whole(2, 7))
    return image if sketch.chance(0.7) else (sketch.whole(1, 12),)


def _wired(sketch: Sketch, shape: tuple[int, ...]) -> Population:
    """The last population of a network whose input has this shape."""
    last = sketch.layer(sketch.input(shape))
    for _ in range(sketch.whole(1, 3)):
        step = sketch.pick("layer", "block", "join", "join", "nested")
        if step == "layer":
            last = sketch.layer(last)
        elif step == "block":
            last = sketch.block(last)
        else:
            last = _joined(sketch, last, nested=step == "nested")
    return last


def _joined(sketch: Sketch, source: Population, nested: bool) -> Population:
    """A residual block around the source; nested: its body is a residual block again."""
    body = sketch.block(source)
    if nested:
        sketch.features.add("nested join")
        body = sketch.join(sketch.block(body), body)
    return sketch.join(body, source)


def _timed(sketch: Sketch, last: Population) -> Program:
    if sketch.chance(0.3):
        sketch.recur()
    if sketch.chance(0.2):
        sketch.delay()
    graded = last.cell is not None and last.cell.kind == "relay"
    kind = "current" if graded else sketch.pick("spikes", "spikes", "membrane")
    readout = Readout(population=last.name, kind=kind, reduce=sketch.pick("mean", "sum", "last"))
    program = Program(
        populations=sketch.populations, projections=sketch.projections, readout=readout
    )
    return align(program)
