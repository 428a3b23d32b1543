"""Every network of the zoo through the compiler, the engines and Lava, value by value.

`python -m ranvier.sim.zoo` prints docs/zoo-lava.md; `--pattern`, `--no-lava` for a part of it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ranvier.deploy.program import Program
from ranvier.sim.difference import n_different
from ranvier.sim.runner import STATES, Result, engines
from ranvier.sim.zoo_cases import Case, cases
from ranvier.train.errors import RanvierError
from ranvier.train.files import write_text

if TYPE_CHECKING:
    from ranvier.train.networks import Network

ENGINES = ("dense", "events", "auto")
AT_ONCE = 4  # networks to a start of Lava where finished ones are kept
LAVA_S = 3600.0  # that a start of Lava may take, on a machine that does other things beside


@dataclass(frozen=True)
class Outcome:
    """One network.

    refusal      the error's text where trace or compile refuse it, else ""
    n_populations, n_synapses, latency, n_spikes    of the Program and its run on `samples` samples
    n_values     spikes and states compared on each engine
    mismatches   engine -> values that differ from the reference's
    """

    case: Case
    refusal: str = ""
    n_populations: int = 0
    n_synapses: int = 0
    latency: int = 0
    steps: int = 0
    n_spikes: int = 0
    n_values: int = 0
    mismatches: dict[str, int] | None = None


def build(case: Case, batch: int = 8) -> tuple[Network, Any]:
    """The network with the statistics of one batch, in eval mode, and the batch.

    Untrained weights fire little behind normalization, so thresholds are low, and normalizations
    are jolted as training would: a network of equal channels proves little.
    """
    import torch
    from torch import nn

    from ranvier.train import create_model

    torch.manual_seed(0)
    net = create_model(case.name, **{"threshold": 0.4, **case.options})
    x = torch.rand(batch, *net.input_shape)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
    with torch.no_grad():
        for module in net.modules():  # without normalization next to nothing would fire
            if net.config.norm == "none" and isinstance(module, (nn.Conv1d, nn.Conv2d)):
                module.weight *= 4
        net.train()(x)
    return net.eval(), x


def compiled(case: Case) -> list[tuple[Program, np.ndarray]]:
    """The Program and one sample as its input population sends it, [time, 1, ...]; or one a stage.

    Raises RanvierError where trace or compile refuse the network.
    """
    from ranvier.deploy import LOIHI2, compile
    from ranvier.export import trace

    net, x = build(case)
    if case.staged:
        return _stages(net, x)
    graph = trace(net, x[:2])
    if case.name == "sequential":  # its steps are an image's columns
        columns = x.movedim(3, 0).numpy()
        program = compile(graph, chip=LOIHI2, calibration=columns)
        return [(program, program.encode(columns[:, :1], None))]
    program = compile(graph, chip=LOIHI2, calibration=x.numpy())
    return [(program, program.encode(x[:1].numpy(), None))]


def _stages(net: Any, x: Any) -> list[tuple[Program, np.ndarray]]:
    """Each stage's Program and what the host gives it after the reference ran the one before."""
    from ranvier.deploy.staged import compile_staged
    from ranvier.sim.staged import run_staged

    staged = compile_staged(net, x.numpy())
    inputs = run_staged(staged, x[:1].numpy(), "reference").inputs
    return [(p, p.encode(given, None)) for p, given in zip(staged.programs, inputs, strict=True)]


def check_all(chosen: Sequence[Case], lava: bool, folder: Path | None) -> list[Outcome]:
    """An Outcome a network; with a folder, finished ones are taken from there and new ones kept."""
    if folder is None:
        return check(chosen, lava)
    kept = {case.title: _read(_path(folder, case), case) for case in chosen}
    todo = [c for c in chosen if _unfinished(kept[c.title], lava)]
    for i in range(0, len(todo), AT_ONCE):
        for outcome in check(todo[i : i + AT_ONCE], lava):
            kept[outcome.case.title] = outcome
            values = {k: v for k, v in asdict(outcome).items() if k != "case"}
            text = json.dumps({"options": repr(outcome.case), **values}, indent=1)
            write_text(_path(folder, outcome.case), text)
    return [found for case in chosen if (found := kept[case.title]) is not None]


def _path(folder: Path, case: Case) -> Path:
    return folder / f"{re.sub('[^A-Za-z0-9=-]+', '_', case.title)}.json"


def _unfinished(outcome: Outcome | None, lava: bool) -> bool:
    return outcome is None or (
        lava and outcome.mismatches is not None and "lava" not in outcome.mismatches
    )


def _read(path: Path, case: Case) -> Outcome | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Outcome(case, **kept) if kept.pop("options", None) == repr(case) else None


def check(
    chosen: Iterable[Case], lava: bool = True, say: Callable[[str], None] = lambda text: None
) -> list[Outcome]:
    """An Outcome a network; all that compile run in one start of Lava.

    Raises LavaError where Lava is missing or fails.
    """
    outcomes: list[Outcome] = []
    kept: list[tuple[int, Program, np.ndarray, Result]] = []
    for case in chosen:
        say(case.title)
        try:
            programs = compiled(case)
        except RanvierError as error:
            outcomes.append(Outcome(case, refusal=" ".join(str(error).split())))
            continue
        references = [_run(program, x, "reference") for program, x in programs]
        kept += [(len(outcomes), *pair, r) for pair, r in zip(programs, references, strict=True)]
        outcomes.append(_on_engines(case, programs, references))
    if lava and kept:
        _on_lava(outcomes, kept)
    return outcomes


def _run(program: Program, x: np.ndarray, engine: str) -> Result:
    return engines()[engine](program, x, STATES)


