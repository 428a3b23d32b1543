"""Data sets as tensors in memory: images, event recordings and per-step sequences.

A set is a plain value: `x` is what the network sees, `y` the labels. Small sets need no worker
processes: a batch is
one indexing operation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ranvier.train.errors import DataError, RangeError, ShapeError, UnsupportedError

IMAGE_SETS = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar100")
EVENT_SETS = ("nmnist", "dvs_gesture", "cifar10_dvs", "dvs128_gesture", "ncaltech101", "shd")
SEQUENCE_SETS = ("ecg",)
FOLDER_SETS = ("imagenet",)  # and every other folder laid out like it
SPLITS = ("train", "test", "all")
IGNORE = -1  # label of a step that counts neither in the loss nor in the accuracy


@dataclass(frozen=True, eq=False)
class Dataset(torch.utils.data.Dataset):
    """Samples and labels of one split.

    x         [N, C, H, W] for images, [N, T, ...] where `timed`; float32, or uint8 / int8 for
              spikes 0, 1, -1
    y         int64 [N], or [N, T] with one label a step (IGNORE = no label)
    n_classes number of classes
    name      the set's name
    split     train, test or all
    timed     x has a time axis after the sample axis
    """

    x: Tensor
    y: Tensor
    n_classes: int
    name: str
    split: str = "train"
    timed: bool = False

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample at one step, such as (C, H, W)."""
        return tuple(self.x.shape[2 if self.timed else 1 :])

    @property
    def steps(self) -> int | None:
        """Number of time steps in x; None where the set has no time axis."""
        return self.x.shape[1] if self.timed else None

    @property
    def per_step(self) -> bool:
        """Whether every step has a label of its own."""
        return self.y.ndim == 2

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]

    def batch(self, index: Tensor | slice | Sequence[int]) -> tuple[Tensor, Tensor]:
        """(x, y) of some samples: x float32 [B, C, H, W], timed [T, B, ...]; y [B] or [T, B]."""
        x, y = self.x[index], self.y[index]
        if self.timed:
            x = x.transpose(0, 1).contiguous()
        if self.per_step:
            y = y.transpose(0, 1).contiguous()
        return x.to(torch.float32), y

    def subset(self, index: Tensor | slice | Sequence[int]) -> Dataset:
        """The same set with only the samples in `index`."""
        return replace(self, x=self.x[index], y=self.y[index])


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    split: str = "train",
    *,
    steps: int | None = None,
    size: int | None = None,
    encoding: str = "direct",
    download: bool = False,
    limit: int | None = None,
    bins: str = "number",
    seed: int = 0,
) -> Dataset:
    """The data set `name`, as tensors in memory.

    name      digits (always there), mnist, fashion_mnist, cifar10, cifar100; nmnist, dvs_gesture,
              ecg;
              cifar10_dvs, dvs128_gesture, ncaltech101, shd (through tonic); imagenet, or the name
              of any folder <name>/{train,val}/<class>/<image>, decoded batch by batch; or a set of
              your own, <name>.npz with x_train, y_train, x_test, y_test: x of uint8 as [n, h, w] or
              [n, h, w, channels], or of floats, taken as they are, as [n, h, w] or
              [n, channels, h, w]
    data_dir  folder with the data; None: the environment variable RANVIER_DATA
    split     train, test or all
    steps     time bins of an event set (default 8); steps of a spike encoding
    size      height and width: larger pads with zeros, smaller averages (images) or merges pixels
              (events)
    encoding  direct, rate, latency or delta (train/encode.py)
    download  fetch missing files (image sets: with checksum; event sets: through tonic)
    limit     keep the first `limit` samples
    bins      event sets: equal `number` of events or equal `time` a bin
    seed      of the random rate code

    Images are float32 in [0, 1] without mean subtraction, so a pixel is exactly k/255 (digits:
    k/16) and the chip
    can be given the 8-bit k itself.
    Raises DataError where files are missing or unreadable, naming the places looked at and the file
    wanted.
    """
    from ranvier.train.encode import encode

    folder = data_folder(data_dir)
    is_folder_set = name in FOLDER_SETS or _is_folder(name, folder)
    is_own = not is_folder_set and _is_own(name, folder)
    _check(name, folder, split, limit, is_folder_set or is_own)
    if is_folder_set:
        data = _folder_images(name, folder, split, size, encoding)
    elif name in IMAGE_SETS or is_own:
        data = _images(name, folder, split, size, download)
    else:
        from ranvier.train.data_events import load_events

        data = load_events(name, folder, split, steps or 8, size, bins, download)
    if limit is not None:
        data = data.subset(slice(0, limit))
    return encode(data, encoding, steps, seed=seed)


