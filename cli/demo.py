"""`ranvier demo`: the whole pipeline on real digits, once for each residual connection."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ranvier.train.errors import RanvierError

JOINS = ("vanilla", "sew", "ms", "or")
MODEL = "resnet-digits"
EPOCHS = 10
STEPS = 4
METRICS = "metrics.csv"
NIR_TOLERANCE = 1e-4  # of logits, float32: another order of summation


@dataclass(frozen=True)
class Row:
    """What the demo measured for one join."""

    join: str
    n_test: int
    torch_accuracy: float
    onnx_accuracy: float
    onnx_agreement: float
    nir_max_error: float
    chip_accuracy: float
    chip_agreement: float
    lava_samples: int
    lava_mismatches: int | None
    spikes_per_neuron: float
    synops: int
    binary_only: bool
    breaking_edge: str
    latency: int
    populations: int
    mapping: str
    train_s: float
    lava_s: float

    def cells(self) -> list[str]:
        """The row as the table shows it."""
        lava = f"{self.lava_samples} / {self.lava_mismatches}" if self.lava_samples else "off"
        binary = "yes" if self.binary_only else f"no: {self.breaking_edge}"
        return [
            self.join,
            f"{100 * self.torch_accuracy:.1f}",
            f"{100 * self.onnx_accuracy:.1f}",
            f"{100 * self.chip_accuracy:.1f}",
            lava,
            f"{self.spikes_per_neuron:.2f}",
            f"{self.synops / self.n_test:,.0f}",
            binary,
        ]


HEADS = [
    "join",
    "torch %",
    "ONNX %",
    "chip %",
    "Lava samples / mismatches",
    "spikes per neuron",
    "synops per sample",
    "binary-only",
]


def run_demo(
    out: Path,
    *,
    joins: tuple[str, ...] = JOINS,
    lava_samples: int = 5,
    epochs: int = EPOCHS,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Trains, exports, compiles, runs and compares one small network a join; artifacts go to `out`.

    say  is told what is going on, a line a stage
    Returns the rows of the table; writes demo.json and report.html as well.
    """
    from ranvier.deploy.lava_compat import available

    why_not = available()
    if why_not:
        say(f"Lava is off: {why_not}")
        lava_samples = 0
    from ranvier.train import load_dataset
    from ranvier.train.recipe import load_run

    train, test = load_dataset("digits", split="train"), load_dataset("digits", split="test")
    say(f"training {MODEL} once a join: {epochs} epochs, {STEPS} steps, {len(train)} digits")
    seconds = train_all(out, joins, epochs, seed)
    rows, parts = [], []
    for join in joins:
        net, _, _ = load_run(out / join / "train")
        of = Trained(join, net, train, test, out / join, seconds[join])
        row, sections = _deploy(of, lava_samples, say)
        rows.append(row)
        parts += sections
    _write(out, rows, parts, seed, epochs)
    return rows


def train_one(join: str, folder: Path, epochs: int, seed: int) -> float:
    """Trains one network into `folder`; the seconds it took. Runs in a process of its own."""
    import torch

    from ranvier.train import create_model, fit, load_dataset

    torch.set_num_threads(1)  # the images are 8x8: a second thread only waits
    torch.manual_seed(seed)
    net = create_model(MODEL, join=join, steps=STEPS)
    begin = time.perf_counter()
    options = {"epochs": epochs, "batch_size": 64, "lr": 5e-3, "schedule": "onecycle", "seed": seed}
    fit(net, load_dataset("digits", split="train"), out_dir=folder, progress=False, **options)
    return time.perf_counter() - begin


