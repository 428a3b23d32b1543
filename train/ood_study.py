"""The grid of out-of-distribution trainings: methods by environment gaps by seeds, run by run.

    python -m ranvier.train.ood --out runs/ood

A finished run lies in <out>/<name>.json with its settings and curves; the command takes up there
where it was cut off. ood.json, table.md, shape.md, curves.csv and curves.html are written after every run.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ranvier.train.colored_mnist import GAPS, TEST_FLIP, colored_mnist
from ranvier.train.errors import RangeError, RanvierError, UnsupportedError
from ranvier.train.files import write_text
from ranvier.train.ood import (
    IRM_PUBLISHED,
    METHODS,
    PUBLISHED,
    OodResult,
    OodSettings,
    as_json,
    ood_table,
    train_ood,
)

# Published for the similarity method at the other gaps. Source: as PUBLISHED.
PUBLISHED_GAPS = {
    (0.05, 0.25): (75.4, 67.9, 35.1),
    (0.025, 0.275): (87.2, 67.9, 23.7),
    (0.0, 0.3): (77.4, 64.5, 33.6),
}
# A run's name besides a method's: the multilayer perceptron of IRM's authors, with their settings.
MLP = "irm-mlp"
CURVES = ("run", "method", "gap", "seed", "epoch", "env1", "env2", "validation", "test",
          "similarity", "loss")  # fmt: skip


@dataclass(frozen=True)
class OodRun:
    """One training of the grid. method: one of METHODS, or irm-mlp; flips: of both environments."""

    method: str
    flips: tuple[float, float]
    seed: int
    settings: OodSettings
    n_digits: int | None = None

    @property
    def name(self) -> str:
        return f"{self.method}-{gap_name(self.flips)}-s{self.seed}"

    def key(self) -> dict[str, Any]:
        """All that decides the outcome, as plain values."""
        return {"settings": asdict(self.settings), "flips": list(self.flips),
                "n_digits": self.n_digits}  # fmt: skip


def gap_name(flips: Sequence[float]) -> str:
    """10/20 for flips of 0.1 and 0.2, with a dash so that it can be a file's name."""
    return "-".join(f"{100 * flip:g}" for flip in flips)


def parse_gap(text: str) -> tuple[float, float]:
    """The flips of a gap's name: 10/20 and 10-20 are (0.1, 0.2). Raises RangeError otherwise."""
    parts = text.replace("/", "-").split("-")
    try:
        first, second = (float(part) / 100 for part in parts)
    except ValueError:
        raise RangeError(f"ood: gap '{text}' is not two percentages, as 10/20") from None
    return first, second


def grid(
    methods: Sequence[str],
    gaps: Sequence[tuple[float, float]],
    seeds: Sequence[int],
    base: OodSettings,
    n_digits: int | None = None,
) -> list[OodRun]:
    """All runs, seed by seed, so that a grid that is cut off has whole rows.

    Raises UnsupportedError for a method that is none of METHODS nor irm-mlp.
    """
    for method in methods:
        if method not in (*METHODS, MLP):
            known = ", ".join((*METHODS, MLP))
            raise UnsupportedError(f"ood: method '{method}' is unknown; known: {known}")
    return [
        OodRun(method, gap, seed, _settings(method, seed, base), n_digits)
        for seed in seeds
        for gap in gaps
        for method in methods
    ]


def _settings(method: str, seed: int, base: OodSettings) -> OodSettings:
    if method == MLP:
        return replace(IRM_PUBLISHED, seed=seed)
    plain = OodSettings()  # what a method does not use must not tell its runs apart
    if method != "irm":
        base = replace(base, penalty=plain.penalty, anneal_epochs=plain.anneal_epochs)
    if not method.startswith("similarity"):
        base = replace(base, similarity_max=plain.similarity_max)
    return replace(base, method=method, seed=seed)  # type: ignore[arg-type]


