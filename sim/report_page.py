# ruff: noqa: E501 - markup is easier to read unbroken
"""The page around a report: markup, style (light and dark) and the script that sorts its tables."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<div class="top"><p class="brand">ranvier</p><button id="theme" type="button" aria-label="switch between light and dark">light / dark</button></div>
<h1>{title}</h1>
<p class="subtitle">{subtitle}</p>
<div class="summary">{summary}</div>
<nav>{links}</nav>
</header>
<main>
{body}
</main>
<footer><h2>Where this comes from</h2><dl>{provenance}</dl></footer>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root{color-scheme:light dark}
:root,:root[data-theme=light]{
--bg:#f6f6f3;--card:#fff;--line:#e2e2dc;--text:#1d2127;--soft:#5e6670;--accent:#2a62c4;
--binary:#0b8263;--ternary:#2a78d6;--integer:#b06c00;--real:#c2305a;
--good:#0b7a4b;--warn:#9a6200;--bad:#bd2a45;
--c0:#3f7fd9;--c1:#d9822b;--c2:#1d9a73;--c3:#b7507f;--c4:#7d63c9;--c5:#7c8a2b;--c6:#2f97a8;--c7:#8a6b52}
@media (prefers-color-scheme:dark){:root:not([data-theme=light]){
--bg:#121417;--card:#1a1d22;--line:#2e333b;--text:#e7e8e6;--soft:#9aa3ad;--accent:#7db0ff;
--binary:#3ec79c;--ternary:#6ab0ff;--integer:#e5a93a;--real:#f2759a;
--good:#4cc38a;--warn:#e5a93a;--bad:#f2758a;
--c0:#6aa3f5;--c1:#eea15a;--c2:#46c39b;--c3:#dc7fae;--c4:#a891ee;--c5:#aebb58;--c6:#5fc3d3;--c7:#bb9a80}}
:root[data-theme=dark]{
--bg:#121417;--card:#1a1d22;--line:#2e333b;--text:#e7e8e6;--soft:#9aa3ad;--accent:#7db0ff;
--binary:#3ec79c;--ternary:#6ab0ff;--integer:#e5a93a;--real:#f2759a;
--good:#4cc38a;--warn:#e5a93a;--bad:#f2758a;
--c0:#6aa3f5;--c1:#eea15a;--c2:#46c39b;--c3:#dc7fae;--c4:#a891ee;--c5:#aebb58;--c6:#5fc3d3;--c7:#bb9a80;
color-scheme:dark}
:root[data-theme=light]{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:15px/1.55 system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,main,footer{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:22px}
.top{display:flex;justify-content:space-between;align-items:center}
.brand{margin:0;font-weight:600;letter-spacing:.04em;color:var(--soft)}
h1{font-size:28px;line-height:1.2;margin:14px 0 4px}
h2{font-size:18px;margin:0 0 6px;display:flex;flex-wrap:wrap;gap:10px;align-items:center}
h3{font-size:14px;margin:10px 0 4px}
.subtitle{margin:0 0 10px;color:var(--soft)}
.summary{max-width:78ch}.summary p{margin:6px 0}
nav{display:flex;flex-wrap:wrap;gap:6px 16px;margin:14px 0 6px;font-size:14px}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer}
#theme{border:1px solid var(--line);border-radius:6px;padding:2px 10px;font-size:13px;color:var(--soft);background:var(--card)}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px;margin:16px 0}
.note{margin:0 0 10px;color:var(--soft);max-width:90ch;font-size:14px}
summary{cursor:pointer;color:var(--accent);font-size:14px}details[open] summary{margin-bottom:8px}
.lead{margin:2px 0 8px}
.badge{font-size:11px;font-weight:500;line-height:1;padding:3px 7px;border-radius:9px;border:1px solid currentColor;color:var(--soft);white-space:nowrap}
.badge.measured{color:var(--good)}.badge.simulated{color:var(--accent)}.badge.modelled{color:var(--warn)}
th .badge{margin-left:6px;font-size:10px;padding:2px 5px}
.scroll{overflow-x:auto}.tall{max-height:660px;overflow-y:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.sortable th{text-align:left;font-size:13px;font-weight:600;color:var(--soft);border-bottom:1px solid var(--line);padding:6px 10px;vertical-align:bottom}
.sortable th.right{text-align:right}
.sortable th button{font-weight:600;text-align:inherit}
.sortable th button:hover{color:var(--accent)}
.sortable th[aria-sort=ascending] button::after{content:" \\2191"}
.sortable th[aria-sort=descending] button::after{content:" \\2193"}
.sortable td{padding:7px 10px;border-bottom:1px solid var(--line);vertical-align:top}
.sortable tbody tr:last-child td{border-bottom:0}
.sortable tbody tr:hover{background:color-mix(in srgb,var(--accent) 6%,transparent)}
td:first-child{white-space:nowrap}td.right{text-align:right;white-space:nowrap}td.center,th.center{text-align:center}
.spread{display:block;font-size:12px;color:var(--soft)}
.tone{font-weight:500;white-space:nowrap}
svg text.axis{font-size:12px}
.tone.good{color:var(--good)}.tone.warn{color:var(--warn)}.tone.bad{color:var(--bad)}
.tone.binary,.carries.binary{color:var(--binary)}.tone.ternary,.carries.ternary{color:var(--ternary)}
.tone.integer,.carries.integer{color:var(--integer)}.tone.real,.carries.real{color:var(--real)}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:center;font-size:13px;color:var(--soft);margin:2px 0 10px}
.key::before{content:"";display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px;background:currentColor}
.key.binary{color:var(--binary)}.key.ternary{color:var(--ternary)}.key.integer{color:var(--integer)}.key.real{color:var(--real)}
.key.raster1{color:#487ed6}.key.raster2{color:#e6961e}.key.raster3{color:#d63c64}
.net{display:flex;min-width:720px}
.key.current{color:color-mix(in srgb,var(--soft) 55%,transparent)}.wire.current{stroke:color-mix(in srgb,var(--soft) 45%,transparent)}.carries.current{color:var(--soft)}
.wires{flex:none}.wire{fill:none;stroke-width:2.2}
.wire.binary{stroke:var(--binary)}.wire.ternary{stroke:var(--ternary)}.wire.integer{stroke:var(--integer);stroke-width:3}.wire.real{stroke:var(--real);stroke-width:3}
.dot{fill:var(--card);stroke:var(--text);stroke-width:1.6}
.rows{flex:1;min-width:0}
.row{height:24px;display:grid;grid-template-columns:minmax(150px,1.2fr) minmax(170px,1.3fr) 110px minmax(140px,1.2fr) 170px;gap:10px;align-items:center;font-size:13px;white-space:nowrap}
.row>span{overflow:hidden;text-overflow:ellipsis}
.row .name{font-weight:600}.row .what,.row .shape{color:var(--soft)}
.row:hover{background:color-mix(in srgb,var(--accent) 7%,transparent)}
figure{margin:0}figcaption{font-size:13px;margin-bottom:3px}figcaption span{color:var(--soft)}
.stack{display:grid;gap:12px}.stack .frame{width:100%}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(225px,1fr));gap:18px 22px}.tiles figcaption b{overflow-wrap:anywhere}.tiles figcaption span{display:block}.tiles svg{max-width:100%}
.pixels{image-rendering:pixelated;display:block}
.frame{border:1px solid var(--line);border-radius:3px;background:color-mix(in srgb,var(--text) 3%,transparent)}
.ramp{display:inline-flex;border:1px solid var(--line)}.ramp i{width:14px;height:10px;background:#2e70d6}
svg text{fill:var(--soft);font-size:11px}
.line{fill:none;stroke-width:2}.area{opacity:.45}
.grid{stroke:var(--line)}
.core{fill:color-mix(in srgb,var(--text) 6%,transparent);stroke:var(--line)}
.cores{display:flex;flex-wrap:wrap;gap:20px;align-items:flex-start}.cores svg{width:480px;max-width:100%}
.meters{flex:1;min-width:300px;display:grid;gap:8px}
.pale1{opacity:.62}.pale2{opacity:.35}
.meter,.bar{display:grid;grid-template-columns:minmax(120px,230px) 1fr 190px;gap:12px;align-items:center;font-size:13px;margin:4px 0}
.track{height:12px;border-radius:6px;background:color-mix(in srgb,var(--text) 8%,transparent);overflow:hidden;display:block}
.track i{display:block;height:100%;border-radius:6px;background:var(--accent)}
.track i.warn{background:var(--warn)}.track i.bad{background:var(--bad)}
.meter span:last-child{text-align:right;font-variant-numeric:tabular-nums}.bar .value{text-align:right;font-variant-numeric:tabular-nums}.bar .badge{margin-left:8px}
.matrix{width:auto;font-size:13px}.matrix th{font-weight:500;color:var(--soft);padding:2px 6px;text-align:right}
.matrix td{position:relative;width:36px;height:26px;text-align:center;border:1px solid var(--line)}
.matrix td i{position:absolute;inset:0;background:var(--bad)}.matrix td span{position:relative}
.matrix td.same{color:var(--soft)}
footer{padding-bottom:40px}footer h2{margin-top:26px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;font-size:13px;margin:6px 0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}code{font-family:ui-monospace,Consolas,monospace;font-size:12px}
@media print{#theme,nav{display:none}.card{break-inside:avoid}.tall{max-height:none}}
"""
STYLE += "".join(
    f".c{i}{{color:var(--c{i})}}svg .c{i}{{fill:var(--c{i})}}svg .line.c{i}{{fill:none;stroke:var(--c{i})}}"
    f".track i.c{i}{{background:var(--c{i})}}\n"
    for i in range(8)
)
STYLE += ".key{white-space:nowrap}.legend .key{font-weight:500}\n"

SCRIPT = """
(function () {
  "use strict";
  var root = document.documentElement;
  document.getElementById("theme").addEventListener("click", function () {
    var dark = root.dataset.theme ? root.dataset.theme === "dark"
      : window.matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  function value(row, i) {
    var v = row.cells[i].dataset.v, n = Number(v);
    return v !== "" && !Number.isNaN(n) ? n : v;
  }
  function order(a, b) {
    if (typeof a === typeof b) { return a < b ? -1 : a > b ? 1 : 0; }
    return typeof a === "number" ? -1 : 1;
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    var heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach(function (head, i) {
      head.querySelector("button").addEventListener("click", function () {
        var up = head.getAttribute("aria-sort") !== "ascending", body = table.tBodies[0];
        heads.forEach(function (h) { h.setAttribute("aria-sort", "none"); });
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        Array.from(body.rows)
          .sort(function (r, s) { return (up ? 1 : -1) * order(value(r, i), value(s, i)); })
          .forEach(function (r) { body.appendChild(r); });
      });
    });
  });
})();
"""
