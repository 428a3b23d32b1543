"""`study_residual`: one family of networks with every residual join, and what survives the chip."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ranvier.sim.published import Published, published_figures
from ranvier.sim.study_run import run_one
from ranvier.sim.study_setup import Setup, make_setup, parts_of
from ranvier.train.data import load_dataset
from ranvier.train.errors import RangeError, RanvierError
from ranvier.train.files import write_text
from ranvier.train.memory import keep_freed_memory

VARIANTS = ("vanilla", "sew", "sew-and", "sew-iand", "ms", "ms-conv", "or")
Run: TypeAlias = "dict[str, Any]"
Job: TypeAlias = "tuple[str, int]"  # variant, seed
Say: TypeAlias = "Callable[[str], None]"


@dataclass(frozen=True, eq=False)
class Study:
    """The runs of a study, and what they come to.

    runs      the figures of each (variant, seed), as `study_run.run_one` gives them
    measures  variant -> identity at initialisation, gradient norms
    wall_s    seconds that this call took; runs taken from disk cost nothing
    failed    run -> why it did not come through
    published figures of other tables, counted again here
    """

    setup: Setup
    runs: list[Run]
    measures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    wall_s: float = 0.0
    meta: Mapping[str, Any] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    published: Sequence[Published] = ()

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
        runs = [{k: v for k, v in r.items() if k != "drawn"} for r in self.runs]
        text = json.dumps(
            {"rows": self.rows(), "runs": runs, "measures": self.measures,
             "wall_s": self.wall_s, "setup": self.setup.key(), "meta": dict(self.meta),
             "failed": dict(self.failed)}, indent=1,
        )  # fmt: skip
        if path is not None:
            write_text(path, text)
        return text

    def data(self) -> dict[str, Any]:
        """The report's data, for `ranvier.sim.report.render`."""
        from ranvier.sim.study_page import report_data

        return report_data(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one HTML file that needs nothing else."""
        from ranvier.sim.report import write_report

        write_report(self.data(), path)

    def __str__(self) -> str:
        return self.table()


def study_residual(
    dataset: str | None = None,
    joins: Sequence[str] = VARIANTS,
    seeds: int | Sequence[int] = 3,
    *,
    out: str | os.PathLike[str] = "runs/study",
    resume: bool = True,
    remeasure: bool = False,
    recipe: str | None = None,
    settings: Sequence[str] = (),
    data_dir: str | None = None,
    model: str | None = None,
    epochs: int | None = None,
    processes: int = 1,
    measures: bool = True,
    say: Say | None = None,
    meta: Mapping[str, Any] | None = None,
    **setup: Any,
) -> Study:
    """The Study of one family of networks: same depth, width, steps, seeds and training, another join each.

    dataset    a name of load_dataset; None: the recipe's, or digits
    joins      names of joins; with "-conv" behind, shortcuts that change the size are 1x1
               convolutions instead of parameter-free
    seeds      how many (0, 1, ...), or which
    out        folder: a run each in <variant>-s<seed>/ (its training in train/, a run folder as
               `ranvier train` leaves it), study.json and study.html
    resume     take finished runs from `out` where they were made with the same setup, and go on with
               trainings that were cut off; False measures and trains all again
    remeasure  measure finished runs again, without training them again
    recipe     where network and training setting come from, one for all joins: a recipe's name, with
               or without a join, or a TOML file; None: the data set's
    settings   "key=value" over the recipe's, as `ranvier train -s`
    model, epochs    instead of the recipe's; another model has its own options
    processes  runs at a time, each on one thread where there are several
    measures   also identity at initialisation, gradient norms over depth, and published figures
    setup      further fields of `study_setup.Setup`: weights, steps, options, train, weight_bits, limit ...
    A run that fails is left out, and named in `failed`.
    Raises RangeError for an unknown join or field, FormatError for an unknown recipe or setting; what
    the first run raised where none came through.
    """
    begin = time.perf_counter()
    numbers = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
    made = make_setup(dataset, recipe, settings, model, epochs, {"data_dir": data_dir, **setup})
    for variant in joins:
        parts_of(variant)
    if not joins or not numbers:
        raise RangeError("study: at least one join and one seed are needed")
    jobs = [(v, s) for s in numbers for v in joins]
    found = _measures(joins) if measures else {}
    figures = published_figures() if measures else ()
    tell, place = say or (lambda text: None), Path(out)
    runs: dict[Job, Run] = {}
    failed: dict[str, RanvierError] = {}

    def study() -> Study:
        told = {k: " ".join(str(e).split()) for k, e in failed.items()}
        done = [runs[j] for j in sorted(runs, key=jobs.index)]
        return Study(
            made, done, found, time.perf_counter() - begin, dict(meta or {}), told, figures
        )

    for job, run in _each(made, jobs, place, resume, remeasure, processes, tell):
        if isinstance(run, RanvierError):
            failed[f"{job[0]}-s{job[1]}"] = run
            tell(f"{job[0]} seed {job[1]} failed: {run}")
            continue
        runs[job] = run
        _write(study(), place)
    if not runs:
        raise next(iter(failed.values()))
    made_of = study()
    _write(made_of, place)
    return made_of


def _write(study: Study, out: Path) -> None:
    study.to_json(out / "study.json")
    study.to_html(out / "study.html")


def run_folder(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant}-s{seed}"


def _each(
    setup: Setup,
    jobs: list[Job],
    out: Path,
    resume: bool,
    remeasure: bool,
    processes: int,
    say: Say,
) -> Iterator[tuple[Job, Run | RanvierError]]:
    """All runs: finished ones from disk, then others as they come, from here or from processes."""
    kept = {j: _kept(setup, run_folder(out, *j)) for j in jobs if resume and not remeasure}
    there = {j: r for j, r in kept.items() if r is not None}
    todo = [j for j in jobs if j not in there]
    if there:
        say(f"{len(there)} of {len(jobs)} runs are there already")
    yield from there.items()
    if todo and not setup.weights:  # or every run would fail for want of the same data
        load_dataset(setup.dataset, setup.data_dir, "test", limit=1)
    for n, (job, run) in enumerate(_running(setup, todo, out, resume, processes), len(there) + 1):
        if not isinstance(run, RanvierError):
            float_, chip = (f"{100 * run['accuracy'][k]:.2f} %" for k in ("float", "chip"))
            onnx = f"ONNX differs in {run['onnx_differ']} of {run['n_onnx']:,}"
            times = f"training {run['train_s']:.0f} s, measuring {run['measure_s']:.0f} s"
            say(
                f"{n}/{len(jobs)} {job[0]} seed {job[1]}: float {float_}, chip {chip}, {onnx} ({times})"
            )
        yield job, run


def _running(
    setup: Setup, todo: list[Job], out: Path, resume: bool, processes: int
) -> Iterator[tuple[Job, Run | RanvierError]]:
    if processes <= 1:
        for job in todo:
            yield job, work(setup, job, out, resume, 0)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), keep_freed_memory) as pool:
        waiting = {pool.submit(work, setup, job, out, resume, 1): job for job in todo}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def work(setup: Setup, job: Job, out: Path, resume: bool, threads: int) -> Run | RanvierError:
    """One run, its figures written as run.json when they are whole; threads 0: torch's own number."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    folder = run_folder(out, *job)
    begin = time.perf_counter()
    try:
        _prepare(setup, folder, resume)
        run = run_one(setup, *job, folder)
    except RanvierError as error:
        return error
    run["seconds"] = time.perf_counter() - begin
    run = json.loads(json.dumps(run, default=_plain))
    write_text(folder / "run.json", json.dumps(run, indent=1))
    return run


def _prepare(setup: Setup, folder: Path, resume: bool) -> None:
    """Makes the run's folder; a training of another setting that lies there is set aside as <run>.old."""
    made = _read(folder / "setup.json")
    if folder.exists() and not (resume and made == setup.training()):
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "setup.json", json.dumps(setup.training(), indent=1))


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
