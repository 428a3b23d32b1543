"""The dense engine's convolutions against the machine's own matrix product, in turns.

Run by hand: python tests/bench_dense.py; a layer's line is its rate, from messages to sums, and the
share of the sgemm rate that was measured in the same rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from ranvier.deploy.cells import Cell
from ranvier.deploy.program import ConvMap, Population, Program, Projection, Readout
from ranvier.sim.dense import DenseBackend, exact_kernels

SIZE, ROUNDS = 1024, 9


def layer(channels: int, side: int, batch: int) -> tuple[Callable[[], object], float]:
    """A call that computes one layer's sums, and its operations (2 a multiply-accumulate)."""
    rng = np.random.default_rng(0)
    shape = (channels, side, side)
    weight = rng.integers(-127, 128, (channels, channels, 3, 3)).astype(np.int16)
    conv = ConvMap(weight=weight, in_shape=shape, out_shape=shape, padding=(1, 1))
    program = Program(
        populations={
            "in": Population(name="in", shape=shape),
            "out": Population(name="out", shape=shape, cell=Cell(vth=100)),
        },
        projections={"p": Projection(name="p", source="in", target="out", map=conv)},
        readout=Readout(population="out"),
    )
    backend = DenseBackend(program)
    keep.append(program)
    message = backend.load((rng.random((1, batch, channels * side * side)) < 0.1).astype(np.int32))
    incoming = [(backend.plan.wirings["p"], message)]
    return lambda: backend.arrive("out", incoming, batch), 2.0 * batch * side**2 * weight.size


keep: list[Program] = []  # a plan holds its program weakly


def main() -> None:
    a = torch.randn(SIZE, SIZE)
    cases = [layer(64, 32, 16), layer(128, 16, 32), layer(256, 8, 64), layer(512, 4, 128)]
    sides = [(lambda: a @ a, 2.0 * SIZE**3), *cases]
    rates: list[list[float]] = [[] for _ in sides]
    with exact_kernels():
        for n in range(ROUNDS + 2):
            for i, (call, operations) in enumerate(sides):
                start = time.perf_counter()
                call()
                if n > 1:
                    rates[i].append(operations / (time.perf_counter() - start) / 1e9)
    for name, row in zip(["sgemm", "64", "128", "256", "512"], rates, strict=True):
        share = statistics.median(x / y for x, y in zip(row, rates[0], strict=True))
        print(f"{name:6} {statistics.median(row):7.1f} GFLOP/s  {share:.2f} of sgemm")


if __name__ == "__main__":
    main()
