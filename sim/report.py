# ruff: noqa: E501 - markup is easier to read unbroken
"""The report: one HTML file that needs nothing else, a pure function of a JSON-able value.

    data = {
        "title": str, "subtitle": str,
        "summary": [str, ...],                  # paragraphs under the title
        "sections": [section, ...],             # in the order in which they are shown
        "provenance": {str: str | number | list | {...}},    # versions, digests, seeds, command
    }

A section is `{"kind", "title", "basis", "note"?, "folded"?, ...}`. `folded` is what to click on to see
it, where it is hidden at first. `basis` says where its figures come
from: "measured" (counted or timed on what really ran), "simulated" (by an engine of this project),
"modelled" (counts times somebody's constants), "inferred" (proved from the graph). What else it holds
depends on its kind; `ranvier.sim.report_parts` makes sections from graphs, programs and runs:

    text       {"paragraphs": [str]}
    table      {"columns": [{"key", "label", "format"?, "align"?, "help"?, "basis"?}], "rows": [{key: cell}]};
               a cell is a value, or {"value", "text"?, "low"?, "high"?, "tone"?, "help"?};
               format is a python format specification; tone is good, warn, bad or a domain
    network    {"nodes": [{"name", "type", "detail", "shape", "domain", "text", "verdict"?}],
               "edges": [{"source", "target", "domain", "text"}]}; domain is binary, ternary,
               integer, real, or current: real where no layer reads it
    rasters    {"rasters": [{"name", "steps", "neurons", "codes": [[int]], "caption"?}],
               "legend"?: [str]}; codes [steps][neurons]: 0 silent, else the n-th entry of the legend
    maps       {"maps": [{"name", "channels", "height", "width", "values": [float], "caption"?}]}; 0..1
    histograms {"histograms": [{"name", "edges": [float], "before": [int], "after": [int], "caption"?}],
               "labels"?: [str, str]}
    cores      {"chip", "n_cores", "limit", "cores": [{"use": {population: share}, "help"?}], "resources":
               [{"name", "used", "limit"}]}
    bars       {"unit", "groups": [{"name", "note"?, "bars": [{"name", "value", "text"?, "help"?, "basis"?}]}]}
    lines      {"x": [str], "x_label"?, "y_label"?, "series": [{"name", "values": [float | None]}], "lo"?, "hi"?,
               "format"?}
    matrix     {"rows": [str], "columns": [str], "values": [[int]], "row_label"?, "column_label"?}
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from ranvier.sim import report_network, report_svg
from ranvier.sim.report_page import PAGE, SCRIPT, STYLE
from ranvier.train.errors import FormatError

Section = Mapping[str, Any]
BASES = {
    "measured": "counted or timed on what really ran",
    "simulated": "computed by an engine of this project",
    "modelled": "counts multiplied by published constants",
    "inferred": "proved from the graph, nothing was run",
}
TONES = ("good", "warn", "bad", "binary", "ternary", "integer", "real")


def render(data: Mapping[str, Any]) -> str:
    """The whole page. Raises FormatError where `data` is not as described above."""
    for key in ("title", "sections"):
        if key not in data:
            raise FormatError(f"report: data has no '{key}'; see ranvier.sim.report")
    sections = data["sections"]
    parts = [_section(i, s) for i, s in enumerate(sections)]
    links = "".join(
        f'<a href="#s{i}">{escape(str(s["title"]))}</a>'
        for i, s in enumerate(sections)
        if not s.get("folded")
    )
    summary = "".join(f"<p>{escape(str(p))}</p>" for p in data.get("summary", ()))
    return PAGE.format(
        title=escape(str(data["title"])),
        subtitle=escape(str(data.get("subtitle", ""))),
        summary=summary,
        links=links,
        body="\n".join(parts),
        provenance=_provenance(data.get("provenance", {})),
        style=STYLE,
        script=SCRIPT,
    )


def write_report(data: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes `render(data)` to `path`, atomically."""
    from ranvier.train.files import write_text

    write_text(path, render(data))


