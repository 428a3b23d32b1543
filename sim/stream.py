"""A program over a data set of any size: memory holds one batch; interrupted runs go on later.

Samples come first here, as data sets have them. With several processes (torch.distributed, which
Lightning Fabric starts) each takes every n-th batch, and counts, predictions and outputs are summed
over the processes at the end: the totals are those of one process.
"""

from __future__ import annotations

import atexit
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ranvier.deploy.program import Program
from ranvier.export.documents import content_digest
from ranvier.export.hdf5_guard import attribute, check_heaps, numbers
from ranvier.sim.ledger import Ledger
from ranvier.sim.runner import run
from ranvier.train.errors import FormatError, RangeError, ShapeError
from ranvier.train.files import atomic_write

FORMAT = "ranvier-evaluation"
VERSION = 2
SAVE_EVERY = 30.0  # seconds
UNKNOWN = -1  # the prediction of a sample that was not run


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a program made of a data set.

    accuracy     share of the samples run whose prediction is their label; nan without labels
    predictions  int64 `[n_total]`; -1 for samples that were not run
    outputs      float64 `[n_total, n_out]`, or None where they were not kept
    ledger       the counts
    n            samples that were run
    confusion    int64 `[label, prediction]`, or None without labels
    """

    accuracy: float
    predictions: np.ndarray
    outputs: np.ndarray | None
    ledger: Ledger
    n: int
    confusion: np.ndarray | None = None


class Source:
    """Batches of a data set: arrays with samples first, or an object with `batch(slice)`."""

    def __init__(self, data: Any, labels: Any, shape: tuple[int, ...], limit: int | None) -> None:
        if isinstance(data, tuple):
            data, labels = data
        self.data, self.labels, self.shape = data, labels, shape
        size = len(data)
        if labels is not None and len(labels) != size:
            raise ShapeError(f"evaluate: {size} samples and {len(labels)} labels")
        self.n = size if limit is None else min(size, limit)
        if self.n < 1:
            raise RangeError(f"evaluate: {self.n} samples; at least one is needed")

    def batch(self, start: int, stop: int) -> tuple[Any, np.ndarray | None]:
        """(x as `run` takes it, labels) of samples start..stop."""
        index = slice(start, stop)
        if hasattr(self.data, "batch"):
            x, y = self.data.batch(index)
            return _array(x), _labels(y)
        x = _array(self.data[index])
        if x.ndim == len(self.shape) + 2:
            x = np.swapaxes(x, 0, 1)
        return x, None if self.labels is None else _labels(self.labels[index])


def _array(x: Any) -> np.ndarray:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)


def _labels(y: Any) -> np.ndarray:
    labels = _array(y)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ShapeError(
            f"evaluate: labels are {labels.dtype} {labels.shape}; one whole number each is needed "
            "(`ranvier run` counts a label a step)"
        )
    return labels.astype(np.int64)


@dataclass
class Partial:
    """What one process has so far.

    counted  (how many of its own batches are done, their ledger): one value, so that an interrupt
             finds both or neither
    """

    predictions: np.ndarray
    outputs: np.ndarray | None
    labels: np.ndarray | None
    counted: tuple[int, Ledger | None] = (0, None)

    @staticmethod
    def empty(n: int, n_out: int, keep: bool) -> Partial:
        outputs = np.zeros((n, n_out)) if keep else None
        return Partial(np.full(n, UNKNOWN, np.int64), outputs, None)

    @property
    def done(self) -> int:
        return self.counted[0]

    @property
    def ledger(self) -> Ledger | None:
        return self.counted[1]

    def digest(self) -> str:
        """Of all but the ledger, which has one of its own."""
        arrays = {"predictions": self.predictions, "outputs": self.outputs, "labels": self.labels}
        kept = {name: array for name, array in arrays.items() if array is not None}
        return content_digest(str(self.done).encode(), kept)

    def add(
        self, start: int, output: np.ndarray, labels: np.ndarray | None, counts: Ledger
    ) -> None:
        stop = start + len(output)
        self.predictions[start:stop] = output.argmax(1)
        if self.outputs is not None:
            self.outputs[start:stop] = output
        if labels is not None:
            if self.labels is None:
                self.labels = np.full(len(self.predictions), UNKNOWN, np.int64)
            self.labels[start:stop] = labels
        whole = counts if self.ledger is None else self.ledger + counts
        self.counted = (self.done + 1, whole)


def evaluate(
    program: Program,
    data: Any,
    labels: Any = None,
    *,
    engine: str = "auto",
    batch_size: int = 64,
    limit: int | None = None,
    steps: int | None = None,
    progress: bool = False,
    resume_path: str | os.PathLike[str] | None = None,
    keep_outputs: bool = True,
    on_batch: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Evaluation:
    """The Evaluation of a program over a data set.

    data          `[n, *shape]`, or `[n, time, *shape]`; a pair of those and labels; or an object
                  with `len` and `batch(slice) -> (x as run takes it, labels)`, read batch by batch
    labels        whole numbers `[n]`, or None
    limit         how many samples at most
    resume_path   HDF5 file for what is done so far: written every half minute, at the end, and when
                  interrupted; if it is there already, its batches are not run again
    keep_outputs  whether to keep every readout; predictions are always kept
    on_batch      called with (samples done, samples in all) of this process
    options       for the engine, such as device="cuda" for dense
    Raises RangeError for no samples or a batch size below 1, FormatError for a resume file of
    another program or data set, and what `run` raises.
    """
    if batch_size < 1:
        raise RangeError(f"evaluate: batch_size is {batch_size}; give 1 or more")
    source = Source(data, labels, program.input.shape, limit)
    rank, world = ranks()
    starts = range(rank * batch_size, source.n, world * batch_size)
    path = None if resume_path is None else _own(Path(resume_path), rank, world)
    key = f"{program.digest()} {source.n} {batch_size} {rank}/{world} {steps}"
    partial = _resumed(path, key) or Partial.empty(source.n, program.output.size, keep_outputs)
    keeper = Keeper(path, key)
    with shown(progress and rank == 0, len(starts), partial.done) as tick, keeper.kept(partial):
        for start in starts[partial.done :]:
            x, y = source.batch(start, min(start + batch_size, source.n))
            result = run(program, x, engine, steps=steps, **options)
            partial.add(start, result.output, y, result.ledger)
            keeper.now_and_then(partial)
            tick()
            if on_batch is not None:
                on_batch(int((partial.predictions != UNKNOWN).sum()), source.n)
    if partial.ledger is None:  # more processes than batches: one sample shows the ledger's form
        x, _ = source.batch(0, 1)
        partial.counted = (0, _no_counts(run(program, x, engine, steps=steps, **options).ledger))
    return _evaluation(program, partial, world)


def _evaluation(program: Program, partial: Partial, world: int) -> Evaluation:
    ledger = partial.ledger
    assert ledger is not None
    predictions, outputs, labels = partial.predictions, partial.outputs, partial.labels
    if world > 1:
        ledger = reduced(ledger)
        predictions = _summed(predictions + 1) - 1
        outputs = None if outputs is None else _summed(outputs)
        labels = _summed(np.zeros_like(predictions) if labels is None else labels + 1) - 1
        labels = None if (labels == UNKNOWN).all() else labels
    ran = predictions != UNKNOWN
    if labels is None:
        return Evaluation(math.nan, predictions, outputs, ledger, int(ran.sum()))
    right = float((predictions[ran] == labels[ran]).mean())
    confusion = confused(labels[ran], predictions[ran], program.output.size)
    return Evaluation(right, predictions, outputs, ledger, int(ran.sum()), confusion)


def confused(labels: np.ndarray, predictions: np.ndarray, n_out: int) -> np.ndarray:
    """int64 `[label, prediction]` counts."""
    size = max(n_out, int(labels.max(initial=0)) + 1)
    table = np.zeros((size, size), np.int64)
    np.add.at(table, (labels, predictions), 1)
    return table


# ---------------------------------------------------------------------- what is on disk


def _own(path: Path, rank: int, world: int) -> Path:
    return path if world == 1 else path.with_name(f"{path.stem}.{rank}of{world}{path.suffix}")


class Keeper:
    """Writes a Partial to its file: now and then, at the end, and when interrupted."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key, self.last = path, key, time.monotonic()

    def now_and_then(self, partial: Partial) -> None:
        if self.path is not None and time.monotonic() - self.last > SAVE_EVERY:
            self.write(partial)

    @contextmanager
    def kept(self, partial: Partial) -> Iterator[None]:
        done = partial.done
        try:
            yield
        finally:
            if self.path is not None and partial.done > done:
                self.write(partial)

    def write(self, partial: Partial) -> None:
        import h5py

        from ranvier.sim.ledger_file import write_into

        assert self.path is not None and partial.ledger is not None
        with atomic_write(self.path) as part, h5py.File(part, "w") as file:
            file.attrs.update(
                {
                    "format": FORMAT, "version": VERSION, "key": self.key, "done": partial.done,
                    "digest": partial.digest(),
                }
            )  # fmt: skip
            for name in ("predictions", "outputs", "labels"):
                if getattr(partial, name) is not None:
                    file.create_dataset(name, data=getattr(partial, name), compression="gzip")
            write_into(file.create_group("ledger"), partial.ledger)
        self.last = time.monotonic()


