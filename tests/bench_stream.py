"""Memory and speed of a million samples of the MLP streamed through `evaluate`.

Run by hand: python tests/bench_stream.py [engine] [samples]
"""

from __future__ import annotations

import sys
import time

import numpy as np
import psutil

from ranvier.sim import bench_nets
from ranvier.sim.stream import evaluate

BATCH = 5000


class Endless:
    """As many samples as wanted, made from one batch that is rolled along."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.x = (np.random.default_rng(0).random((4, BATCH, 784)) < 0.05).astype(np.uint8)

    def __len__(self) -> int:
        return self.n

    def batch(self, index: slice) -> tuple[np.ndarray, np.ndarray]:
        size = len(range(self.n)[index])
        rolled = np.roll(self.x, index.start // BATCH, axis=2)[:, :size]
        return rolled, np.zeros(size, np.int64)


def main(engine: str = "auto", n: int = 1_000_000) -> None:
    program = bench_nets.net("mlp", 0.05)
    process, start, shown = psutil.Process(), time.perf_counter(), [0]

    def note(done: int, total: int) -> None:
        if done * 10 // total >= shown[0]:
            shown[0] += 1
            mib = process.memory_info().rss / 2**20
            print(
                f"{done:9} samples  {time.perf_counter() - start:7.1f} s  {mib:.0f} MiB", flush=True
            )

    found = evaluate(
        program, Endless(n), engine=engine, batch_size=BATCH, keep_outputs=False, on_batch=note
    )
    seconds = time.perf_counter() - start
    print(f"mlp {engine}: {found.n / seconds:.0f} samples/s, {found.ledger.n_synops:.3e} synops")


if __name__ == "__main__":
    main(*sys.argv[1:2], *(int(a) for a in sys.argv[2:3]))
