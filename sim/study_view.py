"""A study as rows, and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ranvier.sim.study import Run, Study
from ranvier.sim.study_run import MAPPINGS
from ranvier.sim.study_setup import parts_of


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is there; None where nothing is."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample (n - 1); None for one value, which has none."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def with_spread(value: float, sd: float | None) -> str:
    """A share in percent with its spread, if it has one: 98.77 ± 0.05."""
    return f"{100 * value:.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")


def _operations(run: Run) -> float | None:
    """All algorithmic operations of a run, a sample."""
    counted = run["algorithmic"]
    keys = ("accumulates", "graded_accumulates", "multiplications")
    return float(sum(counted[k] for k in keys)) if counted else None


def chosen(run: Run) -> Mapping[str, Any]:
    """The figures of the mapping that the compiler chose."""
    found: Mapping[str, Any] = run["mappings"][run["chosen"]]
    return found


def mapping_name(variant: str, mapping: str) -> str:
    """What a mapping of a join is called.

    >>> mapping_name("ms-conv", "graded"), mapping_name("or", "linear")
    ('relay', 'linear')
    """
    return MAPPINGS.get(parts_of(variant)[0], {}).get(mapping, mapping)


def pruned(runs: Sequence[Run]) -> tuple[float | None, float | None, bool | None]:
    """(branches dropped, branches of ORs, whether all outputs stayed equal), mean of runs; None: no OR."""
    found = [r["pruning"] for r in runs if r.get("pruning")]
    if not found:
        return None, None, None
    dropped, there = (mean([len(p[k]) for p in found]) for k in ("dropped", "rates"))
    return dropped, there, all(p["identical"] for p in found)


def row(variant: str, runs: Sequence[Run]) -> dict[str, Any]:
    """One line of the verdict table: means over seeds, `_sd` the spreads."""
    first = runs[0]
    made: dict[str, Any] = {
        "variant": variant,
        "seeds": len(runs),
        "n_parameters": first["n_parameters"],
    }
    for engine in ("float", "onnx", "chip"):
        values = [r["accuracy"][engine] for r in runs]
        made[engine], made[f"{engine}_sd"] = mean(values), spread(values)
    gaps = [r["accuracy"]["chip"] - r["accuracy"]["float"] for r in runs]
    made |= {"gap": mean(gaps), "gap_worst": min(gaps)}
    made |= {"onnx_differ": sum(r["onnx_differ"] for r in runs), "n_onnx": first["n_onnx"]}
    made |= {"binary_only": first["binary_only"], "breaks": (first["breaking_edges"] or [""])[0]}
    made |= {"n_breaks": len(first["breaking_edges"]), "divergence": first["divergence_text"]}
    last = [list(r["agreement"]["integer states"].values())[-1:] for r in runs]
    made["last_agreement"] = mean([v[0] for v in last if v])
    for key in ("accumulates", "graded_accumulates", "multiplications"):
        made[key] = mean([r["algorithmic"].get(key) for r in runs])
    made["algorithmic"] = mean([_operations(r) for r in runs])
    for key in (
        "synops",
        "mults",
        "messages",
        "message_bits",
        "spikes_per_neuron",
        "cores",
        "latency",
    ):
        made[key] = mean([chosen(r).get(key) for r in runs])
    made["mapping"] = "/".join(dict.fromkeys(mapping_name(variant, r["chosen"]) for r in runs))
    made["ssim"] = mean([mean(list(r["pattern_ssim"].values())) for r in runs])
    made["pruned"], made["branches"], made["identical"] = pruned(runs)
    made["energy_nj"] = {
        k: mean([chosen(r)["energy_nj"].get(k) for r in runs]) for k in chosen(first)["energy_nj"]
    }
    made["train_s"] = mean([r["train_s"] for r in runs])
    return made


TEXT = (  # key, head, how it is shown
    ("variant", "join", ""), ("float", "float %", "%"), ("onnx_differ", "ONNX differs", "n"),
    ("chip", "chip %", "%"), ("gap", "gap", "pp"), ("binary_only", "binary-only", ""),
    ("mapping", "mapping", ""), ("algorithmic", "alg. ops", "n"),
    ("multiplications", "of them mult.", "n"), ("synops", "mapped SOPs", "n"),
    ("mults", "graded", "n"), ("message_bits", "bits", "n"), ("cores", "cores", "n"),
    ("latency", "latency", "n"), ("spikes_per_neuron", "spikes/n", "f"),
)  # fmt: skip


def _cell(row: Mapping[str, Any], key: str, kind: str) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    if kind == "%":
        return with_spread(value, row[f"{key}_sd"])
    if kind == "pp":
        return f"{100 * value:+.2f}"
    if kind == "n":
        return f"{value:,.0f}"
    if kind == "f":
        return f"{value:.2f}"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def markdown_table(study: Study) -> str:
    """The verdict table in Markdown."""
    lines = [[head for _, head, _ in TEXT], ["---"] * len(TEXT)]
    lines += [[_cell(r, key, kind) for key, _, kind in TEXT] for r in study.rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text_table(study: Study) -> str:
    """The verdict table in plain text."""
    lines = [[head for _, head, _ in TEXT]]
    lines += [[_cell(r, key, kind) for key, _, kind in TEXT] for r in study.rows()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(TEXT))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
