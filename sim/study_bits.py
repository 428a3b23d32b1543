"""`ranvier study bits`: what a network's accuracy on the chip costs in weight bits.

For each stored network: float accuracy (torch, measured), accuracy of its integer Program at several weight
widths after training (PTQ) and at one after quantization-aware training (QAT), on the whole test split
(simulated by an engine that equals Lava), the cores it needs, and the messages in which Lava itself differs
on some samples. No choice looks at the test split: the last VALIDATION images of the training split are kept
out of the fine-tuning. Below 8 bits they decide between a threshold for each population and one for each
channel, and whether the fine-tuned network is kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ranvier.deploy.options import Thresholds
from ranvier.deploy.program import Program
from ranvier.train.errors import RangeError
from ranvier.train.files import write_text

CALIBRATION = 256
VALIDATION = 2_000
THRESHOLDS: tuple[Thresholds, ...] = ("population", "channel")  # of which the better one is taken


def stored(tag: str) -> list[tuple[str, str]]:
    """(model, join) of the networks stored under a tag, sorted."""
    from ranvier.train.models import WEIGHTS

    found = sorted(p.stem for p in Path(WEIGHTS).glob(f"*-{tag}.safetensors"))
    pairs = []
    for stem in found:
        model = json.loads((Path(WEIGHTS) / f"{stem}.json").read_text())["model"]
        pairs.append((model["name"], model["join"]))
    return pairs


def data_of(model: str, join: str, tag: str) -> str:
    """The data set that a stored network was trained on: that of its recipe."""
    from ranvier.train.models import weights_path

    beside = json.loads(weights_path(model, join, tag).with_suffix(".json").read_text())
    return str(beside["recipe"]["data"]["name"])


def study_bits(
    dataset: str = "mnist",
    *,
    data_dir: Path | None = None,
    ptq: Sequence[int] = (8, 4),
    qat: int | None = 4,
    qat_samples: int = 12_800,
    lava_samples: int = 20,
    limit: int | None = None,
    out: Path = Path("runs/bits"),
    only: str = "*",
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """One row a network stored as `dataset`; rows that `out` holds of the same weights are kept.

    dataset      what `create_model(..., pretrained=dataset)` takes: "mnist", "mnist-wide"
    ptq          weight bits, after training
    qat          weight bits of the quantization-aware fine-tuning (one pass over `qat_samples`)
    lava_samples test samples that also run as Lava processes, at 8 bits
    limit        test samples at most
    only         pattern of "<model>-<join>"
    Raises RangeError where no network is stored for the data set.
    """
    from fnmatch import fnmatch

    names = [(m, j) for m, j in stored(dataset) if fnmatch(f"{m}-{j}", only)]
    if not names:
        raise RangeError(
            f"study bits: no network is stored for '{dataset}' that matches '{only}'; train one with "
            "`ranvier train` and store it with ranvier.train.pretrained.publish"
        )
    rows = []
    for model, join in names:
        path = out / f"{model}-{join}-{dataset}.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("weights") == weights_digest(model, join, dataset):
            rows.append(known)
            continue
        say(f"{model} {join}")
        row = _row(model, join, dataset, data_dir, ptq, qat, qat_samples, lava_samples, limit)
        write_text(path, json.dumps(row, indent=1))
        rows.append(row)
    return rows


def _row(
    model: str,
    join: str,
    dataset: str,
    data_dir: Path | None,
    ptq: Sequence[int],
    qat: int | None,
    qat_samples: int,
    lava_samples: int,
    limit: int | None,
) -> dict[str, Any]:
    from ranvier.deploy import place
    from ranvier.export import trace
    from ranvier.train import create_model, load_dataset

    begin = time.perf_counter()
    net = create_model(model, join=join, pretrained=dataset)
    net.eval()
    data = data_of(model, join, dataset)
    train = load_dataset(data, data_dir, "train", size=_side(net))
    held = min(VALIDATION, len(train) // 5)
    unseen = train.subset(slice(len(train) - held, None))
    part = train.subset(slice(0, min(qat_samples, len(train) - held)))
    test = load_dataset(data, data_dir, "test", size=_side(net), limit=limit)
    x = train.x[:CALIBRATION].float().numpy()
    graph = trace(net, train.x[:4].float())
    wanted = {8, *ptq} | ({qat} if qat else set())
    programs = {bits: compiled(graph, x, bits, unseen) for bits in sorted(wanted)}
    row: dict[str, Any] = {"model": model, "join": join, "n_test": len(test)}
    row["weights"] = weights_digest(model, join, dataset)
    row["float %"] = 100 * _float_accuracy(net, test)
    for bits in ptq:
        row[f"ptq-{bits} %"] = 100 * _chip_accuracy(programs[bits], test)
        row[f"ptq-{bits} thresholds"] = programs[bits].meta["thresholds"]
    if qat is not None:
        tuned = tuned_program(net, programs[qat], part, unseen, x, qat)
        row[f"qat-{qat} %"] = 100 * _chip_accuracy(tuned, test)
        row[f"qat-{qat} thresholds"] = tuned.meta["thresholds"]
        row["qat kept"] = tuned is not programs[qat]
    row["lava samples"] = lava_samples
    row["lava mismatches"] = lava_mismatches(programs[8], test.x[:lava_samples].float().numpy())
    row["cores"] = place(programs[8]).n_cores
    row["joins"] = programs[8].meta["joins"]
    row["digest"] = programs[8].digest()[:12]
    row["seconds"] = round(time.perf_counter() - begin, 1)
    return row


def _side(net: Any) -> int:
    return int(net.input_shape[-1])


def _float_accuracy(net: Any, test: Any) -> float:
    from ranvier.train import evaluate

    return float(evaluate(net, test)["accuracy"])


def _chip_accuracy(program: Program, test: Any) -> float:
    from ranvier.sim.stream import evaluate

    return float(evaluate(program, test.x.float().numpy(), np.asarray(test.y)).accuracy)


def compiled(graph: Any, x: np.ndarray, bits: int, unseen: Any) -> Program:
    """The program at so many bits; below 8 with the thresholds that do better on unseen images."""
    from ranvier.deploy import compile

    kinds = THRESHOLDS[:1] if bits == 8 else THRESHOLDS
    found = [compile(graph, calibration=x, weight_bits=bits, thresholds=k) for k in kinds]
    return max(found, key=lambda p: _chip_accuracy(p, unseen)) if len(found) > 1 else found[0]


def tuned_program(
    net: Any, before: Program, train: Any, unseen: Any, x: np.ndarray, bits: int
) -> Program:
    """The best on unseen images of `before` and of copies of net fine-tuned with both kinds of thresholds."""
    from copy import deepcopy

    from ranvier.deploy.qat import fine_tune

    tuned = [
        fine_tune(deepcopy(net), train, bits, calibration=x, thresholds=kind) for kind in THRESHOLDS
    ]
    return max([*tuned, before], key=lambda p: _chip_accuracy(p, unseen))


def weights_digest(model: str, join: str, dataset: str) -> str:
    """The digest of a stored network's weights, as its .json states it."""
    from ranvier.train.models import WEIGHTS

    text = (Path(WEIGHTS) / f"{model}-{join}-{dataset}.json").read_text()
    return str(json.loads(text)["digest"])


def lava_mismatches(program: Program, x: np.ndarray) -> int | None:
    """Messages in which Lava and the reference differ, over all populations and steps; None: no Lava."""
    from ranvier.deploy.lava_compat import available
    from ranvier.sim.difference import n_different
    from ranvier.sim.runner import run

    if available() or not len(x):
        return None
    ours = run(program, x, engine="reference", record=("spikes",))
    lava = run(program, x, engine="lava", record=("spikes",))
    return n_different(ours, lava)[1]
