"""A study of depth as rows, as text, and as the sections of a report."""

from __future__ import annotations

from typing import Any

import numpy as np

from ranvier.sim import report_parts as parts
from ranvier.sim.study_depth import DepthStudy
from ranvier.sim.study_page import count, log10
from ranvier.sim.study_view import mean, pruned, row, with_spread

IDLE = 0.999  # SSIM beyond which a block passes on what came


def rows(study: DepthStudy) -> list[dict[str, Any]]:
    """One row a join and depth: means over seeds, `_sd` the spreads."""
    found = []
    for depth, one in study.studies.items():
        for variant in one.variants:
            runs = one.of(variant)
            made = {"depth": depth, **row(variant, runs)}
            values = [list(r["pattern_ssim"].values()) for r in runs]
            made["ssim"] = mean([mean(v) for v in values])
            made["pairs"] = mean([len(v) for v in values])
            made["idle"] = mean([sum(s > IDLE for s in v) for v in values if v])
            made["pruned"], made["branches"], made["identical"] = pruned(runs)
            made["train_accuracy"] = mean([r["train"].get("train_accuracy") for r in runs])
            measured = study.measures.get((variant, depth))
            if measured:
                made["slope"] = measured["gradient"]["plain"]["slope"]
                made["slope_zero"] = measured["gradient"]["zero"]["slope"]
                made["identity_zero"] = measured["identity"]["zero"]
            found.append(made)
    order = {v: i for i, v in enumerate(dict.fromkeys(r["variant"] for r in found))}
    return sorted(found, key=lambda r: (order[r["variant"]], r["depth"]))


