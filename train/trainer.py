"""One training, from the first batch to the kept weights.

Each epoch's order and each batch's augmentation are drawn from generators seeded by (seed, epoch,
batch), so that a training continued from a checkpoint sees exactly what it would have seen.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ranvier.train.augmentation import augment, mix
from ranvier.train.checkpoint import save_weights
from ranvier.train.data import Dataset
from ranvier.train.devices import lay_out, make_fabric, ordered_kernels, part_of_batch, seed_all
from ranvier.train.errors import RangeError, RanvierError, ShapeError, UnsupportedError
from ranvier.train.evaluation import QatHook, Wrapped, batch_sums, evaluate
from ranvier.train.files import write_text
from ranvier.train.logs import Progress, TensorBoard, write_csv
from ranvier.train.losses import make_loss, rate_penalty
from ranvier.train.rates import FiringRates
from ranvier.train.resume import CHECKPOINT, State, require_finite, restore_state, save_state
from ranvier.train.schedule import Ema, Schedule, make_optimizer
from ranvier.train.settings import Settings

WEIGHTS = "weights.safetensors"
METRICS = "metrics.json"
MODEL = "model.json"


class Trainer:
    """Runs one training; `state` is what a checkpoint holds besides weights and optimizer."""

    def __init__(
        self,
        net: nn.Module,
        train: Dataset,
        test: Dataset | None,
        settings: Settings,
        folder: Path | None,
        hook: QatHook,
        beside: Mapping[str, str] | None = None,
    ) -> None:
        self.net, self.train, self.test, self.settings = net, train, test, settings
        self.folder, self.hook, self.beside = folder, hook, dict(beside or {})
        self.loss = make_loss(settings.loss, settings.label_smoothing, settings.logit_scale)
        self.test_loss = make_loss(settings.loss, scale=settings.logit_scale)
        self.n_batches = math.ceil(len(train) / settings.batch_size)
        self.schedule = _schedule(settings, self.n_batches)
        self.state = State()
        self.ema: Ema | None = None
        self.best_state: dict[str, Tensor] = {}
        _check(train, settings)

    # ---- the whole training

    def run(self, resume: bool, progress: bool, devices: int, accelerator: str) -> dict[str, Any]:
        """Trains; returns the metrics."""
        s = self.settings
        self.fabric = make_fabric(s.amp, devices, accelerator)
        self.fabric.launch()
        self._set_up()
        main = self.fabric.is_global_zero
        if resume:
            assert self.folder is not None
            restore_state(self, self.folder / CHECKPOINT)
        elif main and self.folder is not None:
            _keep_previous(self.folder)
        self._write(self._write_model)
        self.logs = TensorBoard(self.folder if main else None)
        done = self.state.epoch * self.n_batches + self.state.batch
        self.bar = Progress(progress and main, s.epochs * self.n_batches, done)
        try:
            with self.bar, ordered_kernels(s.deterministic):
                self._epochs()
        finally:
            self.logs.close()
        return self._finish()

    def _set_up(self) -> None:
        s = self.settings
        seed_all(s.seed)
        lay_out(self.net)
        wrapped: nn.Module = Wrapped(self.net, self.loss.per_step, self.hook)
        if self.fabric.world_size > 1 and self.fabric.device.type == "cuda":
            wrapped = nn.SyncBatchNorm.convert_sync_batchnorm(wrapped)
        optimizer = make_optimizer(self.net, s.optimizer, s.lr, s.weight_decay, s.momentum)
        self.model, self.optimizer = self.fabric.setup(wrapped, optimizer)
        self.ema = Ema(self.net, s.ema) if s.ema else None

    def _epochs(self) -> None:
        self.saved_at = time.monotonic()
        while self.state.epoch < self.settings.epochs and not self._stop_early():
            self.clock = time.monotonic()
            self.net.train()
            with FiringRates(self.net, keep_graph=self.settings.rate_weight > 0) as self.rates:
                self._batches()
            self._end_epoch()

    def _batches(self) -> None:
        order = torch.randperm(len(self.train), generator=self._generator(0))
        while self.state.batch < self.n_batches:
            first = self.state.batch
            group = range(first, min(first + self.settings.accumulate, self.n_batches))
            self._optimizer_step(order, group)
            self.state.batch = group.stop
            self.state.step += 1
            if self._due():
                self.save()

    def _optimizer_step(self, order: Tensor, group: range) -> None:
        s = self.settings
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.schedule(self.state.step)
        self.optimizer.zero_grad(set_to_none=True)
        for i in group:
            with self.fabric.no_backward_sync(self.model, enabled=i < group.stop - 1):
                self._backward(order[i * s.batch_size : (i + 1) * s.batch_size], i, len(group))
        if s.clip:
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=s.clip, error_if_nonfinite=False
            )
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.net)

    def _backward(self, index: Tensor, i: int, n_in_group: int) -> None:
        x, y, target, share = self._load(index, i)
        self.rates.clear()
        self.rates.enabled = (
            self.settings.rate_weight > 0 or i % 10 == 0
        )  # a sample suffices to show
        output = self.model(x)
        if self.train.n_classes > output.shape[-1]:
            raise ShapeError(
                f"train: the network has {output.shape[-1]} outputs, and '{self.train.name}' has"
                f" {self.train.n_classes} classes; build it with num_classes={self.train.n_classes}"
            )
        loss = self.loss(output, target)
        if self.settings.rate_weight:
            penalty = rate_penalty(self.rates.tensors(), self.settings.rate_target)
            loss = loss + self.settings.rate_weight * penalty.to(loss.device)
        if self.rates.enabled:
            self.state.rate = self.rates.mean()
            self.rates.clear()
        now = batch_sums(self.net, loss, output.detach(), y)
        self._require_finite(now, i)
        self.state.sums += torch.cat([now, torch.tensor([y.shape[-1]], dtype=torch.float64)])
        self.fabric.backward(loss * (share / n_in_group))
        self._show(i)

    def _load(self, index: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """(x, y, target, share): this process's part of batch i, and its weight in the joint mean.

        Every process draws the whole batch's augmentation: the result does not depend on their
        number.
        """
        s, generator, device = self.settings, self._generator(1 + i), self.fabric.device
        x, y = self.train.batch(index)
        x = augment(x, s.augment, generator)
        target = y
        if s.mixup or s.cutmix:
            x, target = mix(x, y, self.train.n_classes, s.mixup, s.cutmix, generator)
        share = 1.0
        if self.fabric.world_size > 1:
            part, share = part_of_batch(len(index), self.fabric.global_rank, self.fabric.world_size)
            x = x[:, part] if self.train.timed else x[part]
            target = target[part] if target.is_floating_point() else target[..., part]
            y = y[..., part]
        return x.to(device), y.to(device), target.to(device), share

    def _generator(self, position: int) -> Generator:
        """For this epoch and position (0: the order, 1 + i: batch i); the same in every process."""
        seed = (self.settings.seed * 1_000_003 + self.state.epoch) * 1_000_003 + position
        return torch.Generator().manual_seed(seed % 2**63)

    def _require_finite(self, sums: Tensor, i: int) -> None:
        if math.isfinite(sums[0].item()):
            return
        s = self.settings
        amp = "" if s.amp == "no" else ", use amp='no'"
        raise RanvierError(
            f"train: the loss is {sums[0].item()} at epoch {self.state.epoch + 1}, batch {i + 1} of"
            f" {self.n_batches} (lr {self.schedule(self.state.step):.3g}). Lower lr, set"
            f" clip=1.0{amp},"
            f" or check the data; {self._last_good()}"
        )

    def _last_good(self) -> str:
        path = None if self.folder is None else self.folder / CHECKPOINT
        there = path is not None and path.is_file()
        return f"the last good checkpoint is '{path}'" if there else "no checkpoint was written yet"

    def _show(self, i: int) -> None:
        name = f"{self.state.epoch + 1}/{self.settings.epochs}"
        if i % 5:
            self.bar.step(name)
            return
        loss, right, labels, samples = self.state.sums.tolist()
        figures = {
            "loss": loss / max(labels, 1),
            "accuracy": right / max(labels, 1),
            "rate": self.state.rate,
            "images/s": samples * self.fabric.world_size / max(self._spent(), 1e-9),
        }
        self.bar.step(name, **figures)

    def _spent(self) -> float:
        """Seconds of this epoch so far, those before a resume included."""
        return self.state.epoch_seconds + time.monotonic() - self.clock

    # ---- the end of an epoch

    def _end_epoch(self) -> None:
        state = self.state
        state.history.append(self._row())
        if self.settings.keep == "best" and self.best() is state.history[-1]:
            with self._averaged():
                self.best_state = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        state.seconds += self._spent()
        state.epoch, state.batch, state.epoch_seconds = state.epoch + 1, 0, 0.0
        state.sums.zero_()
        self._write(lambda folder: write_csv(folder / "metrics.csv", state.history))
        self.logs.add(state.history[-1])
        self.save()

    def _row(self) -> dict[str, Any]:
        sums = self.state.sums
        if self.fabric.world_size > 1:
            sums = self.fabric.all_reduce(
                sums.float().to(self.fabric.device), reduce_op="sum"
            ).cpu()
        loss, right, labels, samples = sums.tolist()
        spent = self._spent()
        row = {
            "epoch": self.state.epoch + 1,
            "lr": self.schedule(self.state.step - 1),
            "train_loss": loss / max(labels, 1),
            "train_accuracy": right / max(labels, 1),
            "firing_rate": self.state.rate,
            "images_per_s": samples / max(spent, 1e-9),
            "seconds": spent,
        }
        if self.test is not None:
            with self._averaged(), self.fabric.autocast():
                batch = self.settings.batch_size
                tested = evaluate(self.net, self.test, batch, loss=self.test_loss, qat=self.hook)
            row |= {"test_loss": tested["loss"], "test_accuracy": tested["accuracy"]}
            row["firing_rate"] = tested["firing_rate"]
        return row

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The moving average in net's place, where there is one."""
        if self.ema:
            self.ema.swap(self.net)
        try:
            yield
        finally:
            if self.ema:
                self.ema.swap(self.net)

    def best(self) -> dict[str, Any]:
        """The first of the epochs with the highest accuracy."""
        key = "train_accuracy" if self.test is None else "test_accuracy"
        return max(self.state.history, key=lambda row: row[key])

    def _stop_early(self) -> bool:
        if not self.settings.early_stop or not self.state.history:
            return False
        return self.state.epoch - self.best()["epoch"] >= self.settings.early_stop

    # ---- files

    def _finish(self) -> dict[str, Any]:
        if self.settings.keep == "best":
            self._put(self.best_state)
        elif self.ema:
            self._put(self.ema.state)
        lay_out(self.net, channels_last=False).eval()
        metrics = self._metrics()

        def write(folder: Path) -> None:
            metrics["digest"] = save_weights(folder / WEIGHTS, self.net)
            write_text(folder / METRICS, json.dumps(metrics, indent=2) + "\n")

        self._write(write)
        return metrics

    @torch.no_grad()
    def _put(self, state: dict[str, Tensor]) -> None:
        for name, value in self.net.state_dict().items():
            value.copy_(state[name])

    def _metrics(self) -> dict[str, Any]:
        last, best = self.state.history[-1], self.best()
        kept = best if self.settings.keep == "best" else last
        return {
            "accuracy": kept.get("test_accuracy"),
            "loss": kept.get("test_loss"),
            "firing_rate": kept["firing_rate"],
            "train_accuracy": kept["train_accuracy"],
            "train_loss": kept["train_loss"],
            "epochs": self.state.epoch,
            "kept_epoch": kept["epoch"],
            "best_epoch": best["epoch"],
            "best_accuracy": best.get("test_accuracy"),
            "seconds": self.state.seconds,
            "images_per_s": last["images_per_s"],
            "n_parameters": sum(p.numel() for p in self.net.parameters()),
            "n_train": len(self.train),
            "n_test": 0 if self.test is None else len(self.test),
            "seed": self.settings.seed,
            "device": str(self.fabric.device),
            "n_processes": self.fabric.world_size,
            "torch": torch.__version__,
        }

    def _write_model(self, folder: Path) -> None:
        """What create_model needs to build the network again, where it came from there.

        Written when the checkpoint has been accepted: a refused --resume leaves the folder as it was.
        """
        config = getattr(self.net, "config", None)
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            write_text(folder / MODEL, json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        for name, text in self.beside.items():
            write_text(folder / name, text)

    def _due(self) -> bool:
        late = time.monotonic() - self.saved_at >= self.settings.checkpoint_seconds
        return self.folder is not None and late and self.state.batch < self.n_batches

    def save(self) -> None:
        """Writes a checkpoint, where there is a folder for it; weights that are not finite end it all."""
        if self.folder is None:
            require_finite(self.net.state_dict(), self.state.epoch + (self.state.batch > 0))
        self._write(lambda folder: save_state(self, folder / CHECKPOINT))
        self.saved_at = time.monotonic()

    def _write(self, write: Callable[[Path], None]) -> None:
        if self.folder is not None and self.fabric.is_global_zero:
            try:
                write(self.folder)
            except RanvierError as error:
                raise RanvierError(f"train: {error}; {self._last_good()}") from error
        if self.fabric.world_size > 1:
            self.fabric.barrier()

    def elapsed(self) -> float:
        """Seconds of the unfinished epoch, for a checkpoint; 0 between two epochs."""
        return self._spent() if self.state.batch else 0.0


def _schedule(s: Settings, n_batches: int) -> Schedule:
    n_per_epoch = math.ceil(n_batches / s.accumulate)
    return Schedule(
        kind=s.schedule,
        lr=s.lr,
        n_steps=n_per_epoch * s.epochs,
        n_warmup=round(s.warmup * n_per_epoch),
        n_per_step=s.step_epochs * n_per_epoch,
        gamma=s.gamma,
    )


def _keep_previous(folder: Path) -> None:
    """A new training in a used folder must not be continued from the old one's checkpoint, nor, while
    it is unfinished, be taken for the old one by its weights and figures."""
    for name in (CHECKPOINT, WEIGHTS, METRICS):
        if (folder / name).is_file():
            (folder / name).replace(folder / f"previous-{name}")


def _check(train: Dataset, settings: Settings) -> None:
    if len(train) == 0:
        raise RangeError(f"train: the data set '{train.name}' is empty")
    if (
        torch.is_tensor(train.x)
        and train.x.is_floating_point()
        and not torch.isfinite(train.x).all()
    ):
        raise RangeError(f"train: the data set '{train.name}' holds values that are not finite")
    if train.per_step != (settings.loss == "per-step"):
        labels = "a label a step" if train.per_step else "one label a sample"
        fitting = "per-step" if train.per_step else "ce, mse or tet"
        raise UnsupportedError(
            f"train: '{train.name}' has {labels}; use loss {fitting}, not '{settings.loss}'"
        )