def train_all(out: Path, joins: tuple[str, ...], epochs: int, seed: int) -> dict[str, float]:
    """Trains all joins, as many at a time as there are cores, with a bar for each; join -> seconds."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from rich.progress import Progress

    folders = {join: out / join / "train" for join in joins}
    for folder in folders.values():
        (folder / METRICS).unlink(missing_ok=True)
    workers = min(len(joins), os.cpu_count() or 1)
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        Progress(disable=not sys.stdout.isatty()) as progress,
    ):
        bars = {join: progress.add_task(f"training {join}", total=epochs) for join in joins}
        runs = {j: pool.submit(train_one, j, folders[j], epochs, seed) for j in joins}
        while not all(run.done() for run in runs.values()):
            for join in joins:
                progress.update(bars[join], completed=epochs_done(folders[join] / METRICS))
            time.sleep(0.2)
        return {join: run.result() for join, run in runs.items()}


def epochs_done(metrics: Path) -> int:
    """Rows in a run's metrics.csv, which training writes after each epoch."""
    return max(0, len(metrics.read_text().splitlines()) - 1) if metrics.exists() else 0


@dataclass(frozen=True)
class Trained:
    """One join's network as trained, and what is known before it leaves torch."""

    join: str
    net: Any
    train: Any
    test: Any
    folder: Path
    train_s: float

    @property
    def x(self) -> np.ndarray:
        """The held-out images, floats `[sample, 1, 8, 8]`."""
        return np.asarray(self.test.x.float())

    @property
    def y(self) -> np.ndarray:
        return np.asarray(self.test.y)


def _deploy(of: Trained, lava_samples: int, say: Callable[[str], None]) -> tuple[Row, list[Any]]:
    """The row of one join, and its sections of the report: every stage, one after the other."""
    import torch

    torch.set_num_threads(1)
    logits = _logits(of)
    say(f"{of.join}: exporting NIR and ONNX, verifying both against torch")
    graph, nir_error, onnx = _export(of, logits)
    say(f"{of.join}: compiling to 8-bit integers, running {len(of.y)} digits on the engine")
    program, result = _compile_and_run(of, graph)
    if lava_samples:
        say(f"{of.join}: running {lava_samples} digits as Lava processes")
    mismatches, lava_s = _lava(of, program, lava_samples)
    row = Row(
        join=of.join,
        n_test=len(of.y),
        torch_accuracy=_accuracy(logits, of.y),
        onnx_accuracy=_accuracy(onnx, of.y),
        onnx_agreement=_agreement(onnx, logits),
        nir_max_error=nir_error,
        chip_accuracy=_accuracy(result.output, of.y),
        chip_agreement=_agreement(result.output, logits),
        lava_samples=lava_samples,
        lava_mismatches=mismatches,
        train_s=of.train_s,
        lava_s=lava_s,
        **_counts(graph, program, result),
    )
    return row, _sections(of.join, graph, program, result)


def _logits(of: Trained) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return np.asarray(of.net(of.test.x.float()))


def _export(of: Trained, logits: np.ndarray) -> tuple[Any, float, np.ndarray]:
    """(graph, largest difference of NIR's logits to torch's, ONNX Runtime's logits); files in the folder.

    Raises RanvierError where NIR gives back another graph.
    """
    from ranvier.export import read_nir, trace, write_nir, write_onnx
    from ranvier.export.onnx_file import run_onnx

    graph = trace(of.net, of.test.x.float()[:8])
    graph.save(of.folder / "graph.h5")
    write_nir(graph, of.folder / "net.nir")
    again = read_nir(of.folder / "net.nir")
    difference = graph.diff(again)
    if difference:
        raise RanvierError(f"demo: NIR lost something of '{of.join}': {difference[0]}")
    error = float(np.abs(again.readout(again.run(of.x)) - logits).max())
    write_onnx(graph, of.folder / "net.onnx", steps=STEPS, static=True)
    return graph, error, run_onnx(of.folder / "net.onnx", of.x, output="readout")


def _compile_and_run(of: Trained, graph: Any) -> tuple[Any, Any]:
    """(Program, Result of all held-out images on the engine)."""
    from ranvier.deploy import compile
    from ranvier.sim import run

    program = compile(graph, calibration=np.asarray(of.train.x[:256]))
    program.save(of.folder / "program.h5")
    return program, run(program, of.x, record=("spikes",))


