"""Results of `ranvier bench` as Markdown tables: times beside counts, and what follows from them.

Run by hand: python tests/bench_table.py results/sim.csv [more.csv]
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable

Line = dict[str, str]
ENGINES = ("dense", "events", "auto")


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
        "snntorch / side | the same in CPU time | spread |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cpu = 1000 * float(r["cpu_seconds"]) / (int(r["batch"]) * int(r["steps"]))
        lines.append(
            f"| {r['net']} | {float(r['rate']):.1%} | {r['side']} | {int(r['spikes']):,} | "
            f"{int(r['synops']):,} | {float(r['ms_per_sample_step']):.4g} | {cpu:.4g} | "
            f"{float(r['samples_per_s']):.4g} | {ratio(r['ratio_snntorch'])} | "
            f"{ratio(r['ratio_cpu'])} | {float(r['spread']):.0%} |"
        )
    return "\n".join(lines)


def ratio(value: str) -> str:
    return f"{float(value):.2f}" if float(value) else ""


def shares(rows: list[Line]) -> tuple[list[float], list[float]]:
    """auto against the better of dense and events, of each net and rate: by the clock, in CPU time."""
    cases: dict[tuple[str, str], dict[str, Line]] = defaultdict(dict)
    for r in rows:
        cases[r["net"], r["rate"]][r["side"]] = r
    whole = [c for c in cases.values() if all(e in c for e in ENGINES)]
    return tuple(  # type: ignore[return-value]
        [min(float(c["dense"][k]), float(c["events"][k])) / float(c["auto"][k]) for c in whole]
        for k in ("seconds", "cpu_seconds")
    )


def main(*paths: str) -> None:
    rows = read(paths)
    print(table(rows))
    wall, cpu = shares(rows)
    if wall:
        print(
            f"\nauto against the better of dense and events, {len(wall)} cases: median "
            f"{statistics.median(wall):.2f}, least {min(wall):.2f} by the clock; median "
            f"{statistics.median(cpu):.2f}, least {min(cpu):.2f} in CPU time"
        )
    print(f"\nthreads {rows[0]['threads']}, {rows[0]['machine']}, {rows[0]['versions']}")
    print(f"commits {', '.join(sorted({r['commit'] for r in rows}))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
