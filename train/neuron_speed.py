"""How fast the parallel neurons are beside the serial LIF, by number of steps.

`python -m ranvier.train.neuron_speed` prints the table: ratios of processor time to that of a LIF
run step by step under autograd, as snntorch runs one. Published, on GPUs: ParaLIF up to 200 times
faster than LIF; PSU 3 to 4 times on SHD.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
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
SERIAL = "lif, step by step"
# Published ratios to LIF, on GPUs. Sources: Yarga and Wood 2024; Li et al. 2024 (on SHD, T = 15).
PUBLISHED = {"paralif-sd, fft": "up to 200", "psu": "3 to 4 (SHD)"}


@dataclass(frozen=True)
class Timing:
    """Seconds of processor time for one batch, a value a round."""

    neuron: str
    steps: int
    forward_s: tuple[float, ...]
    training_s: tuple[float, ...]


def _clock(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def time_neurons(steps: int, values: int, repeats: int = 5) -> dict[str, Timing]:
    """Every neuron over x [steps, 8, values / 8], the serial LIF first; the neurons take turns.

    A round that does not count comes first.
    """
    x = torch.randn(steps, 8, values // 8, requires_grad=True)
    runs = {SERIAL: _run(LIF(0.5), x, "loop")}
    runs |= {name: _run(make(steps), x) for name, make in NEURONS.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, (forward, train) in runs.items():
            seconds[name].append((_clock(forward), _clock(train)))
    return {
        name: Timing(name, steps, *(tuple(s) for s in zip(*found[1:], strict=True)))
        for name, found in seconds.items()
    }


def _run(
    neuron: nn.Module, x: Tensor, backend: str | None = None
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(forward alone, forward and backward)."""
    neuron.multi_step = True  # type: ignore[assignment]

    def call() -> Tensor:
        with nullcontext() if backend is None else use_backend(backend):
            out: Tensor = neuron(x)
        return out

    def forward() -> None:
        with torch.no_grad():
            call()

    def train() -> None:
        call().sum().backward()

    return forward, train


def speedup(serial: Sequence[float], other: Sequence[float]) -> float:
    """How many times less time: the median over the rounds of their ratios."""
    return statistics.median(a / max(b, 1e-9) for a, b in zip(serial, other, strict=True))


def speed_table(
    steps: Iterable[int] = (4, 8, 16, 32, 64), values: int = 1 << 15, repeats: int = 5
) -> str:
    """Markdown: for each neuron and number of steps, times faster than the serial LIF.

    values  neurons x batch; each cell is "forward / forward and backward"
    """
    columns = list(steps)
    found = {n: time_neurons(n, values, repeats) for n in columns}
    lines = [
        "| neuron | " + " | ".join(f"T = {n}" for n in columns) + " | published |",
        "|---" * (len(columns) + 2) + "|",
    ]
    serial = [found[n][SERIAL] for n in columns]
    ms = [
        f"{1e3 * statistics.median(t.forward_s):.1f} / {1e3 * statistics.median(t.training_s):.1f} ms"
        for t in serial
    ]
    lines.append(f"| {SERIAL} | {' | '.join(ms)} | |")
    for name in NEURONS:
        cells = [
            f"{speedup(a.forward_s, b.forward_s):.1f} / {speedup(a.training_s, b.training_s):.1f}"
            for a, b in ((found[n][SERIAL], found[n][name]) for n in columns)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {PUBLISHED.get(name, '')} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m ranvier.train.neuron_speed`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ranvier.train.neuron_speed")
    parser.add_argument("--steps", default="4,8,16,32,64,128,256,512")
    parser.add_argument("--values", type=int, default=1 << 14, help="neurons x batch")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    steps = [int(n) for n in options.steps.split(",")]
    print(speed_table(steps, options.values, options.repeats), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
