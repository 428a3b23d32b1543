"""The training loop: `fit` and `evaluate`.

Fabric places the network on the device, wraps it for several processes and casts for mixed precision; everything else
is here. Each epoch's order and each batch's augmentation are drawn from generators seeded by (seed, epoch, batch), so
that a training continued from a checkpoint sees exactly what it would have seen.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ranvier.train.augmentation import augment, mix
from ranvier.train.checkpoint import (
    Checkpoint,
    fill,
    optimizer_parts,
    read_tensors,
    restore_optimizer,
    restore_rng,
    rng_parts,
    save_weights,
    write_tensors,
)
from ranvier.train.data import IGNORE, Dataset
from ranvier.train.errors import FormatError, RangeError, RanvierError, ShapeError, UnsupportedError
from ranvier.train.files import write_text
from ranvier.train.logs import Progress, TensorBoard, write_csv
from ranvier.train.losses import Loss, make_loss, rate_penalty
from ranvier.train.rates import FiringRates
from ranvier.train.schedule import Ema, Schedule, make_optimizer
from ranvier.train.settings import Settings, make_settings

# A hook makes a network compute as the chip would, while it is entered: it is called as `hook(net)` around every
# forward pass, in training and in evaluation, and returns a context manager. On leaving, net's parameters must be the
# float ones again under their own names, since that is what the optimizer moves and a checkpoint keeps.
QatHook = Callable[[nn.Module], AbstractContextManager[Any]]

# qat=True takes the quantizer's own hook. It lives in a later stage, which imports this one; a plug-in named by text
# and looked up when it is asked for keeps the imports pointing one way (train <- export <- deploy).
QAT_HOOK = "ranvier.deploy.qat:fake_quant"

CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class FitResult:
    """What a training came to.

    metrics  figures of the kept weights and of the training: accuracy, loss, firing_rate, seconds, ... (metrics.json)
    best     the epoch with the best accuracy, as a row of metrics.csv
    history  all rows of metrics.csv
    """

    metrics: dict[str, Any]
    best: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)


def evaluate(
    net: nn.Module,
    data: Dataset,
    batch_size: int = 256,
    *,
    loss: str | Loss = "ce",
    qat: bool | QatHook = False,
) -> dict[str, Any]:
    """{accuracy, loss, n, firing_rate, firing_rates} of net on a data set, in eval mode, without gradients.

    accuracy     fraction of right labels (of labelled steps where every step has its own)
    n            samples
    firing_rate  spikes per neuron and step; firing_rates: layer -> the same
    Raises ShapeError where net gives no [B, n] or [T, B, n].
    """
    loss = make_loss(loss) if isinstance(loss, str) else loss
    was_training = net.training
    net.eval()
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    sums = torch.zeros(3, dtype=torch.float64)
    try:
        with torch.inference_mode(), FiringRates(net) as rates:
            for i in range(0, len(data), batch_size):
                x, y = (t.to(device) for t in data.batch(slice(i, i + batch_size)))
                with hook_of(qat)(net):
                    output = run_net(net, x, loss.per_step)
                sums += batch_sums(loss, output, y)
    finally:
        net.train(was_training)
    n_labels = max(sums[2].item(), 1)
    return {
        "accuracy": sums[1].item() / n_labels, "loss": sums[0].item() / n_labels, "n": len(data),
        "firing_rate": rates.mean(), "firing_rates": rates.by_layer(),
    }  # fmt: skip


def run_net(net: nn.Module, x: Tensor, per_step: bool) -> Tensor:
    """net's output: the readout [B, n], or every step's [T, B, n] where `per_step`. Raises ShapeError otherwise."""
    sequence = getattr(net, "sequence", None)
    output = sequence(x) if per_step and sequence is not None else net(x)
    if not isinstance(output, Tensor) or output.ndim not in (2, 3):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ShapeError(
            f"train: {type(net).__name__} returned {found}; a network must return logits [batch, classes], or "
            "[time, batch, classes]"
        )
    return output


def batch_sums(loss: Loss, output: Tensor, y: Tensor) -> Tensor:
    """float64 [3] on the CPU: loss times labels, right labels, labels."""
    predicted = (output.mean(0) if output.ndim == 3 and y.ndim == 1 else output).argmax(-1)
    labelled = y != IGNORE
    n = labelled.sum()
    right = ((predicted == y) & labelled).sum()
    return torch.stack([loss(output, y).double() * n, right.double(), n.double()]).cpu()


def hook_of(qat: bool | QatHook) -> QatHook:
    """The hook itself, the registered one for True, one that does nothing for False."""
    if qat is False:
        return lambda net: nullcontext()
    if qat is not True:
        return qat
    module, name = QAT_HOOK.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"train: qat=True needs {QAT_HOOK}, which is not there ({error}); give a hook of your own (qat=hook)"
        ) from error


def fit(
    net: nn.Module,
    train: Dataset,
    test: Dataset | None = None,
    *,
    out_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    devices: int = 1,
    accelerator: str = "auto",
    qat: bool | QatHook = False,
    **options: Any,
) -> FitResult:
    """Trains net in place; returns its figures.

    test       tested after every epoch
    out_dir    folder for checkpoint.safetensors, weights.safetensors, metrics.csv, metrics.json; None writes nothing
    resume     continue from out_dir's checkpoint where there is one; on the CPU the result equals an uninterrupted
               training to the bit
    progress   a bar, where the standard error is a terminal
    devices    processes: each takes its part of every batch (Fabric starts them, or torchrun has)
    accelerator    auto, cpu or cuda
    qat        True, or a hook that quantizes during every forward pass (see QatHook)
    options    every field of Settings: epochs, batch_size, lr, optimizer, schedule, loss, amp, ema, seed, ...

    Raises RanvierError where the loss stops being a number or a file cannot be written; the last good checkpoint
    stands. Raises FormatError where the checkpoint is of another model, data or settings.
    """
    settings = make_settings(options)
    if len(train) == 0:
        raise RangeError(f"train: the data set '{train.name}' is empty")
    folder = None if out_dir is None else Path(out_dir)
    if resume and folder is None:
        raise RangeError("train: resume=True needs out_dir, the folder with the checkpoint")
    trainer = _Trainer(net, train, test, settings, folder, hook_of(qat))
    return trainer.run(resume, progress, devices, accelerator)


class _Wrapped(nn.Module):
    """What Fabric and DDP see: forward is the output that the loss wants, the hook around it."""

    def __init__(self, net: nn.Module, per_step: bool, hook: QatHook) -> None:
        super().__init__()
        self.net, self._per_step, self._hook = net, per_step, hook

    def forward(self, x: Tensor) -> Tensor:
        with self._hook(self.net):
            return run_net(self.net, x, self._per_step)


class _Trainer:
    """One training: its state is exactly what a checkpoint holds."""

    def __init__(
        self,
        net: nn.Module,
        train: Dataset,
        test: Dataset | None,
        settings: Settings,
        folder: Path | None,
        hook: QatHook,
    ) -> None:
        self.net, self.train, self.test, self.s, self.folder, self.hook = (
            net,
            train,
            test,
            settings,
            folder,
            hook,
        )
        self.loss = make_loss(settings.loss, settings.label_smoothing)
        self.test_loss = make_loss(settings.loss)
        self.n_batches = math.ceil(len(train) / settings.batch_size)
        n_per_epoch = math.ceil(self.n_batches / settings.accumulate)
        self.schedule = Schedule(
            settings.schedule, settings.lr, n_per_epoch * settings.epochs, round(settings.warmup * n_per_epoch),
            settings.step_epochs * n_per_epoch, settings.gamma,
        )  # fmt: skip
        self.epoch = self.batch = self.step = 0
        self.sums = torch.zeros(
            4, dtype=torch.float64
        )  # loss, right, labels, samples of the epoch so far
        self.seconds = self.epoch_seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.best_state: dict[str, Tensor] = {}
        self.ema: Ema | None = None
        self.rate = 0.0

    # ---- the whole training

    def run(self, resume: bool, progress: bool, devices: int, accelerator: str) -> FitResult:
        self.fabric = _make_fabric(self.s, devices, accelerator)
        self.fabric.launch()
        _seed(self.s)
        wrapped = _Wrapped(self.net, self.loss.per_step, self.hook)
        if self.fabric.world_size > 1 and self.fabric.device.type == "cuda":
            wrapped = nn.SyncBatchNorm.convert_sync_batchnorm(wrapped)
        optimizer = make_optimizer(
            self.net, self.s.optimizer, self.s.lr, self.s.weight_decay, self.s.momentum
        )
        self.model, self.optimizer = self.fabric.setup(wrapped, optimizer)
        self.net = wrapped.net
        self.ema = Ema(self.net, self.s.ema) if self.s.ema else None
        if resume:
            self._restore()
        self.logs = TensorBoard(self.folder if self.fabric.is_global_zero else None)
        show = progress and self.fabric.is_global_zero
        done = self.epoch * self.n_batches + self.batch
        try:
            with (
                Progress(show, self.s.epochs * self.n_batches, done) as self.bar,
                _deterministic(self.s),
            ):
                self._epochs()
        finally:
            self.logs.close()
        return self._finish()

    def _epochs(self) -> None:
        self.saved_at = time.monotonic()
        while self.epoch < self.s.epochs and not self._stop_early():
            self.clock = time.monotonic()
            self.net.train()
            with FiringRates(self.net, keep_graph=self.s.rate_weight > 0) as self.rates:
                self._batches()
            self._end_epoch()

    def _batches(self) -> None:
        order = torch.randperm(len(self.train), generator=self._generator(0))
        while self.batch < self.n_batches:
            group = range(self.batch, min(self.batch + self.s.accumulate, self.n_batches))
            self._optimizer_step(order, group)
            self.batch = group.stop
            self.step += 1
            if self._due():
                self._save()

    def _optimizer_step(self, order: Tensor, group: range) -> None:
        lr = self.schedule(self.step)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        for i in group:
            with self.fabric.no_backward_sync(self.model, enabled=i < group.stop - 1):
                self._backward(
                    order[i * self.s.batch_size : (i + 1) * self.s.batch_size], i, len(group)
                )
        if self.s.clip:
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.s.clip, error_if_nonfinite=False
            )
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.net)

    def _backward(self, index: Tensor, i: int, n_in_group: int) -> None:
        x, y, target, share = self._load(index, i)
        self.rates.clear()
        self.rates.enabled = self.s.rate_weight > 0 or i % 10 == 0  # a sample is enough to look at
        output = self.model(x)
        loss = self.loss(output, target)
        if self.s.rate_weight:
            penalty = rate_penalty(self.rates.tensors(), self.s.rate_target)
            loss = loss + self.s.rate_weight * penalty.to(loss.device)
        if self.rates.enabled:
            self.rate = self.rates.mean()
            self.rates.clear()
        with torch.no_grad():
            plain = Loss(self.loss.name, lambda *_: loss.detach(), self.loss.per_step)
            now = batch_sums(plain, output.detach(), y)
        self.sums += torch.cat([now, torch.tensor([y.shape[-1]], dtype=torch.float64)])
        self._check_finite(now, i)
        self.fabric.backward(loss * (share / n_in_group))
        self._show(i)

    def _load(self, index: Tensor, i: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """(x, y, target, share): this process's part of batch i, and its weight in the mean over processes.

        Every process draws the whole batch's augmentation, so that the result does not depend on their number.
        """
        generator = self._generator(1 + i)
        x, y = self.train.batch(index)
        x = augment(x, self.s.augment, generator)
        target = y
        if self.s.mixup or self.s.cutmix:
            x, target = mix(x, y, self.train.n_classes, self.s.mixup, self.s.cutmix, generator)
        rank, world = self.fabric.global_rank, self.fabric.world_size
        share = 1.0
        if world > 1:
            if len(index) < world:
                rank = min(
                    rank, len(index) - 1
                )  # too few samples to go round: some are computed twice
                share = world / len(index) if self.fabric.global_rank < len(index) else 0.0
                world = len(index)
            else:
                share = world * len(range(rank, len(index), world)) / len(index)
            x = x[rank::world] if x.ndim == 4 else x[:, rank::world]
            y = y[..., rank::world]
            target = target[rank::world] if target.is_floating_point() else target[..., rank::world]
        device = self.fabric.device
        return x.to(device), y.to(device), target.to(device), share

    def _generator(self, position: int) -> Generator:
        """A generator for this epoch and position (0: the order, 1 + i: batch i), the same in every process."""
        seed = (self.s.seed * 1_000_003 + self.epoch) * 1_000_003 + position
        return torch.Generator().manual_seed(seed % 2**63)

    def _check_finite(self, sums: Tensor, i: int) -> None:
        if not math.isfinite(sums[0].item()):
            raise RanvierError(
                f"train: the loss is {sums[0].item()} at epoch {self.epoch + 1}, batch {i + 1} of {self.n_batches} "
                f"(lr {self.schedule(self.step):.3g}). Lower lr, set clip=1.0{self._amp_advice()} or check the data; "
                f"{self._last_good()}"
            )

    def _amp_advice(self) -> str:
        return "" if self.s.amp == "no" else ", use amp='no'"

    def _last_good(self) -> str:
        path = None if self.folder is None else self.folder / CHECKPOINT
        return (
            f"the last good checkpoint is '{path}'"
            if path and path.is_file()
            else "no checkpoint was written yet"
        )

    def _show(self, i: int) -> None:
        if i % 5:
            self.bar.step(f"{self.epoch + 1}/{self.s.epochs}")
            return
        loss, right, labels, samples = self.sums.tolist()
        spent = self.epoch_seconds + time.monotonic() - self.clock
        self.bar.step(
            f"{self.epoch + 1}/{self.s.epochs}", loss=loss / max(labels, 1), accuracy=right / max(labels, 1),
            rate=self.rate, **{"images/s": samples * self.fabric.world_size / max(spent, 1e-9)},
        )  # fmt: skip

    # ---- the end of an epoch

    def _end_epoch(self) -> None:
        loss, right, labels, samples = self._reduced().tolist()
        spent = self.epoch_seconds + time.monotonic() - self.clock
        row = {
            "epoch": self.epoch + 1, "lr": self.schedule(self.step - 1), "train_loss": loss / max(labels, 1),
            "train_accuracy": right / max(labels, 1), "firing_rate": self.rate,
            "images_per_s": samples / max(spent, 1e-9), "seconds": spent,
        }  # fmt: skip
        if self.test is not None:
            tested = self._tested()
            row |= {"test_loss": tested["loss"], "test_accuracy": tested["accuracy"]}
            row["firing_rate"] = tested["firing_rate"]
        self.history.append(row)
        if self.s.keep == "best" and self._best() is row:
            with self._averaged():
                self.best_state = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        self.seconds += self.epoch_seconds + time.monotonic() - self.clock
        self.epoch, self.batch, self.epoch_seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()
        self._write(lambda folder: write_csv(folder / "metrics.csv", self.history))
        self.logs.add(row)
        self._save()

    def _reduced(self) -> Tensor:
        return (
            self.fabric.all_reduce(self.sums, reduce_op="sum")
            if self.fabric.world_size > 1
            else self.sums
        )

    def _tested(self) -> dict[str, Any]:
        assert self.test is not None
        with self._averaged(), self.fabric.autocast():
            return evaluate(
                self.net, self.test, self.s.batch_size, loss=self.test_loss, qat=self.hook
            )

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

    def _best(self) -> dict[str, Any]:
        key = "train_accuracy" if self.test is None else "test_accuracy"
        return max(self.history, key=lambda row: row[key])

    def _stop_early(self) -> bool:
        if not self.s.early_stop or not self.history:
            return False
        return self.epoch - self._best()["epoch"] >= self.s.early_stop

    def _finish(self) -> FitResult:
        if self.s.keep == "best":
            self._put(self.best_state)
        elif self.ema:
            self._put(self.ema.state)
        row, best = self.history[-1], self._best()
        kept = best if self.s.keep == "best" else row
        metrics = {
            "accuracy": kept.get("test_accuracy"), "loss": kept.get("test_loss"), "firing_rate": kept["firing_rate"],
            "train_accuracy": kept["train_accuracy"], "train_loss": kept["train_loss"], "epochs": self.epoch,
            "best_accuracy": best.get("test_accuracy"), "best_epoch": best["epoch"], "kept_epoch": kept["epoch"],
            "seconds": self.seconds, "images_per_s": row["images_per_s"],
            "n_parameters": sum(p.numel() for p in self.net.parameters()),
            "n_train": len(self.train), "n_test": 0 if self.test is None else len(self.test),
            "seed": self.s.seed, "device": str(self.fabric.device), "processes": self.fabric.world_size,
            "torch": torch.__version__,
        }  # fmt: skip

        def write(folder: Path) -> None:
            digest = save_weights(folder / WEIGHTS, self.net)
            metrics["digest"] = digest
            write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")

        self._write(write)
        self.net.eval()
        return FitResult(metrics, best, self.history)

    @torch.no_grad()
    def _put(self, state: dict[str, Tensor]) -> None:
        for name, value in self.net.state_dict().items():
            value.copy_(state[name])

    # ---- checkpoints

    def _due(self) -> bool:
        late = time.monotonic() - self.saved_at >= self.s.checkpoint_seconds
        return self.folder is not None and late and self.batch < self.n_batches

    def _write(self, write: Callable[[Path], None]) -> None:
        if self.folder is not None and self.fabric.is_global_zero:
            try:
                write(self.folder)
            except RanvierError as error:
                raise RanvierError(
                    f"train: {error}; {self._last_good()}. Make room and use --resume"
                ) from error
        if self.fabric.world_size > 1:
            self.fabric.barrier()

    def _save(self) -> None:
        self._write(self._save_to)
        self.saved_at = time.monotonic()

    def _save_to(self, folder: Path) -> None:
        checkpoint = Checkpoint()
        checkpoint.add("model", self.net.state_dict())
        _require_finite(checkpoint.tensors, self.epoch + 1)
        checkpoint.add("best", self.best_state)
        if self.ema:
            checkpoint.add("ema", self.ema.state)
        tensors, optimizer = optimizer_parts(self.optimizer)
        checkpoint.add("optimizer", tensors)
        states, rng = rng_parts()
        checkpoint.add("rng", states)
        checkpoint.tensors["sums"] = self.sums
        now = time.monotonic() - self.clock if self.batch else 0.0
        checkpoint.meta = {
            "epoch": self.epoch, "batch": self.batch, "step": self.step, "history": self.history, "rate": self.rate,
            "seconds": self.seconds, "epoch_seconds": self.epoch_seconds + now, "optimizer": optimizer, "rng": rng,
            "settings": self.s.as_dict(), "data": self._data_key(), "precision": self._precision_state(),
        }  # fmt: skip
        write_tensors(folder / CHECKPOINT, checkpoint.tensors, checkpoint.meta)

    def _data_key(self) -> list[Any]:
        return [self.train.name, self.train.split, list(self.train.x.shape)]

    def _precision_state(self) -> dict[str, Any]:
        """The fp16 loss scale and its counters; empty in other precisions."""
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        return {} if scaler is None else scaler.state_dict()

    def _restore(self) -> None:
        assert self.folder is not None
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return
        tensors, meta = read_tensors(path)
        self._require_same(path, meta)
        checkpoint = Checkpoint(tensors, meta)
        fill(self.net, checkpoint.part("model"), path)
        restore_optimizer(self.optimizer, checkpoint.part("optimizer"), meta["optimizer"])
        if self.ema:
            self.ema.state = {
                k: v.to(self.fabric.device) for k, v in checkpoint.part("ema").items()
            }
        self.best_state = {k: v.to(self.fabric.device) for k, v in checkpoint.part("best").items()}
        for name in ("epoch", "batch", "step", "history", "rate", "seconds", "epoch_seconds"):
            setattr(self, name, meta[name])
        self.sums = tensors["sums"].clone()
        if meta["precision"]:
            self.fabric.strategy.precision.scaler.load_state_dict(meta["precision"])
        restore_rng(checkpoint.part("rng"), meta["rng"])

    def _require_same(self, path: Path, meta: dict[str, Any]) -> None:
        if "settings" not in meta:
            raise FormatError(f"train: '{path}' is no checkpoint of a training; it has no settings")
        now = json.loads(json.dumps(self.s.as_dict()))
        for key, value in now.items():
            if key != "checkpoint_seconds" and meta["settings"].get(key) != value:
                raise FormatError(
                    f"train: '{path}' was trained with {key}={meta['settings'].get(key)}, now {key}={value}; "
                    "resume with the same settings, or start anew in another folder"
                )
        if meta["data"] != self._data_key():
            raise FormatError(
                f"train: '{path}' was trained on {meta['data']}, not on {self._data_key()}"
            )


def _require_finite(tensors: dict[str, Tensor], epoch: int) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise RanvierError(
                f"'{name}' is not finite in epoch {epoch}, so no checkpoint is written; lower lr or set clip=1.0"
            )


def _make_fabric(settings: Settings, devices: int, accelerator: str) -> Any:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    if settings.amp == "fp16" and not torch.cuda.is_available():
        raise UnsupportedError("train: amp='fp16' needs a CUDA device; use amp='bf16' or 'no'")
    if devices < 1:
        raise RangeError(f"train: devices is {devices}; give 1 or more")
    precision = {"no": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[settings.amp]
    several = devices > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1
    # neurons keep membranes as buffers, whose shape follows the batch: nothing to broadcast
    strategy: Any = DDPStrategy(broadcast_buffers=False) if several else "auto"
    return Fabric(accelerator=accelerator, devices=devices, strategy=strategy, precision=precision)


def _seed(settings: Settings) -> None:
    import random

    import numpy as np

    random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    torch.manual_seed(settings.seed)


@contextmanager
def _deterministic(settings: Settings) -> Iterator[None]:
    """Ordered kernels while entered, where asked for."""
    before = torch.are_deterministic_algorithms_enabled()
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
