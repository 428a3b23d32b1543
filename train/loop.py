"""The public face of training: `fit` and `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ranvier.train.data import Dataset, as_dataset
from ranvier.train.errors import RangeError, expect
from ranvier.train.evaluation import QAT_HOOK, QatHook, evaluate, hook_of
from ranvier.train.settings import make_settings
from ranvier.train.trainer import Trainer

__all__ = ["QAT_HOOK", "FitResult", "QatHook", "evaluate", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What a training came to.

    metrics  of the kept weights and the training: accuracy, loss, firing_rate, seconds, ...
    best     the epoch with the best accuracy, as a row of metrics.csv
    history  all rows of metrics.csv
    """

    metrics: dict[str, Any]
    best: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


def fit(
    net: nn.Module,
    train: Dataset | tuple[Any, Any],
    test: Dataset | tuple[Any, Any] | None = None,
    *,
    out_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    devices: int = 1,
    accelerator: str = "auto",
    qat: bool | QatHook = False,
    beside: Mapping[str, str] | None = None,
    **options: Any,
) -> FitResult:
    """Trains net in place, leaves it in eval mode, and returns the figures.

    train      a Dataset, or a pair (x, y) of arrays
    test       the same; tested after every epoch
    out_dir    folder for checkpoint.safetensors, weights.safetensors, metrics.csv, metrics.json and
               TensorBoard's files; None writes nothing
    resume     continue from out_dir's checkpoint where there is one; on the CPU the result equals
               an
               uninterrupted training to the bit
    progress   a bar, where the standard error is a terminal
    devices    processes, each with its part of every batch (started here, or by torchrun)
    accelerator    auto, cpu or cuda
    qat        True, or a hook that quantizes during every forward pass (evaluation.QatHook)
    beside     further files of out_dir, name -> text, written once the training starts
    options    every field of Settings: epochs, batch_size, lr, optimizer, schedule, warmup, loss,
               weight_decay, clip, accumulate, amp, ema, early_stop, mixup, cutmix, augment, seed,
               ...

    Raises RanvierError where the loss stops being a number or a file cannot be written (the last
    good
    checkpoint stands), FormatError where the checkpoint is of another model, data or settings,
    UnsupportedError for an unknown option, naming the nearest.
    """
    expect(net, nn.Module, "train", "give the network")
    train = as_dataset(train, "train")
    test = None if test is None else as_dataset(test, "train")
    settings = make_settings(options)
    if resume and out_dir is None:
        raise RangeError("train: resume=True needs out_dir, the folder with the checkpoint")
    folder = None if out_dir is None else Path(out_dir)
    trainer = Trainer(net, train, test, settings, folder, hook_of(qat), beside)
    metrics = trainer.run(resume, progress, devices, accelerator)
    return FitResult(metrics, trainer.best(), trainer.state.history)