def _resumed(path: Path | None, key: str) -> Partial | None:
    import h5py

    from ranvier.sim.ledger_file import read_from

    if path is None or not path.exists():
        return None
    try:
        check_heaps(path)
        with h5py.File(path, "r") as file:
            if (attribute(file, "format"), attribute(file, "version")) != (FORMAT, VERSION):
                raise FormatError("it holds no evaluation of this version")
            if attribute(file, "key") != key:
                raise FormatError(
                    "it is of another program, data set or batch size; "
                    "remove it, or name another file"
                )
            outputs, labels = (
                numbers(file, n) if n in file else None for n in ("outputs", "labels")
            )
            counted = (int(attribute(file, "done")), read_from(file["ledger"]))
            partial = Partial(numbers(file, "predictions"), outputs, labels, counted)
            if attribute(file, "digest") != partial.digest():
                raise FormatError("its content does not match its digest; remove it")
            return partial
    except FormatError as error:
        raise FormatError(f"evaluate: '{path}': {error}") from error
    except Exception as error:  # h5py raises many kinds on damaged files
        raise FormatError(f"evaluate: '{path}' cannot be read: {error}") from error


# ---------------------------------------------------------------------- several processes


def ranks() -> tuple[int, int]:
    """(this process, how many); starts a gloo group where the environment names one."""
    import torch.distributed as dist

    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
        atexit.register(_leave)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _leave() -> None:
    """Ends the group: its threads must not run on while the interpreter goes down."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _summed(a: np.ndarray) -> np.ndarray:
    """The sum over the processes."""
    import torch
    import torch.distributed as dist

    total = torch.from_numpy(np.ascontiguousarray(a).copy())
    if dist.get_backend() == "nccl":
        total = total.cuda()
    dist.all_reduce(total)
    summed: np.ndarray = total.cpu().numpy()
    return summed


def reduced(ledger: Ledger) -> Ledger:
    """The ledger of all processes; each must hold one of the same program."""

    def all_of(part: Any) -> dict[str, dict[str, np.ndarray]]:
        return {n: {k: _summed(v) for k, v in c.items()} for n, c in part.items()}

    return replace(
        ledger,
        populations=all_of(ledger.populations),
        projections=all_of(ledger.projections),
        neurons={n: _summed(v) for n, v in ledger.neurons.items()},
        n_samples=int(_summed(np.array([ledger.n_samples]))[0]),
    )


def _no_counts(ledger: Ledger) -> Ledger:
    """A ledger with every count at zero."""

    def none(part: Any) -> dict[str, dict[str, np.ndarray]]:
        return {n: {k: np.zeros_like(v) for k, v in c.items()} for n, c in part.items()}

    return replace(
        ledger,
        populations=none(ledger.populations),
        projections=none(ledger.projections),
        neurons={n: np.zeros_like(v) for n, v in ledger.neurons.items()},
        n_samples=0,
    )


# ---------------------------------------------------------------------- progress


@contextmanager
def shown(
    wanted: bool, total: int, done: int, what: str = "evaluate"
) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal; elsewhere nothing."""
    if not wanted:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total, completed=done)
        yield lambda: bars.advance(task)
