"""What a checkpoint holds of a training, and how it comes back to the bit."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ranvier.train.checkpoint import (
    Checkpoint,
    fill,
    optimizer_parts,
    read_tensors,
    restore_optimizer,
    restore_rng,
    rng_parts,
    write_tensors,
)
from ranvier.train.errors import FormatError, RanvierError

if TYPE_CHECKING:
    from ranvier.train.trainer import Trainer

CHECKPOINT = "checkpoint.safetensors"
_MAY_CHANGE = {"checkpoint_seconds"}  # settings without influence on the result


@dataclass
class State:
    """Where a training stands.

    epoch, batch    the next ones, from 0; step: optimizer steps done
    sums            of the epoch so far: loss, right labels, labels, samples
    history         rows of metrics.csv
    seconds         of the finished epochs; epoch_seconds: of this one, before a resume
    rate            firing rate last seen
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    rate: float = 0.0


_PLAIN = ("epoch", "batch", "step", "history", "seconds", "epoch_seconds", "rate")


def save_state(trainer: Trainer, path: Path) -> None:
    """Writes a checkpoint. Raises RanvierError, the old one standing, unless all is finite."""
    checkpoint = Checkpoint()
    checkpoint.add("model", trainer.net.state_dict())
    require_finite(checkpoint.tensors, trainer.state.epoch + (trainer.state.batch > 0))
    checkpoint.add("best", trainer.best_state)
    if trainer.ema:
        checkpoint.add("ema", trainer.ema.state)
    tensors, optimizer = optimizer_parts(trainer.optimizer)
    checkpoint.add("optimizer", tensors)
    generators, rng = rng_parts()
    checkpoint.add("rng", generators)
    checkpoint.tensors["sums"] = trainer.state.sums
    scaler = getattr(trainer.fabric.strategy.precision, "scaler", None)
    checkpoint.meta = {
        **{name: getattr(trainer.state, name) for name in _PLAIN},
        "epoch_seconds": trainer.elapsed(),
        "optimizer": optimizer,
        "rng": rng,
        "scaler": None if scaler is None else scaler.state_dict(),
        "settings": trainer.settings.as_dict(),
        "data": _data_key(trainer),
        "model": _model_key(trainer),
    }
    write_tensors(path, checkpoint.tensors, checkpoint.meta)


def restore_state(trainer: Trainer, path: Path) -> None:
    """Puts a training where its checkpoint was; without a checkpoint it starts from the beginning.

    Raises FormatError where the checkpoint is damaged, or of another model, data or settings.
    """
    if not path.is_file():
        return
    tensors, meta = read_tensors(path)
    _require_same(trainer, path, meta)
    checkpoint = Checkpoint(tensors, meta)
    device = trainer.fabric.device
    fill(trainer.net, checkpoint.part("model"), path)
    restore_optimizer(trainer.optimizer, checkpoint.part("optimizer"), meta["optimizer"])
    if trainer.ema:
        trainer.ema.state = {k: v.to(device) for k, v in checkpoint.part("ema").items()}
    trainer.best_state = {k: v.to(device) for k, v in checkpoint.part("best").items()}
    trainer.state = State(**{name: meta[name] for name in _PLAIN}, sums=tensors["sums"].clone())
    if meta["scaler"] is not None:
        trainer.fabric.strategy.precision.scaler.load_state_dict(meta["scaler"])
    restore_rng(checkpoint.part("rng"), meta["rng"])


def _data_key(trainer: Trainer) -> list[Any]:
    return [trainer.train.name, trainer.train.split, list(trainer.train.x.shape)]


def _model_key(trainer: Trainer) -> dict[str, Any] | None:
    """The network's configuration as JSON gives it back; None where it has none."""
    config = getattr(trainer.net, "config", None)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return None
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _require_same(trainer: Trainer, path: Path, meta: dict[str, Any]) -> None:
    if "settings" not in meta:
        raise FormatError(f"train: '{path}' is no checkpoint of a training: it has no settings")
    then = meta["settings"]
    for key, value in json.loads(json.dumps(trainer.settings.as_dict())).items():
        if key not in _MAY_CHANGE and then.get(key) != value:
            raise FormatError(
                f"train: '{path}' was trained with {key}={then.get(key)}, now {key}={value}; resume"
                " with the same settings, or start anew in another folder"
            )
    model, now = meta.get("model") or {}, _model_key(trainer) or {}
    for key in model if now else ():
        if now.get(key) != model[key]:
            raise FormatError(
                f"train: '{path}' is of a network with {key}={model[key]}, now {key}={now.get(key)};"
                " resume with the same network, or start anew in another folder"
            )
    if meta["data"] != _data_key(trainer):
        raise FormatError(
            f"train: '{path}' was trained on {meta['data']}, not on {_data_key(trainer)}"
        )


def require_finite(tensors: dict[str, Tensor], epoch: int) -> None:
    """Raises RanvierError naming the first tensor that holds a value that is not finite."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise RanvierError(
                f"'{name}' is not finite in epoch {epoch}: no checkpoint is written. Lower lr"
                f" or set"
                " clip=1.0"
            )
