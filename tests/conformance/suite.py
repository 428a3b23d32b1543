"""Holds every engine against the reference on random Programs, and keeps what fails, made small."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ranvier.deploy.lava_compat import available
from ranvier.deploy.program import Program, Readout
from ranvier.sim.difference import first_difference, n_different
from ranvier.sim.lava_engine import run_all_on_lava
from ranvier.sim.reference import run_chip_time, run_reference
from ranvier.sim.runner import Result, engines
from ranvier.train.errors import LavaError

KEPT = Path(__file__).with_name("kept")
WORKER = Path(__file__).with_name("worker.py")
ALL = ("spikes", "u", "v")
CHUNK = 20  # networks for one start of Lava
LIMIT_S = 3600  # for so many, Lava's own limits included
Job = tuple[str, Program, np.ndarray]


@dataclass
class Tally:
    """What was compared with the reference: per engine nets, values, mismatches and crashes."""

    nets: Counter[str] = field(default_factory=Counter)
    values: Counter[str] = field(default_factory=Counter)
    mismatches: Counter[str] = field(default_factory=Counter)
    crashes: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def add(self, engine: str, values: int, mismatches: int, note: str = "") -> None:
        self.nets[engine] += 1
        self.values[engine] += values
        self.mismatches[engine] += mismatches
        self.notes += [note] if note else []

    def crash(self, engine: str, note: str) -> None:
        """A run that gave nothing to compare: an error of Lava, or the end of its process."""
        self.crashes[engine] += 1
        self.notes.append(note)

    @property
    def failures(self) -> int:
        return sum(self.mismatches.values()) + sum(self.crashes.values())

    def __iadd__(self, other: Tally) -> Tally:
        for mine, theirs in zip(self._counters(), other._counters(), strict=True):
            mine.update(theirs)
        self.notes += other.notes
        return self

    def _counters(self) -> tuple[Counter[str], ...]:
        return self.nets, self.values, self.mismatches, self.crashes

    def to_data(self) -> list[Any]:
        return [*map(dict, self._counters()), self.notes]

    @staticmethod
    def from_data(data: list[Any]) -> Tally:
        *counts, notes = data
        return Tally(*map(Counter, counts), notes)

    def __str__(self) -> str:
        rows = [
            f"{e:10} {self.nets[e]:6} nets {self.values[e]:12,} values "
            f"{self.mismatches[e]:6} mismatches {self.crashes[e]:4} crashes"
            for e in {**self.nets, **self.crashes}
        ]
        return "\n".join(rows + self.notes)


def engine_names() -> list[str]:
    """The engines that are held against the reference one Program at a time."""
    return [name for name in engines() if name not in ("reference", "lava")]


def check(
    jobs: Iterable[Job], lava: bool = True, now: Callable[[str, str], None] = lambda *_: None
) -> Tally:
    """Chip time, every fast engine and, where it is here, Lava against the reference.

    now  told the job and the engine before each run
    """
    tally, waiting = Tally(), []
    for name, program, x in jobs:
        now(name, "reference")
        expected = engines()["reference"](program, x, ALL)
        _chip_time(tally, name, program, x)
        for engine in engine_names():
            now(name, engine)
            _compare(tally, name, engine, engines()[engine](program, x, ALL), expected)
        waiting.append((name, program, x, expected))
        if len(waiting) == CHUNK:
            now(name, "lava")
            _lava(tally, waiting, lava)
            waiting = []
    _lava(tally, waiting, lava)
    return tally


def check_apart(jobs: Sequence[Job], lava: bool = True, worker: Path = WORKER) -> Tally:
    """`check` in processes of their own, so that one that crashes is counted and the rest is run.

    An engine is compiled code in this very process: where it ends by a signal, nothing else would
    be left of a long run.
    """
    tally = Tally()
    for start in range(0, len(jobs), CHUNK):
        rest = list(jobs[start : start + CHUNK])
        while rest:
            part, crashed = _apart(rest, lava, worker)
            tally += part
            rest = [job for job in rest if job[0] != crashed] if crashed else []
    return tally


def _apart(jobs: Sequence[Job], lava: bool, worker: Path) -> tuple[Tally, str | None]:
    """The tally of one process; where it crashed, one with that alone, and the job it was at."""
    with tempfile.TemporaryDirectory(prefix="conformance") as name:
        folder = Path(name)
        write_jobs(folder, jobs)
        end, output = _run([sys.executable, str(worker), name, "lava" if lava else "fast"])
        if (folder / "tally.json").exists():
            return Tally.from_data(json.loads((folder / "tally.json").read_text())), None
        if not (folder / "now").exists():
            raise RuntimeError(f"{worker} did not begin ({end}):\n{output}")
        job, engine = (folder / "now").read_text().split("\n")
    tally = Tally()
    tally.crash(engine, f"{job}: {engine} {end}\n" + "\n".join(output.splitlines()[:25]))
    return tally, job


def _run(command: Sequence[str]) -> tuple[str, str]:
    """How a process ended, in words, and what it wrote."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, timeout=LIMIT_S, errors="replace", **options)
    except subprocess.TimeoutExpired:
        return f"did not end within {LIMIT_S} s", ""
    code = done.returncode
    end = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return end, str(done.stdout)


