"""Benchmarks of the engines: equality first, then the sides in turn, as ratios in one run."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ranvier.deploy.program import Program
from ranvier.sim.bench_nets import NETS, net, random_spikes
from ranvier.sim.race import TURNS
from ranvier.train.errors import RangeError, RanvierError
from ranvier.train.files import atomic_write

RATES = (0.02, 0.05, 0.1, 0.2)
SIDES = ("dense", "events", "auto", "snntorch")
EXTRA = ("reference", "spikingjelly", "lava")  # sides to ask for by name
ROUNDS = 5
MOST_ROUNDS = 101
ENOUGH_S = 6.0  # quick nets are run in more rounds, until all sides together took so long
SLOW_ROUNDS = 2  # of the reference
DECIDING = 1 + 3 * TURNS  # runs in which auto tries its ways, which it does once: not timed
BATCH = {"mlp": 512}
LAVA_STEPS = 16
LAVA_STEPS_LARGE = 1  # of networks with more weights than LARGE: ten seconds a step
LAVA_LIMIT_S = 3600.0
LARGE = 10**7
QUICK = ("mlp", "vgg9", "resnet20-vanilla")


@dataclass(frozen=True)
class Row:
    """One side of one benchmark.

    rate            of the random input and of every population; of a trained net, what it measured
    seconds         of one pass over the batch: the median of the rounds
    cpu_seconds     processor time of one pass, over all threads: the least of the rounds
    spread          (slowest - fastest) / median
    ratio_snntorch  how many times faster than the snntorch loop in the same rounds, a sample
    ratio_cpu       the same in processor time, which a loaded machine distorts less
    ratio_better    of auto: how many times faster than the quicker of dense and events, in the same
                    rounds; 0 elsewhere
    better_cpu      the same in processor time
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
    cpu_seconds: float
    spread: float
    samples_per_s: float
    synops_per_s: float
    ms_per_sample_step: float
    ratio_snntorch: float
    ratio_cpu: float
    ratio_better: float
    better_cpu: float
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
    spikingjelly: str | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[Row]:
    """The rows of every net at every rate; trained nets have their own rate. Sides are engines,
    "snntorch", "spikingjelly" and "lava".

    Every engine's spikes and counts are held against the others' first, and those of a small part
    against the reference's; of the float loops, every layer's spikes given the same messages. `out`
    gets the rows as CSV, rewritten whole after each net.
    spikingjelly  the Python of an environment that has ranvier and SpikingJelly
    Raises RangeError for an unknown side, RanvierError where two sides differ.
    """
    unknown = [s for s in sides if s not in (*SIDES, *EXTRA)]
    if unknown:
        raise RangeError(f"bench: side '{unknown[0]}' is none of {', '.join((*SIDES, *EXTRA))}")
    if "spikingjelly" in sides and spikingjelly is None:
        raise RangeError(
            "bench: spikingjelly runs apart; name the Python of an environment that has it"
        )
    rows: list[Row] = []
    for name in nets:
        for rate in (math.nan,) if is_trained(name) else rates:
            program, x = case(name, rate, steps, batch or BATCH.get(name, 16))
            new = bench(name, rate, program, x, sides, rounds, spikingjelly)
            rows += new
            for row in new:
                if show is not None:
                    show(row)
            if out is not None:
                write(rows, out)
            tick()
    return rows


def case(name: str, rate: float, steps: int, batch: int) -> tuple[Program, np.ndarray]:
    """(program, x `[steps, batch, *shape]`) of one benchmark."""
    if is_trained(name):
        from ranvier.sim.bench_trained import trained

        return trained(name, batch)
    program = net(name, rate, steps)
    return program, random_spikes(program, rate, batch, seed=7)


def is_trained(name: str) -> bool:
    return name not in NETS and name.rpartition("-")[2] in ("digits", "mnist")


