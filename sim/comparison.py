"""`compare`: one network on every engine, on the same samples; where they part, and why."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ranvier.deploy.program import Program
from ranvier.export.domains import binary_only
from ranvier.export.graph import Graph
from ranvier.sim.accuracy import Score, confusion, judged, score, sign_test
from ranvier.sim.ladder import Agreement, Divergence, Ladder, levels, with_integers
from ranvier.sim.ledger import Ledger
from ranvier.sim.runner import engines as program_engines
from ranvier.sim.runner import run
from ranvier.train.errors import LavaError, RangeError, ShapeError, UnsupportedError

FLOAT_ENGINES = ("torch", "graph", "onnx")
DEFAULT = ("torch", "onnx", "dense", "lava")
BATCH = 128
Progress: TypeAlias = "Callable[[str, int, int], None]"  # what, done, of how many


@dataclass(frozen=True)
class Advice:
    """What one layer's integers cost, measured: with this population's parameters in floats.

    accuracy, gain  of the float-state network with all others as integers, and against all integers
    n               answers: samples, or labelled steps
    won, lost       of these: right only with the change, right only without
    error           of the readout without the change, and with it, root mean square over its spread
    """

    population: str
    bits: int
    accuracy: float
    gain: float
    n: int
    error: tuple[float, float]
    won: int = 0
    lost: int = 0

    @property
    def worth_it(self) -> bool:
        """Whether it wins half a point at least, beyond what chance does once in twenty (sign test)."""
        return self.gain >= 0.005 and sign_test(self.won, self.lost) < 0.05

    def __str__(self) -> str:
        return (
            f"floats instead of {self.bits} bits in '{self.population}' change the accuracy by "
            f"{100 * self.gain:+.2f} points ({self.won} won, {self.lost} lost of {self.n} answers) "
            f"and the readout's error from {self.error[0]:.2%} to {self.error[1]:.2%}"
        )


@dataclass(frozen=True, eq=False)
class Report:
    """What `compare` found; engines in the order in which they were asked for.

    scores            engine -> right answers of how many samples, or of how many labelled steps
    disagreements     (engine, engine) -> counts [classes, classes], each engine against the first
    agreement         rung -> population -> how far its messages are those of the float network
    first_divergence  the earliest value in which the chip leaves the float network
    advice            per population, best first; empty where it was not asked for
    lava              samples, values compared and values that differ, where Lava ran
    skipped           engine -> why it did not run
    ledger            the counts of the first chip engine over all samples
    parity            engine -> largest absolute difference of its output to the first engine's
    """

    scores: dict[str, Score]
    disagreements: dict[tuple[str, str], np.ndarray]
    agreement: dict[str, dict[str, Agreement]]
    first_divergence: Divergence | None
    advice: list[Advice]
    lava: dict[str, int]
    skipped: dict[str, str]
    ledger: Ledger | None
    parity: dict[str, float]
    graph: Graph
    program: Program
    ladder: Ladder = field(repr=False)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> dict[str, float]:
        """engine -> fraction of right answers."""
        return {k: v.accuracy for k, v in self.scores.items()}

    @property
    def drop(self) -> float:
        """Accuracy lost between the first engine and the worst chip engine."""
        first = next(iter(self.scores))
        chip = [
            v.accuracy for k, v in self.scores.items() if k not in FLOAT_ENGINES and k != "lava"
        ]
        return self.scores[first].accuracy - min(chip) if chip else 0.0

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All figures as JSON; written to `path` as well, where one is given."""
        from ranvier.sim.comparison_view import as_json
        from ranvier.train.files import write_text

        text = as_json(self)
        if path is not None:
            write_text(path, text)
        return text

    def data(self) -> dict[str, Any]:
        """The report's data, for `ranvier.sim.report.render`."""
        from ranvier.sim.comparison_view import report_data

        return report_data(self)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one HTML file that needs nothing else."""
        from ranvier.sim.report import write_report

        write_report(self.data(), path)

    def __str__(self) -> str:
        rows = [f"{name:<10} {s}" for name, s in self.scores.items()]
        rows += [f"{name:<10} not run: {why}" for name, why in self.skipped.items()]
        if self.lava:
            rows.append(f"lava: {self.lava['different']} of {self.lava['values']:,} values differ")
        rows.append(f"first divergence: {self.first_divergence or 'none'}")
        return "\n".join(rows)


def compare(
    net: Any,
    program: Program,
    dataset: Any,
    engines: Sequence[str] = DEFAULT,
    *,
    graph: Graph | None = None,
    limit: int | None = None,
    lava_limit: int = 8,
    onnx_limit: int | None = None,
    ladder_limit: int = 64,
    advice_limit: int = 128,
    meta: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """The Report of one network on several engines, on the same samples.

    net           a torch module, or a Graph (then "torch" is not among the engines)
    dataset       a Dataset, or a pair (x, y): x floats `[batch, *shape]` held over time, or
                  `[time, batch, *shape]`; y class indices `[batch]`, or `[batch, time]` with -1 for
                  a step without a label: then each labelled step is an answer, right or wrong
    engines       torch, graph (float interpreter), onnx (ONNX Runtime); and of the Program:
                  reference, dense, events, lava
    graph         the traced graph, where it is known already
    limit         samples at most; lava_limit, onnx_limit the same for Lava and ONNX Runtime
    ladder_limit  samples for agreement and divergence
    advice_limit  samples for measuring what each layer's integers cost; 0: do not measure
    meta          what else should stand in the report: seeds, command, data
    Lava is skipped, with the reason in `skipped`, where it is not installed.
    Raises RangeError for an unknown engine, ShapeError for data that does not fit.
    """
    for name, n, least in (("limit", limit, 1), ("lava_limit", lava_limit, 0)):
        if n is not None and n < least:
            raise RangeError(f"compare: {name} is {n}; give {least} or more")
    x, y = _samples(dataset, program, limit)
    _check(engines, net)
    tell = progress or (lambda what, done, total: None)
    if graph is None:
        graph = net if isinstance(net, Graph) else _traced(net, x, program)
    given = program
    if y.ndim == 2:
        graph, program = _each_step(graph, program)
    limits = {"onnx": onnx_limit, "lava": lava_limit}
    runner = _Runner(net, graph, program, x, y, tell, limits)
    for name in engines:
        runner.run(name)
    tell("ladder", 0, 1)
    ladder = Ladder(graph, program, x[_batch(program, x, slice(0, ladder_limit))])
    found = ladder.agreement
    some = slice(0, advice_limit)
    told = advise(Ladder(graph, program, x[_batch(program, x, some)]), y[some], tell)
    tell("ladder", 1, 1)
    first = next(iter(runner.outputs), None)
    parity = {} if first is None else runner.parity(first)
    return Report(
        runner.scores, runner.disagreements(), found, ladder.first_divergence, told, runner.lava,
        runner.skipped, runner.ledger, parity, graph, given, ladder, dict(meta or {}),
    )  # fmt: skip


def _check(engines: Sequence[str], net: Any) -> None:
    known = (*FLOAT_ENGINES, *program_engines())
    for name in engines:
        if name not in known:
            raise RangeError(f"compare: engine '{name}' is none of {', '.join(known)}")
    if not engines:
        raise RangeError(f"compare: no engine was named; any of {', '.join(known)}")
    if "torch" in engines and isinstance(net, Graph):
        raise RangeError(
            "compare: engine 'torch' needs the torch module, not its Graph; use 'graph'"
        )


def _samples(dataset: Any, program: Program, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    if hasattr(dataset, "batch"):
        data_x, data_y = dataset.batch(slice(0, limit))
        data_y = data_y.T if data_y.ndim == 2 else data_y  # a Dataset gives time first
    else:
        data_x, data_y = dataset
    x = np.asarray(data_x.detach().cpu() if hasattr(data_x, "detach") else data_x, np.float32)
    y = np.asarray(data_y.detach().cpu() if hasattr(data_y, "detach") else data_y)
    shape = program.input.shape
    if x.shape[1:] != shape and x.shape[2:] != shape:
        raise ShapeError(
            f"compare: samples have shape {x.shape}; the program takes [batch, {shape}] or "
            f"[time, batch, {shape}]"
        )
    axis = _axis(program, x)
    n = x.shape[axis]
    steps = len(x) if axis else program.steps
    if y.shape not in ((n,), (n, steps)):
        raise ShapeError(
            f"compare: {n} samples, labels of shape {y.shape}; one class index a sample is needed, or "
            f"one a sample and step [{n}, {steps}]"
        )
    if y.ndim == 2 and not (y >= 0).any():
        raise RangeError("compare: none of its steps has a label")
    keep = slice(0, limit)
    return x[_batch(program, x, keep)], y[keep].astype(np.int64)


def _each_step(graph: Graph, program: Program) -> tuple[Graph, Program]:
    """Both with outputs `[time, batch, classes]`, not reduced over time."""
    (output,) = graph.outputs
    if program.readout.reduce != output.reduce:  # see `ranvier.deploy.readouts`
        raise UnsupportedError(
            "compare: the program's output holds a sum over all steps, so labels of single steps "
            "cannot be judged; compile for a chip that sends values, such as loihi2"
        )
    nodes = [replace(node, reduce="none") if node is output else node for node in graph]
    readout = replace(program.readout, reduce="none")
    return graph.with_nodes(nodes), program.with_parts(readout=readout)


def _axis(program: Program, x: np.ndarray) -> int:
    return 0 if x.ndim == len(program.input.shape) + 1 else 1


def _batch(program: Program, x: np.ndarray, keep: slice) -> tuple[slice, ...]:
    return (keep,) if _axis(program, x) == 0 else (slice(None), keep)


def _traced(net: Any, x: np.ndarray, program: Program) -> Graph:
    import torch

    from ranvier.export.tracer import trace

    return trace(net, torch.from_numpy(x[_batch(program, x, slice(0, 1))]))


class _Runner:
    """Runs one engine after the other and keeps what they gave."""

    def __init__(
        self, net: Any, graph: Graph, program: Program, x: np.ndarray, y: np.ndarray,
        tell: Progress, limits: Mapping[str, int | None],
    ) -> None:  # fmt: skip
        self.net, self.graph, self.program, self.x, self.y = net, graph, program, x, y
        self.tell, self.limits = tell, limits
        self.outputs: dict[str, np.ndarray] = {}
        self.scores: dict[str, Score] = {}
        self.skipped: dict[str, str] = {}
        self.lava: dict[str, int] = {}
        self.ledger: Ledger | None = None

    def run(self, name: str) -> None:
        if name == "lava":
            self._run_lava()
            return
        with tempfile.TemporaryDirectory() as folder:
            one = self._engine(name, Path(folder))
            parts = []
            n = self._n(name)
            for i in range(0, n, BATCH):
                self.tell(name, i, n)
                parts.append(one(self._part(i, min(BATCH, n - i))))
        self.tell(name, n, n)
        self._keep(name, np.concatenate(parts, -2))

    def _n(self, name: str) -> int:
        """How many samples an engine runs."""
        limit = self.limits.get(name)
        return len(self.y) if limit is None else min(limit, len(self.y))

    def _part(self, i: int, n: int) -> np.ndarray:
        return self.x[_batch(self.program, self.x, slice(i, i + n))]

    def _keep(self, name: str, output: np.ndarray) -> None:
        if output.ndim != 1 + self.y.ndim:
            wanted = "[batch, classes]; let the output be reduced over time (Output.reduce)"
            if self.y.ndim == 2:
                wanted = "[time, batch, classes]; let the network keep its steps"
            raise UnsupportedError(
                f"compare: engine '{name}' gave outputs of shape {output.shape}, not {wanted}"
            )
        rows, labels = judged(output, self.y[: output.shape[-2]])
        self.outputs[name] = rows
        self.scores[name] = score(rows, labels, "samples" if self.y.ndim == 1 else "steps")

    def _engine(self, name: str, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
        if name == "torch":
            return lambda x: run_torch(self.net, self.graph, x)
        if name == "graph":
            return lambda x: self._reduced(self.graph.run(x))
        if name == "onnx":
            return self._onnx(folder)
        return lambda x: self._chip(name, x)

    def _reduced(self, series: np.ndarray) -> np.ndarray:
        out = np.asarray(self.graph.readout(series))
        return out.reshape(len(out), -1) if self.graph.outputs[0].reduce != "none" else out

    def _onnx(self, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
        from ranvier.export.onnx_file import run_onnx, write_onnx

        static = _axis(self.program, self.x) == 0
        steps = (self.program.steps or self.graph.steps) if static else len(self.x)
        path = folder / "net.onnx"
        write_onnx(self.graph, path, steps, static=static)

        def one(x: np.ndarray) -> np.ndarray:
            found = run_onnx(path, x)
            series = found["output"] if isinstance(found, dict) else found
            return self._reduced(np.asarray(series))

        return one

    def _chip(self, name: str, x: np.ndarray) -> np.ndarray:
        result = run(self.program, x, name)
        if not self.scores.keys() - set(FLOAT_ENGINES):
            self.ledger = result.ledger if self.ledger is None else self.ledger + result.ledger
        return result.output

    def _run_lava(self) -> None:
        from ranvier.deploy.lava_compat import available
        from ranvier.sim.difference import n_different

        reason = available()
        if reason is not None:
            self.skipped["lava"] = reason
            return
        n = self._n("lava")
        x = self._part(0, n)
        self.tell("lava", 0, n)
        try:
            result = run(self.program, x, "lava", ("spikes", "u", "v"))
        except (LavaError, UnsupportedError) as error:
            self.skipped["lava"] = str(error)
            return
        values, different = n_different(run(self.program, x, "auto", ("spikes", "u", "v")), result)
        self.lava = {"samples": n, "values": values, "different": different}
        self._keep("lava", result.output)
        self.tell("lava", n, n)

    def disagreements(self) -> dict[tuple[str, str], np.ndarray]:
        names = list(self.outputs)
        found = {}
        for other in names[1:]:
            a, b = self.outputs[names[0]], self.outputs[other]
            n = min(len(a), len(b))
            found[names[0], other] = confusion(a[:n], b[:n], a.shape[1])
        return found

    def parity(self, first: str) -> dict[str, float]:
        a = self.outputs[first]
        return {
            name: float(np.abs(a[: len(b)] - b).max(initial=0.0))
            for name, b in self.outputs.items()
            if name != first
        }


def run_torch(net: Any, graph: Graph, x: np.ndarray) -> np.ndarray:
    """The module's own output in eval mode and from the zero state: `[batch, classes]`, or
    `[time, batch, classes]` where the graph's output is not reduced over time.

    A module that computes one step is called once a step; the module itself is left untouched.
    """
    import torch

    from ranvier.export.interpret import with_time
    from ranvier.export.trace_plan import as_given, chosen, is_ours, make_plan, rested
    from ranvier.train.evaluation import run_net

    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    made, sample = rested(net), torch.from_numpy(np.array(x)).to(device)
    with torch.no_grad():
        if is_ours(made):
            out = run_net(made, sample, graph.outputs[0].reduce == "none")
        elif (plan := make_plan(net, sample, 0)).loop:
            out = chosen(made(as_given(sample, plan)), plan.output)
        else:
            series = with_time(sample, graph.inputs[0].shape, graph.steps, "compare")
            out = torch.stack([chosen(made(x_t), plan.output) for x_t in series])
    array = np.asarray(out.cpu())
    return np.asarray(graph.readout(array)) if array.ndim == 3 else array


def advise(ladder: Ladder, labels: np.ndarray, tell: Progress | None = None) -> list[Advice]:
    """What each population's integers cost, best first: measured by giving it its floats back.

    All others keep their integers; states are floats throughout, which leaves out only rounding.
    """
    lowered, program = ladder.lowered, ladder.program
    if not len(labels):
        return []
    x = levels(program, ladder.series).astype(np.float32)

    def outputs(graph: Graph) -> np.ndarray:
        out = np.asarray(graph.readout(graph.run(x)))
        return out.reshape(*out.shape[: labels.ndim], -1)

    wanted, known = judged(outputs(lowered), labels)
    spread = float(wanted.std()) or 1.0

    def error(out: np.ndarray) -> float:
        return float(np.sqrt(np.mean((out - wanted) ** 2))) / spread

    base, _ = judged(outputs(with_integers(lowered, program)), labels)
    before, right = error(base), score(base, known).accuracy
    hit = base.argmax(-1) == known
    found = []
    layers = [p for p in program if not p.is_input and program.into(p.name)]
    for i, population in enumerate(layers):
        if tell is not None:
            tell("advice", i, len(layers))
        out, _ = judged(outputs(with_integers(lowered, program, keep=(population.name,))), labels)
        bits = min(p.bits for p in program.into(population.name))
        accuracy, now = score(out, known).accuracy, out.argmax(-1) == known
        won, lost = int((now & ~hit).sum()), int((hit & ~now).sum())
        found.append(
            Advice(
                population.name, bits, accuracy, accuracy - right, len(known),
                (before, error(out)), won, lost,
            )
        )  # fmt: skip
    return sorted(found, key=lambda a: (-a.gain, a.error[1]))


def verdict_text(graph: Graph) -> str:
    """Whether the network only adds weights after its stem, in a sentence."""
    holds, broken = binary_only(graph)
    if holds:
        return "Every layer after the stem only adds weights: its messages are binary."
    return f"{len(broken)} layers take more than binary messages, the first at {broken[0]}."