def _pm(r: dict[str, Any], key: str) -> str:
    return with_spread(r[key], r[f"{key}_sd"])


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def text_table(study: DepthStudy) -> str:
    """The rows in Markdown."""
    heads = ["join", "layers", "float %", "chip %", "training %", "identity, zero-init",
             "log gradient a block", "zero-init", "SSIM", "blocks that pass on", "OR branches dropped",
             "spikes / neuron"]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for r in study.rows():
        lines.append([
            r["variant"], str(r["depth"]), _pm(r, "float"), _pm(r, "chip"),
            _number(r["train_accuracy"] and 100 * r["train_accuracy"], ".2f"),
            _number(r.get("identity_zero"), ".0%"),
            _number(r.get("slope"), "+.3f"), _number(r.get("slope_zero"), "+.3f"),
            _number(r["ssim"], ".3f"),
            "–" if r["idle"] is None else f"{r['idle']:.1f} of {r['pairs']:.0f}",
            "–" if r["pruned"] is None else f"{r['pruned']:.1f} of {r['branches']:.0f}",
            _number(r["spikes_per_neuron"], ".2f"),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report_data(study: DepthStudy) -> dict[str, Any]:
    """The study for `ranvier.sim.report.render`."""
    some = next(iter(study.studies.values()))
    runs = [r for s in study.studies.values() for r in s.runs]
    setup, seeds = some.setup, sorted({r["seed"] for r in runs})
    meta = {k: v for k, v in study.meta.items() if k != "command"}
    key = {k: v for k, v in setup.key().items() if k != "model"}
    return {
        "title": "Does depth help, or does it degrade?",
        "subtitle": f"ResNets of {', '.join(map(str, study.studies))} layers on {setup.dataset}, "
        f"{setup.steps} steps, {count(len(seeds), 'seed')}, {setup.weight_bits}-bit weights",
        "summary": summary(study),
        "sections": [_table(study), *_accuracy(study), *_gradients(study)],
        "provenance": parts.provenance(
            str(study.meta.get("command", "")), seeds=seeds, setup=key, wall=f"{study.wall_s:.0f} s, "
            f"training {sum(r['train_s'] for r in runs):.0f} s",
            digests={f"{r['setup']['model']} {r['variant']} {r['seed']}": r["digest"][:16] for r in runs},
            **meta,
        ),
    }  # fmt: skip


def summary(study: DepthStudy) -> list[str]:
    """What the table says, a sentence a join."""
    told, found = [], study.rows()
    for variant in dict.fromkeys(r["variant"] for r in found):
        of = [r for r in found if r["variant"] == variant]
        a, b = of[0], of[-1]
        told.append(
            f"{variant}: {100 * a['chip']:.2f} % on the chip with {a['depth']} layers, "
            f"{100 * b['chip']:.2f} % with {b['depth']} (float {100 * a['float']:.2f} and "
            f"{100 * b['float']:.2f} %)."
        )
    return told


def _table(study: DepthStudy) -> parts.Section:
    shown = [
        {
            **r,
            "float": {"value": r["float"], "text": _pm(r, "float")},
            "chip": {"value": r["chip"], "text": _pm(r, "chip")},
            "idle": None if r["idle"] is None else {
                "value": r["idle"] / max(1, r["pairs"]), "text": f"{r['idle']:.1f} of {r['pairs']:.0f}"},
            "pruned": None if r["pruned"] is None else {
                "value": r["pruned"], "text": f"{r['pruned']:.1f} of {r['branches']:.0f}"},
        }
        for r in study.rows()
    ]  # fmt: skip
    columns = [
        parts.column("variant", "join"), parts.column("depth", "layers", "d"),
        parts.column("float", "float %", basis="measured", align="right"),
        parts.column("chip", "chip %", basis="simulated", align="right"),
        parts.column("train_accuracy", "training split", ".2%", basis="measured"),
        parts.column("identity_zero", "identity, zero-init", ".0%", basis="measured",
                     help="share of its shortcut that the worst untrained block passes on, last norm "
                     "of each branch at zero"),
        parts.column("slope", "log gradient a block", "+.3f", basis="measured", help="0: the norm stays"),
        parts.column("slope_zero", "zero-init", "+.3f", basis="measured", help="the same, branches at zero"),
        parts.column("ssim", "SSIM", ".3f", basis="simulated",
                     help="of the firing patterns of consecutive blocks of equal shape, mean"),
        parts.column("idle", "blocks that pass on", basis="simulated", align="right",
                     help=f"SSIM above {IDLE}: the block did nothing; mean over seeds"),
        parts.column("pruned", "OR branches dropped", basis="simulated", align="right",
                     help="silent on every sample; the outputs stay the same to the bit"),
        parts.column("spikes_per_neuron", "spikes / neuron", ".2f", basis="simulated", help="a sample"),
    ]  # fmt: skip
    note = "Mean over seeds ± standard deviation. The same data, widths, seeds and training at each depth."
    return parts.table("Depth", columns, shown, note=note)


def _accuracy(study: DepthStudy) -> list[parts.Section]:
    found, depths = study.rows(), list(study.studies)
    made = []
    for key, title, basis in (
        ("float", "Float accuracy over depth", "measured"),
        ("chip", "Chip accuracy over depth", "simulated"),
    ):
        series = {
            v: [next((r[key] for r in found if r["variant"] == v and r["depth"] == d), None) for d in depths]
            for v in dict.fromkeys(r["variant"] for r in found)
        }  # fmt: skip
        seen = [x for s in series.values() for x in s if x is not None]
        lo = max(0.0, float(np.floor(min(seen, default=0.0) * 20 - 0.5) / 20))
        made.append(
            parts.curves(title, [str(d) for d in depths], series, lo=lo, hi=1.0, format=".0%",
                         basis=basis, x_label="weighted layers", y_label="accuracy")
        )  # fmt: skip
    return made


def _gradients(study: DepthStudy) -> list[parts.Section]:
    if not study.measures:
        return []
    deepest = max(study.studies)
    profiles = {
        j: m["gradient"]["plain"]["r"] for (j, d), m in study.measures.items() if d == deepest
    }
    n = len(next(iter(profiles.values())))
    names = [str(i) for i in range(0, n, max(1, n // 14))]
    series = {j: [log10(r[int(i)]) for i in names] for j, r in profiles.items()}
    note = (
        f"log10 of the squared gradient norm at the input of each of {n} equal untrained blocks (tdBN) "
        "over that at the end; 0 everywhere is equality (block dynamical isometry)."
    )
    return [
        parts.curves("Gradient norm over depth", names, series, format=".1f", basis="measured",
                     note=note, x_label="block", y_label="log10 ratio")
    ]  # fmt: skip