def _on_engines(
    case: Case, programs: Sequence[tuple[Program, np.ndarray]], references: Sequence[Result]
) -> Outcome:
    mismatches, n_values = {}, 0
    for engine in ENGINES:
        found = [
            n_different(r, _run(*pair, engine))
            for pair, r in zip(programs, references, strict=True)
        ]
        mismatches[engine] = sum(different for _, different in found)
        n_values = max(n_values, sum(n for n, _ in found))
    return Outcome(
        case,
        n_populations=sum(len(p.populations) for p, _ in programs),
        n_synapses=sum(_n_synapses(p) for p, _ in programs),
        latency=sum(p.latency for p, _ in programs),
        steps=len(programs[0][1]),
        n_spikes=sum(_n_spikes(p, r) for (p, _), r in zip(programs, references, strict=True)),
        n_values=n_values,
        mismatches=mismatches,
    )


def _n_spikes(program: Program, result: Result) -> int:
    sent = [result.trace[n].spikes for n in program.populations if n != program.input.name]
    return sum(int(np.count_nonzero(s)) for s in sent if s is not None)


def _n_synapses(program: Program) -> int:
    return sum(int(np.size(p.map.weight)) for p in program.projections.values())


def _on_lava(
    outcomes: list[Outcome], kept: Sequence[tuple[int, Program, np.ndarray, Result]]
) -> None:
    from ranvier.sim.lava_engine import run_all_on_lava

    jobs = [(program, x) for _, program, x, _ in kept]
    runs = run_all_on_lava(jobs, STATES, timeout_s=LAVA_S)
    found: dict[int, list[tuple[int, int]]] = {}
    for (i, _, _, reference), lava in zip(kept, runs, strict=True):
        found.setdefault(i, []).append(n_different(reference, lava))
    for i, counts in found.items():
        mismatches = {**(outcomes[i].mismatches or {}), "lava": sum(d for _, d in counts)}
        n = sum(n for n, _ in counts)
        outcomes[i] = replace(outcomes[i], n_values=n, mismatches=mismatches)


# ---- the page


def table(outcomes: Sequence[Outcome]) -> str:
    """Two Markdown tables: what runs, and what is refused with the reason given."""
    columns = [*ENGINES, "lava"]
    lines = [
        "| network | size | steps | populations | weights | latency | spikes | values compared | "
        + " | ".join(columns) + " |",
        "|" + "---|" * (8 + len(columns)),
    ]  # fmt: skip
    for o in outcomes:
        if o.mismatches is not None:
            cells = [str(o.mismatches.get(c, "not run")) for c in columns]
            numbers = (o.n_populations, o.n_synapses, o.latency, o.n_spikes, o.n_values)
            row = [o.case.title, o.case.size, str(o.steps), *(f"{n:,}" for n in numbers), *cells]
            lines.append("| " + " | ".join(row) + " |")
    lines += ["", "| network | size | refused, because |", "|---|---|---|"]
    for o in outcomes:
        if o.mismatches is None:
            reason = o.refusal.replace("|", "/")
            lines.append(f"| {o.case.title} | {o.case.size} | {reason} |")
    return "\n".join(lines) + "\n"


HEAD = """# Which networks compile, and run in Lava value for value

Generated by `python -m ranvier.sim.zoo > docs/zoo-lava.md`. Every name of `list_models()`, small: the layout
is the named network's, with fewer channels, blocks and pixels, random weights, normalization statistics of
one batch. Each is traced, compiled for loihi2 (8 bits, joins="auto"), and run on one sample by the reference
interpreter, by the engines and by Lava's own processes. Compared are all spikes, currents u and membranes v
of every population at every step; the last columns count the values that differ from the reference.

"""


def page(outcomes: Sequence[Outcome], missing: Sequence[Case] = ()) -> str:
    """docs/zoo-lava.md; missing: the cases that have not been run."""
    ran = [o for o in outcomes if o.mismatches is not None]
    in_lava = [o for o in ran if o.mismatches and "lava" in o.mismatches]
    wrong = sum(sum((o.mismatches or {}).values()) for o in ran)
    total = sum(o.n_values for o in in_lava)
    summary = (
        f"{len(ran)} networks compile; {len(in_lava)} ran in Lava, {total:,} values there;"
        f" {wrong} mismatches in all. {len(outcomes) - len(ran)} are refused.\n\n"
    )
    left = "".join(f"\n- {case.title}" for case in missing)
    return HEAD + summary + table(outcomes) + (f"\nNot run yet:\n{left}\n" if left else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the page; 1 where a value differs."""
    parser = argparse.ArgumentParser(prog="python -m ranvier.sim.zoo", description=__doc__)
    parser.add_argument(
        "--pattern", default="*", help="names, as in list_models; several by commas"
    )
    parser.add_argument("--no-lava", action="store_true", help="the engines alone")
    parser.add_argument("--keep", type=Path, help="folder of finished networks, to go on from")
    parser.add_argument(
        "--finished", action="store_true", help="print what --keep has, run nothing"
    )
    options = parser.parse_args(argv)
    patterns = options.pattern.split(",")
    chosen = [c for c in cases()
              if any(fnmatch.fnmatch(t, p) for p in patterns for t in (c.title, c.name))]  # fmt: skip
    if options.finished and options.keep is not None:
        found = [(case, _read(_path(options.keep, case), case)) for case in chosen]
        outcomes = [outcome for _, outcome in found if outcome is not None]
        missing = [case for case, outcome in found if outcome is None]
    else:
        outcomes, missing = check_all(chosen, not options.no_lava, options.keep), []
    print(page(outcomes, missing), end="")
    return int(any(sum((o.mismatches or {}).values()) for o in outcomes))


__all__ = ["Case", "Outcome", "cases", "check", "compiled", "page", "table"]

if __name__ == "__main__":
    raise SystemExit(main())
