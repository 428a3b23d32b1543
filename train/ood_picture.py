"""Curves of out-of-distribution trainings as one HTML page of plain SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, TOP = 420, 220, 44, 26
COLORS = {
    "erm": "#c0392b", "irm": "#2471a3", "irm-mlp": "#148f77", "similarity-trains": "#7d3c98",
    "similarity-rates": "#d68910",
}  # fmt: skip
STYLE = """body{font:14px system-ui,sans-serif;margin:24px;color:#222;background:#fff}
svg{margin:0 12px 12px 0} .key{margin-right:16px} .key b{display:inline-block;width:22px;height:3px;
vertical-align:middle;margin-right:6px} @media (prefers-color-scheme:dark){body{color:#ddd;
background:#1b1b1b}} text{fill:currentColor;font-size:11px} .grid{stroke:currentColor;opacity:.18}"""

Curve = list[tuple[float, float]]


def page(records: Sequence[dict[str, Any]]) -> str:
    """One section a gap: accuracy in training, in the test, and similarity; means over the seeds."""
    sections = []
    for gap in dict.fromkeys(r["gap"] for r in records):
        here = [r for r in records if r["gap"] == gap]
        methods = list(dict.fromkeys(r["method"] for r in here))
        keys = "".join(
            f'<span class="key"><b style="background:{COLORS[m]}"></b>{escape(m)}</span>'
            for m in methods
        )
        panels = "".join(
            panel(title, {m: mean_curve([r for r in here if r["method"] == m], keys_of)
                          for m in methods}, top)
            for title, keys_of, top in (
                ("training accuracy, mean of both environments", ("env1", "env2"), 1.0),
                ("test accuracy (colors reversed)", ("test",), 1.0),
                ("similarity of paired output trains, cosine", ("similarity",), 1.0),
            )
        )  # fmt: skip
        sections.append(
            f"<h2>color flips {escape(gap.replace('-', '/'))} %</h2><p>{keys}</p>{panels}"
        )
    head = '<!doctype html><meta charset="utf-8"><title>Colored MNIST</title>'
    text = "<p>Epochs run to the right, each run scaled to its own number of them.</p>"
    return f"{head}<style>{STYLE}</style><h1>Colored MNIST</h1>{text}{''.join(sections)}\n"


def mean_curve(records: Sequence[dict[str, Any]], keys: Sequence[str]) -> Curve:
    """(share of the training done, mean over keys and seeds), a point an evaluated epoch."""
    curves = [
        [
            (row["epoch"] / r["result"]["history"][-1]["epoch"], sum(row[k] for k in keys))
            for row in r["result"]["history"]
        ]
        for r in records
    ]
    n = min(map(len, curves), default=0)
    return [
        (curves[0][i][0], sum(c[i][1] for c in curves) / len(curves) / len(keys)) for i in range(n)
    ]


def panel(title: str, curves: dict[str, Curve], top: float) -> str:
    """One SVG: a line a method, 0 .. top upwards."""
    wide, high = WIDTH - LEFT - 10, HEIGHT - TOP - 14

    def at(x: float, y: float) -> str:
        return f"{LEFT + x * wide:.1f},{TOP + (1 - y / top) * high:.1f}"

    grid = "".join(
        f'<path class="grid" d="M{at(0, top * i / 4)} L{at(1, top * i / 4)}"/>'
        f'<text x="{LEFT - 6}" y="{TOP + (1 - i / 4) * high + 4:.1f}" text-anchor="end">'
        f"{top * i / 4:g}</text>"
        for i in range(5)
    )
    lines = "".join(
        f'<polyline fill="none" stroke="{COLORS[m]}" stroke-width="1.6" points="'
        + " ".join(at(x, y) for x, y in curve if math.isfinite(y))
        + '"/>'
        for m, curve in curves.items()
    )
    label = f'<text x="{LEFT}" y="14">{escape(title)}</text>'
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg {size} role="img" aria-label="{escape(title)}">{label}{grid}{lines}</svg>'
