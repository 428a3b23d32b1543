"""Integer networks for benchmarks: layer lists, with thresholds that set the firing rates.

Weights are random; thresholds are chosen population by population on a random input, so that each
fires at the wanted rate. No training and no compiler: what is measured is the engines.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ranvier.deploy.cells import VTH_MAX, Cell
from ranvier.deploy.program import (
    ConvMap,
    DenseMap,
    LinearMap,
    OneToOne,
    Population,
    Program,
    Projection,
    Readout,
)
from ranvier.train.errors import RangeError

CIFAR = (3, 32, 32)
VGG = {
    "vgg9": (64, 64, "M", 128, 128, "M", 256, 256, "M"),
    "vgg16": (
        64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M",
    ),
}  # fmt: skip
DECAY = 819  # of the membrane, a fifth a step


@dataclass
class Builder:
    """Collects populations and projections in order."""

    rng: np.random.Generator
    populations: dict[str, Population]
    projections: dict[str, Projection]

    @staticmethod
    def of(shape: tuple[int, ...], seed: int, hi: int = 1) -> Builder:
        entry = Population(name="input", shape=shape, hi=hi)
        return Builder(np.random.default_rng(seed), {"input": entry}, {})

    def neurons(
        self, name: str, sources: list[tuple[str, LinearMap]], cell: Cell | None = None
    ) -> str:
        """A population fed by maps from sources; the last of a name counts."""
        shape = sources[0][1].out_shape
        cell = cell or Cell(dv=DECAY, vth=1)
        lo, hi = (-(2**17), 2**17) if cell.graded else (0, 1)
        self.populations[name] = Population(name=name, shape=shape, cell=cell, lo=lo, hi=hi)
        for source, linear in sources:
            key = f"{source}->{name}"
            self.projections[key] = Projection(name=key, source=source, target=name, map=linear)
        return name

    def weights(self, *shape: int) -> np.ndarray:
        w = np.rint(self.rng.normal(0, 32, shape)).clip(-127, 127)
        return (2 * w).astype(np.int16)

    def conv(self, source: str, c_out: int, k: int = 3, stride: int = 1) -> tuple[str, LinearMap]:
        c, h, w = self.populations[source].shape
        out = (c_out, -(-h // stride), -(-w // stride))
        weight = self.weights(c_out, c, k, k)
        return source, ConvMap(
            weight=weight, in_shape=(c, h, w), out_shape=out, stride=(stride, stride),
            padding=(k // 2, k // 2),
        )  # fmt: skip

    def pool(self, source: str) -> str:
        """The maximum of 2x2 spikes: a population that fires where any of four did."""
        c, h, w = self.populations[source].shape
        linear = ConvMap(
            weight=np.full((c, 1, 2, 2), 2, np.int16), in_shape=(c, h, w),
            out_shape=(c, h // 2, w // 2), stride=(2, 2), groups=c,
        )  # fmt: skip
        return self.neurons(f"{source}.pool", [(source, linear)], Cell(dv=4096, vth=1))

    def dense(self, source: str, n_out: int) -> tuple[str, LinearMap]:
        return source, DenseMap(weight=self.weights(n_out, self.populations[source].size))

    def same(self, source: str, weight: int = 2) -> tuple[str, LinearMap]:
        shape = self.populations[source].shape
        return source, OneToOne(weight=np.full((), weight, np.int16), shape=shape)

    def program(self, steps: int) -> Program:
        last = list(self.populations)[-1]
        readout = Readout(population=last)
        return Program(
            populations=self.populations, projections=self.projections, readout=readout, steps=steps
        )


def vgg(name: str, steps: int, seed: int) -> Program:
    b = Builder.of(CIFAR, seed)
    at = "input"
    for i, width in enumerate(VGG[name]):
        at = b.pool(at) if width == "M" else b.neurons(f"conv{i}", [b.conv(at, int(width))])
    if name == "vgg16":
        at = b.neurons("fc1", [b.dense(at, 128)])
    b.neurons("out", [b.dense(at, 10)])
    return b.program(steps)


def mlp(steps: int, seed: int) -> Program:
    b = Builder.of((784,), seed)
    at = b.neurons("fc1", [b.dense("input", 512)])
    at = b.neurons("fc2", [b.dense(at, 256)])
    b.neurons("out", [b.dense(at, 10)])
    return b.program(steps)


def resnet(
    n: int, join: str, steps: int, seed: int, widths: tuple[int, ...] = (16, 32, 64)
) -> Program:
    """CIFAR ResNet, n blocks a stage; shortcuts that change shape are 1x1 convolutions.

    join  vanilla: the shortcut's spikes enter the block's last neurons; sew: sums of spikes, each
          source projecting separately; or: a population of logic neurons; ms: currents, which a
          graded relay carries
    """
    b = Builder.of(CIFAR, seed)
    block = {"vanilla": _vanilla, "sew": _sew, "or": _or, "ms": _ms}[join]
    carried = [_stem(b, join, widths[0])]
    for i, (width, stride) in enumerate(
        (w, 2 if stage and not k else 1) for stage, w in enumerate(widths) for k in range(n)
    ):
        carried = block(b, f"block{i}", carried, width, stride)
    if join == "ms":
        carried = [b.neurons("tail", [b.same(carried[0], 64)])]
    b.neurons("out", [b.dense(source, 10) for source in carried])
    return b.program(steps)


def _stem(b: Builder, join: str, width: int) -> str:
    relay = Cell(kind="relay") if join == "ms" else None
    return b.neurons("stem", [b.conv("input", width)], relay)


def _shortcut(b: Builder, source: str, width: int, stride: int) -> tuple[str, LinearMap]:
    changed = stride > 1 or b.populations[source].shape[0] != width
    return b.conv(source, width, 1, stride) if changed else b.same(source, 128)


def _vanilla(b: Builder, name: str, carried: list[str], width: int, stride: int) -> list[str]:
    (at,) = carried
    mid = b.neurons(f"{name}.a", [b.conv(at, width, 3, stride)])
    return [b.neurons(f"{name}.b", [b.conv(mid, width), _shortcut(b, at, width, stride)])]


def _sew(b: Builder, name: str, carried: list[str], width: int, stride: int) -> list[str]:
    maps = [b.conv(at, width, 3, stride) for at in carried]
    shared = maps[0][1]
    mid = b.neurons(f"{name}.a", [(at, shared) for at, _ in maps])
    new = b.neurons(f"{name}.b", [b.conv(mid, width)])
    if stride == 1:
        return [*carried, new]
    short = b.conv(carried[0], width, 1, stride)[1]
    return [b.neurons(f"{name}.s", [(at, short) for at in carried]), new]


def _or(b: Builder, name: str, carried: list[str], width: int, stride: int) -> list[str]:
    (at,) = carried
    mid = b.neurons(f"{name}.a", [b.conv(at, width, 3, stride)])
    new = b.neurons(f"{name}.b", [b.conv(mid, width)])
    if stride > 1:
        at = b.neurons(f"{name}.s", [_shortcut(b, at, width, stride)])
    return [b.neurons(f"{name}.or", [b.same(new), b.same(at)], Cell(dv=4096, vth=1))]


def _ms(b: Builder, name: str, carried: list[str], width: int, stride: int) -> list[str]:
    (at,) = carried
    fire = b.neurons(f"{name}.a", [b.same(at, 64)])
    mid = b.neurons(f"{name}.b", [b.conv(fire, width, 3, stride)])
    short = b.conv(fire, width, 1, stride) if stride > 1 else b.same(at, 1)
    return [b.neurons(f"{name}.sum", [b.conv(mid, width), short], Cell(kind="relay"))]


NETS: dict[str, Callable[[int, int], Program]] = {
    "mlp": mlp,
    "vgg9": lambda steps, seed: vgg("vgg9", steps, seed),
    "vgg16": lambda steps, seed: vgg("vgg16", steps, seed),
    **{
        f"resnet{6 * n + 2}-{join}": functools.partial(resnet, n, join)
        for n in (3, 5)
        for join in ("vanilla", "sew", "or", "ms")
    },
    "resnet18-vanilla": functools.partial(resnet, 2, "vanilla", widths=(64, 128, 256, 512)),
}


def random_spikes(program: Program, rate: float, batch: int, seed: int = 0) -> np.ndarray:
    """`[steps, batch, *shape]` float32: spikes at a rate."""
    rng = np.random.default_rng(seed)
    steps = program.steps or 1
    return (rng.random((steps, batch, *program.input.shape)) < rate).astype(np.float32)


def net(name: str, rate: float, steps: int = 4, seed: int = 0) -> Program:
    """A benchmark network whose populations fire at about `rate`.

    Raises RangeError for an unknown name.
    """
    if name not in NETS:
        raise RangeError(f"bench: net '{name}' is none of {', '.join(NETS)}")
    program = NETS[name](steps, seed)
    return calibrated(program, rate, random_spikes(program, rate, 4, seed + 1))


def calibrated(program: Program, rate: float, x: np.ndarray) -> Program:
    """The program with thresholds at which each population fires at `rate` for x.

    Populations of logic (no memory, threshold 1) stay; the search is a bisection on the engine.
    """
    from ranvier.sim.dense import DenseBackend, exact_kernels
    from ranvier.sim.layout import inner

    whole = program.encode(x)
    use = DenseBackend(program)
    flat = whole.reshape(*whole.shape[:2], -1)
    sent: dict[str, Any] = {}
    cells: dict[str, Cell] = {}
    with exact_kernels():
        for p in program:
            if p.is_input:
                sent[p.name] = use.load(inner(flat, use.plan.frames[p.name]))
                continue
            incoming = [(use.plan.wirings[q.name], sent[q.source]) for q in use.plan.into[p.name]]
            sent[p.name], cells[p.name] = _tuned(use, p, incoming, whole.shape[:2], rate)
    populations = {
        n: p if p.is_input else replace(p, cell=cells[n]) for n, p in program.populations.items()
    }
    return replace(program, populations=populations)


def _tuned(use: Any, p: Population, incoming: Any, size: Any, rate: float) -> tuple[Any, Cell]:
    assert p.cell is not None
    steps, batch = size
    cell = p.cell
    if cell.graded or cell.dv is not DECAY:
        return use.drive(p.name, incoming, steps, batch, None, False).sent, cell
    total = use.arrive(p.name, incoming, batch)
    low, high = 1, VTH_MAX
    while low < high:
        middle = (low + high) // 2
        sent = _fire(use, p, total, steps, middle)
        if float(use.numpy(sent).mean()) > rate:
            low = middle + 1
        else:
            high = middle
    cell = replace(cell, vth=low)
    return _fire(use, p, total, steps, low), cell


def _fire(use: Any, p: Population, total: Any, steps: int, vth: int) -> Any:
    from ranvier.sim.dense import scan_cpu
    from ranvier.sim.plan import plan_cell

    assert p.cell is not None
    wide = use.plan.cells[p.name].wide
    use.plan.cells[p.name] = plan_cell(replace(p.cell, vth=vth), p, use.plan.frames[p.name], wide)
    return scan_cpu(use.plan, p.name, total.numpy(), steps, None, False).sent
