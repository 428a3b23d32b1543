"""One run of a study: a network trained (or loaded), exported, compiled every way, measured."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ranvier.sim.study_setup import STORED, Setup, parts_of, recipe_of
from ranvier.train.errors import FormatError
from ranvier.train.files import write_text

MAPPINGS = {
    "sew": {"linear": "linear", "graded": "graded"},
    "ms": {"linear": "unrolled", "graded": "relay"},
}
CALIBRATION = 256  # training samples
COUNTED = 128  # test samples for algorithmic operations and firing patterns
CALLED = {"torch": "float", "onnx": "onnx", "auto": "chip"}
PRUNED = 1024  # test samples on which a branch must stay silent to be dropped


def run_one(setup: Setup, variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains (or loads) one network and measures it; the figures, as plain values.

    folder/train is the training's run folder, which `ranvier compile`, `compare` and `publish` take;
    a training that was cut off goes on there.
    """
    from ranvier.train.recipe import recipe_data

    train_set, test_set = recipe_data(recipe_of(setup, variant, seed), setup.data_dir)
    net, metrics = trained(setup, variant, seed, train_set, test_set, folder / "train")
    begin = time.perf_counter()
    found = measure(setup, net, train_set, test_set, f"{variant}, seed {seed}", folder)
    return {
        "variant": variant, "seed": seed, "setup": setup.key(),
        "train_s": float(metrics.get("seconds", 0.0)), "measure_s": time.perf_counter() - begin,
        "train": metrics, **found,
    }  # fmt: skip


def trained(
    setup: Setup, variant: str, seed: int, train_set: Any, test_set: Any, folder: Path
) -> tuple[Any, dict[str, Any]]:
    """(net in eval mode, metrics of its training): trained in `folder`, or taken from elsewhere."""
    if setup.weights:
        net, metrics = loaded(setup, variant, seed, train_set)
    else:
        net = build(setup, variant, seed, train_set)
        metrics = _fit(setup, variant, net, seed, train_set, test_set, folder)
    return net.eval(), {k: v for k, v in metrics.items() if isinstance(v, (int, float, str))}


def build(setup: Setup, variant: str, seed: int, data: Any) -> Any:
    """The untrained network of a variant, its weights drawn with `seed`."""
    from ranvier.train.recipe import build as build_recipe

    return build_recipe(recipe_of(setup, variant, seed), data)


def loaded(setup: Setup, variant: str, seed: int, data: Any) -> tuple[Any, dict[str, Any]]:
    """(net, metrics) of the stored weights, or of a run folder <variant>-s<seed>[/train].

    Raises FormatError where it is not the network that the setup describes, or is not there.
    """
    from ranvier.train import create_model
    from ranvier.train.recipe import load_run

    if setup.weights == STORED:
        join, shortcut = parts_of(variant)
        tag = setup.dataset if shortcut == "A" else f"{setup.dataset}-{shortcut}"
        net: Any = create_model(setup.model, join=join, pretrained=tag)
        metrics: dict[str, Any] = {}
    else:
        place = Path(setup.weights) / f"{variant}-s{seed}"
        place = place / "train" if (place / "train").is_dir() else place
        net, _, metrics = load_run(place)
    _same(asdict(net.config), asdict(build(setup, variant, seed, data).config), variant)
    return net, metrics


def _same(found: dict[str, Any], wanted: dict[str, Any], variant: str) -> None:
    """Raises FormatError naming what differs: a study compares networks that differ in the join alone."""
    for key, value in wanted.items():
        sides: tuple[Any, ...] = (found.get(key), value)
        if key == "image_size":
            sides = tuple((v, v) if isinstance(v, int) else tuple(v or ()) for v in sides)
        if sides[0] != sides[1]:
            raise FormatError(
                f"study: the weights for '{variant}' were trained with {key}={found.get(key)}, the study's "
                f"network has {value}; give the study the same (-s {key}=...)"
            )


