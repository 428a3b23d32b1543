"""What the commands export, compile, run, compare and bench do, as plain functions."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ranvier.cli.sources import (
    arrays,
    default_output,
    load_graph,
    load_net,
    load_program,
    weights_digest,
)
from ranvier.train.errors import FormatError, RangeError

if TYPE_CHECKING:
    from ranvier.deploy.program import Program

VERIFY_SAMPLES = 16


def export_run(
    run: Path, nir: Path | None, onnx: Path | None, net: Path | None, verify: bool
) -> list[dict[str, Any]]:
    """Writes graph.h5 and the asked-for files (NIR and ONNX if none is asked for); a row a file."""
    import torch

    from ranvier.export import read_nir, trace, write_net, write_nir, write_onnx

    module, _, _ = load_net(run)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(VERIFY_SAMPLES, *module.input_shape, generator=generator)
    graph = trace(module, x[:2])
    with torch.inference_mode():
        wanted = module(x).numpy()
    graph.save(run / "graph.h5")
    rows = [_row(run / "graph.h5", "graph", _error(graph, x, wanted) if verify else None)]
    if nir is None and onnx is None and net is None:
        nir, onnx = run / "net.nir", run / "net.onnx"
    if nir is not None:
        write_nir(graph, nir)
        rows.append(_row(nir, "NIR", _error(read_nir(nir), x, wanted) if verify else None))
    if onnx is not None:
        from ranvier.export.onnx_file import run_onnx

        write_onnx(graph, onnx, steps=graph.steps, static=True)
        found = (
            float(np.abs(run_onnx(onnx, x.numpy(), output="readout") - wanted).max())
            if verify
            else None
        )
        rows.append(_row(onnx, "ONNX", found))
    if net is not None:
        write_net(load_program(run), net)
        rows.append(_row(net, "netx", None))
    return rows


def _error(graph: Any, x: Any, wanted: np.ndarray) -> float:
    return float(np.abs(graph.readout(graph.run(x.numpy())) - wanted).max())


def _row(path: Path, kind: str, error: float | None) -> dict[str, Any]:
    shown = "not verified" if error is None else f"{error:.2e}"
    return {
        "file": str(path),
        "format": kind,
        "bytes": path.stat().st_size,
        "largest difference to torch (measured)": shown,
    }


def compile_source(
    source: Path,
    chip: str,
    options: dict[str, Any],
    output: Path | None,
    calibration: str | None,
    data_dir: Path | None,
) -> dict[str, Any]:
    """Compiles a run folder or a file; writes the program; a row on it."""
    from ranvier.deploy import compile
    from ranvier.deploy.chip import chip_named

    target = chip_named(chip)
    if source.suffix == ".net" and source.is_file():
        if calibration is not None or options != {"weight_bits": 8, "joins": "auto"}:
            raise RangeError(
                f"compile: '{source}' holds whole numbers already; --bits, --joins and --calibration have "
                "nothing to choose there"
            )
        from ranvier.deploy.netx_file import read_program

        program = read_program(source)
    else:
        graph = load_graph(source)
        x = _calibration(source, graph, calibration, data_dir)
        program = compile(graph, chip=target, calibration=x, **options)
        if source.is_dir():  # so that a later command notices that the run was trained again
            meta = {**program.meta, "weights": weights_digest(source)}
            program = program.with_parts(meta=meta)
    path = output or default_output(source, "program.h5")
    if path.resolve() == source.resolve():
        raise RangeError(f"compile: '{path}' is the input itself; name another file with -o")
    program.save(path)
    return {
        "program": str(path),
        "populations": len(program.populations),
        "projections": len(program.projections),
        "neurons": sum(p.size for p in program if not p.is_input),
        "latency": program.latency,
        "joins": str(program.meta.get("joins", "-")),
        "digest": program.digest()[:16],
    }


def _calibration(source: Path, graph: Any, named: str | None, data_dir: Path | None) -> Any:
    """Calibration input: what is named, else the run's own training data, else none."""
    if named is not None:
        shape = graph.inputs[0].shape
        run = source if source.is_dir() else source.parent
        x, _ = arrays(
            named,
            split="train",
            data_dir=data_dir,
            limit=512,
            shape=shape,
            steps=graph.steps,
            run=run,
        )
        return np.swapaxes(x, 0, 1) if x.ndim == len(shape) + 2 else x  # sets have samples first
    if source.is_dir():
        from ranvier.train.recipe import recipe_data

        _, recipe, _ = load_net(source)
        if recipe is not None:
            train, _ = recipe_data(recipe, data_dir)
            return _series(train, slice(0, 512))
    return None


