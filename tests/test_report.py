"""The report: all sections, escaping, refusals; in a real browser no error, tables that sort."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_domains import residual

from ranvier.sim import report_parts as parts
from ranvier.sim.report import KINDS, formatted, render, write_report
from ranvier.train.errors import FormatError

EVIL = '<script>alert("1")</script> & {braces}'
RNG = np.random.default_rng(0)
VOID = {"meta", "img", "br", "link", "input", "hr"}
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --enable-logging=stderr"
).split()


def example(name: str = "ms") -> dict:
    """Data with every kind of section, JSON-able."""
    spikes = {f"{name}.n{i}": RNG.random((6, 4, 8, 8)) < 0.2 for i in range(2)}
    others = {k: v ^ (RNG.random(v.shape) < 0.05) for k, v in spikes.items()}
    columns = [
        parts.column("join", "join"),
        parts.column("acc", "accuracy", ".1%", basis="measured"),
    ]
    rows = [
        {"join": name, "acc": {"value": 0.9, "low": 0.88, "high": 0.92}},
        {"join": "or", "acc": 0.101},
        {"join": "sew", "acc": {"value": 1.0, "tone": "good"}},
        {"join": "vanilla", "acc": None},
    ]
    edges = np.linspace(-1, 1, 11)
    counts = RNG.integers(0, 9, 10).tolist()
    sections = [
        {"kind": "text", "title": name, "paragraphs": [name]},
        parts.table("Verdict", columns, rows, note=name),
        parts.network(residual("sew", 3, "conv")),
        parts.rasters(spikes, others, ("both", "float only", name)),
        parts.rate_maps({k: v[:, None] for k, v in spikes.items()}),
        {"kind": "histograms", "title": "w", "basis": "measured", "histograms": [
            {"name": name, "edges": edges.tolist(), "before": counts, "after": counts[::-1]}]},
        {"kind": "cores", "title": "c", "basis": "modelled", "chip": name, "n_cores": 2, "limit": 8,
         "cores": [{"use": {name: 0.5, "b": 0.4}}, {"use": {"b": 1.0}}],
         "resources": [{"name": name, "used": 9, "limit": 8}]},
        parts.energy_bars({name: {"a": 1.0, name: 3.0}}),
        parts.curves("lines", [name, "b"], {name: [0.5, None], "x": [0.1, 0.2]}, format=".0%"),
        {"kind": "matrix", "title": "m", "rows": [name, 1], "columns": [0, name],
         "values": [[5, 1], [0, 4]]},
    ]  # fmt: skip
    data = {"title": name, "subtitle": name, "summary": [name], "sections": sections}
    return json.loads(
        json.dumps({**data, "provenance": parts.provenance(name, digests={name: name})})
    )


class Strict(HTMLParser):
    """Refuses tags that do not nest; keeps what was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_every_kind_is_shown_and_nests():
    data = example()
    assert {s["kind"] for s in data["sections"]} == set(KINDS)
    parser = Strict()
    parser.feed(render(data))
    assert parser.open == []
    assert parser.seen.count("section") == len(data["sections"])
    assert {"svg", "img", "table", "dl"} <= set(parser.seen)


def test_everything_is_escaped():
    page = render(example(EVIL))
    assert "alert(" in page and "<script>alert" not in page
    assert page.count("<script>") == 1
    parser = Strict()
    parser.feed(page)
    assert parser.open == []


def test_nothing_is_fetched():
    page = render(example())
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:|#)", page)
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_pure():
    assert render(example_fixed()) == render(example_fixed())


def example_fixed() -> dict:
    return {"title": "t", "sections": [parts.network(residual("ms", 2))]}


def test_labels_say_where_figures_come_from():
    page = render(example())
    for basis in ("measured", "simulated", "modelled", "inferred"):
        assert f'class="badge {basis}"' in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": None}, "no 'title'"),
        ({"sections": [{"kind": "pie", "title": "x"}]}, "kind 'pie'"),
        ({"sections": [{"kind": "text"}]}, "no title"),
        ({"sections": [{"kind": "table", "title": "x"}]}, "'columns'"),
        (
            {"sections": [{"kind": "text", "title": "x", "paragraphs": [], "basis": "guessed"}]},
            "guessed",
        ),
    ],
)
def test_refusals(change, message):
    data = {**example_fixed(), **change}
    data = {k: v for k, v in data.items() if v is not None}
    with pytest.raises(FormatError, match=message):
        render(data)


def test_formatted():
    assert formatted(0.5, ".0%") == "50\u202f%"
    assert (formatted(None), formatted(True), formatted(1234.0, ",d")) == ("–", "yes", "1,234")


def test_wires_carry_their_domain():
    section = parts.network(residual("ms", 3, "conv"))
    found = {(e["source"], e["target"]): e["domain"] for e in section["edges"]}
    assert found["b0.top", "b0.conv"] == "binary"
    assert found["b0.join", "b1.short"] == "real"
    assert found["b0.join", "b1.top"] == "current"


def test_png_holds_its_pixels():
    """Decoded by hand: the image data inflates to a filter byte and a row of codes, each row."""
    import base64
    import zlib

    from ranvier.sim.report_svg import RASTER, png

    codes = np.array([[0, 1, 2], [3, 0, 1]], np.uint8)
    raw = base64.b64decode(png(codes, RASTER).split(",")[1])
    start = raw.index(b"IDAT") + 4
    rows = np.frombuffer(zlib.decompress(raw[start:]), np.uint8).reshape(2, 4)
    np.testing.assert_array_equal(rows[:, 1:], codes)


def browse(page: Path, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    browser = next(
        (b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None
    )
    if browser is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


SORT = """<script>
var b = document.querySelectorAll("table.sortable th button")[1];
document.body.dataset.asc = (b.click(), order());
document.body.dataset.desc = (b.click(), order());
document.getElementById("theme").click();
function order() { return Array.from(b.closest("table").tBodies[0].rows).map(function (r) {
  return r.cells[0].textContent; }).join(" "); }
</script>"""


def test_in_a_browser(tmp_path):
    page = tmp_path / "report.html"
    write_report(example(), page)
    page.write_text(page.read_text().replace("</body>", SORT + "</body>"))
    done = browse(page, tmp_path, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert 'data-asc="or ms sew vanilla"' in done.stdout  # by value, what is missing last
    assert 'data-desc="vanilla sew ms or"' in done.stdout
    assert re.search(r'<html[^>]*data-theme="(dark|light)"', done.stdout)


def test_the_browser_reports_errors(tmp_path):
    """The control: a page with a broken script, and one that asks the network, are noticed."""
    page = tmp_path / "bad.html"
    broken = '<script>nothing.here()</script><img src="https://example.org/x.png">'
    page.write_text(render(example()).replace("</body>", broken + "</body>"))
    seen = browse(page, tmp_path, "--dump-dom").stderr
    assert "nothing is not defined" in seen and "Content Security Policy" in seen
