"""Sections of a report from the things they show: graphs, runs, weights, placements, counts."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ranvier.deploy.program import OneToOne, Program
from ranvier.export.domains import Domain, infer_domains, verdicts
from ranvier.export.graph import Graph, detail
from ranvier.export.nodes import Node
from ranvier.sim.ledger import Ledger

Section = dict[str, Any]
MAX_NEURONS = 512  # of a raster: more are thinned evenly, which the caption says
MAX_CHANNELS = 64  # of a rate map


def column(key: str, label: str, format: str = "", **more: Any) -> dict[str, Any]:
    """A column of a table: `more` is align, help or basis."""
    return {"key": key, "label": label, "format": format, **more}


def table(
    title: str, columns: Sequence[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]], **more: Any
) -> Section:
    """A table; `more` is basis or note."""
    return {"kind": "table", "title": title, "columns": list(columns), "rows": list(rows), **more}


def short(domain: Domain) -> str:
    """A domain in a few characters, for a wire.

    >>> short(Domain("integer", 0.0, 3.0, 1.0)), short(Domain("binary", 0.0, 1.0, 1.0))
    ('integer 0..3', 'binary')
    """
    if domain.kind in ("binary", "ternary"):
        return domain.kind if domain.hi > domain.lo else f"always {domain.lo:g}"
    if np.isinf(domain.lo) and np.isinf(domain.hi):
        return domain.kind
    return f"{domain.kind} {_bound(domain.lo)}..{_bound(domain.hi)}"


def _bound(x: float) -> str:
    return f"{x:.3g}".replace("inf", "∞")


def network(graph: Graph, title: str = "The network and what its wires carry") -> Section:
    """The graph drawn, each wire in the colour of its domain, each layer with its verdict."""
    domains, said = infer_domains(graph), verdicts(graph)

    def colour(source: str, targets: Sequence[str]) -> str:
        """A real value matters where a layer reads it; else it is a neuron's current."""
        kind = domains[source].kind
        return "current" if kind == "real" and not any(t in said for t in targets) else kind

    def row(node: Node) -> dict[str, Any]:
        verdict, domain = said.get(node.name), domains[node.name]
        shown: dict[str, Any] = {
            "name": node.name,
            "type": type(node).__name__,
            "detail": detail(node),
            "shape": "x".join(map(str, graph.shapes[node.name])),
            "domain": colour(node.name, graph.consumers[node.name]),
            "text": short(domain),
        }
        if verdict is not None:
            shown["verdict"] = {
                "kind": verdict.kind, "reason": verdict.reason, "stem": verdict.stem,
            }  # fmt: skip
        return shown

    edges = [
        {"source": s, "target": n.name, "domain": colour(s, [n.name]), "text": str(domains[s])}
        for n in graph
        for s in n.inputs
    ]
    note = "A row is a node, a wire on the left an edge. Hover over a verdict for the reason."
    rows = [row(n) for n in graph]
    return {
        "kind": "network", "title": title, "basis": "inferred", "note": note,
        "nodes": rows, "edges": edges,
    }  # fmt: skip


def _thinned(spikes: np.ndarray) -> tuple[np.ndarray, str]:
    """[time, neurons] with at most MAX_NEURONS columns, and the caption."""
    n = spikes.shape[1]
    if n <= MAX_NEURONS:
        return spikes, f"{n} neurons"
    pick = np.linspace(0, n - 1, MAX_NEURONS).round().astype(int)
    return spikes[:, pick], f"{MAX_NEURONS} of {n:,} neurons"


