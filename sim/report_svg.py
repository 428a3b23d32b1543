# ruff: noqa: E501 - markup is easier to read unbroken
"""The figures of a report: plain SVG, HTML and small PNG images, coloured by the page's own style."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

Section = Mapping[str, Any]
N_COLOURS = 8  # of the page's palette: classes c0 .. c7


def png(codes: np.ndarray, palette: np.ndarray) -> str:
    """A data URI of an image: codes [height, width] uint8 into palette [n, 4] (red, green, blue, alpha)."""
    height, width = codes.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), codes.astype(np.uint8)], 1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"PLTE", palette[:, :3].astype(np.uint8).tobytes())
    parts += chunk(b"tRNS", palette[:, 3].astype(np.uint8).tobytes())
    parts += chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


# legible on white and on black: nothing, both / spike, only the first, only the second
RASTER = np.array([[0, 0, 0, 0], [72, 126, 214, 255], [230, 150, 30, 255], [214, 60, 100, 255]])
RAMP = np.array([[46, 112, 214, round(255 * (i / 255) ** 0.8)] for i in range(256)])


def figure(name: str, inside: str, caption: str = "") -> str:
    text = f" <span>{escape(caption)}</span>" if caption else ""
    return f"<figure><figcaption><b>{escape(name)}</b>{text}</figcaption>{inside}</figure>"


def rasters(section: Section) -> str:
    """Time downwards, neurons to the right; one image a population."""
    marks = "".join(
        f'<span class="key raster{i}">{escape(str(name))}</span>'
        for i, name in enumerate(section.get("legend", ()), 1)
    )
    legend = f'<div class="legend">{marks}</div>' if marks else ""
    drawn = []
    for r in section["rasters"]:
        codes = np.asarray(r["codes"], np.uint8).reshape(r["steps"], -1)
        high = max(6, min(14, 120 // max(1, len(codes)))) * len(codes)
        alt = f"spikes of {r['name']}, {r['steps']} steps, {r['neurons']} neurons"
        image = f'<img class="pixels frame" style="height:{high}px" alt="{escape(alt)}" src="{png(codes, RASTER)}">'
        drawn.append(figure(str(r["name"]), image, str(r.get("caption", ""))))
    return f"{legend}<div class='stack'>{''.join(drawn)}</div>"


def mosaic(values: np.ndarray) -> np.ndarray:
    """Channels [c, h, w] side by side in a nearly square grid, a pixel of 0 between them."""
    c, h, w = values.shape
    across = math.ceil(math.sqrt(c * h / w))
    down = math.ceil(c / across)
    out = np.zeros((down * (h + 1) - 1, across * (w + 1) - 1))
    for i in range(c):
        y, x = divmod(i, across)
        out[y * (h + 1) : y * (h + 1) + h, x * (w + 1) : x * (w + 1) + w] = values[i]
    return out


def maps(section: Section) -> str:
    """Firing rates, a tile a channel: empty is silent, full is a spike in every step."""
    drawn = []
    for m in section["maps"]:
        values = np.asarray(m["values"], float).reshape(m["channels"], m["height"], m["width"])
        codes = np.rint(255 * np.clip(mosaic(values), 0, 1)).astype(np.uint8)
        zoom = max(1, round(170 / max(codes.shape)))
        size = f"width:{codes.shape[1] * zoom}px;height:{codes.shape[0] * zoom}px"
        alt = f"firing rates of {m['name']}"
        image = f'<img class="pixels frame" style="{size}" alt="{escape(alt)}" src="{png(codes, RAMP)}">'
        drawn.append(figure(str(m["name"]), image, str(m.get("caption", ""))))
    scale = "".join(f'<i style="opacity:{(i / 8) ** 0.8:.2f}"></i>' for i in range(9))
    legend = f'<div class="legend">0 <span class="ramp">{scale}</span> 1 spike a step</div>'
    return f"{legend}<div class='tiles'>{''.join(drawn)}</div>"


def histograms(section: Section) -> str:
    """Two histograms over the same bins, one as an area, one as a line."""
    labels = section.get("labels", ("before", "after"))
    legend = (
        f'<div class="legend"><span class="key c0">{escape(str(labels[0]))}</span>'
        f'<span class="key c1">{escape(str(labels[1]))}</span></div>'
    )
    drawn = [
        figure(str(h["name"]), _histogram(h), str(h.get("caption", "")))
        for h in section["histograms"]
    ]
    return f"{legend}<div class='tiles'>{''.join(drawn)}</div>"


def _histogram(h: Section) -> str:
    width, height = 220, 80
    edges = [float(e) for e in h["edges"]]
    top = max(1, *h["before"], *h["after"])
    n = len(h["before"])

    def steps(counts: Sequence[int]) -> str:
        points = [(i, height - height * math.sqrt(c / top)) for i, c in enumerate(counts)]
        return "".join(f"L{i * width / n:.1f} {y:.1f}H{(i + 1) * width / n:.1f}" for i, y in points)

    area = f"M0 {height}{steps(h['before'])}L{width} {height}Z"
    line = f"M0 {height}{steps(h['after'])}L{width} {height}"
    return (
        f'<svg class="frame" viewBox="0 0 {width} {height + 16}" width="{width}" height="{height + 16}">'
        f'<path class="area c0" d="{area}"/><path class="line c1" d="{line}"/>'
        f'<text x="1" y="{height + 13}">{edges[0]:.3g}</text>'
        f'<text x="{width - 1}" y="{height + 13}" text-anchor="end">{edges[-1]:.3g}</text></svg>'
    )


def cores(section: Section) -> str:
    """Every core of the chip as a square: filled by how full it is, coloured by population."""
    used = section["cores"]
    names = list(dict.fromkeys(name for core in used for name in core["use"]))
    colour = {name: _shade(i) for i, name in enumerate(names)}
    total = max(section["limit"], len(used))
    across, side = 16, 26
    squares = []
    for i in range(total):
        x, y = (i % across) * (side + 4) + 1, (i // across) * (side + 4) + 1
        core = used[i] if i < len(used) else {"use": {}}
        squares.append(_core(i, core, colour, x, y, side))
    high = math.ceil(total / across) * (side + 4) + 1
    keys = "".join(f'<span class="key {colour[n]}">{escape(str(n))}</span>' for n in names)
    meters = "".join(_meter(r) for r in section.get("resources", ()))
    head = f"{section['n_cores']} of {section['limit']} cores of {section['chip']}"
    return (
        f'<p class="lead">{escape(head)}</p><div class="legend">{keys}</div>'
        f'<div class="cores"><svg viewBox="0 0 {across * (side + 4)} {high}" role="img" '
        f'aria-label="{escape(head)}">{"".join(squares)}</svg><div class="meters">{meters}</div></div>'
    )


def _shade(i: int) -> str:
    """The classes of the i-th population: the palette, then the palette paler, then paler still."""
    return f"c{i % N_COLOURS} pale{min(2, i // N_COLOURS)}"


def _core(i: int, core: Section, colour: Mapping[str, str], x: float, y: float, side: float) -> str:
    title = (
        core.get("help")
        or ", ".join(f"{n} {100 * u:.0f} %" for n, u in core["use"].items())
        or "free"
    )
    parts, bottom = (
        [f'<rect class="core" x="{x}" y="{y}" width="{side}" height="{side}" rx="3"/>'],
        y + side,
    )
    for name, share in core["use"].items():
        high = side * min(1.0, float(share))
        bottom -= high
        parts.append(
            f'<rect class="{colour[name]}" x="{x}" y="{bottom:.1f}" width="{side}" height="{high:.1f}"/>'
        )
    return f"<g>{''.join(parts)}<title>core {i}: {escape(str(title))}</title></g>"


def _meter(resource: Section) -> str:
    share = resource["used"] / resource["limit"] if resource["limit"] else 0.0
    tone = "bad" if share > 1 else ("warn" if share > 0.9 else "fine")
    text = f"{resource['used']:,} of {resource['limit']:,}"
    return (
        f'<div class="meter"><span>{escape(str(resource["name"]).replace("_", " "))}</span>'
        f'<span class="track"><i class="{tone}" style="width:{100 * min(1, share):.1f}%"></i></span>'
        f"<span>{escape(text)}</span></div>"
    )


def amount(value: float) -> str:
    """Four digits, without powers of ten.

    >>> amount(24391.7), amount(20.671), amount(0.001234)
    ('24,392', '20.67', '0.001234')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def bars(section: Section) -> str:
    """Horizontal bars; each group has its own scale, since models do not compare."""
    from ranvier.sim.report import badge

    drawn = []
    for i, group in enumerate(section["groups"]):
        top = max((b["value"] or 0.0 for b in group["bars"]), default=0.0) or 1.0
        rows = []
        for bar in group["bars"]:
            value = bar["value"]
            text = bar.get("text") or (
                "–" if value is None else f"{amount(value)} {section.get('unit', '')}"
            )
            help_ = f' title="{escape(str(bar["help"]))}"' if bar.get("help") else ""
            width = 0.0 if value is None else 100 * value / top
            rows.append(
                f'<div class="bar"{help_}><span>{escape(str(bar["name"]))}{badge(bar.get("basis"))}</span>'
                f'<span class="track"><i class="c{i % N_COLOURS}" style="width:{width:.2f}%"></i></span>'
                f'<span class="value">{escape(str(text))}</span></div>'
            )
        note = f'<p class="note">{escape(str(group["note"]))}</p>' if group.get("note") else ""
        drawn.append(
            f"<div class='group'><h3>{escape(str(group['name']))}</h3>{note}{''.join(rows)}</div>"
        )
    return "".join(drawn)