def run_grid(
    runs: Sequence[OodRun],
    out: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The records of all runs: finished ones from `out`, the others trained; reports are written.

    A record is OodRun.key() with method, gap, seed, result (OodResult as plain values) and seconds.
    """
    folder = Path(out)
    records: list[dict[str, Any]] = []
    for n, run in enumerate(runs, 1):
        record = _kept(folder / f"{run.name}.json", run)
        if record is None:
            record = _train(run, data_dir)
            write_text(folder / f"{run.name}.json", json.dumps(record, indent=1))
            last = record["result"]["history"][-1]
            said = ", ".join(f"{k} {100 * last[k]:.1f}" for k in ("env1", "env2", "test"))
            say(f"{n}/{len(runs)} {run.name}: {said} ({record['seconds']:.0f} s)")
        records.append(record)
        write_reports(records, folder)
    return records


def _kept(path: Path, run: OodRun) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(record, dict) and all(record.get(k) == v for k, v in run.key().items())
    return record if same else None


def _train(run: OodRun, data_dir: str | os.PathLike[str] | None) -> dict[str, Any]:
    begin = time.perf_counter()
    environments = colored_mnist(data_dir, flips=run.flips, seed=run.seed, limit=run.n_digits)
    result = train_ood(environments, run.settings)
    return {
        "method": run.method, "gap": gap_name(run.flips), "seed": run.seed, **run.key(),
        "result": as_json(result), "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def table(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a gap, method and selection rule, as ood_table gives them, beside the published."""
    rows = []
    for gap in dict.fromkeys(r["gap"] for r in records):
        for method in dict.fromkeys(r["method"] for r in records if r["gap"] == gap):
            found = [r for r in records if (r["gap"], r["method"]) == (gap, method)]
            results = [_result(r) for r in found]
            for row in ood_table(results):
                published = published_row(method, parse_gap(gap))
                oracle = row["selection"] == "oracle"
                rows.append({**row, "gap": gap, "method": method,
                             "published": published if oracle else None})  # fmt: skip
    return rows


def published_row(method: str, flips: tuple[float, float]) -> tuple[float, ...] | None:
    """The published accuracies of a method at a gap, in percent; None where there are none."""
    if flips == (0.1, 0.2):
        return PUBLISHED.get(method)
    return PUBLISHED_GAPS.get(flips) if method == "similarity-trains" else None


def _result(record: dict[str, Any]) -> OodResult:
    result = record["result"]
    return OodResult(
        OodSettings(**record["settings"]),
        [{k: math.nan if v is None else v for k, v in row.items()} for row in result["history"]],
        result["selected"],
    )


# ---- reports


def write_reports(records: Sequence[dict[str, Any]], folder: Path) -> None:
    """ood.json, table.md, shape.md, curves.csv and curves.html of the records."""
    from ranvier.train.ood_picture import page

    rows = table(records)
    write_text(folder / "ood.json", json.dumps({"rows": rows, "n_runs": len(records)}, indent=1))
    write_text(folder / "table.md", markdown(rows))
    write_text(folder / "shape.md", shape_table(records))
    write_text(folder / "curves.csv", curves_csv(records))
    write_text(folder / "curves.html", page(records))


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown: percent, mean and spread over the seeds."""
    lines = [
        "| flips | method | epoch chosen by | seeds | env 1 | env 2 | validation | test | published |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[k]:.1f}" + (f" ± {row[k + '_spread']:.1f}" if row["n_seeds"] > 1 else "")
            for k in ("env1", "env2", "validation", "test")
        ]
        published = " / ".join(f"{v:.1f}" for v in row["published"]) if row["published"] else ""
        gap = row["gap"].replace("-", "/")
        begin = [gap, row["method"], row["selection"], str(row["n_seeds"])]
        lines.append("| " + " | ".join([*begin, *cells, published]) + " |")
    return "\n".join(lines) + "\n"


def color_line(flips: Sequence[float], train: float) -> float:
    """Test accuracy of who answers by color in some cases and guesses in the others.

    train  its mean training accuracy; 0.5 gives 0.5, that of color alone TEST_FLIP's complement
    """
    by_color = 1 - sum(flips) / len(flips)
    return 0.5 + (train - 0.5) * (0.5 - TEST_FLIP) / (by_color - 0.5)


def shape_table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: how far the epochs of each method lie above the color line, in points."""
    lines = [
        "| flips | method | epochs | test above the color line, mean | at most | validation at most |",
        "|---|---|---|---|---|---|",
    ]
    for gap, method in dict.fromkeys((r["gap"], r["method"]) for r in records):
        rows = [row for r in records if (r["gap"], r["method"]) == (gap, method)
                for row in r["result"]["history"]]  # fmt: skip
        flips = parse_gap(gap)
        above = [100 * (row["test"] - color_line(flips, (row["env1"] + row["env2"]) / 2))
                 for row in rows]  # fmt: skip
        best = 100 * max(row["validation"] for row in rows)
        lines.append(
            f"| {gap.replace('-', '/')} | {method} | {len(rows)} |"
            f" {sum(above) / len(above):+.1f} | {max(above):+.1f} | {best:.1f} |"
        )
    return "\n".join(lines) + "\n"


def curves_csv(records: Sequence[dict[str, Any]]) -> str:
    """Every epoch of every run, as CSV with the columns CURVES."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CURVES, lineterminator="\n")
    writer.writeheader()
    for r in records:
        head = {k: r[k] for k in ("method", "gap", "seed")}
        name = f"{r['method']}-{r['gap']}-s{r['seed']}"
        for row in r["result"]["history"]:
            values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({"run": name, **head, **values})
    return text.getvalue()


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m ranvier.train.ood`; returns the exit status."""
    options = _parser().parse_args(argv)
    base = OodSettings(
        epochs=options.epochs, batch_size=options.batch_size, hidden=options.hidden,
        steps=options.steps, lr=options.lr, l2=options.l2, anneal_epochs=options.anneal,
        penalty=options.penalty, similarity_max=options.similarity,
    )  # fmt: skip
    try:
        gaps = [parse_gap(g) for g in options.gaps.split(",")]
        seeds = [int(s) for s in options.seeds.split(",")]
        runs = grid(options.methods.split(","), gaps, seeds, base, options.digits)
        records = run_grid(runs, options.out, data_dir=options.data, say=_say)
    except (RanvierError, ValueError) as error:
        print(f"ood: {error}".replace("ood: ood:", "ood:"))
        return 2
    rows = table(records)
    print(json.dumps(rows, indent=1) if options.json else markdown(rows))
    if not options.json:
        print(shape_table(records))
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ranvier.train.ood", description=__doc__)
    add = parser.add_argument
    add("--out", default="runs/ood", help="folder of the runs and reports")
    add("--methods", default=",".join(METHODS), help=f"of {', '.join((*METHODS, MLP))}")
    gaps = ",".join(gap_name(g).replace("-", "/") for g in GAPS)
    add("--gaps", default="10/20", help=f"color flips of the environments in percent, as {gaps}")
    add("--seeds", default="0,1,2")
    add("--epochs", type=int, default=50)
    add("--batch-size", type=int, default=1000, help="samples of each environment in a step")
    add("--hidden", type=int, default=128)
    add("--steps", type=int, default=6)
    add("--lr", type=float, default=1e-3)
    add("--l2", type=float, default=1e-4)
    add("--anneal", type=int, default=15, help="IRM: epochs before the full penalty")
    add("--penalty", type=float, default=100.0, help="IRM: weight of the penalty")
    add("--similarity", type=float, default=1.0, help="weight of 1 - cosine in the last epoch")
    add("--digits", type=int, default=None, help="digits in all (default: 60,000)")
    add("--data", default=None, help="where mnist.npz lies (default: RANVIER_DATA)")
    add("--json", action="store_true", help="print the table as JSON")
    return parser


__all__ = ["PUBLISHED_GAPS", "TEST_FLIP", "OodRun", "grid", "run_grid", "table"]
