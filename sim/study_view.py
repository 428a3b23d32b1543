"""A study as rows, as text, and as the sections of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ranvier.sim import report_parts as parts
from ranvier.sim.study import Run, Study
from ranvier.sim.study_run import MAPPINGS
from ranvier.sim.study_setup import parts_of


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is there; None where nothing is."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def spread(values: Sequence[float]) -> float:
    """The standard deviation of a sample (n - 1); 0 for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


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
    made["mapping"] = mapping_name(variant, first["chosen"])
    made["ssim"] = mean([mean(list(r["pattern_ssim"].values())) for r in runs])
    made["pruned"], made["branches"], made["identical"] = pruned(runs)
    made["energy_nj"] = {
        k: mean([chosen(r)["energy_nj"].get(k) for r in runs]) for k in chosen(first)["energy_nj"]
    }
    made["train_s"] = mean([r["train_s"] for r in runs])
    return made


TEXT = (  # key, head, how it is shown
    ("variant", "join", ""), ("float", "float %", "%"), ("onnx", "ONNX %", "%"),
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
        return f"{100 * value:.2f} ±{100 * row[f'{key}_sd']:.2f}"
    if kind == "pp":
        return f"{100 * value:+.2f}"
    if kind == "n":
        return f"{value:,.0f}"
    if kind == "f":
        return f"{value:.2f}"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


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


def report_data(study: Study) -> dict[str, Any]:
    """The study for `ranvier.sim.report.render`."""
    s = study.setup
    n = study.runs[0]["n_test"]
    seeds = sorted({r["seed"] for r in study.runs})
    sections = [
        _verdicts(study),
        _reasons(study),
        _alternatives(study),
        _agreement(study),
        *_energy(study),
        *_gradients(study),
        *_patterns(study),
        _runs(study),
    ]
    meta = {k: v for k, v in study.meta.items() if k != "command"}
    return {
        "title": "Which residual connection survives the chip?",
        "subtitle": f"{s.model} on {s.dataset}: {n:,} test samples, {s.steps} steps, {len(seeds)} seeds, "
        f"{s.weight_bits}-bit weights",
        "summary": summary(study),
        "sections": sections,
        "provenance": parts.provenance(
            str(study.meta.get("command", "")), seeds=seeds, setup=s.key(),
            wall=f"{study.wall_s:.0f} s, training {sum(r['train_s'] for r in study.runs):.0f} s",
            digests={f"{r['variant']} {r['seed']}": r["digest"][:16] for r in study.runs}, **meta,
        ),
    }  # fmt: skip


def summary(study: Study) -> list[str]:
    """What the table says, in sentences made from its figures."""
    rows = study.rows()
    best = max(rows, key=lambda r: r["chip"])
    worst = min(rows, key=lambda r: r["gap"])
    binary = [r["variant"] for r in rows if r["binary_only"]]
    other = [r for r in rows if not r["binary_only"]]
    told = [
        f"On the chip {best['variant']} is best: {100 * best['chip']:.2f} % (float "
        f"{100 * best['float']:.2f} %). Integers cost {worst['variant']} most: "
        f"{100 * worst['gap']:+.2f} points in the mean of its seeds.",
        f"Binary messages alone, after the stem: {', '.join(binary) or 'none'}.",
    ]
    if other:
        told[-1] += (
            " Not so: " + "; ".join(f"{r['variant']}, at {r['breaks']}" for r in other) + "."
        )
    cheap = [r for r in rows if r["synops"] is not None]
    if cheap:
        least = min(cheap, key=lambda r: r["synops"])
        most = max(cheap, key=lambda r: r["synops"])
        told.append(
            f"Fewest synaptic operations a sample: {least['variant']} with {least['synops']:,.0f}; most: "
            f"{most['variant']} with {most['synops']:,.0f}."
        )
    return told


def _pm(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    value, sd = row[key], row[f"{key}_sd"]
    return {"value": value, "text": f"{100 * value:.2f} ± {100 * sd:.2f}"}


def _verdicts(study: Study) -> parts.Section:
    rows = []
    for r in study.rows():
        yes = r["binary_only"]
        rows.append({
            **r, "float": _pm(r, "float"), "onnx": _pm(r, "onnx"), "chip": _pm(r, "chip"),
            "gap": {"value": r["gap"], "text": f"{100 * r['gap']:+.2f}",
                    "tone": "bad" if r["gap"] < -0.01 else ""},
            "binary_only": {"value": yes, "text": "yes" if yes else "no", "tone": "good" if yes else "bad",
                            "help": r["breaks"]},
        })  # fmt: skip
    columns = [
        parts.column("variant", "join"),
        parts.column("float", "float %", basis="measured", align="right"),
        parts.column("onnx", "ONNX %", basis="measured", align="right"),
        parts.column("chip", "chip %", basis="simulated", align="right"),
        parts.column("gap", "chip − float", align="right", help="points"),
        parts.column("binary_only", "binary only", basis="inferred"),
        parts.column("mapping", "mapping"),
        parts.column("algorithmic", "algorithmic operations", ",.0f",
                     help="a sample, as the network is written, each through a weight"),
        parts.column("multiplications", "of them multiplications", ",.0f", help="reals arrive"),
        parts.column("synops", "mapped SOPs", ",.0f", help="synaptic operations on the chip, a sample"),
        parts.column("mults", "graded ops", ",.0f", help="of these, with a message that is no spike"),
        parts.column("message_bits", "bits", ".0f", help="of the widest message between populations"),
        parts.column("cores", "cores", ".0f", basis="modelled"),
        parts.column("latency", "latency", ".0f", help="chip steps"),
        parts.column("spikes_per_neuron", "spikes / neuron", ".2f", help="a sample"),
        parts.column("n_parameters", "parameters", ",d"),
    ]  # fmt: skip
    note = "Mean over seeds ± standard deviation. The mapping is the one that the compiler chose by cost."
    return parts.table("The verdict", columns, rows, note=note)


def _reasons(study: Study) -> parts.Section:
    rows = [
        {
            "variant": r["variant"], "n": r["n_breaks"], "breaks": r["breaks"] or "–",
            "divergence": r["divergence"], "last": r["last_agreement"],
        }
        for r in study.rows()
    ]  # fmt: skip
    columns = [
        parts.column("variant", "join"),
        parts.column("n", "layers that take more than spikes", "d"),
        parts.column("breaks", "the first of them", basis="inferred"),
        parts.column(
            "divergence",
            "first value in which the chip leaves the float network (first seed)",
            basis="simulated",
        ),
        parts.column("last", "spikes kept in the last population", ".1%", basis="simulated"),
    ]
    return parts.table("Why", columns, rows)


def _alternatives(study: Study) -> parts.Section:
    rows = []
    for variant in study.variants:
        runs = study.of(variant)
        for name in runs[0]["mappings"]:
            figures = [r["mappings"][name] for r in runs if name in r["mappings"]]
            keys = ("accuracy", "synops", "mults", "messages", "message_bits", "neurons", "projections",
                    "weights", "cores", "latency")  # fmt: skip
            rows.append({
                "variant": variant, "mapping": mapping_name(variant, name),
                "chosen": sum(r["chosen"] == name for r in runs),
                **{k: mean([f.get(k) for f in figures]) for k in keys},
            })  # fmt: skip
    columns = [
        parts.column("variant", "join"), parts.column("mapping", "mapping"),
        parts.column("chosen", "chosen", "d", help="in so many seeds, by counted cost"),
        parts.column("accuracy", "chip accuracy", ".2%"),
        parts.column("synops", "synaptic operations", ",.0f"),
        parts.column("mults", "graded", ",.0f"), parts.column("message_bits", "bits", ".0f"),
        parts.column("messages", "messages", ",.0f"), parts.column("neurons", "neurons", ",.0f"),
        parts.column("projections", "projections", ",.0f"),
        parts.column("weights", "stored weights", ",.0f"), parts.column("cores", "cores", ".0f"),
        parts.column("latency", "latency", ".0f"),
    ]  # fmt: skip
    note = (
        "A join whose sum feeds several layers can be sent as a value (graded, relay), or never be formed: "
        "each source projects to each layer by itself (linear, unrolled). Both give the same network."
    )
    return parts.table(
        "Two ways to map a join, side by side", columns, rows, basis="simulated", note=note
    )


def _agreement(study: Study) -> parts.Section:
    layers = [study.of(v)[0]["agreement"]["integer states"] for v in study.variants]
    longest = max(layers, key=len)
    series = {}
    for variant, found in zip(study.variants, layers, strict=True):
        values = [
            mean([list(r["agreement"]["integer states"].values())[i] for r in study.of(variant)])
            for i in range(len(found))
        ]
        series[variant] = values + [None] * (len(longest) - len(values))
    x = [f"{i + 1}" for i in range(len(longest))]
    return parts.curves(
        "Spikes that the chip keeps, population by population", x, series, hi=1.0, format=".0%",
        basis="simulated",
        note="Spikes in both over spikes in either; populations in order from the input, mean of seeds.",
    )  # fmt: skip


def _energy(study: Study) -> list[parts.Section]:
    rows = study.rows()
    models = list(dict.fromkeys(k for r in rows for k in r["energy_nj"]))
    if not models:
        return []
    bars = {m: {r["variant"]: r["energy_nj"].get(m) for r in rows} for m in models}
    known = {m: {k: v for k, v in b.items() if v is not None} for m, b in bars.items()}
    note = (
        "The same counts by each model's constants. None is a measurement; boundaries differ, so that "
        "only bars of one model compare."
    )
    return [parts.energy_bars(known, note=note)]


def _gradients(study: Study) -> list[parts.Section]:
    if not study.measures:
        return []
    rows = []
    for join, found in study.measures.items():
        plain, zero = found["gradient"]["plain"], found["gradient"]["zero"]
        rows.append({
            "join": join, "identity": found["identity"], "slope": plain["slope"],
            "most": plain["max_abs_log"], "zero": zero["max_abs_log"],
        })  # fmt: skip
    columns = [
        parts.column("join", "join"),
        parts.column("identity", "identity at initialisation", ".0%", help="last normalization at zero"),
        parts.column("slope", "log gradient a block", "+.3f", help="0: the norm stays"),
        parts.column("most", "largest |log ratio|", ".2f"),
        parts.column("zero", "the same, branches at zero", ".2f"),
    ]  # fmt: skip
    depth = len(next(iter(study.measures.values()))["gradient"]["plain"]["r"])
    note = f"Squared gradient norm at each of {depth} equal blocks over that at the end (untrained, tdBN)."
    names = [str(i) for i in range(0, depth, max(1, depth // 10))]
    series = {
        join: [log10(found["gradient"]["plain"]["r"][int(i)]) for i in names]
        for join, found in study.measures.items()
    }
    return [
        parts.table("Measures of the literature: can depth train?", columns, rows,
                    basis="measured", note=note),
        parts.curves("Gradient norm over depth", names, series, format=".0f", basis="measured",
                     note="log10 of the squared norm at a block's input over that at the end; 0 is equality. "
                     "A curve stops where the gradient is zero."),
    ]  # fmt: skip


def log10(x: float) -> float | None:
    return float(np.log10(x)) if x > 1e-30 else None


def _patterns(study: Study) -> list[parts.Section]:
    rows = []
    for variant in study.variants:
        for run in study.of(variant):
            pruning = run.get("pruning")
            if not run["pattern_ssim"] and not pruning:
                continue  # no two blocks of one shape in a row, and no OR
            rows.append({
                "variant": variant, "seed": run["seed"],
                "ssim": mean(list(run["pattern_ssim"].values())),
                "most": max(run["pattern_ssim"].values(), default=None),
                "dropped": len(pruning["dropped"]) if pruning else None,
                "same": pruning["identical"] if pruning else None,
            })  # fmt: skip
    columns = [
        parts.column("variant", "join"), parts.column("seed", "seed", "d"),
        parts.column("ssim", "SSIM of firing patterns, mean", ".3f",
                     help="of consecutive blocks of equal shape; 1: the block did nothing"),
        parts.column("most", "highest", ".3f"),
        parts.column("dropped", "OR branches at rate zero", "d", help="dropped by natural pruning"),
        parts.column("same", "output without them equal to the bit"),
    ]  # fmt: skip
    title = "Firing patterns and natural pruning"
    return [parts.table(title, columns, rows, basis="simulated")] if rows else []


def _runs(study: Study) -> parts.Section:
    rows = [
        {
            "variant": r["variant"], "seed": r["seed"], **{k: r["accuracy"][k] for k in r["accuracy"]},
            "parity": r["parity"].get("onnx"), "train_s": r["train_s"], "seconds": r["seconds"],
            "digest": r["digest"][:12],
        }
        for r in study.runs
    ]  # fmt: skip
    columns = [
        parts.column("variant", "join"), parts.column("seed", "seed", "d"),
        parts.column("float", "float", ".2%"), parts.column("onnx", "ONNX", ".2%"),
        parts.column("chip", "chip", ".2%"),
        parts.column("parity", "ONNX, largest difference", ".1e"),
        parts.column("train_s", "training, s", ".0f"), parts.column("seconds", "all, s", ".0f"),
        parts.column("digest", "program"),
    ]  # fmt: skip
    return parts.table("Every run", columns, rows, basis="measured")
