# ruff: noqa: E501 - markup is easier to read unbroken
"""The network as a picture: one row a node, wires on the left in the colour of their domain."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

ROW = 24
BEND = 9  # how far an arc goes out for each level of nesting
DOMAINS = ("binary", "ternary", "integer", "real", "current")


def _levels(spans: list[tuple[int, int]]) -> list[int]:
    """For each wire (from row, to row) the level on which it meets no other: short ones first."""
    taken: list[list[tuple[int, int]]] = []
    found = [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda k: spans[k][1] - spans[k][0]):
        a, b = spans[i]
        level = 0
        while level < len(taken) and any(a < d and c < b for c, d in taken[level]):
            level += 1
        if level == len(taken):
            taken.append([])
        taken[level].append((a, b))
        found[i] = level
    return found


def _domain(edge: Mapping[str, Any]) -> str:
    return str(edge["domain"]) if edge["domain"] in DOMAINS else "real"


def _wire(edge: Mapping[str, Any], a: int, b: int, x: float, bend: float) -> str:
    y0, y1 = a * ROW + ROW / 2, b * ROW + ROW / 2
    title = escape(f"{edge['source']} -> {edge['target']}: {edge['text']}")
    if bend == 0:
        path = f"M{x:g} {y0:g}V{y1:g}"
    else:
        r = min(bend, abs(y1 - y0) / 2)
        out, turn = x - bend, r if y1 > y0 else -r
        path = f"M{x:g} {y0:g}Q{out:g} {y0:g} {out:g} {y0 + turn:g}V{y1 - turn:g}Q{out:g} {y1:g} {x:g} {y1:g}"
    return f'<path class="wire {_domain(edge)}" d="{path}"><title>{title}</title></path>'


def network(section: Mapping[str, Any]) -> str:
    nodes, edges = section["nodes"], section["edges"]
    place = {n["name"]: i for i, n in enumerate(nodes)}
    rows = [(place[e["source"]], place[e["target"]]) for e in edges]
    skips = [i for i, (a, b) in enumerate(rows) if b != a + 1]
    levels = dict(zip(skips, _levels([(min(rows[i]), max(rows[i])) for i in skips]), strict=True))
    gutter = 14 + BEND * (2 + max(levels.values(), default=-1))
    wires = [
        _wire(e, *rows[i], gutter, BEND * (levels[i] + 1.2) if i in levels else 0)
        for i, e in enumerate(edges)
    ]
    dots = [
        f'<circle class="dot" cx="{gutter}" cy="{i * ROW + ROW / 2:g}" r="4"/>'
        for i in range(len(nodes))
    ]
    height = ROW * len(nodes)
    drawing = (
        f'<svg class="wires" width="{gutter + 12}" height="{height}" role="img" '
        f'aria-label="wires of the network">{"".join(wires)}{"".join(dots)}</svg>'
    )
    return (
        f"{_legend()}<div class='scroll tall'><div class='net'>{drawing}<div class='rows'>"
        f"{''.join(_row(n) for n in nodes)}</div></div></div>"
    )


def _row(node: Mapping[str, Any]) -> str:
    domain, verdict = _domain(node), node.get("verdict")
    said = ""
    if verdict:
        tone = {"accumulate-only": "good", "graded accumulate": "warn"}.get(verdict["kind"], "bad")
        mark = " (stem)" if verdict.get("stem") else ""
        said = (
            f'<span class="tone {tone}" title="{escape(str(verdict["reason"]))}">'
            f"{escape(str(verdict['kind']))}{mark}</span>"
        )
    detail = " ".join(str(node[k]) for k in ("type", "detail") if node.get(k))
    return (
        f'<div class="row"><span class="name">{escape(str(node["name"]))}</span>'
        f'<span class="what">{escape(detail)}</span>'
        f'<span class="shape">{escape(str(node["shape"]))}</span>'
        f'<span class="carries {domain}" title="{escape(str(node["text"]))}">{escape(str(node["text"]))}'
        f"</span>{said}</div>"
    )


def _legend() -> str:
    marks = "".join(f'<span class="key {d}">{d}</span>' for d in DOMAINS)
    marks += " (a current, or a membrane: real, but no layer reads it)"
    return f'<div class="legend">a wire carries {marks}</div>'
