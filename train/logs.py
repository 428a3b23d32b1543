"""What a training shows and writes: a progress bar, metrics.csv, TensorBoard if installed."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

from ranvier.train.files import write_text

COLUMNS = (
    "epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "firing_rate",
    "images_per_s", "seconds",
)  # fmt: skip


def write_csv(path: Path, history: list[dict[str, Any]]) -> None:
    """metrics.csv, whole, from the history: after a resume it has no row twice."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(path, text.getvalue())


class TensorBoard:
    """Scalars of every epoch in FOLDER/tensorboard; nothing where TensorBoard is not installed."""

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def add(self, row: dict[str, Any]) -> None:
        if self._writer is not None:
            for name, value in row.items():
                if name != "epoch" and isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, row["epoch"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class Progress:
    """A progress bar over all batches: loss, accuracy, firing rate, images/s and the time left.

    Silent unless `wanted` and the standard error is a terminal.
    """

    def __init__(self, wanted: bool, n_batches: int, done: int = 0) -> None:
        self._bar: Any = None
        if not (wanted and sys.stderr.isatty()):
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        text = TextColumn("{task.description}  {task.fields[shown]}")
        self._bar = Bar(BarColumn(), text, TimeRemainingColumn(), console=Console(stderr=True))
        self._task = self._bar.add_task("", total=n_batches, completed=done, shown="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, epoch: str, **values: float) -> None:
        """One batch on; `values` empty leaves the shown figures as they are."""
        if self._bar is None:
            return
        if values:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            self._bar.update(self._task, description=f"epoch {epoch}", shown=shown)
        self._bar.advance(self._task)
