"""Results of `ranvier bench` as Markdown tables: times beside counts, and what follows from them.

Run by hand: python tests/bench_table.py results/sim.csv [more.csv]
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Iterable

Line = dict[str, str]


def read(paths: Iterable[str]) -> list[Line]:
    rows: list[Line] = []
    for path in paths:
        with open(path, newline="", encoding="utf-8") as file:
            rows += list(csv.DictReader(file))
    return rows


def table(rows: list[Line]) -> str:
    """One line for each net, rate and side."""
    lines = [
        "| net | rate | side | spikes | synops | ms a sample-step | CPU ms a sample-step | samples/s | "
        "snntorch / side | the same in CPU time | better / auto | the same in CPU time | spread |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cpu = 1000 * float(r["cpu_seconds"]) / (int(r["batch"]) * int(r["steps"]))
        lines.append(
            f"| {r['net']} | {float(r['rate']):.1%} | {r['side']} | {int(r['spikes']):,} | "
            f"{int(r['synops']):,} | {float(r['ms_per_sample_step']):.4g} | {cpu:.4g} | "
            f"{float(r['samples_per_s']):.4g} | {ratio(r['ratio_snntorch'])} | "
            f"{ratio(r['ratio_cpu'])} | {ratio(r['ratio_better'])} | {ratio(r['better_cpu'])} | "
            f"{float(r['spread']):.0%} |"
        )
    return "\n".join(lines)


def ratio(value: str) -> str:
    return f"{float(value):.2f}" if float(value) else ""


def shares(rows: list[Line]) -> tuple[list[float], list[float]]:
    """auto against the better of dense and events, of each net and rate: by the clock, in CPU time."""
    autos = [r for r in rows if r["side"] == "auto" and float(r["ratio_better"])]
    return [float(r["ratio_better"]) for r in autos], [float(r["better_cpu"]) for r in autos]


def summary(values: list[float]) -> str:
    below = sum(v < 0.9 for v in values)
    return f"median {statistics.median(values):.2f}, least {min(values):.2f}, {below} below 0.9"


def main(*paths: str) -> None:
    rows = read(paths)
    print(table(rows))
    wall, cpu = shares(rows)
    if wall:
        print(
            f"\nauto against the better of dense and events, {len(wall)} cases: "
            f"{summary(wall)} by the clock; {summary(cpu)} in CPU time"
        )
    print(f"\nthreads {rows[0]['threads']}, {rows[0]['machine']}, {rows[0]['versions']}")
    print(f"commits {', '.join(sorted({r['commit'] for r in rows}))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