def bench(
    name: str, rate: float, program: Program, x: np.ndarray, sides: Sequence[str], rounds: int,
    spikingjelly: str | None = None,
) -> list[Row]:  # fmt: skip
    """The rows of one net on one input."""
    steps, batch = x.shape[:2]
    fast = [s for s in sides if s not in ("snntorch", *EXTRA)]
    counts, equal = agreed(program, x, fast)
    rate = counts.spikes_per_neuron / steps if math.isnan(rate) else rate
    calls = {s: side(s, program, x) for s in sides if s in SIDES}
    compared = dict.fromkeys(fast, equal)
    with contextlib.ExitStack() as held:
        if "snntorch" in sides:
            from ranvier.sim.bench_float import StepLoop, agreement

            compared["snntorch"] = agreement(StepLoop(program), program, program.encode(x))
        if "spikingjelly" in sides:
            from ranvier.sim.bench_jelly import Apart

            apart = held.enter_context(Apart(str(spikingjelly), program, x))
            calls["spikingjelly"], compared["spikingjelly"] = apart, apart.equal
        for _ in range(DECIDING if "auto" in calls else 0):
            calls["auto"]()
        times = timed(calls, rounds, enough_s=ENOUGH_S)
    common = (batch, steps, counts.n_spikes, counts.n_synops)
    loop = times.get("snntorch")
    rows = [_row(name, rate, s, common, t, loop, compared[s]) for s, t in times.items()]
    wall, cpu = against_better(times)
    rows = [replace(r, ratio_better=wall, better_cpu=cpu) if r.side == "auto" else r for r in rows]
    if "reference" in sides:
        one = run_counts(program, x[:, :1])
        found = timed({"reference": side("reference", program, x[:, :1])}, SLOW_ROUNDS, 0)
        few = (1, steps, one.n_spikes, one.n_synops)
        per = None if loop is None else [(w / batch, c / batch) for w, c in loop]
        rows.append(_row(name, rate, "reference", few, found["reference"], per, "itself"))
    if "lava" in sides:
        rows.append(_row(name, rate, "lava", (1, 1, 0, 0), [lava_step(program, x)], None, equal))
    return rows


def run_counts(program: Program, x: np.ndarray) -> Any:
    from ranvier.sim.runner import run

    return run(program, x, "dense").ledger


def side(name: str, program: Program, x: np.ndarray) -> Callable[[], Any]:
    """A call that runs x once on a side."""
    whole = program.encode(x)
    if name == "snntorch":
        from ranvier.sim.bench_float import StepLoop

        loop = StepLoop(program)
        return lambda: loop(whole)
    from ranvier.sim.runner import engines

    engine = engines()[name]
    return lambda: engine(program, whole, ())


Times: TypeAlias = "list[tuple[float, float]]"


def timed(
    calls: dict[str, Callable[[], Any]], rounds: int, burn_in: int = 2, enough_s: float = 0.0
) -> dict[str, Times]:
    """(seconds, processor seconds) of each call, taken by turns after a burn-in.

    Each round has an order of its own, since what ran before leaves its weights in the caches.
    There are at least so many rounds, and more while they took less than `enough_s` together. A
    call that ran elsewhere returns its own processor seconds as a float.
    """
    for call in calls.values():
        for _ in range(burn_in):
            call()
    found: dict[str, Times] = {name: [] for name in calls}
    shuffle = random.Random(0).shuffle
    begun = time.perf_counter()
    for n in range(max(rounds, MOST_ROUNDS)):
        if n >= rounds and time.perf_counter() - begun > enough_s:
            break
        order = list(calls)
        shuffle(order)
        for name in order:
            start, cpu = time.perf_counter(), time.process_time()
            elsewhere = calls[name]()
            spent = time.process_time() - cpu
            spent = elsewhere if isinstance(elsewhere, float) else spent
            found[name].append((time.perf_counter() - start, spent))
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