def _fit(
    setup: Setup, variant: str, net: Any, seed: int, train_set: Any, test_set: Any, folder: Path
) -> dict[str, Any]:
    """The metrics of the training in `folder`, which goes on from its checkpoint.

    The test split is not looked at while training, unless a setting asks for it.
    """
    from ranvier.train import fit
    from ranvier.train.recipe import RECIPE

    recipe = recipe_of(setup, variant, seed)
    options = recipe.train.as_dict()
    watched = test_set if options["keep"] == "best" or options["early_stop"] else None
    write_text(folder / RECIPE, recipe.model_dump_json(indent=2, exclude_none=True) + "\n")
    try:
        result = fit(
            net, train_set, watched, out_dir=folder, resume=True, progress=False, **options
        )
    except FormatError:  # a training that was cut off before a setting got another default
        shutil.rmtree(folder, ignore_errors=True)
        write_text(folder / RECIPE, recipe.model_dump_json(indent=2, exclude_none=True) + "\n")
        net.load_state_dict(build(setup, variant, seed, train_set).state_dict())
        result = fit(net, train_set, watched, out_dir=folder, progress=False, **options)
    return dict(result.metrics)


def measure(
    setup: Setup, net: Any, train_set: Any, test_set: Any, title: str, folder: Path
) -> dict[str, Any]:
    """Everything that a trained network shows: accuracies, verdict, mappings, divergence.

    The network's own comparison is written to folder/report.html.
    """
    from ranvier.deploy import compile
    from ranvier.export.domains import binary_only
    from ranvier.export.tracer import trace
    from ranvier.sim.comparison import compare
    from ranvier.sim.comparison_view import figures
    from ranvier.train.models import n_parameters

    x, _ = train_set.batch(slice(0, CALIBRATION))
    graph = trace(net, x[:, :4] if train_set.timed else x[:4])
    auto = compile(graph, calibration=x.numpy(), weight_bits=setup.weight_bits, joins=setup.mapping)  # type: ignore[call-overload,unused-ignore]
    report = compare(
        net, auto, test_set, ("torch", "onnx", "auto"), graph=graph,
        ladder_limit=setup.ladder_limit, advice_limit=setup.advice_limit,
        onnx_limit=setup.onnx_limit, meta={"title": f"{setup.model} on {setup.dataset}: {title}"},
    )  # fmt: skip
    report.to_html(folder / "report.html")
    told = figures(report)
    holds, broken = binary_only(graph)
    return {
        "n_parameters": n_parameters(net),
        "accuracy": {CALLED[k]: v for k, v in report.accuracy.items()},
        "n_test": report.scores["torch"].n,
        "n_onnx": report.scores["onnx"].n,
        "onnx_differ": _differ(report, "torch", "onnx"),
        "chip_differ": _differ(report, "torch", "auto"),
        "parity": report.parity,
        "agreement": {
            r: {n: a["overlap"] for n, a in v.items()} for r, v in told["agreement"].items()
        },
        "first_divergence": told["first_divergence"],
        "divergence_text": str(report.first_divergence or "none"),
        "advice": told["advice"],
        "binary_only": holds,
        "breaking_edges": [str(e) for e in broken],
        "algorithmic": algorithmic(graph, test_set),
        "mappings": mappings(setup, graph, auto, x.numpy(), test_set, report),
        "chosen": auto.meta["joins"],
        "drawn": drawn(graph, auto),
        "digest": auto.digest(),
        "pattern_ssim": _similarity(graph, test_set),
        "pruning": _pruning(graph, test_set),
    }


def _differ(report: Any, first: str, other: str) -> int:
    """Samples that two engines put into different classes."""
    counts = report.disagreements[first, other]
    return int(counts.sum() - np.trace(counts))


def drawn(graph: Any, program: Any) -> list[dict[str, Any]]:
    """The network with what its wires carry, and the cores that it takes: sections of a report."""
    from ranvier.sim import report_parts as parts

    return [parts.network(graph), parts.chip_sections(program, None)[0]]


