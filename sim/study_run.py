"""One run of a study: a network trained (or loaded), exported, compiled every way, measured."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ranvier.train.errors import RangeError

CONV = "-conv"  # of a variant's name: 1x1 convolutions as shortcuts instead of none with parameters
MAPPINGS = {
    "sew": {"linear": "linear", "graded": "graded"},
    "ms": {"linear": "unrolled", "graded": "relay"},
}
MODELS = {"digits": "resnet-digits"}  # data set -> default model of the family
EPOCHS = {"digits": 10, "mnist": 4, "fashion_mnist": 6}
TRAIN = {"batch_size": 64, "lr": 5e-3, "schedule": "onecycle"}


@dataclass(frozen=True)
class Setup:
    """What all runs of a study share.

    model     a name of list_models(); joins and shortcuts vary, the rest is `options`
    train     settings of the training (train/settings.py); the seed is added for each run
    limit     test samples at most (None: all), train_limit the same for training samples
    ladder_limit, advice_limit   as in `compare`
    """

    dataset: str = "digits"
    model: str = "resnet-digits"
    steps: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    weight_bits: int = 8
    limit: int | None = None
    train_limit: int | None = None
    ladder_limit: int = 64
    advice_limit: int = 0
    data_dir: str | None = None
    size: int | None = None

    def key(self) -> dict[str, Any]:
        """What a finished run must have been made with to be taken again."""
        made = asdict(self)
        del made["data_dir"]
        return dict(json.loads(json.dumps(made)))


def parts_of(variant: str) -> tuple[str, str]:
    """(join, shortcut) of a variant such as "ms" or "ms-conv".

    Raises RangeError where the join is unknown.

    >>> parts_of("sew-and"), parts_of("ms-conv")
    (('sew-and', 'A'), ('ms', 'conv'))
    """
    from ranvier.train.models import JOIN_NAMES

    join, shortcut = variant, "A"
    if variant.endswith(CONV):
        join, shortcut = variant[: -len(CONV)], "conv"
    if join not in JOIN_NAMES:
        known = ", ".join(JOIN_NAMES)
        raise RangeError(f"study: '{variant}' is none of {known}, nor one of them with '{CONV}'")
    return join, shortcut


def run_one(setup: Setup, variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains (or loads) one network and measures it; the figures, as plain values.

    Weights and the finished figures lie in `folder`; a training that was cut off goes on there.
    """
    from ranvier.train import load_dataset

    where = {"data_dir": setup.data_dir, "size": setup.size}
    train_set = load_dataset(setup.dataset, split="train", limit=setup.train_limit, **where)
    test_set = load_dataset(setup.dataset, split="test", limit=setup.limit, **where)
    net = build(setup, variant, seed, train_set)
    begin = time.perf_counter()
    metrics = _fit(setup, variant, net, seed, train_set, test_set, folder)
    seconds = time.perf_counter() - begin
    found = measure(setup, net, train_set, test_set)
    return {
        "variant": variant, "seed": seed, "setup": setup.key(), "train_s": seconds,
        "train": metrics, **found,
    }  # fmt: skip


def build(setup: Setup, variant: str, seed: int, data: Any) -> Any:
    """The untrained network of a variant, its weights drawn with `seed`."""
    import torch

    from ranvier.train import create_model

    join, shortcut = parts_of(variant)
    shape = {"in_channels": data.input_shape[0], "num_classes": data.n_classes}
    size = tuple(data.input_shape[1:])
    torch.manual_seed(seed)
    return create_model(
        setup.model, join=join, shortcut=shortcut, steps=data.steps or setup.steps,
        **shape, image_size=size, **setup.options,
    )  # fmt: skip


def _fit(
    setup: Setup, variant: str, net: Any, seed: int, train_set: Any, test_set: Any, folder: Path
) -> dict[str, Any]:
    from ranvier.train import fit
    from ranvier.train.errors import FormatError

    options = {**TRAIN, "epochs": EPOCHS.get(setup.dataset, 10), **setup.train, "seed": seed}
    where = folder / "train"
    try:
        result = fit(
            net, train_set, test_set, out_dir=where, resume=True, progress=False, **options
        )
    except FormatError:  # a training that was cut off before a setting got another default
        shutil.rmtree(where, ignore_errors=True)
        net.load_state_dict(build(setup, variant, seed, train_set).state_dict())
        result = fit(net, train_set, test_set, out_dir=where, progress=False, **options)
    return {k: v for k, v in result.metrics.items() if isinstance(v, (int, float, str))}


def measure(setup: Setup, net: Any, train_set: Any, test_set: Any) -> dict[str, Any]:
    """Everything that a trained network shows: accuracies, verdict, mappings, divergence."""
    from ranvier.deploy import compile
    from ranvier.export.domains import binary_only
    from ranvier.export.tracer import trace
    from ranvier.sim.comparison import compare
    from ranvier.sim.comparison_view import figures
    from ranvier.train.models import n_parameters

    x, _ = train_set.batch(slice(0, 256))
    graph = trace(net, x[:, :4] if train_set.timed else x[:4])
    auto = compile(graph, calibration=x.numpy(), weight_bits=setup.weight_bits)
    report = compare(
        net, auto, test_set, ("torch", "onnx", "dense"), graph=graph,
        ladder_limit=setup.ladder_limit, advice_limit=setup.advice_limit,
    )  # fmt: skip
    told = figures(report)
    holds, broken = binary_only(graph)
    return {
        "n_parameters": n_parameters(net),
        "accuracy": report.accuracy,
        "n_test": next(iter(report.scores.values())).n,
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
        "digest": auto.digest(),
        "pattern_ssim": _similarity(graph, test_set),
        "pruning": _pruning(graph, test_set),
    }


def _similarity(graph: Any, test_set: Any) -> dict[str, float]:
    from ranvier.sim.measures import pattern_ssim

    x, _ = test_set.batch(slice(0, 128))
    return pattern_ssim(graph, x.numpy())


def _pruning(graph: Any, test_set: Any) -> dict[str, Any] | None:
    from ranvier.export.nodes import Join
    from ranvier.sim.measures import natural_pruning

    if not any(isinstance(n, Join) and n.op == "or" for n in graph):
        return None
    x, _ = test_set.batch(slice(0, 256))
    return natural_pruning(graph, x.numpy()).figures()


def algorithmic(graph: Any, test_set: Any) -> dict[str, float]:
    """Operations of the network as written, a sample: additions of weights and multiplications."""
    from ranvier.sim.operations import count

    x, _ = test_set.batch(slice(0, 128))
    return count(graph, x.numpy())


def mappings(
    setup: Setup, graph: Any, auto: Any, calibration: np.ndarray, test_set: Any, report: Any
) -> dict[str, dict[str, Any]]:
    """Both ways to map the joins, where there are two: name -> what it needs and gives."""
    from ranvier.deploy import compile

    chosen = str(auto.meta["joins"])
    found = {chosen: mapped(auto, report.accuracy["dense"], report.ledger)}
    two = len(graph.lower("linear").populations) != len(graph.lower("graded").populations)
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
