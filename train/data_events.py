"""Event recordings as frames [N, T, C, H, W], and sequences with a label a step [N, T, C, 1, 1].

A frame counts the events of each pixel and polarity in one time bin, so the sum over all bins is
the number of events,
whatever `steps`, `bins` and (up to the sensor's size) `size` are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ranvier.train.data import IGNORE, Dataset, missing
from ranvier.train.errors import DataError, RangeError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Events:
    """Events of one recording in order of time: x, y in pixels, polarity 0 or 1, t in us."""

    x: Array
    y: Array
    polarity: Array
    t: Array

    def __len__(self) -> int:
        return len(self.t)


@dataclass(frozen=True)
class _Sensor:
    height: int
    width: int
    polarities: int = 2


_NPZ = {"nmnist": (_Sensor(34, 34), 10), "dvs_gesture": (_Sensor(128, 128), 10)}
# ranvier's name -> class in tonic.datasets, sensor, classes, whether tonic knows a train/test split
_TONIC: dict[str, tuple[str, _Sensor, int, bool]] = {
    "nmnist": ("NMNIST", _Sensor(34, 34), 10, True),
    "dvs_gesture": ("DVSGesture", _Sensor(128, 128), 11, True),
    "dvs128_gesture": ("DVSGesture", _Sensor(128, 128), 11, True),
    "cifar10_dvs": ("CIFAR10DVS", _Sensor(128, 128), 10, False),
    "ncaltech101": ("NCALTECH101", _Sensor(180, 240), 101, False),
    "shd": ("SHD", _Sensor(1, 700, 1), 20, True),
}


def load_events(
    name: str,
    folder: Path | None,
    split: str,
    steps: int,
    size: int | None = None,
    bins: str = "number",
    download: bool = False,
) -> Dataset:
    """An event set, float32 [N, steps, C, H, W]; shd [N, steps, 1, 1, 700], ecg [N, 1301, 4, 1, 1].

    Raises DataError where the files are missing, RangeError for an impossible steps, size or bins.
    """
    if bins not in ("number", "time"):
        raise RangeError(
            f"data: bins='{bins}'; an event set is cut by equal 'number' of events or equal 'time'"
        )
    if steps < 1 or (size is not None and size < 1):
        raise RangeError(f"data: steps={steps}, size={size}; both must be 1 or more")
    if name == "ecg":
        return _ecg(folder, split)
    if name in _NPZ and folder is not None:
        for path in (folder / f"{name}.npz", folder / name / f"{name}.npz"):
            if path.is_file():
                return _npz_events(name, path, split, steps, size, bins)
    return _tonic_events(name, folder, split, steps, size, bins, download)


def integrate(
    events: Events,
    steps: int,
    height: int,
    width: int,
    polarities: int = 2,
    *,
    size: int | None = None,
    bins: str = "number",
) -> Array:
    """Event counts, float32 [steps, polarities, H, W]; H, W = height, width, or size, size.

    bins  number: bin i holds events n*i/steps .. n*(i+1)/steps; time: bin i holds an equal part of
          the duration
    size  smaller than the sensor: pixels merge, no event is lost; larger: zeros all around
    """
    x, y, height, width = _fit(events, height, width, size)
    n = len(events)
    if bins == "number":
        step = np.arange(n, dtype=np.int64) * steps // max(n, 1)
    else:
        t = events.t.astype(np.int64) - (int(events.t[0]) if n else 0)
        step = t * steps // (int(t[-1]) + 1 if n else 1)
    shape = (steps, polarities, height, width)
    flat = ((step * polarities + events.polarity) * height + y) * width + x
    return np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape).astype(np.float32)


def _fit(
    events: Events, height: int, width: int, size: int | None
) -> tuple[Array, Array, int, int]:
    x, y = events.x.astype(np.int64), events.y.astype(np.int64)
    if size is None:
        return x, y, height, width
    x = x * size // width if size < width else x + (size - width) // 2
    y = y * size // height if size < height else y + (size - height) // 2
    return x, y, size, size


# ---- npz event files
# ------------------------------------------------------------------------------------------------


def _npz_events(
    name: str, path: Path, split: str, steps: int, size: int | None, bins: str
) -> Dataset:
    sensor, n_classes = _NPZ[name]
    try:
        with np.load(path, allow_pickle=False) as file:
            raw, offsets, label = file["raw"], file["offsets"], file["label"].astype(np.int64)
            is_test = file["is_test"] if "is_test" in file.files else None
    except (
        Exception
    ) as error:  # KeyError, ValueError, OSError, BadZipFile: whatever a wrong file raises
        raise DataError(
            f"data: '{path}' is no event file with raw, offsets, label: {error}"
        ) from error
    chosen = _choose(name, path, split, is_test, len(label))
    frames = [
        integrate(
            decode_events(raw[offsets[i] : offsets[i + 1]]),
            steps,
            sensor.height,
            sensor.width,
            size=size,
            bins=bins,
        )
        for i in chosen
    ]
    return Dataset(
        torch.from_numpy(np.stack(frames)),
        torch.from_numpy(label[chosen]),
        n_classes,
        name,
        split,
        timed=True,
    )


def _choose(name: str, path: Path, split: str, is_test: Array | None, n: int) -> Array:
    if split == "all" or (is_test is None and split == "train"):
        return np.arange(n)
    if is_test is None:
        raise DataError(
            f"data: '{path}' has no test split (no array is_test); '{name}' is a handful of"
            f" clips, use split='train'"
        )
    return np.flatnonzero(is_test if split == "test" else ~is_test)


def decode_events(raw: Array) -> Events:
    """Events from uint8 [n, 5]: x, y, polarity in the top bit of byte 2, then 23 bits of time."""
    b = raw.astype(np.int64)
    t = (b[:, 2] & 127) << 16 | b[:, 3] << 8 | b[:, 4]
    return Events(b[:, 0], b[:, 1], b[:, 2] >> 7, t)


# ---- ECG ---------------------------------------------------------------------------------------
# ---------------------


def _ecg(folder: Path | None, split: str) -> Dataset:
    parts = ["train", "test"] if split == "all" else [split]
    pairs = [_read_ecg(folder, part) for part in parts]
    x = torch.from_numpy(np.concatenate([x for x, _ in pairs]))
    y = torch.from_numpy(np.concatenate([y for _, y in pairs]))
    return Dataset(x, y, 6, "ecg", split, timed=True)


def _read_ecg(folder: Path | None, split: str) -> tuple[Array, Array]:
    """x int8 [N, 1301, 4, 1, 1] in -1, 0, 1; y int64 [N, 1301], IGNORE where no class is marked."""
    from scipy.io import loadmat

    file = f"QTDB_{split}.mat"
    path = next(
        (p for p in (_at(folder, file), _at(folder, f"ecg/{file}")) if p and p.is_file()), None
    )
    if path is None:
        how = (
            "The delta-encoded QTDB set is published with the code of Yin, Corradi and Bohte, 2021."
        )
        raise missing("ecg", folder, [file, f"ecg/{file}"], how)
    try:
        content = loadmat(path, variable_names=["x", "y"])
        x, y = content["x"], content["y"]
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise DataError(f"data: '{path}' is no MATLAB file with x and y: {error}") from error
    labels = np.where(y.sum(-1) == 1, y.argmax(-1), IGNORE)
    return x.astype(np.int8)[..., None, None], labels.astype(np.int64)


def _at(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


# ---- tonic -------------------------------------------------------------------------------------
# ---------------------


def _tonic_events(
    name: str,
    folder: Path | None,
    split: str,
    steps: int,
    size: int | None,
    bins: str,
    download: bool,
) -> Dataset:
    kind, sensor, n_classes, has_split = _TONIC[name]
    parts = _tonic_parts(kind, name, folder, split, has_split, download)
    frames, labels = [], []
    for source, chosen in parts:
        for i in chosen:
            recording, label = source[int(i)]
            frames.append(_frame(recording, sensor, steps, size, bins))
            labels.append(label)
    y = _numbered(labels)
    return Dataset(
        torch.from_numpy(np.stack(frames)), torch.from_numpy(y), n_classes, name, split, timed=True
    )


def _frame(recording: Any, sensor: _Sensor, steps: int, size: int | None, bins: str) -> Array:
    x = recording["x"]
    y = recording["y"] if "y" in recording.dtype.names else np.zeros_like(x)
    one = sensor.polarities == 1
    polarity = np.zeros(len(x), np.int64) if one else recording["p"].astype(np.int64)
    events = Events(x, y, polarity, recording["t"])
    frame = integrate(
        events,
        steps,
        sensor.height,
        sensor.width,
        sensor.polarities,
        size=None if one else size,
        bins=bins,
    )
    return frame.reshape(steps, -1) if one else frame


def _numbered(labels: list[Any]) -> Array:
    """Labels as int64; names are numbered in alphabetical order."""
    if not isinstance(labels[0], str):
        return np.asarray(labels, np.int64)
    order = {name: i for i, name in enumerate(sorted(set(labels)))}
    return np.array([order[name] for name in labels], np.int64)


def _tonic_parts(
    kind: str, name: str, folder: Path | None, split: str, has_split: bool, download: bool
) -> list[tuple[Any, Array]]:
    if has_split:
        wanted = ("train", "test") if split == "all" else (split,)
        sources = [
            _tonic_set(kind, name, folder, download, train=part == "train") for part in wanted
        ]
        return [(source, np.arange(len(source))) for source in sources]
    source = _tonic_set(kind, name, folder, download)
    return [(source, split_per_class(source.targets, split))]


def split_per_class(targets: Any, split: str) -> Array:
    """Indices of the first 90 % of every class (train), of the rest (test), or of all.

    For the sets that were published without a split.
    """
    targets = np.asarray(targets)
    chosen = []
    for label in np.unique(targets):
        of_class = np.flatnonzero(targets == label)
        cut = len(of_class) * 9 // 10
        chosen.append({"train": of_class[:cut], "test": of_class[cut:], "all": of_class}[split])
    return np.sort(np.concatenate(chosen))


def _tonic_set(kind: str, name: str, folder: Path | None, download: bool, **options: Any) -> Any:
    wanted = [f"{kind}/ (tonic's layout)"]
    if name in _NPZ:
        wanted.insert(0, f"{name}.npz")
    how = "Get it with --download (through tonic)."
    if folder is None:
        raise missing(name, folder, wanted, how)
    try:
        from tonic import datasets
    except ImportError as error:
        raise missing(
            name,
            folder,
            wanted,
            f"tonic's layout needs tonic: pip install 'ranvier[events]' ({error})",
        ) from None
    return _guarded(getattr(datasets, kind), missing(name, folder, wanted, how), download)(
        str(folder), **options
    )


def _guarded(kind: type, error: DataError, download: bool) -> type:
    """tonic's class; its download of whatever is missing raises `error` unless asked for."""
    if download:
        return kind

    def refuse(self: Any) -> None:
        raise error

    return type(kind.__name__, (kind,), {"download": refuse})  # the name decides tonic's folder
