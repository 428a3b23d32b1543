"""`study_residual`: one family of networks with every residual join, and what survives the chip."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ranvier.sim.study_run import EPOCHS, MODELS, Setup, parts_of, run_one
from ranvier.train.errors import RangeError
from ranvier.train.files import write_text

VARIANTS = ("vanilla", "sew", "sew-and", "sew-iand", "ms", "ms-conv", "or")
Run: TypeAlias = "dict[str, Any]"
Say: TypeAlias = "Callable[[str], None]"


@dataclass(frozen=True, eq=False)
class Study:
    """The runs of a study, and what they come to.

    runs      the figures of each (variant, seed), as `study_run.run_one` gives them
    measures  variant -> identity at initialisation, gradient norms
    wall_s    seconds that this call took; runs taken from disk cost nothing
    """

    setup: Setup
    runs: list[Run]
    measures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    wall_s: float = 0.0
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(r["variant"] for r in self.runs))

    def of(self, variant: str) -> list[Run]:
        """The runs of one variant, by seed."""
        return sorted((r for r in self.runs if r["variant"] == variant), key=lambda r: r["seed"])

    def rows(self) -> list[dict[str, Any]]:
        """One row a variant: means over its seeds, spreads beside them."""
        from ranvier.sim.study_view import row

        return [row(v, self.of(v)) for v in self.variants]

    def table(self) -> str:
        """The rows as text."""
        from ranvier.sim.study_view import text_table

        return text_table(self)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Rows, runs and measures as JSON; written to `path` as well, where one is given."""
        text = json.dumps(
            {"rows": self.rows(), "runs": self.runs, "measures": self.measures,
             "wall_s": self.wall_s, "setup": self.setup.key(), "meta": dict(self.meta)}, indent=1,
        )  # fmt: skip
        if path is not None:
            write_text(path, text)
        return text

    def data(self) -> dict[str, Any]:
        """The report's data, for `ranvier.sim.report.render`."""
        from ranvier.sim.study_view import report_data

        return report_data(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one HTML file that needs nothing else."""
        from ranvier.sim.report import write_report

        write_report(self.data(), path)

    def __str__(self) -> str:
        return self.table()


def study_residual(
    dataset: str = "digits",
    joins: Sequence[str] = VARIANTS,
    seeds: int | Sequence[int] = 3,
    *,
    out: str | os.PathLike[str] = "runs/study",
    resume: bool = True,
    data_dir: str | None = None,
    model: str | None = None,
    epochs: int | None = None,
    processes: int = 1,
    measures: bool = True,
    say: Say | None = None,
    meta: Mapping[str, Any] | None = None,
    **setup: Any,
) -> Study:
    """The Study of one family of networks: same depth, width, steps and seeds, another join each.

    joins      names of joins; with "-conv" behind, shortcuts that change the size are 1x1
               convolutions instead of parameter-free
    seeds      how many (0, 1, ...), or which
    out        folder: a run each in <variant>-s<seed>/, study.json and study.html
    resume     take finished runs from `out` where they were made with the same setup, and go on with
               trainings that were cut off; False measures and trains all again
    model      a network of list_models() (digits: resnet-digits; else resnet8)
    processes  runs at a time, each on one thread where there are several
    measures   also identity at initialisation and gradient norms over depth
    setup      further fields of `study_run.Setup`: steps, options, train, weight_bits, limit, size
    Raises RangeError for an unknown join or field; DataError where the data set is missing.
    """
    begin = time.perf_counter()
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    made = _setup(dataset, model, epochs, data_dir, setup)
    for variant in joins:
        parts_of(variant)
    if not joins or not numbers:
        raise RangeError("study: at least one join and one seed are needed")
    jobs = [(v, s) for s in numbers for v in joins]
    runs = _all(made, jobs, Path(out), resume, processes, say or (lambda text: None))
    found = _measures(joins) if measures else {}
    study = Study(made, runs, found, time.perf_counter() - begin, dict(meta or {}))
    study.to_json(Path(out) / "study.json")
    study.to_html(Path(out) / "study.html")
    return study


def _setup(
    dataset: str, model: str | None, epochs: int | None, data_dir: str | None, given: dict[str, Any]
) -> Setup:
    known = set(Setup.__dataclass_fields__)
    for key in given:
        if key not in known:
            raise RangeError(f"study: option '{key}' is none of {', '.join(sorted(known))}")
    train = {"epochs": epochs or EPOCHS.get(dataset, 10), **given.pop("train", {})}
    name = model or MODELS.get(dataset, "resnet8")
    return Setup(dataset=dataset, model=name, data_dir=data_dir, train=train, **given)


def run_folder(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant}-s{seed}"


def _all(
    setup: Setup, jobs: list[tuple[str, int]], out: Path, resume: bool, processes: int, say: Say
) -> list[Run]:
    """All runs, in the order of jobs; finished ones from disk, others here or in processes."""
    found: dict[tuple[str, int], Run] = {}
    for job in jobs:
        kept = _kept(setup, run_folder(out, *job)) if resume else None
        if kept is not None:
            found[job] = kept
    todo = [j for j in jobs if j not in found]
    if found:
        say(f"{len(found)} of {len(jobs)} runs are there already")
    for n, (job, run) in enumerate(_running(setup, todo, out, resume, processes), len(found) + 1):
        found[job] = run
        accuracy = ", ".join(f"{k} {100 * v:.2f}" for k, v in run["accuracy"].items())
        say(f"{n}/{len(jobs)} {job[0]} seed {job[1]}: {accuracy} ({run['seconds']:.0f} s)")
    return [found[j] for j in jobs]


def _running(
    setup: Setup, todo: list[tuple[str, int]], out: Path, resume: bool, processes: int
) -> Any:
    if processes <= 1:
        for job in todo:
            yield job, work(setup, job, out, resume, 0)
        return
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        waiting = {pool.submit(work, setup, job, out, resume, 1): job for job in todo}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def work(setup: Setup, job: tuple[str, int], out: Path, resume: bool, threads: int) -> Run:
    """One run, its figures written as run.json when they are whole; threads 0: torch's own number."""
    import shutil

    import torch

    if threads:
        torch.set_num_threads(threads)
    folder = run_folder(out, *job)
    if not resume or _stale(setup, folder):
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "setup.json", json.dumps(setup.key(), indent=1))
    begin = time.perf_counter()
    run = run_one(setup, *job, folder)
    run["seconds"] = time.perf_counter() - begin
    run = json.loads(json.dumps(run, default=_plain))
    write_text(folder / "run.json", json.dumps(run, indent=1))
    return run


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"study: {type(value).__name__} has no place in JSON")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _kept(setup: Setup, folder: Path) -> Run | None:
    """The finished run in a folder, where it was made with this setup."""
    run = _read(folder / "run.json")
    return run if isinstance(run, dict) and run.get("setup") == setup.key() else None


def _stale(setup: Setup, folder: Path) -> bool:
    """Whether the folder holds a training of another setup."""
    return folder.exists() and _read(folder / "setup.json") != setup.key()


def _measures(joins: Sequence[str]) -> dict[str, dict[str, Any]]:
    """join -> measures of untrained networks; the kind of shortcut plays no part in them."""
    import torch

    from ranvier.sim.measures import gradient_norms, identity_at_init, isometry
    from ranvier.train import create_model

    found: dict[str, dict[str, Any]] = {}
    for join in dict.fromkeys(parts_of(v)[0] for v in joins):
        torch.manual_seed(0)
        net = create_model("resnet-digits", join=join, zero_init=True, steps=4)
        same = identity_at_init(net, torch.rand(4, 1, 8, 8))
        norms = {z: gradient_norms(join, zero_init=z == "zero") for z in ("zero", "plain")}
        found[join] = {
            "identity": min(same.values()),
            "gradient": {z: {"r": r.tolist(), **isometry(r)} for z, r in norms.items()},
        }
    return found
