"""A spiking network and its artificial twin on event frames: accuracy, and time per 100 batches.

    python -m ranvier.train.pair --dataset nmnist

`dvs-snn` (IF neurons, hard reset) reads T frames; `dvs-cnn` (the same layers, ReLU) one frame that
holds all events of the sample. Plain SGD at 0.05 without momentum, batches of 32, 20 epochs.
Published on CIFAR10-DVS, T = 8, RTX 3070 Ti: SNN 66.68 %, 23.76 s for 100 batches; CNN 68.20 %,
3.72 s; so 25 % less time a frame for the SNN. Widths, split and resizing are not published and
ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranvier.train.data import Dataset, load_dataset
from ranvier.train.errors import RangeError, RanvierError
from ranvier.train.loop import fit
from ranvier.train.models import create_model

PUBLISHED = {"snn": {"accuracy": 0.6668, "s_per_100": 23.76},
             "cnn": {"accuracy": 0.6820, "s_per_100": 3.72}}  # fmt: skip


@dataclass(frozen=True)
class PairRow:
    """One of the two networks.

    accuracy           on the test split after the last epoch
    s_per_100          seconds for 100 training batches: 100 times the median batch
    ms_per_frame       of one sample's one frame, in training
    n_frames           frames a sample
    """

    network: str
    accuracy: float
    s_per_100: float
    ms_per_frame: float
    n_frames: int
    n_parameters: int


def compare_pair(
    dataset: str = "nmnist",
    data_dir: str | None = None,
    *,
    steps: int = 8,
    size: int = 32,
    epochs: int = 20,
    batch_size: int = 32,
    lr: float = 0.05,
    seed: int = 0,
    limit: int | None = None,
    timed_batches: int = 10,
) -> list[PairRow]:
    """The two rows, SNN first, on an event set.

    Frames are counts of equally many events each, pixels merged to size x size; each network's
    frames are divided by the mean of the training frames' nonzero counts, since the CNN's one
    frame holds `steps` times as many events.
    Raises DataError where the data set or its test split is missing; RangeError for an image set.
    """
    train, test = (
        load_dataset(dataset, data_dir, split, steps=steps, size=size, limit=limit)
        for split in ("train", "test")
    )
    if not train.timed or train.x.ndim != 5:
        raise RangeError(f"pair: '{dataset}' has no event frames; nmnist and cifar10_dvs have")
    rows = []
    for name, merge in (("dvs-snn", False), ("dvs-cnn", True)):
        torch.manual_seed(seed)
        sets = [_frames(part, merge) for part in (train, test)]
        unit = float(sets[0].x[sets[0].x > 0].mean())
        sets = [replace(part, x=part.x / unit) for part in sets]
        net = create_model(
            name, steps=1 if merge else steps, image_size=size, num_classes=train.n_classes,
            in_channels=train.x.shape[2],
        )  # fmt: skip
        seconds = seconds_per_batch(net, sets[0], batch_size, lr, timed_batches)
        result = fit(
            net, sets[0], sets[1], epochs=epochs, batch_size=batch_size, lr=lr, seed=seed,
            optimizer="sgd", momentum=0.0, schedule="constant", progress=False,
        )  # fmt: skip
        frames = 1 if merge else steps
        rows.append(PairRow(
            name, float(result.metrics["accuracy"]), 100 * seconds,
            1e3 * seconds / batch_size / frames, frames, sum(p.numel() for p in net.parameters()),
        ))  # fmt: skip
    return rows


def _frames(data: Dataset, merge: bool) -> Dataset:
    """The set as it is, or with all frames of a sample summed into one."""
    return replace(data, x=data.x.sum(1, keepdim=True)) if merge else data


def seconds_per_batch(
    net: nn.Module, data: Dataset, batch_size: int, lr: float, n: int = 10
) -> float:
    """The median time of a training batch, on a copy, after one that does not count."""
    import copy

    net = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    x, y = data.batch(slice(0, batch_size))
    return statistics.median([_batch(net, optimizer, x, y) for _ in range(n + 1)][1:])


def _batch(net: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> float:
    begin = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    return time.perf_counter() - begin


def markdown(rows: Sequence[PairRow], dataset: str) -> str:
    """The comparison as Markdown, the data set named."""
    snn, cnn = rows
    lines = [
        f"Data set: {dataset}.",
        "",
        "| network | frames | parameters | accuracy % | s / 100 batches | ms / frame |"
        " published (CIFAR10-DVS) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, key in ((snn, "snn"), (cnn, "cnn")):
        known = PUBLISHED[key]
        lines.append(
            f"| {row.network} | {row.n_frames} | {row.n_parameters:,} | {100 * row.accuracy:.2f} |"
            f" {row.s_per_100:.2f} | {row.ms_per_frame:.3f} |"
            f" {100 * known['accuracy']:.2f} %, {known['s_per_100']:.2f} s |"
        )
    ratio = snn.ms_per_frame / cnn.ms_per_frame
    lines += ["", f"Time of a frame, SNN / CNN: {ratio:.2f} (published: 0.80)."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m ranvier.train.pair`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ranvier.train.pair", description=__doc__)
    parser.add_argument("--dataset", default="nmnist", help="nmnist, cifar10_dvs, dvs128_gesture")
    parser.add_argument("--data", default=None, help="where it lies (default: RANVIER_DATA)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--limit", type=int, default=None, help="samples of each split at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    o = parser.parse_args(argv)
    try:
        rows = compare_pair(o.dataset, o.data, steps=o.steps, size=o.size, epochs=o.epochs,
                            limit=o.limit, seed=o.seed)  # fmt: skip
    except RanvierError as error:
        print(error)
        return 2
    plain = [row.__dict__ for row in rows]
    print(json.dumps(plain, indent=1) if o.json else markdown(rows, o.dataset), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