def rasters(
    spikes: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray] | None = None,
    legend: Sequence[str] = ("spike",), title: str = "Spikes of one sample",
) -> Section:  # fmt: skip
    """Spike rasters. With `others`, of a second run, each spike is marked as of both, or of one.

    spikes, others  name -> [time, *shape] of one sample; anything but zero is a spike
    """
    drawn = []
    for name, series in spikes.items():
        flat, caption = _thinned(np.asarray(series).reshape(len(series), -1) != 0)
        codes = flat.astype(int)
        rate = f"{100 * flat.mean():.1f} % of {caption} and {len(flat)} steps"
        if others is not None and name in others:
            other = _thinned(np.asarray(others[name]).reshape(len(series), -1) != 0)[0]
            codes = flat * 2 + other * 3 - (flat & other) * 4
            rate += f"; {int((flat != other).sum())} differ"
        drawn.append({
            "name": name, "steps": len(codes), "neurons": codes.shape[1], "codes": codes.tolist(),
            "caption": rate,
        })  # fmt: skip
    note = "Time runs downwards, neurons from left to right."
    return {
        "kind": "rasters", "title": title, "basis": "simulated", "note": note,
        "legend": list(legend), "rasters": drawn,
    }  # fmt: skip


def rate_maps(
    spikes: Mapping[str, np.ndarray], title: str = "Firing rates", note: str = ""
) -> Section:
    """Mean rates over samples and steps, a tile a channel.

    spikes  name -> [time, batch, C, H, W] or [time, batch, n]
    """
    drawn = []
    for name, series in spikes.items():
        rates = (np.asarray(series) != 0).mean((0, 1))
        if rates.ndim != 3:
            rates = rates.reshape(1, 1, -1) if rates.size <= 64 else _square(rates.reshape(-1))
        shown = rates[:MAX_CHANNELS]
        caption = f"mean {rates.mean():.3f}, silent {100 * (rates == 0).mean():.1f} %"
        if len(rates) > MAX_CHANNELS:
            caption += f"; {MAX_CHANNELS} of {len(rates)} channels"
        c, h, w = shown.shape
        drawn.append({
            "name": name, "channels": c, "height": h, "width": w, "caption": caption,
            "values": [round(float(v), 4) for v in shown.reshape(-1)],
        })  # fmt: skip
    return {"kind": "maps", "title": title, "basis": "simulated", "note": note, "maps": drawn}


def _square(rates: np.ndarray) -> np.ndarray:
    side = math.ceil(math.sqrt(rates.size))
    return np.concatenate([rates, np.zeros(side * side - rates.size)]).reshape(1, side, side)


def weight_histograms(
    graph: Graph, program: Program, title: str = "Weights before and after", bins: int = 48
) -> Section:
    """Each projection's weights as the float network has them, and as the integers read back.

    graph  the lowered graph from which the program was made; a projection is paired with the node
           of its name or its origin, where there is one
    """
    from ranvier.sim.ladder import read_back

    drawn = []
    for p in program.projections.values():
        node: Any = graph.nodes.get(p.name) or graph.nodes.get(p.origin)
        weight = getattr(node, "weight", None)
        if weight is None or np.shape(weight) != p.map.weight.shape or isinstance(p.map, OneToOne):
            continue
        weight = np.asarray(weight, float)
        back = read_back(program, p.name)
        span = float(max(np.abs(weight).max(initial=0), np.abs(back).max(initial=0))) or 1.0
        edges = np.linspace(-span, span, bins + 1)
        used = weight != 0
        if np.unique(weight[used]).size < 2:
            continue  # a shortcut's ones: nothing to see
        error = float(np.sqrt(np.mean((weight - back) ** 2))) / (float(weight.std()) or 1.0)
        drawn.append({
            "name": p.name, "edges": [float(e) for e in edges],
            "before": np.histogram(weight[used], edges)[0].tolist(),
            "after": np.histogram(back[used], edges)[0].tolist(),
            "caption": f"{p.bits} bits, error {error:.2%} of the spread",
        })  # fmt: skip
    note = "The same bins; heights are square roots of counts, so that tails can be seen."
    return {
        "kind": "histograms", "title": title, "basis": "measured", "note": note,
        "labels": ["float", "integer, read back"], "histograms": drawn,
    }  # fmt: skip