def as_dataset(data: Any, stage: str) -> Dataset:
    """A Dataset as it is; (x, y), numpy or torch, as one: x `[n, ...]`, y class numbers `[n]`.

    Raises UnsupportedError for anything else, ShapeError where x and y do not belong together.
    """
    if hasattr(data, "batch") and hasattr(data, "per_step"):
        return data
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise UnsupportedError(
            f"{stage}: {type(data).__name__} is no data set; give load_dataset(name), or a pair (x, y) of"
            " arrays"
        )
    x, y = torch.as_tensor(data[0]), torch.as_tensor(data[1])
    if y.ndim != 1 or x.ndim < 2 or len(x) != len(y) or y.is_floating_point() or (y < 0).any():
        raise ShapeError(
            f"{stage}: x {tuple(x.shape)} and y {tuple(y.shape)} of {y.dtype}; x [n, ...] and one class"
            " number from 0 a sample, y [n], are needed"
        )
    return Dataset(x.float(), y.long(), int(y.max()) + 1 if len(y) else 0, "own")


def data_folder(data_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder to look in: the argument, else RANVIER_DATA, else None."""
    found = data_dir or os.environ.get("RANVIER_DATA")
    return Path(found).expanduser() if found else None


def _check(name: str, folder: Path | None, split: str, limit: int | None, found: bool) -> None:
    known = IMAGE_SETS + EVENT_SETS + SEQUENCE_SETS + FOLDER_SETS
    if name not in known and not found:
        where = "--data DIR or RANVIER_DATA" if folder is None else f"'{folder}'"
        raise DataError(
            f"data: there is no set '{name}'; known sets: {', '.join(known)}; or your own in {where}:"
            f" {name or '<name>'}.npz with x_train, y_train, x_test, y_test, or a folder of that name"
            " with train/<class>/<image> in it"
        )
    if split not in SPLITS:
        raise DataError(f"data: there is no split '{split}'; a set has {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise RangeError(f"data: limit is {limit}; give 1 or more, or leave it out")


def _is_folder(name: str, folder: Path | None) -> bool:
    from ranvier.train.data_folder import is_folder

    known = IMAGE_SETS + EVENT_SETS + SEQUENCE_SETS
    return name not in known and is_folder(name, folder)


def _is_own(name: str, folder: Path | None) -> bool:
    """Whether `name` is a set that ranvier does not know, in an .npz file of that name."""
    known = IMAGE_SETS + EVENT_SETS + SEQUENCE_SETS
    plain = bool(name) and Path(name).name == name  # no path: what lies elsewhere is no set of DIR
    return plain and name not in known and folder is not None and (folder / f"{name}.npz").is_file()


def _folder_images(
    name: str, folder: Path | None, split: str, size: int | None, encoding: str
) -> Dataset:
    from ranvier.train.data_folder import load_folder

    if encoding != "direct":
        raise UnsupportedError(
            f"data: '{name}' is decoded batch by batch and takes encoding='direct' only, not"
            f" '{encoding}'"
        )
    return load_folder(name, folder, split, size)


def missing(name: str, folder: Path | None, wanted: Sequence[str], how: str) -> DataError:
    """The error for an absent set: where it was looked for, what is wanted, how to get it."""
    if folder is None:
        where = "no folder was given: pass --data DIR (data_dir=) or set RANVIER_DATA"
    elif not folder.is_dir():
        where = f"the folder '{folder}' does not exist"
    else:
        where = f"looked in '{folder}'"
    return DataError(f"data: '{name}' is missing: {where}; wanted {' or '.join(wanted)}. {how}")


# ---- images ------------------------------------------------------------------------------------
# ---------------------


def _images(
    name: str, folder: Path | None, split: str, size: int | None, download: bool
) -> Dataset:
    classes = 100 if name == "cifar100" else 10
    if name == "digits":
        x, y = _digits(split)
    elif name in IMAGE_SETS:
        from ranvier.train.data_files import read_images

        x, y = read_images(name, folder, split, download)
    else:
        from ranvier.train.data_files import read_own

        assert folder is not None
        x, y, classes = read_own(name, folder, split)
    images = torch.from_numpy(np.ascontiguousarray(x))
    if size is not None:
        images = resize_images(images, size)
    labels = torch.from_numpy(np.ascontiguousarray(y).astype(np.int64))
    return Dataset(images, labels, classes, name, split)


def _digits(split: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """scikit-learn's 1,797 8x8 digits: 1,437 to train on and 360 to test on, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw, y = load_digits(return_X_y=True)
    x = (raw / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    if split == "all":
        return x, y
    train, test = train_test_split(np.arange(len(y)), test_size=360, random_state=0, stratify=y)
    keep = train if split == "train" else test
    return x[keep], y[keep]


def resize_images(x: Tensor, size: int) -> Tensor:
    """x [N, C, H, W] at size x size: padded with zeros, or averaged down and rounded to k/255.

    Raises RangeError unless size >= 1.
    """
    if size < 1:
        raise RangeError(f"data: size is {size}; give 1 or more pixels")
    height, width = x.shape[-2:]
    if size >= max(height, width):
        top, left = (size - height) // 2, (size - width) // 2
        return F.pad(x, (left, size - width - left, top, size - height - top))
    small = F.interpolate(x, (size, size), mode="area")
    return (small * 255).round() / 255  # keeps the promise that a pixel is a whole number of 255ths


def require_timed(data: Dataset, what: str) -> None:
    """Raises UnsupportedError unless `data` has a time axis."""
    if not data.timed:
        raise UnsupportedError(
            f"data: {what} needs a time axis, and '{data.name}' holds still images; use an"
            f" event set, "
            "or encoding='rate' or 'latency'"
        )