def write_jobs(folder: Path, jobs: Sequence[Job]) -> None:
    (folder / "names.json").write_text(json.dumps([name for name, _, _ in jobs]))
    for name, program, x in jobs:
        program.save(folder / f"{name}.h5")
        np.save(folder / f"{name}.npy", x)


def read_jobs(folder: Path) -> list[Job]:
    names = json.loads((folder / "names.json").read_text())
    return [(n, Program.load(folder / f"{n}.h5"), np.load(folder / f"{n}.npy")) for n in names]


def _compare(tally: Tally, name: str, engine: str, found: Result, expected: Result) -> int:
    values, wrong = n_different(found, expected)
    first = first_difference(found, expected)
    if first is None and not found.ledger.same_counts(expected.ledger):
        wrong, note = wrong + 1, f"{name}: {engine} counts differently"
    else:
        note = f"{name}: {engine} and reference differ: {first}" if first else ""
        wrong = wrong or int(first is not None)
    tally.add(engine, values, wrong, note)
    return wrong


def _chip_time(tally: Tally, name: str, program: Program, x: np.ndarray) -> None:
    """Aligned Programs mean the same in chip time, each sample in the stream as alone."""
    whole = run_reference(program, x)
    samples = run_chip_time(program, [x[:, k : k + 1] for k in range(x.shape[1])])
    values = wrong = 0
    for part in ("sent", "u", "v"):
        for population in program.populations:
            streamed = [getattr(s, part)[population] for s in samples]
            expected = getattr(whole, part)[population]
            values += expected.size
            wrong += int((np.concatenate(streamed, axis=1) != expected).sum())
    tally.add("chip time", values, wrong, f"{name}: chip time differs" if wrong else "")


def _lava(
    tally: Tally, waiting: Sequence[tuple[str, Program, np.ndarray, Result]], on: bool
) -> None:
    if not waiting or not on or available():
        return
    try:
        results = run_all_on_lava([(program, x) for _, program, x, _ in waiting], ALL)
    except LavaError as error:
        before = tally.crashes["lava"]
        if len(waiting) > 1:  # which one was it?
            for item in waiting:
                _lava(tally, [item], on)
        if tally.crashes["lava"] == before:  # it alone, or none of them alone
            others = ", ".join(name for name, *_ in waiting[1:])
            tally.crash("lava", f"{waiting[0][0]}: {error}" + (others and f"\nwith {others}"))
        return
    for (name, _, _, expected), found in zip(waiting, results, strict=True):
        _compare(tally, name, "lava", found, expected)


def kept() -> list[Job]:
    """The cases that failed once, from their files."""
    jobs = []
    for file in sorted(KEPT.glob("*.h5")):
        jobs.append((file.stem, Program.load(file), np.load(file.with_suffix(".npy"))))
    return jobs


def keep(job: Job) -> Path:
    """Writes a case to the folder of kept ones: its Program as HDF5, its input beside it."""
    name, program, x = job
    KEPT.mkdir(exist_ok=True)
    program.save(KEPT / f"{name}.h5")
    np.save(KEPT / f"{name}.npy", x)
    return KEPT / f"{name}.h5"


def fails(job: Job, lava: bool = True) -> bool:
    return check_apart([job], lava).failures > 0


def shrunk(job: Job, lava: bool = True) -> Job:
    """A smaller case that still fails: fewer samples, fewer steps, fewer populations.

    lava  whether to try in Lava, which takes seconds each time, and not only on the fast engines
    """
    changed = True
    while changed:
        changed = False
        for smaller in _smaller(job):
            if fails(smaller, lava):
                job, changed = smaller, True
                break
    return job


def _smaller(job: Job) -> Iterable[Job]:
    name, program, x = job
    if x.shape[1] > 1:
        yield name, program, x[:, : x.shape[1] // 2]
        yield name, program, x[:, x.shape[1] // 2 :]
    if x.shape[0] > 1:
        yield name, program, x[:-1]
        yield name, program, x[1:]
    for population in list(program)[::-1]:
        if not population.is_input and population.name != program.readout.population:
            yield name, without(program, population.name), x
    if len(program.populations) > 2:
        yield name, without(program, program.readout.population), x
    for projection in program.projections:
        rest = {n: p for n, p in program.projections.items() if n != projection}
        yield name, replace(program, projections=rest), x


def without(program: Program, name: str) -> Program:
    """The program less one population and all its projections."""
    populations = {n: p for n, p in program.populations.items() if n != name}
    projections = {n: p for n, p in program.projections.items() if name not in (p.source, p.target)}
    readout = program.readout
    if readout.population == name:
        readout = Readout(population=list(populations)[-1], kind="spikes")
    return replace(program, populations=populations, projections=projections, readout=readout)