def cores(placement: Any, title: str = "Cores") -> Section:
    """How full every core is, coloured by population, and what all used cores hold together."""
    return {"kind": "cores", "title": title, "basis": "modelled", **placement.to_dict()}


def chip_sections(program: Program, ledger: Ledger | None) -> list[Section]:
    """What the chip needs: its cores, and energy by every model."""
    from ranvier.deploy.chip import chip_named
    from ranvier.deploy.placement import place
    from ranvier.sim.energy_models import MODELS, energy
    from ranvier.train.errors import RanvierError

    found: list[Section] = []
    try:
        chip = chip_named(str(program.meta.get("chip", "loihi2")))
        found.append(cores(place(program, chip, solver="greedy")))
    except RanvierError as error:
        found.append({"kind": "text", "title": "Cores", "paragraphs": [str(error)]})
    if ledger is not None:
        told = {name: energy(ledger, name) for name in MODELS}
        bars = {name: {k: v / 1000 for k, v in e.parts_pj.items()} for name, e in told.items()}
        found.append(energy_bars(bars, notes=boundaries()))
    return found


def boundaries() -> dict[str, str]:
    """Energy model -> what it counts and leaves out, and its source."""
    from ranvier.sim.energy_models import MODELS

    return {n: f"Boundary: {m.boundary}. Source: {m.source}." for n, m in MODELS.items()}


def energy_bars(
    models: Mapping[str, Mapping[str, float]], unit: str = "nJ", title: str = "Energy a sample",
    note: str = "", basis: str = "modelled", notes: Mapping[str, str] | None = None,
) -> Section:  # fmt: skip
    """Bars: {group: {bar: value}}; notes say of each group what it counts and leaves out."""
    said = notes or {}
    groups = [
        {"name": g, "note": said.get(g, ""),
         "bars": [{"name": b, "value": float(v)} for b, v in bars.items()]}
        for g, bars in models.items()
    ]  # fmt: skip
    return {
        "kind": "bars",
        "title": title,
        "basis": basis,
        "note": note,
        "unit": unit,
        "groups": groups,
    }


def curves(
    title: str, x: Sequence[str], series: Mapping[str, Sequence[float | None]], **more: Any
) -> Section:
    """Lines over named places; `more` is lo, hi, format, basis or note."""
    rows = [{"name": k, "values": list(v)} for k, v in series.items()]
    return {"kind": "lines", "title": title, "x": list(x), "series": rows, **more}


def ledger_table(ledger: Ledger, program: Program, title: str = "What it cost") -> Section:
    """Per projection: synaptic operations, multiplications, and spikes of its source, a sample."""
    n = max(1, ledger.n_samples)
    rows = []
    for name, p in program.projections.items():
        counts = ledger.projections[name]
        source = program.populations[p.source]
        rows.append({
            "name": name, "source": p.source, "target": p.target,
            "rate": ledger.rate(p.source), "synops": counts["n_synops"].sum() / n,
            "mults": counts["n_mults"].sum() / n,
            "messages": {"value": "graded" if source.graded else "binary",
                         "tone": "integer" if source.graded else "binary"},
        })  # fmt: skip
    columns = [
        column("name", "projection"), column("source", "from"), column("target", "to"),
        column("messages", "messages"),
        column("rate", "rate", ".3f", help="messages a neuron and step"),
        column("synops", "synaptic operations", ",.0f", help="a sample"),
        column("mults", "with a graded message", ",.0f", help="a sample"),
    ]  # fmt: skip
    return table(title, columns, rows, basis="simulated")


def provenance(command: str = "", **more: Any) -> dict[str, Any]:
    """Versions, the command and whatever else identifies a result: digests, seeds, data."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("ranvier", "numpy", "torch", "snntorch", "onnx", "onnxruntime", "lava-nc"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    said = {"command": command} if command else {}
    return {**said, "versions": found, **more}