def _lava(of: Trained, program: Any, samples: int) -> tuple[int | None, float]:
    """(messages in which Lava and the engine differ, seconds); None where Lava is off."""
    from ranvier.sim.study_bits import lava_mismatches

    if not samples:
        return None, 0.0
    begin = time.perf_counter()
    return lava_mismatches(program, of.x[:samples]), time.perf_counter() - begin


def _counts(graph: Any, program: Any, result: Any) -> dict[str, Any]:
    """What the graph, the Program and its run say of themselves, as fields of a Row."""
    from ranvier.export.domains import binary_only

    is_binary, edges = binary_only(graph)
    return {
        "spikes_per_neuron": result.ledger.spikes_per_neuron,
        "synops": result.ledger.n_synops,
        "binary_only": is_binary,
        "breaking_edge": str(edges[0]) if edges else "",
        "latency": program.latency,
        "populations": len(program.populations),
        "mapping": str(program.meta["joins"]),
    }


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    """The share of samples that both put into one class."""
    return float((a.argmax(1) == b.argmax(1)).mean())


def _accuracy(output: np.ndarray, y: np.ndarray) -> float:
    return float((output.argmax(1) == y).mean())


def _sections(join: str, graph: Any, program: Any, result: Any) -> list[Any]:
    from ranvier.sim import report_parts

    return [
        report_parts.network(graph, f"{join}: the network and what its wires carry"),
        report_parts.ledger_table(result.ledger, program, f"{join}: what it cost, by population"),
    ]


def _write(out: Path, rows: list[Row], parts: list[Any], seed: int, epochs: int) -> None:
    from ranvier.sim import report_parts
    from ranvier.sim.report import write_report
    from ranvier.train.files import write_text

    write_text(out / "demo.json", json.dumps([asdict(r) for r in rows], indent=1))
    columns = [
        report_parts.column("join", "join"),
        report_parts.column("torch", "torch %", ".1f", basis="measured"),
        report_parts.column("onnx", "ONNX Runtime %", ".1f", basis="measured"),
        report_parts.column("chip", "chip (8-bit integers) %", ".1f", basis="simulated"),
        report_parts.column("lava", "Lava samples", "d", basis="simulated"),
        report_parts.column("mismatches", "of these, spikes that differ", "d", basis="simulated"),
        report_parts.column("spikes", "spikes per neuron and sample", ".2f", basis="simulated"),
        report_parts.column("synops", "synaptic operations per sample", ",.0f", basis="simulated"),
        report_parts.column("binary", "binary-only", basis="inferred"),
    ]
    cells = [
        {
            "join": r.join,
            "torch": 100 * r.torch_accuracy,
            "onnx": 100 * r.onnx_accuracy,
            "chip": 100 * r.chip_accuracy,
            "lava": r.lava_samples,
            "mismatches": r.lava_mismatches,
            "spikes": r.spikes_per_neuron,
            "synops": r.synops / r.n_test,
            "binary": "yes" if r.binary_only else f"no: {r.breaking_edge}",
        }
        for r in rows
    ]
    data = {
        "title": "Which residual connection survives the chip?",
        "subtitle": f"ranvier demo: {MODEL} on {rows[0].n_test} held-out digits, {STEPS} time steps",
        "summary": [
            "The same small network, trained once with each residual connection, exported, compiled "
            "to 8-bit Loihi integers and run bit for bit as the chip computes.",
            "binary-only: whether every convolution after the stem receives plain spikes; if not, "
            "the first wire that carries more.",
        ],
        "sections": [report_parts.table("The table", columns, cells, basis="simulated"), *parts],
        "provenance": report_parts.provenance(
            "ranvier demo", seed=seed, epochs=epochs, dataset="scikit-learn digits, 1,437 + 360"
        ),
    }
    write_report(data, out / "report.html")


def failed(rows: list[Row]) -> str | None:
    """What is wrong with the result, if anything: mismatching spikes, or an export that differs."""
    for r in rows:
        if r.lava_mismatches:
            return f"{r.join}: {r.lava_mismatches} messages differ between Lava and the engine"
        if r.nir_max_error > NIR_TOLERANCE:
            return f"{r.join}: NIR's logits differ from torch's by {r.nir_max_error:g}"
    return None