def lines(section: Section) -> str:
    """Curves over named places, such as the agreement of each layer; every second one is dashed, so that
    curves that coincide are both seen."""
    from ranvier.sim.report import formatted

    x, series, spec = section["x"], section["series"], section.get("format", ".3g")
    seen = [v for s in series for v in s["values"] if v is not None]
    marks = ticks(
        section.get("lo", min(seen, default=0.0)), section.get("hi", max(seen, default=1.0))
    )
    lo, hi = marks[0], marks[-1]
    left, width, high = 74, max(560, 62 * len(x)), 210

    def at(i: int, v: float) -> tuple[float, float]:
        return left + (i + 0.5) * width / len(x), 10 + high * (1 - (v - lo) / (hi - lo))

    grid = []
    for v in marks:
        y = at(0, v)[1]
        grid.append(f'<path class="grid" d="M{left} {y:.1f}H{left + width}"/>')
        grid.append(
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(formatted(v, spec))}</text>'
        )
    longest = max((len(str(n)) for n in x), default=0)
    turn = longest * 7 > width / max(1, len(x))
    placed = "rotate(24)" if turn else ""
    anchor = "start" if turn else "middle"
    names = [
        f'<text transform="translate({at(i, lo)[0]:.1f} {high + 26}) {placed}" text-anchor="{anchor}">'
        f"{escape(str(n))}</text>"
        for i, n in enumerate(x)
    ]
    over = sorted(enumerate(series), key=lambda pair: pair[0] % 2)  # dashes lie over whole lines
    curves = [_curve(s, k, x, at, spec) for k, s in over]
    below = high + 26 + (5 * longest // 2 + 16 if turn else 22)
    names.append(
        f'<text class="axis" x="{left + width / 2:.0f}" y="{below}" text-anchor="middle">'
        f"{escape(str(section.get('x_label', '')))}</text>"
        f'<text class="axis" transform="translate(14 {10 + high / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(str(section.get("y_label", "")))}</text>'
    )
    keys = "".join(
        f'<span class="key c{k % N_COLOURS}">{escape(str(s["name"]))}</span>'
        for k, s in enumerate(series)
    )
    total_w, total_h = left + width + 60, below + 8
    return (
        f'<div class="legend">{keys}</div><div class="scroll"><svg class="chart" width="{total_w}" '
        f'height="{total_h}" viewBox="0 0 {total_w} {total_h}" role="img" '
        f'aria-label="{escape(str(section["title"]))}">{"".join(grid + names + curves)}</svg></div>'
    )


def ticks(lo: float, hi: float) -> list[float]:
    """Four to eight round numbers from lo (or just below) to hi (or just above).

    >>> ticks(0.57, 1.0), ticks(-4.2, 3.0)
    ([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0])
    """
    span = hi - lo if hi > lo else 1.0
    unit = 10.0 ** math.floor(math.log10(span / 4))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 6)
    first, last = math.floor(lo / step + 1e-9), math.ceil(max(hi, lo + step) / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _curve(series: Section, k: int, x: Sequence[Any], at: Any, spec: str) -> str:
    from ranvier.sim.report import formatted

    parts, path, pen = [], "", "M"
    for i, v in enumerate(series["values"]):
        if v is None:
            pen = "M"
            continue
        px, py = at(i, v)
        path += f"{pen}{px:.1f} {py:.1f}"
        pen = "L"
        title = escape(f"{series['name']}, {x[i]}: {formatted(v, spec)}")
        parts.append(
            f'<circle class="c{k % N_COLOURS}" cx="{px:.1f}" cy="{py:.1f}" r="{4 if k % 2 else 3}">'
            f"<title>{title}</title></circle>"
        )
    dash = ' stroke-dasharray="7 5"' if k % 2 else ""
    return f'<path class="line c{k % N_COLOURS}"{dash} d="{path}"/>{"".join(parts)}'


def matrix(section: Section) -> str:
    """Counts in a square, darker for more."""
    values = section["values"]
    off = [v for i, row in enumerate(values) for j, v in enumerate(row) if i != j] or [0]
    top = max(1, *off)
    heads = "".join(f"<th>{escape(str(c))}</th>" for c in section["columns"])
    body = []
    for i, (name, row) in enumerate(zip(section["rows"], values, strict=True)):
        cells = "".join(_count(v, i == j, top) for j, v in enumerate(row))
        body.append(f"<tr><th>{escape(str(name))}</th>{cells}</tr>")
    corner = f"{section.get('row_label', '')} \\ {section.get('column_label', '')}"
    return (
        f'<div class="scroll"><table class="matrix"><thead><tr><th>{escape(corner)}</th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _count(v: int, same: bool, top: int) -> str:
    shade = 0.0 if same or not v else 0.25 + 0.75 * v / top
    kind = "same" if same else "off"
    return (
        f'<td class="{kind}"><i style="opacity:{shade:.2f}"></i><span>{v if v else ""}</span></td>'
    )