def _section(i: int, section: Section) -> str:
    kind = section.get("kind")
    if kind not in KINDS:
        raise FormatError(f"report: section {i} has kind '{kind}'; any of {', '.join(KINDS)}")
    if "title" not in section:
        raise FormatError(f"report: section {i} ({kind}) has no title")
    try:
        inside = KINDS[kind](section)
    except (KeyError, TypeError, IndexError) as error:
        raise FormatError(f"report: section '{section['title']}' ({kind}): {error!r}") from error
    note = f'<p class="note">{escape(str(section["note"]))}</p>' if section.get("note") else ""
    if section.get("folded"):
        inside = f"<details><summary>{escape(str(section['folded']))}</summary>{inside}</details>"
    head = f"<h2>{escape(str(section['title']))}{badge(section.get('basis'))}</h2>"
    return f'<section id="s{i}" class="card kind-{kind}">{head}{note}{inside}</section>'


def badge(basis: Any) -> str:
    """The small mark that says where figures come from; "" for none."""
    if basis is None:
        return ""
    if basis not in BASES:
        raise FormatError(f"report: basis '{basis}' is none of {', '.join(BASES)}")
    return f'<span class="badge {basis}" title="{escape(BASES[basis])}">{basis}</span>'


def _text(section: Section) -> str:
    return "".join(f"<p>{escape(str(p))}</p>" for p in section["paragraphs"])


def formatted(value: Any, spec: str = "") -> str:
    """A value as a table shows it; None is a dash.

    >>> formatted(0.9567, ".1%"), formatted(12345, ",d"), formatted(None), formatted(True)
    ('95.7\\u202f%', '12,345', '–', 'yes')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        text = format(int(value) if spec.endswith("d") else value, spec or "g")
        return text.replace("%", "\u202f%")
    return str(value)


def _cell(cell: Any, column: Section, align: str) -> str:
    full = cell if isinstance(cell, Mapping) else {"value": cell}
    value, spec = full.get("value"), column.get("format", "")
    text = str(full["text"]) if "text" in full else formatted(value, spec)
    tone = full.get("tone", "")
    if tone and tone not in TONES:
        raise FormatError(f"report: tone '{tone}' is none of {', '.join(TONES)}")
    spread = ""
    if full.get("low") is not None and full.get("high") is not None:
        span = f"{formatted(full['low'], spec)} to {formatted(full['high'], spec)}"
        spread = f'<span class="spread">{escape(span)}</span>'
    key = f"{float(value):.12g}" if isinstance(value, (int, float)) else str(value or text)
    inside = f'<span class="tone {tone}">{escape(text)}</span>' if tone else escape(text)
    help_ = f' title="{escape(str(full["help"]))}"' if full.get("help") else ""
    return f'<td class="{escape(align)}" data-v="{escape(key)}"{help_}>{inside}{spread}</td>'


def _table(section: Section) -> str:
    columns, rows = section["columns"], section["rows"]
    heads, aligned = [], []
    for column in columns:
        first = next((r.get(column["key"]) for r in rows if r.get(column["key"]) is not None), "")
        value = first.get("value") if isinstance(first, Mapping) else first
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        align = column.get("align", "right" if number else "left")
        aligned.append(align)
        help_ = f' title="{escape(str(column["help"]))}"' if column.get("help") else ""
        mark = badge(column.get("basis"))
        heads.append(
            f'<th scope="col" class="{escape(align)}"{help_} aria-sort="none">'
            f'<button type="button">{escape(str(column["label"]))}</button>{mark}</th>'
        )
    body = "".join(
        f"<tr>{''.join(_cell(r.get(c['key']), c, a) for c, a in zip(columns, aligned, strict=True))}</tr>"
        for r in rows
    )
    return (
        '<div class="scroll"><table class="sortable"><thead><tr>'
        f"{''.join(heads)}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _provenance(entries: Mapping[str, Any]) -> str:
    return "".join(f"<dt>{escape(str(k))}</dt><dd>{_shown(v)}</dd>" for k, v in entries.items())


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{escape(str(k))}&nbsp;{_shown(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_shown(v) for v in value)
    return f"<code>{escape(str(value))}</code>"


KINDS: dict[str, Callable[[Section], str]] = {
    "text": _text,
    "table": _table,
    "network": report_network.network,
    "rasters": report_svg.rasters,
    "maps": report_svg.maps,
    "histograms": report_svg.histograms,
    "cores": report_svg.cores,
    "bars": report_svg.bars,
    "lines": report_svg.lines,
    "matrix": report_svg.matrix,
}
