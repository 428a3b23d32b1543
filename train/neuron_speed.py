"""How fast the parallel neurons are beside the serial LIF, by number of steps.

`python -m ranvier.train.neuron_speed` prints the table: ratios of processor time to that of a LIF
run step by step under autograd, as snntorch runs one. Published, on GPUs: ParaLIF up to 200 times
faster than LIF; PSU 3 to 4 times on SHD.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ranvier.train.neurons import LIF
from ranvier.train.neurons_paralif import ParaLIF
from ranvier.train.neurons_parallel import PSN, PSU, MaskedPSN, SlidingPSN
from ranvier.train.scan import use_backend

NEURONS: dict[str, Callable[[int], nn.Module]] = {
    "lif (fused scan)": lambda steps: LIF(0.5),
    "psn": PSN,
    "masked-psn, order 4": lambda steps: MaskedPSN(steps, 4),
    "sliding-psn, order 4": lambda steps: SlidingPSN(4),
    "psu": lambda steps: PSU(0.5),
    "paralif-sd, fft": lambda steps: ParaLIF("sd"),
    "paralif-sd, sequential": lambda steps: ParaLIF("sd", backend="sequential"),
}


@dataclass(frozen=True)
class Timing:
    """Seconds of processor time for one batch: the median of `repeats`."""

    neuron: str
    steps: int
    forward_s: float
    training_s: float


def _timed(run: Callable[[], object], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def measure(
    name: str, neuron: nn.Module, x: Tensor, repeats: int = 5, backend: str | None = None
) -> Timing:
    """Times the forward pass, and forward and backward, of `neuron` over x [T, B, N]."""
    neuron.multi_step = True  # type: ignore[assignment]

    def forward() -> Tensor:
        if backend is None:
            return neuron(x)
        with use_backend(backend):
            return neuron(x)

    def forward_quietly() -> None:
        with torch.no_grad():
            forward()

    def train() -> None:
        forward().sum().backward()

    return Timing(name, len(x), _timed(forward_quietly, repeats), _timed(train, repeats))


def speed_table(
    steps: Iterable[int] = (4, 8, 16, 32, 64), values: int = 1 << 15, repeats: int = 5
) -> str:
    """Markdown: for each neuron and number of steps, times faster than the serial LIF.

    values  neurons x batch; each cell is "forward / forward and backward"
    """
    columns = list(steps)
    serial: dict[int, Timing] = {}
    cells: dict[str, list[str]] = {name: [] for name in NEURONS}
    for n in columns:
        x = torch.randn(n, 8, values // 8, requires_grad=True)
        serial[n] = measure("lif", LIF(0.5), x, repeats, backend="loop")
        for name, make in NEURONS.items():
            t = measure(name, make(n), x, repeats)
            fast, trained = serial[n].forward_s / t.forward_s, serial[n].training_s / t.training_s
            cells[name].append(f"{fast:.1f} / {trained:.1f}")
    head = "| neuron | " + " | ".join(f"T = {n}" for n in columns) + " |"
    lines = [head, "|---" * (len(columns) + 1) + "|"]
    ms = " | ".join(
        f"{serial[n].forward_s * 1e3:.1f} / {serial[n].training_s * 1e3:.1f} ms" for n in columns
    )
    lines.append(f"| lif, step by step | {ms} |")
    lines += [f"| {name} | {' | '.join(row)} |" for name, row in cells.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(speed_table(), end="")
