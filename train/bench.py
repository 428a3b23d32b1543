"""`ranvier bench --suite train`: forward and backward against the same network as a plain snntorch loop.

The plain side is the network with snntorch's own `Leaky` in place of every neuron, run step by step as
snntorch's tutorials do. Both sides take the same images and the same loss; before anything is timed, the
spikes of both are compared in eval mode. The two sides run in turn; a row is the median over the rounds.
"""

from __future__ import annotations

import copy
import csv
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranvier.train.devices import lay_out
from ranvier.train.errors import RanvierError
from ranvier.train.files import atomic_write
from ranvier.train.memory import keep_freed_memory

NET, JOIN = "resnet20", "sew"
STEPS = (4, 8, 16, 32)
BATCH = 16
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """One network at one number of steps. Times are measured; memory is the process's peak."""

    net: str
    join: str
    device: str
    threads: int
    torch: str
    steps: int
    batch: int
    images_per_s: float
    plain_images_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    peak_mib: float
    plain_peak_mib: float
    spikes_equal: bool


def plain(net: nn.Module) -> nn.Module:
    """A copy whose neurons are snntorch.Leaky, to be run one step at a time."""
    import snntorch

    from ranvier.train.neurons import LIF

    twin = copy.deepcopy(net)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LIF):
                leaky = snntorch.Leaky(
                    beta=child.beta.detach().clone(),
                    threshold=child.threshold.detach().clone(),
                    spike_grad=child.spike_grad,
                    init_hidden=True,
                    reset_mechanism=str(child.reset_mechanism),
                    reset_delay=False,
                )
                setattr(parent, name, leaky)
    return twin


def loop(net: Any, x: Tensor) -> Tensor:
    """The mean over `steps` of the network run one step at a time, `[B, classes]`."""
    net.reset()
    total = net.step(x)
    for _ in range(net.steps - 1):
        total = total + net.step(x)
    return total / net.steps


def train_step(run: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    loss = nn.functional.cross_entropy(run(x), y)
    loss.backward()


def make(name: str, join: str, steps: int, device: str) -> tuple[Any, Any]:
    """(ours, the plain twin), with equal weights; ours laid out as a training lays it out."""
    from ranvier.train.models import create_model

    torch.manual_seed(0)
    net = create_model(name, join=join, steps=steps).to(device)
    twin = plain(net).to(device)
    return lay_out(net), twin


def batch_of(n: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, 32, 32, generator=generator)
    return x.to(device), torch.arange(n).remainder(10).to(device)


def equal_outputs(net: Any, twin: Any, x: Tensor) -> bool:
    """Whether both give the same logits in eval mode: not one spike differs."""
    net.eval(), twin.eval()
    with torch.no_grad():
        same = torch.allclose(net(x), loop(twin, x), atol=1e-5)
    net.train(), twin.train()
    return bool(same)


def seconds(work: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_mib(
    name: str, join: str, steps: int, n: int, device: str, ours: bool, threads: int
) -> float:
    """Peak memory of one training step in a process of its own, over what it took before, MiB."""
    with get_context("spawn").Pool(1) as pool:
        return float(pool.apply(_peak, (name, join, steps, n, device, ours, threads)))


def _peak(name: str, join: str, steps: int, n: int, device: str, ours: bool, threads: int) -> float:
    torch.set_num_threads(threads)
    net, twin = make(name, join, steps, device)
    x, y = batch_of(n, device)
    run = net if ours else lambda x: loop(twin, x)
    train_step(run, x[:1], y[:1])  # kernels are compiled before anything is counted
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        train_step(run, x, y)
        return torch.cuda.max_memory_allocated() / 2**20
    before = _resident("VmRSS", clear_peak=True)
    train_step(run, x, y)
    return _resident("VmHWM") - before


def _resident(field: str, clear_peak: bool = False) -> float:
    """A memory figure of this process from Linux's /proc, in MiB."""
    if clear_peak:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
    )
    return int(line.split()[1]) / 1024


def measure(
    steps: int, *, name: str = NET, join: str = JOIN, n: int = BATCH, rounds: int = ROUNDS
) -> Row:
    """One row. Raises RanvierError where the two sides do not compute the same."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, twin = make(name, join, steps, device)
    x, y = batch_of(n, device)
    if not equal_outputs(net, twin, x):
        raise RanvierError(
            f"bench: {name} {join} at {steps} steps differs from the plain snntorch loop"
        )
    sides: dict[str, Callable[[], None]] = {
        "ours": lambda: train_step(net, x, y),
        "plain": lambda: train_step(lambda x: loop(twin, x), x, y),
    }
    for work in sides.values():
        work()  # burn in
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, work in sides.items():
            times[side].append(seconds(work, device))
    ratios = [b / a for a, b in zip(times["ours"], times["plain"], strict=True)]
    threads = torch.get_num_threads()
    return Row(
        net=name,
        join=join,
        device=device if device == "cpu" else torch.cuda.get_device_name(),
        threads=threads,
        torch=torch.__version__,
        steps=steps,
        batch=n,
        images_per_s=n / statistics.median(times["ours"]),
        plain_images_per_s=n / statistics.median(times["plain"]),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        peak_mib=peak_mib(name, join, steps, n, device, True, threads),
        plain_peak_mib=peak_mib(name, join, steps, n, device, False, threads),
        spikes_equal=True,
    )


def main(quick: bool = False, out: str | os.PathLike[str] | None = None) -> None:
    """Prints a line a row; `out` gets them as CSV."""
    keep_freed_memory()  # of both sides: they run in this process
    rows = []
    for steps in STEPS[:2] if quick else STEPS:
        row = measure(steps, rounds=3 if quick else ROUNDS)
        rows.append(row)
        print(
            f"{row.net} {row.join} T={row.steps:<3} batch {row.batch}  {row.images_per_s:7.1f} images/s, "
            f"plain loop {row.plain_images_per_s:7.1f}  ratio {row.ratio:.2f} "
            f"({row.ratio_low:.2f}..{row.ratio_high:.2f})  peak {row.peak_mib:.0f} MiB, plain "
            f"{row.plain_peak_mib:.0f}  (measured, {row.device}, {row.threads} threads)",
            flush=True,
        )
    if out is not None:
        with atomic_write(out) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
