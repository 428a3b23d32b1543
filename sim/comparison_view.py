"""A comparison as JSON, and as the sections of a report."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np

from ranvier.export.domains import binary_only, verdicts
from ranvier.sim import report_parts as parts
from ranvier.sim.comparison import FLOAT_ENGINES, Report, verdict_text
from ranvier.sim.ladder import RUNGS

MAX_DRAWN = 24  # populations with a raster and a rate map
TONES = {"accumulate-only": "good", "graded accumulate": "warn", "multiply": "bad"}


def as_json(report: Report) -> str:
    """Every figure of the report, indented."""
    return json.dumps(figures(report), indent=1)


def figures(report: Report) -> dict[str, Any]:
    """The figures as plain values."""
    holds, broken = binary_only(report.graph)
    divergence = report.first_divergence
    return {
        "engines": {
            name: {
                "accuracy": s.accuracy, "interval": list(s.interval), "right": s.right, "n": s.n,
                "max_difference": report.parity.get(name),
            }
            for name, s in report.scores.items()
        },
        "skipped": report.skipped,
        "drop": report.drop,
        "disagreements": {
            f"{a}/{b}": {"n": int(m.sum() - np.trace(m)), "counts": m.tolist()}
            for (a, b), m in report.disagreements.items()
        },
        "agreement": {
            rung: {name: asdict(a) for name, a in layers.items()}
            for rung, layers in report.agreement.items()
        },
        "first_divergence": None if divergence is None else asdict(divergence),
        "advice": [asdict(a) for a in report.advice],
        "lava": report.lava,
        "binary_only": holds,
        "breaking_edges": [str(e) for e in broken],
        "ledger": _totals(report),
        "program": {"digest": report.program.digest(), "latency": report.program.latency,
                    **dict(report.program.meta)},
        "meta": report.meta,
    }  # fmt: skip


def _totals(report: Report) -> dict[str, Any]:
    ledger = report.ledger
    if ledger is None:
        return {}
    return {
        "n_samples": ledger.n_samples, "n_spikes": ledger.n_spikes, "n_synops": ledger.n_synops,
        "n_mults": ledger.n_mults, "n_updates": ledger.n_updates, "n_messages": ledger.n_messages,
        "spikes_per_neuron": ledger.spikes_per_neuron,
    }  # fmt: skip


def report_data(report: Report) -> dict[str, Any]:
    """The whole comparison for `ranvier.sim.report.render`."""
    spikes = {rung: report.ladder.sent[rung] for rung in (RUNGS[0], RUNGS[-1])}
    drawn = list(report.ladder.names)[:MAX_DRAWN]
    sections = [
        _engines(report),
        *([_divergence(report)] if report.first_divergence else []),
        parts.network(report.graph),
        _curves(report),
        parts.rasters(
            {n: spikes[RUNGS[0]][n][:, 0] for n in drawn},
            {n: spikes[RUNGS[-1]][n][:, 0] for n in drawn},
            ("float and chip", "float only", "chip only"),
            "Spikes of the first sample, float and chip",
        ),
        parts.rate_maps(
            {n: spikes[RUNGS[-1]][n] for n in drawn},
            "Firing rates on the chip",
            f"Mean over {report.ladder.series.shape[1]} samples and all steps; a tile is a channel.",
        ),
        parts.weight_histograms(report.ladder.lowered, report.program),
        *_advice(report),
        *_matrices(report),
        *([parts.ledger_table(report.ledger, report.program)] if report.ledger else []),
        *parts.chip_sections(report.program, report.ledger),
        _layers(report),
    ]
    name = report.meta.get("title") or "One network, every engine"
    return {
        "title": name,
        "subtitle": str(report.meta.get("subtitle", "")),
        "summary": _summary(report),
        "sections": sections,
        "provenance": parts.provenance(
            str(report.meta.get("command", "")),
            digest=report.program.digest(),
            program={
                k: v for k, v in report.program.meta.items() if isinstance(v, (str, int, float))
            },
            **{k: v for k, v in report.meta.items() if k not in ("title", "subtitle", "command")},
        ),
    }


def _summary(report: Report) -> list[str]:
    first = next(iter(report.scores), None)
    told = [verdict_text(report.graph)]
    chip = [n for n in report.scores if n not in (*FLOAT_ENGINES, "lava")]
    if first and chip:
        a, b = report.scores[first], report.scores[chip[0]]
        told.append(
            f"{first} is right on {a.accuracy:.2%} of {a.n} {a.of}, the chip's integers "
            f"({chip[0]}) on {b.accuracy:.2%}: {100 * (b.accuracy - a.accuracy):+.2f} points."
        )
    if first and report.scores[first].of == "steps":
        told.append(
            "Steps of one sample are alike, and the intervals here count them as independent: they "
            "are too narrow."
        )
    if report.lava:
        same = "none" if report.lava["different"] == 0 else f"{report.lava['different']:,}"
        told.append(
            f"Lava ran {report.lava['samples']} samples; of {report.lava['values']:,} spikes and "
            f"states {same} differ from the engine's."
        )
    told += [f"{name} did not run: {why}" for name, why in report.skipped.items()]
    return told


def _engines(report: Report) -> parts.Section:
    kinds = {"torch": "measured", "onnx": "measured", "graph": "simulated"}
    rows = []
    for name, s in report.scores.items():
        low, high = s.interval
        against = next((int(m.sum() - np.trace(m)) for (_, b), m in report.disagreements.items()
                        if b == name), None)  # fmt: skip
        rows.append({
            "engine": name, "basis": kinds.get(name, "simulated"), "n": s.n,
            "accuracy": {"value": s.accuracy, "low": low, "high": high},
            "against": against, "difference": report.parity.get(name),
        })  # fmt: skip
    for name, why in report.skipped.items():
        rows.append({"engine": name, "basis": {"value": "not run", "help": why, "tone": "warn"}})
    first = next(iter(report.scores), "")
    columns = [
        parts.column("engine", "engine"), parts.column("basis", "basis"),
        parts.column("n", next((s.of for s in report.scores.values()), "samples"), ",d"),
        parts.column("accuracy", "accuracy", ".2%", help="below: 95 % interval (Wilson)"),
        parts.column("against", f"other classes than {first}", ",d"),
        parts.column("difference", f"largest difference to {first}", ".3g"),
    ]  # fmt: skip
    return parts.table("Accuracy on every engine", columns, rows)


def _divergence(report: Report) -> parts.Section:
    text = [f"The earliest difference: {report.first_divergence}."]
    return {
        "kind": "text", "title": "Where the chip first leaves the float network",
        "basis": "simulated", "paragraphs": text,
    }  # fmt: skip


def _curves(report: Report) -> parts.Section:
    names = list(report.ladder.names)
    series = {
        rung: [report.agreement[rung][n].overlap for n in names]
        for rung in RUNGS[1:]
        if rung in report.agreement
    }
    seen = [v for values in series.values() for v in values]
    return parts.curves(
        "How much of the float network's spikes each rung keeps",
        names, series, lo=max(0.0, min(seen, default=0.0) - 0.02), hi=1.0, format=".1%",
        basis="simulated", x_label="population, from the input on", y_label="spikes kept",
        note="Spikes in both over spikes in either, by population; 100 % is the same spike train. "
        f"Over {report.ladder.series.shape[1]} samples.",
    )  # fmt: skip


def _layers(report: Report) -> parts.Section:
    said = verdicts(report.graph)
    rows = [
        {
            "node": v.node,
            "kind": {"value": v.kind, "tone": TONES[v.kind]},
            "domain": parts.short(v.domain), "stem": v.stem, "chain": " → ".join(v.chain),
            "why": v.reason,
        }
        for v in said.values()
    ]  # fmt: skip
    columns = [
        parts.column("node", "layer"), parts.column("kind", "verdict"),
        parts.column("domain", "what arrives"), parts.column("stem", "stem"),
        parts.column("chain", "made so by"), parts.column("why", "why"),
    ]  # fmt: skip
    return parts.table("What each layer receives", columns, rows, basis="inferred")


def _advice(report: Report) -> list[parts.Section]:
    if not report.advice:
        return []
    rows = [
        {
            "population": a.population,
            "bits": a.bits,
            "accuracy": a.accuracy,
            "gain": {"value": a.gain, "tone": "good" if a.worth_it else ""},
            "samples": f"{a.won} / {a.lost}",
            "error": a.error[1] - a.error[0],
        }
        for a in report.advice
    ]
    best = report.advice[0]
    if best.worth_it:
        note = f"Worth its bits: {best}."
    else:
        note = "No layer wins half a point with more bits, beyond what chance does in one case of twenty."
    columns = [
        parts.column("population", "floats instead of integers in"),
        parts.column("bits", "now, bits", "d"),
        parts.column("accuracy", "accuracy", ".2%"),
        parts.column("gain", "won", "+.2%"),
        parts.column("samples", "answers won / lost", align="right"),
        parts.column("error", "change of the readout's error", "+.2%"),
    ]
    note += f" Over {best.n} answers, float states; all other layers keep their integers."
    return [parts.table("What more bits would win", columns, rows, basis="simulated", note=note)]


def _matrices(report: Report) -> list[parts.Section]:
    found = []
    for (a, b), m in report.disagreements.items():
        if int(m.sum() - np.trace(m)):
            names = [str(i) for i in range(len(m))]
            found.append({
                "kind": "matrix", "title": f"Disagreements: {a} and {b}", "basis": "simulated",
                "note": f"Rows: the class that {a} gives; columns: the class that {b} gives. Off the "
                "diagonal they disagree.",
                "rows": names, "columns": names, "values": m.tolist(), "row_label": a,
                "column_label": b,
            })  # fmt: skip
    return found