def lava_step(program: Program, x: np.ndarray) -> tuple[float, float]:
    """(seconds, processor seconds) a step of one sample in Lava: the slope of one run.

    What is before the first step and after the last, starting above all, is left out. Processor
    seconds are those of all of Lava's processes.
    Raises RanvierError where the run is too quick to be watched.
    """
    from ranvier.deploy.align import align
    from ranvier.sim.lava_engine import run_on_lava

    aligned = align(program)
    large = sum(p.map.weight.size for p in program.projections.values()) > LARGE
    n = LAVA_STEPS_LARGE if large else LAVA_STEPS
    series = np.tile(x[:, :1], (-(-n // len(x)), *[1] * (x.ndim - 1)))[:n]
    seen: dict[int, tuple[float, float]] = {}

    def watch(done: int, total: int) -> None:
        if 0 < done < total and done not in seen:
            seen[done] = (time.perf_counter(), _children())

    run_on_lava(aligned, aligned.encode(series), timeout_s=LAVA_LIMIT_S, progress=watch)
    if len(seen) < 2:
        raise RanvierError("bench: Lava took its steps faster than they are looked at")
    first, last = min(seen), max(seen)
    wall, cpu = ((b - a) / (last - first) for a, b in zip(seen[first], seen[last], strict=True))
    return wall, cpu


def _children() -> float:
    """Processor seconds of the processes that were started here and run."""
    import psutil

    used = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            used += times.user + times.system
    return used


def _row(
    name: str, rate: float, side: str, common: Any, times: Times, loop: Times | None, equal: str
) -> Row:
    batch, steps, spikes, synops = common
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    walls = [w for w, _ in times]
    seconds, cpu = statistics.median(walls), min(c for _, c in times)
    spread = (max(walls) - min(walls)) / seconds
    ratio, ratio_cpu = _ratios(loop, times)
    return Row(
        name, round(rate, 4), side, batch, steps, spikes, synops, seconds, cpu, round(spread, 3),
        batch / seconds, synops / seconds, 1000 * seconds / (batch * steps), ratio, ratio_cpu, 0.0, 0.0,
        equal, round(peak, 1), threads(), round(os.getloadavg()[0], 1), commit(), machine(), versions(),
    )  # fmt: skip


def _ratios(loop: Times | None, times: Times) -> tuple[float, float]:
    """How many times faster than `loop`: the median over rounds, and in least processor time."""
    if not loop:
        return 0.0, 0.0
    wall = statistics.median(a[0] / b[0] for a, b in zip(loop, times, strict=False))
    cpu = min(c for _, c in loop) / max(1e-9, min(c for _, c in times))
    return round(wall, 2), round(cpu, 2)


def against_better(times: dict[str, Times]) -> tuple[float, float]:
    """ratio_better and better_cpu of a Row: medians over the rounds."""
    if not {"dense", "events", "auto"} <= set(times):
        return 0.0, 0.0

    def ratio(k: int) -> float:
        side = {s: [t[k] for t in times[s]] for s in ("dense", "events", "auto")}
        quick = min(("dense", "events"), key=lambda s: statistics.median(side[s]))
        pairs = zip(side[quick], side["auto"], strict=True)
        return round(statistics.median(a / max(1e-9, b) for a, b in pairs), 3)

    return ratio(0), ratio(1)


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
    """A row for people; no ratio to snntorch where its loop was not run."""
    against = f"{row.ratio_snntorch:6.2f}x snntorch ({row.ratio_cpu:.2f}x in CPU time)  "
    better = f"{row.ratio_better:.2f}x the better side  " if row.ratio_better else ""
    return (
        f"{row.net:22} {row.rate:5.1%} {row.side:12} {row.ms_per_sample_step:9.4f} ms a sample-step "
        f"{row.samples_per_s:9.1f} samples/s {row.synops_per_s / 1e9:7.2f} Gsynops/s "
        f"{against if row.ratio_snntorch else ''}{better}spread {row.spread:.0%}"
    )


def main(
    quick: bool = False, out: str | os.PathLike[str] | None = None, *,
    nets: Sequence[str] = (), rates: Sequence[float] = (), sides: Sequence[str] = (),
    rounds: int = ROUNDS, spikingjelly: str | None = None, as_json: bool = False,
) -> None:  # fmt: skip
    """Runs the suite and prints a line a row, or all as JSON; `out` gets the CSV."""
    from ranvier.sim.bench_trained import stored
    from ranvier.sim.stream import shown

    nets = nets or (QUICK if quick else (*NETS, *stored()))
    rates = rates or ((0.02, 0.1) if quick else RATES)
    sides = sides or SIDES
    if spikingjelly is not None and "spikingjelly" not in sides:
        sides = (*sides, "spikingjelly")
    total = sum(1 if is_trained(n) else len(rates) for n in nets)

    def show(row: Row) -> None:
        if not as_json:
            print(line(row), flush=True)

    with shown(True, total, 0, "bench") as tick:
        rows = run_suite(
            nets, rates, sides, rounds=rounds, out=out, show=show, spikingjelly=spikingjelly,
            tick=tick,
        )  # fmt: skip
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
