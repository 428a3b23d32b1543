"""Peak memory and time of a whole CIFAR-10 test set through a ResNet of 32 weighted layers.

Run by hand: python tests/bench_memory.py [engine] [images] [join]; reads $RANVIER_DATA/cifar10.npz,
or takes noise in its place.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from ranvier.deploy.program import Population
from ranvier.sim import bench_nets
from ranvier.sim.stream import evaluate


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def images(n: int) -> tuple[np.ndarray, str]:
    """uint8 `[n, 3, 32, 32]`, and where they come from."""
    path = Path(os.environ.get("RANVIER_DATA", "")) / "cifar10.npz"
    if path.is_file():
        with np.load(path) as file:
            x = file["x_test"][:n]
            return (x if x.shape[1] == 3 else x.transpose(0, 3, 1, 2)), "cifar10"
    return np.random.default_rng(0).integers(0, 256, (n, 3, 32, 32), np.uint8), "noise"


class Pixels:
    """Batches of pixels as levels, read as they are needed."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, index: slice) -> tuple[np.ndarray, np.ndarray]:
        part = self.x[index]
        return part.astype(np.float32), np.zeros(len(part), np.int64)


def main(engine: str = "auto", n: int = 10_000, join: str = "vanilla") -> None:
    pixels, what = images(n)
    program = bench_nets.resnet(5, join, 4, 0)
    entry = Population(name="input", shape=(3, 32, 32), lo=0, hi=255)
    program = replace(program, populations={**program.populations, "input": entry})
    sample = np.broadcast_to(pixels[:4].astype(np.float32), (4, 4, 3, 32, 32))
    program = bench_nets.calibrated(program, 0.1, sample)
    print(f"{what}: {n} images, before the run {peak_mib():.0f} MiB", flush=True)
    start, curve = time.perf_counter(), []

    def note(done: int, total: int) -> None:
        if done * 10 // total > len(curve):
            curve.append(peak_mib())
            seconds = time.perf_counter() - start
            print(f"{done:6} images  {seconds:7.1f} s  peak {curve[-1]:.0f} MiB", flush=True)

    found = evaluate(program, Pixels(pixels), engine=engine, batch_size=100, on_batch=note)
    seconds = time.perf_counter() - start
    print(
        f"resnet32-{join} {engine}: {found.n / seconds:.1f} images/s, "
        f"{1000 * seconds / found.n / 4:.3f} ms a sample-step, peak {peak_mib():.0f} MiB, "
        f"{found.ledger.n_synops / found.n:.3e} synops and {found.ledger.spikes_per_neuron:.3f} "
        "spikes a neuron per image"
    )


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(*arguments[:1], *(int(a) for a in arguments[1:2]), *arguments[2:3])
