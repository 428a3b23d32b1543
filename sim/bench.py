"""Benchmarks of the engines: equality first, then the sides in turn, as ratios in one run."""

from __future__ import annotations

import csv
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ranvier.deploy.program import Program
from ranvier.sim.bench_nets import NETS, net, random_spikes
from ranvier.train.errors import RangeError, RanvierError
from ranvier.train.files import atomic_write

RATES = (0.02, 0.05, 0.1, 0.2)
SIDES = ("dense", "events", "auto", "snntorch")
ROUNDS = 5
BATCH = {"mlp": 512}
LAVA_STEPS = 16
QUICK = ("mlp", "vgg9", "resnet20-vanilla")


@dataclass(frozen=True)
class Row:
    """One side of one benchmark.

    seconds         of one pass over the batch: the median of the rounds
    spread          (slowest - fastest) / median
    ratio_snntorch  how many times faster than the snntorch loop in the same rounds
    peak_mb         most memory that the process has held until then
    load            the machine's load average when the row was made: above its cores, others ran too
    """

    net: str
    rate: float
    side: str
    batch: int
    steps: int
    spikes: int
    synops: int
    seconds: float
    spread: float
    samples_per_s: float
    synops_per_s: float
    ms_per_sample_step: float
    ratio_snntorch: float
    equal: str
    peak_mb: float
    threads: int
    load: float
    commit: str
    machine: str
    versions: str


def run_suite(
    nets: Sequence[str] = tuple(NETS),
    rates: Sequence[float] = RATES,
    sides: Sequence[str] = SIDES,
    *,
    steps: int = 4,
    batch: int | None = None,
    rounds: int = ROUNDS,
    out: str | os.PathLike[str] | None = None,
    show: Callable[[Row], None] | None = None,
) -> list[Row]:
    """The rows of every net at every rate. Sides are engines and "snntorch".

    Every engine's spikes and counts are held against the others' first, and those of a small part
    against the reference's. `out` gets the rows as CSV, rewritten whole after each net.
    Raises RangeError for an unknown side, RanvierError where two sides differ.
    """
    unknown = [s for s in sides if s not in (*SIDES, "lava")]
    if unknown:
        raise RangeError(f"bench: side '{unknown[0]}' is none of {', '.join(SIDES)}, lava")
    rows: list[Row] = []
    for name in nets:
        for rate in rates:
            new = bench(name, rate, sides, steps, batch or BATCH.get(name, 16), rounds)
            rows += new
            for row in new:
                if show is not None:
                    show(row)
            if out is not None:
                write(rows, out)
    return rows


def bench(
    name: str, rate: float, sides: Sequence[str], steps: int, batch: int, rounds: int
) -> list[Row]:
    """The rows of one net at one rate."""
    program = net(name, rate, steps)
    x = random_spikes(program, rate, batch, seed=7)
    engines = [s for s in sides if s not in ("snntorch", "lava")]
    counts, equal = agreed(program, x, engines)
    calls = {s: side(s, program, x) for s in sides if s != "lava"}
    times = timed(calls, rounds)
    loop = times.get("snntorch")
    common = (batch, steps, counts.n_spikes, counts.n_synops)
    rows = []
    for s, seconds in times.items():
        middle = statistics.median(seconds)
        ratio = (
            statistics.median(a / b for a, b in zip(loop, seconds, strict=True)) if loop else 0.0
        )
        spread = (max(seconds) - min(seconds)) / middle
        shown = equal if s in engines else "float"
        rows.append(_row(name, rate, s, common, middle, spread, ratio, shown))
    if "lava" in sides:
        step = lava_step(program, x)
        rows.append(_row(name, rate, "lava", (1, 1, 0, 0), step, 0.0, 0.0, equal))
    return rows


