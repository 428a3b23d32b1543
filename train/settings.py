"""Every setting of a training, checked when built; the [train] table of a recipe is this."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from ranvier.train.errors import RangeError, UnsupportedError
from ranvier.train.losses import LOSSES
from ranvier.train.schedule import OPTIMIZERS, SCHEDULES

AMP = ("no", "bf16", "fp16")
KEEP = ("last", "best")


@dataclass(frozen=True)
class Settings:
    """How to train.

    epochs, batch_size   batch_size counts the samples of one step over all devices
    lr, optimizer, momentum, weight_decay    adamw, adam or sgd; decay spares biases, norms and taus
    schedule, warmup     cosine, step, onecycle or constant; warm-up in epochs (may be a fraction)
    step_epochs, gamma   schedule 'step': lr * gamma after every step_epochs
    loss, label_smoothing    ce, mse, tet or per-step (train/losses.py)
    logit_scale          factor on the output in the loss; several times faster learning where the
                         readout is a mean of rare spikes
    rate_weight, rate_target    adds rate_weight * mean over layers of max(0, rate - rate_target)^2
    clip                 largest gradient norm; 0 = no clipping
    accumulate           batches per optimizer step
    amp                  no, bf16 or fp16 (CUDA only)
    ema                  decay of the weights' moving average, which is then what is tested and
                         kept; 0 = off
    early_stop           stop after so many epochs without a better accuracy; 0 = never
    keep                 weights at the end: of the last epoch, or of the best one. The best on the
                         test split is
                         chosen by looking at it: give a validation set as `test` for an honest
                         figure
    mixup, cutmix        Beta parameter; 0 = off
    augment              none, shift, flip-crop, randaugment or events (train/augmentation.py)
    seed, deterministic  seeds torch, numpy, Python; deterministic also forbids unordered CUDA
                         kernels
    checkpoint_seconds   time between two checkpoints within an epoch; each epoch ends with one
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by recipes

    epochs: int = 10
    batch_size: int = 128
    lr: float = 1e-3
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["cosine", "step", "constant", "onecycle"] = "cosine"
    warmup: float = 0.0
    step_epochs: int = 30
    gamma: float = 0.1
    loss: str = "ce"
    label_smoothing: float = 0.0
    logit_scale: float = 1.0
    rate_weight: float = 0.0
    rate_target: float = 0.1
    clip: float = 0.0
    accumulate: int = 1
    amp: Literal["no", "bf16", "fp16"] = "no"
    ema: float = 0.0
    early_stop: int = 0
    keep: Literal["last", "best"] = "last"
    mixup: float = 0.0
    cutmix: float = 0.0
    augment: str = "none"
    seed: int = 0
    deterministic: bool = False
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "step_epochs"):
            if getattr(self, name) < 1:
                raise RangeError(f"train: {name} is {getattr(self, name)}; give 1 or more")
        for name in (
            "weight_decay",
            "warmup",
            "rate_weight",
            "clip",
            "ema",
            "early_stop",
            "mixup",
            "cutmix",
        ):
            if getattr(self, name) < 0:
                raise RangeError(f"train: {name} is {getattr(self, name)}; give 0 (off) or more")
        if not 0 <= self.label_smoothing < 1:
            raise RangeError(
                f"train: label_smoothing is {self.label_smoothing}; allowed 0 up to below 1"
            )
        if not self.logit_scale > 0:
            raise RangeError(f"train: logit_scale is {self.logit_scale}; give a positive factor")
        self._check_names()

    def _check_names(self) -> None:
        from ranvier.train.augmentation import AUGMENTATIONS

        allowed = {
            "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "loss": tuple(LOSSES),
            "amp": AMP, "keep": KEEP, "augment": AUGMENTATIONS,
        }  # fmt: skip
        for name, values in allowed.items():
            if (found := getattr(self, name)) not in values:
                raise UnsupportedError(
                    f"train: {name}='{found}' is unknown; known: {', '.join(values)}"
                )
        if self.loss == "per-step" and (self.mixup or self.cutmix):
            raise UnsupportedError(
                "train: mixup and cutmix blend whole samples; loss='per-step' has a label a step"
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_settings(options: dict[str, Any]) -> Settings:
    """Settings from keywords. Raises UnsupportedError for a wrong one, naming the nearest."""
    known = [f.name for f in fields(Settings)]
    for key in options:
        if key not in known:
            raise UnsupportedError(f"train: there is no setting '{key}'{nearest(key, known)}")
    try:
        return Settings(**options)
    except TypeError as error:
        given = ", ".join(f"{k}={v!r}" for k, v in options.items())
        raise UnsupportedError(f"train: a setting of {given} has a wrong type: {error}") from error


def nearest(key: str, known: list[str]) -> str:
    """'; did you mean ...?', or the list of all where nothing is near."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
