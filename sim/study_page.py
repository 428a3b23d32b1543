"""A study as the sections of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ranvier.sim import report_parts as parts
from ranvier.sim.published import section
from ranvier.sim.study import Study
from ranvier.sim.study_run import COUNTED, PRUNED
from ranvier.sim.study_view import mapping_name, mean, with_spread

VANISHED = 100.0  # |log| of a ratio of squared gradient norms: the gradient is zero in floats


def report_data(study: Study) -> dict[str, Any]:
    """The study for `ranvier.sim.report.render`."""
    s = study.setup
    n = study.runs[0]["n_test"]
    seeds = sorted({r["seed"] for r in study.runs})
    sections = [
        _verdicts(study),
        _costs(study),
        _reasons(study),
        _alternatives(study),
        _agreement(study),
        *_energy(study),
        *_gradients(study),
        *_patterns(study),
        _runs(study),
        *([section(study.published)] if study.published else []),
        *_networks(study),
    ]
    meta = {k: v for k, v in study.meta.items() if k != "command"}
    return {
        "title": "Which residual connection survives the chip?",
        "subtitle": f"{s.model} on {s.dataset}: {n:,} test samples, {s.steps} steps, "
        f"{count(len(seeds), 'seed')}, {s.weight_bits}-bit weights",
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


def count(n: int, what: str) -> str:
    """A number of things.

    >>> count(1, "seed"), count(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{n} {what}{'' if n == 1 else 's'}"


def _pm(row: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = row[key]
    return {"value": value, "text": with_spread(value, row[f"{key}_sd"])}


def _verdicts(study: Study) -> parts.Section:
    rows = []
    for r in study.rows():
        yes = r["binary_only"]
        rows.append({
            **r, "float": _pm(r, "float"), "chip": _pm(r, "chip"),
            "onnx_differ": {"value": r["onnx_differ"],
                            "text": f"{r['onnx_differ']} of {r['n_onnx'] * r['seeds']:,}"},
            "gap_worst": {"value": r["gap_worst"], "text": f"{100 * r['gap_worst']:+.2f}"},
            "gap": {"value": r["gap"], "text": f"{100 * r['gap']:+.2f}",
                    "tone": "bad" if r["gap"] < -0.01 else ""},
            "binary_only": {"value": yes, "text": "yes" if yes else "no", "tone": "good" if yes else "bad",
                            "help": r["breaks"]},
        })  # fmt: skip
    n, some = study.runs[0]["n_test"], study.runs[0]["n_onnx"]
    seen = "" if some == n else f"; ONNX Runtime on the first {some:,} of them"
    columns = [
        parts.column("variant", "join"),
        parts.column("float", "float %", basis="measured", align="right"),
        parts.column("onnx_differ", "ONNX, other classes", basis="measured", align="right",
                     help="samples that ONNX Runtime puts into another class than torch, all seeds"),
        parts.column("chip", "chip %", basis="simulated", align="right"),
        parts.column("gap", "chip − float", align="right", help="points"),
        parts.column("gap_worst", "worst seed", align="right", help="points"),
        parts.column("binary_only", "binary only", basis="inferred"),
        parts.column("mapping", "mapping"),
        parts.column("synops", "mapped SOPs", ",.0f", basis="simulated",
                     help="synaptic operations on the chip, a sample"),
        parts.column("n_parameters", "parameters", ",d"),
    ]  # fmt: skip
    note = (
        f"Mean over seeds ± standard deviation; {n:,} test samples{seen}. The mapping is the one that the "
        "compiler chose by cost. Each run's own page, with spikes, weights and first divergence, lies beside "
        "this one as <join>-s<seed>/report.html."
    )
    return parts.table("The verdict", columns, rows, note=note)


def _costs(study: Study) -> parts.Section:
    columns = [
        parts.column("variant", "join"), parts.column("mapping", "mapping"),
        parts.column("algorithmic", "algorithmic operations", ",.0f",
                     help="as the network is written, each through a weight"),
        parts.column("multiplications", "of them multiplications", ",.0f", help="reals arrive"),
        parts.column("synops", "mapped SOPs", ",.0f", help="synaptic operations on the chip"),
        parts.column("mults", "graded ops", ",.0f", help="of these, with a message that is no spike"),
        parts.column("messages", "messages", ",.0f"),
        parts.column("message_bits", "bits", ".0f", help="of the widest message between populations"),
        parts.column("spikes_per_neuron", "spikes / neuron", ".2f"),
        parts.column("cores", "cores", ".0f", basis="modelled"),
        parts.column("latency", "latency", ".0f", help="chip steps"),
    ]  # fmt: skip
    note = (
        f"A sample, mean over seeds. Algorithmic operations: counted on {COUNTED} test samples; all others "
        "on the whole test split."
    )
    return parts.table("What it costs", columns, study.rows(), basis="simulated", note=note)


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
        basis="simulated", x_label="population, from the input on", y_label="spikes kept",
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
    return [parts.energy_bars(known, note=note, notes=parts.boundaries())]


def _gradients(study: Study) -> list[parts.Section]:
    if not study.measures:
        return []
    rows = []
    for join, found in study.measures.items():
        plain, zero = found["gradient"]["plain"], found["gradient"]["zero"]
        rows.append({
            "join": join, "identity": found["identity"], "slope": _slope(plain),
            "most": _log(plain["max_abs_log"]), "zero": _log(zero["max_abs_log"]),
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
                     x_label="block", y_label="log10 ratio",
                     note="log10 of the squared norm at a block's input over that at the end; 0 is equality. "
                     "A curve stops where the gradient is zero."),
    ]  # fmt: skip


def _log(x: float) -> dict[str, Any]:
    """The largest |log ratio| of gradient norms, where there is a gradient at all."""
    return {"value": x, "text": "no gradient" if x > VANISHED else f"{x:.2f}"}


def _slope(found: Mapping[str, float]) -> Any:
    """log gradient a block, where there is a gradient at all."""
    gone = found["max_abs_log"] > VANISHED
    return {"value": None, "text": "no gradient"} if gone else found["slope"]


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
                "dropped": f"{len(pruning['dropped'])} of {len(pruning['rates'])}" if pruning else None,
                "lowest": min(pruning["rates"].values()) if pruning else None,
                "same": pruning["identical"] if pruning else None,
            })  # fmt: skip
    columns = [
        parts.column("variant", "join"), parts.column("seed", "seed", "d"),
        parts.column("ssim", "SSIM of firing patterns, mean", ".3f",
                     help="of consecutive blocks of equal shape; 1: the block did nothing"),
        parts.column("most", "highest", ".3f"),
        parts.column("dropped", "OR branches at rate zero", align="right",
                     help="dropped by natural pruning"),
        parts.column("lowest", "lowest rate of a branch", ".4f", help="spikes a neuron and step"),
        parts.column("same", "output without them equal to the bit"),
    ]  # fmt: skip
    title = "Firing patterns and natural pruning"
    note = (
        f"SSIM on {COUNTED} test samples, of consecutive blocks of equal shape; branches on {PRUNED:,}. "
        "A branch of an OR that never fires is dropped with what leads to it."
    )
    return [parts.table(title, columns, rows, basis="simulated", note=note)] if rows else []


def _networks(study: Study) -> list[parts.Section]:
    """Each variant's network and cores, first seed, hidden until asked for."""
    return [
        {**drawn, "title": f"{variant}: {str(drawn['title']).lower()}", "folded": "show"}
        for variant in study.variants
        for drawn in study.of(variant)[0].get("drawn", ())
    ]


def _runs(study: Study) -> parts.Section:
    n = study.runs[0]["n_onnx"]
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
        parts.column("float", "float", ".2%"), parts.column("onnx", f"ONNX, first {n:,}", ".2%"),
        parts.column("chip", "chip", ".2%"),
        parts.column("parity", "ONNX, largest difference", ".1e"),
        parts.column("train_s", "training, s", ".0f"), parts.column("seconds", "all, s", ".0f"),
        parts.column("digest", "program"),
    ]  # fmt: skip
    return parts.table("Every run", columns, rows, basis="measured")