def side(name: str, program: Program, x: np.ndarray) -> Callable[[], Any]:
    """A call that runs x once on a side."""
    if name == "snntorch":
        from ranvier.sim.bench_float import StepLoop

        loop = StepLoop(program)
        return lambda: loop(x)
    from ranvier.sim.runner import engines

    whole = program.encode(x)
    engine = engines()[name]
    return lambda: engine(program, whole, ())


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, taken by turns after a burn-in."""
    for call in calls.values():
        call()
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return found


def agreed(program: Program, x: np.ndarray, engines: Sequence[str]) -> tuple[Any, str]:
    """(the ledger, what was compared); raises RanvierError where two engines differ."""
    from ranvier.sim.runner import run

    states = ("spikes",)
    few = x[:, :1]
    if sum(p.map.weight.size for p in program.projections.values()) > 10**6:
        few = few[:2]
    want = run(program, few, "reference", states)
    ledger: Any = None
    for name in engines:
        got = run(program, few, name, states)
        for population in program.populations:
            one, two = (np.asarray(r.trace[population].spikes) for r in (want, got))
            if not np.array_equal(one, two):
                raise RanvierError(f"bench: {name} and the reference differ in '{population}'")
        if not got.ledger.same_counts(want.ledger):
            raise RanvierError(f"bench: {name} and the reference count differently")
        counts = run(program, x, name).ledger
        if ledger is not None and not counts.same_counts(ledger):
            raise RanvierError(f"bench: {name} counts differently from {engines[0]}")
        ledger = counts
    values = sum(p.size for p in program) * few.shape[0]
    ledger = ledger if ledger is not None else run(program, x, "dense").ledger
    return ledger, f"{values} spikes and all counts"


def lava_step(program: Program, x: np.ndarray) -> float:
    """Seconds a step of one sample in Lava: a long run less a short one, start-up left out."""
    from ranvier.deploy.align import align
    from ranvier.sim.runner import run

    aligned = align(program)
    series = np.tile(x[:, :1], (-(-LAVA_STEPS // len(x)), *[1] * (x.ndim - 1)))[:LAVA_STEPS]
    seconds = []
    for steps in (1, LAVA_STEPS):
        start = time.perf_counter()
        run(aligned, series[:steps], "lava")
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / (LAVA_STEPS - 1)


def _row(
    name: str, rate: float, side: str, common: Any, seconds: float, spread: float, ratio: float,
    equal: str,
) -> Row:  # fmt: skip
    batch, steps, spikes, synops = common
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Row(
        name, rate, side, batch, steps, spikes, synops, seconds, round(spread, 3), batch / seconds,
        synops / seconds, 1000 * seconds / (batch * steps), round(ratio, 2), equal, round(peak, 1),
        threads(), round(os.getloadavg()[0], 1), commit(), machine(), versions(),
    )  # fmt: skip


def threads() -> int:
    """Threads that torch and numba may use."""
    import numba
    import torch

    return min(torch.get_num_threads(), numba.get_num_threads())


def commit() -> str:
    """The commit of the source tree; empty outside one."""
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, check=True,
            capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> str:
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    return f"{model}, {os.cpu_count()} cores"


def versions() -> str:
    names = ("torch", "numba", "numpy", "snntorch")
    return " ".join([f"python {platform.python_version()}", *(f"{n} {version(n)}" for n in names)])


def write(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Writes rows as CSV, atomically."""
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(asdict(rows[0])))
        table.writeheader()
        table.writerows(asdict(row) for row in rows)


def line(row: Row) -> str:
    """A row for people."""
    return (
        f"{row.net:18} {row.rate:5.0%} {row.side:9} {row.ms_per_sample_step:9.4f} ms a sample-step "
        f"{row.samples_per_s:9.1f} samples/s {row.synops_per_s / 1e9:7.2f} Gsynops/s "
        f"{row.ratio_snntorch:6.2f}x snntorch  spread {row.spread:.0%}"
    )


def main(quick: bool = False, out: str | os.PathLike[str] | None = None) -> None:
    """Runs the suite and prints a line a row; `out` gets the CSV."""
    nets = QUICK if quick else tuple(NETS)
    rates = (0.02, 0.1) if quick else RATES
    run_suite(nets, rates, out=out, show=lambda row: print(line(row), flush=True))