def _similarity(graph: Any, test_set: Any) -> dict[str, float]:
    from ranvier.sim.measures import pattern_ssim

    x, _ = test_set.batch(slice(0, COUNTED))
    return pattern_ssim(graph, x.numpy())


def _pruning(graph: Any, test_set: Any) -> dict[str, Any] | None:
    from ranvier.export.nodes import Join
    from ranvier.sim.measures import natural_pruning

    if not any(isinstance(n, Join) and n.op == "or" for n in graph):
        return None
    x, _ = test_set.batch(slice(0, PRUNED))
    return natural_pruning(graph, x.numpy()).figures()


def algorithmic(graph: Any, test_set: Any) -> dict[str, float]:
    """Operations of the network as written, a sample: additions of weights and multiplications."""
    from ranvier.sim.operations import count

    x, _ = test_set.batch(slice(0, COUNTED))
    return count(graph, x.numpy())


def mappings(
    setup: Setup, graph: Any, auto: Any, calibration: np.ndarray, test_set: Any, report: Any
) -> dict[str, dict[str, Any]]:
    """Both ways to map the joins, where there are two: name -> what it needs and gives."""
    from ranvier.deploy import compile

    chosen = str(auto.meta["joins"])
    found = {chosen: mapped(auto, report.accuracy["auto"], report.ledger)}
    two = setup.mapping == "auto" and len(graph.lower("linear").populations) != len(
        graph.lower("graded").populations
    )
    for other in {"linear", "graded"} - {chosen} if two else ():
        program = compile(
            graph, calibration=calibration, weight_bits=setup.weight_bits, joins=other
        )  # type: ignore[call-overload,unused-ignore]
        accuracy, ledger = run_all(program, test_set)
        found[other] = mapped(program, accuracy, ledger)
    return found


def run_all(program: Any, data: Any, batch: int = 128) -> tuple[float, Any]:
    """(accuracy, ledger) of a program over a data set."""
    from ranvier.sim.runner import run

    right, ledger = 0, None
    for i in range(0, len(data), batch):
        x, y = data.batch(slice(i, i + batch))
        result = run(program, x.numpy())
        right += int((result.output.argmax(-1) == y.numpy()).sum())
        ledger = result.ledger if ledger is None else ledger + result.ledger
    return right / len(data), ledger


def mapped(program: Any, accuracy: float, ledger: Any) -> dict[str, Any]:
    """What one mapping needs: operations, messages, cores, latency, energy; a sample."""
    from ranvier.sim.measures import message_bits

    n = ledger.n_samples
    synapses = sum(int(np.count_nonzero(p.map.weight)) for p in program.projections.values())
    return {
        "accuracy": accuracy,
        "synops": ledger.n_synops / n,
        "mults": ledger.n_mults / n,
        "messages": ledger.n_messages / n,
        "updates": ledger.n_updates / n,
        "spikes_per_neuron": ledger.spikes_per_neuron,
        "message_bits": message_bits(program),
        "populations": len(program.populations),
        "projections": len(program.projections),
        "neurons": sum(p.size for p in program if not p.is_input),
        "weights": synapses,
        "latency": program.latency,
        **needs(program),
        "energy_nj": energies(program, ledger),
    }


def needs(program: Any) -> dict[str, Any]:
    """{"cores": how many of the chip}, by the placement; None where it does not fit."""
    from ranvier.deploy.chip import LOIHI2
    from ranvier.deploy.placement import place
    from ranvier.train.errors import CapacityError

    try:
        return {"cores": place(program, LOIHI2).n_cores}
    except CapacityError as error:
        return {"cores": None, "cores_why": str(error)}


def energies(program: Any, ledger: Any) -> dict[str, float]:
    """Nanojoule a sample by each energy model that knows the program's events."""
    from ranvier.sim.energy_models import energy_table

    return energy_table(program, ledger)
