"""The studies' commands: text from the command line to what the functions take."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranvier.train.errors import RangeError

if TYPE_CHECKING:
    from ranvier.sim.study import Study


def numbers(text: str, what: str) -> list[int]:
    """Whole numbers between commas; for seeds, one number alone counts them from 0.

    >>> numbers("3", "seeds"), numbers("0,4", "seeds"), numbers("20", "depths")
    ([0, 1, 2], [0, 4], [20])
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise RangeError(f"study: {what} '{text}' are no whole numbers between commas") from None
    return list(range(found[0])) if what == "seeds" and len(found) == 1 else found


def teller() -> Any:
    """Says a line on stderr, with the seconds since now."""
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:7.1f} s] {text}", file=sys.stderr, flush=True)

    return say


def command_line() -> str:
    """What was typed, for a report."""
    import shlex

    return shlex.join(["ranvier", *sys.argv[1:]])


def residual(
    dataset: str | None, joins: str, seeds: str, recipe: str | None, settings: list[str], out: Path,
    runs: Path | None, stored: bool, processes: int, remeasure: bool, data_dir: Path | None,
    **setup: Any,
) -> Study:  # fmt: skip
    """`ranvier study residual`."""
    from ranvier.sim.study import study_residual
    from ranvier.sim.study_setup import STORED

    if runs is not None and stored:
        raise RangeError("study: --runs and --stored exclude each other")
    weights = STORED if stored else "" if runs is None else str(runs)
    return study_residual(
        dataset, tuple(joins.split(",")), numbers("1" if stored else seeds, "seeds"), out=out,
        recipe=recipe, settings=settings, weights=weights, processes=processes, remeasure=remeasure,
        data_dir=None if data_dir is None else str(data_dir), say=teller(),
        meta={"command": command_line()}, **setup,
    )  # fmt: skip