def _series(data: Any, index: slice) -> np.ndarray:
    """Samples of a data set as the engines take them: [batch, ...], event sets [time, batch, ...]."""
    x, _ = data.batch(index)
    return np.asarray(x)


def run_program(
    path: Path,
    data: str,
    engine: str,
    limit: int | None,
    batch_size: int,
    data_dir: Path | None,
    ledger: Path | None,
) -> dict[str, Any]:
    """Runs a program over a data set, batch by batch; a row with accuracy and counts."""
    program = load_program(path)
    from ranvier.sim.stream import evaluate
    from ranvier.train.files import write_text

    run = path if path.is_dir() else path.parent
    x, y = arrays(
        data, split="test", data_dir=data_dir, limit=limit, shape=program.input.shape,
        steps=program.steps, run=run,
    )  # fmt: skip
    if y is not None and y.ndim == 2:
        found = label_a_step(program, x, y, engine, batch_size)
    else:
        found = evaluate(program, x, y, engine=engine, batch_size=batch_size, progress=True)
    if ledger is not None:
        write_text(ledger, json.dumps(found.ledger.to_dict(), indent=1))
    counts = found.ledger
    return {
        "samples": found.n,
        "engine": engine,
        "accuracy (simulated)": "-" if y is None else f"{100 * found.accuracy:.2f} %",
        "spikes": counts.n_spikes,
        "spikes per neuron": counts.spikes_per_neuron,
        "synops": counts.n_synops,
        "of these multiplications": counts.n_mults,
        "neuron updates": counts.n_updates,
        "latency steps": program.latency,
    }


def label_a_step(program: Program, x: Any, y: Any, engine: str, batch_size: int) -> Any:
    """The Evaluation over a set with a label a step: x `[n, time, ...]`, y `[n, time]`, -1 for no label.

    Its accuracy is the share of labelled steps that are right; predictions are `[n, time]`.
    """
    from ranvier.sim import run
    from ranvier.sim.accuracy import judged, score
    from ranvier.sim.stream import Evaluation

    if batch_size < 1:
        raise RangeError(f"run: batch_size is {batch_size}; give 1 or more")
    each = program.with_parts(readout=replace(program.readout, reduce="none"))
    parts = [
        run(each, np.swapaxes(np.asarray(x[i : i + batch_size]), 0, 1), engine)
        for i in range(0, len(y), batch_size)
    ]
    output = np.concatenate([p.output for p in parts], 1)
    accuracy = score(*judged(output, y)).accuracy
    ledger = sum(p.ledger for p in parts)
    return Evaluation(accuracy, output.argmax(-1).T, None, ledger, len(y))


def compare_run(
    run: Path, engines: list[str], limit: int | None, lava_limit: int, data_dir: Path | None
) -> Any:
    """The comparison report of a run folder on its recipe's test split."""
    from ranvier.cli.studies import command_line
    from ranvier.deploy import compile
    from ranvier.export import trace
    from ranvier.sim import compare
    from ranvier.train.recipe import recipe_data

    net, recipe, _ = load_net(run)
    if recipe is None:
        raise FormatError(
            f"'{run}' has no recipe.json, so its data set is not known; use `ranvier run`"
        )
    train, test = recipe_data(recipe, data_dir)
    if (run / "program.h5").exists():
        program = load_program(run)
    else:
        x = _series(train, slice(0, 512))
        two = x[:, :2] if train.steps is not None else x[:2]
        program = compile(trace(net, two), calibration=x)
    config: Any = net.config
    meta = {
        "title": f"{config.name}, join {config.join}, on every engine",
        "subtitle": f"{recipe.data.name}, test split; {config.steps} steps; trained as recipe "
        f"{recipe.name}, seed {recipe.train.seed}",
        "command": command_line(), "run": str(run), "seed": recipe.train.seed,
        "data": recipe.data.name,
    }  # fmt: skip
    return compare(
        net, program, test, engines=tuple(engines), limit=limit, lava_limit=lava_limit, meta=meta
    )


def run_bench(suite: str, quick: bool, out: Path | None, **options: Any) -> None:
    """Runs a benchmark suite, printing rows as they come; `out` gets them as CSV."""
    homes = {"sim": "ranvier.sim.bench", "train": "ranvier.train.bench"}
    if suite not in homes:
        raise RangeError(f"bench: suite '{suite}' is none of {', '.join(homes)}")
    given = {k: v for k, v in options.items() if v}
    if given and suite != "sim":
        raise RangeError(f"bench: suite '{suite}' takes no {', '.join(given)}")
    importlib.import_module(homes[suite]).main(quick=quick, out=out, **given)
