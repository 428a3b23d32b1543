"""What an engine holds between layers, most at any time: packed as it is, and as a byte a spike.

Run by hand: python tests/bench_held.py
"""

from __future__ import annotations

import numpy as np

from ranvier.deploy.program import Program
from ranvier.sim import bench_nets, dense, events
from ranvier.sim.layers import Walk
from ranvier.sim.spikes import Spikes

STEPS = 4


def held(program: Program, module: object) -> tuple[float, float, int]:
    """(MiB as it is, MiB with a byte a spike, samples of a part)."""
    use = module.backend(program)  # type: ignore[attr-defined]
    size = use.part(STEPS)
    x = program.encode(bench_nets.random_spikes(program, 0.1, size))
    sizes: dict[str, tuple[int, int]] = {}
    most = [0, 0]
    order = list(program.populations)
    last = {n: use.plan.last_reader.get(n, n) for n in order}

    class Watched(Walk):
        def _keep(self, name: str, done: object) -> None:
            sent = done.sent  # type: ignore[attr-defined]
            n_bytes = sent.bits.nbytes if isinstance(sent, Spikes) else sent.nbytes
            sizes[name] = (
                n_bytes,
                int(np.prod(sent.shape)) if isinstance(sent, Spikes) else n_bytes,
            )
            live = [n for n in sizes if order.index(last[n]) >= order.index(name)]
            for k in range(2):
                most[k] = max(most[k], sum(sizes[n][k] for n in live))
            super()._keep(name, done)  # type: ignore[arg-type]

    with dense.exact_kernels():
        Watched(use, x, (), {}).run()
    return most[0] / 2**20, most[1] / 2**20, size


def main() -> None:
    print(
        "| net | engine | samples a part | MiB held | with a byte a spike |\n|---|---|---|---|---|"
    )
    for name in ("vgg16", *(f"resnet32-{j}" for j in ("vanilla", "sew", "or", "ms"))):
        program = bench_nets.NETS[name](STEPS, 0)
        for module in (dense, events):
            packed, plain, size = held(program, module)
            engine = module.__name__.rpartition(".")[2]
            print(f"| {name} | {engine} | {size} | {packed:.1f} | {plain:.1f} |")


if __name__ == "__main__":
    main()
