"""Image sets from disk: npz, idx (MNIST), pickled batches (CIFAR); no torchvision, no trust."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from ranvier.train.data import missing
from ranvier.train.errors import DataError
from ranvier.train.files import atomic_write

Array = np.ndarray[Any, Any]

_IDX_FOLDERS = {
    "mnist": ("MNIST/raw", "mnist"),
    "fashion_mnist": ("FashionMNIST/raw", "fashion_mnist"),
}
_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_CIFAR = {
    "cifar10": (
        "cifar-10-batches-py",
        [f"data_batch_{i}" for i in range(1, 6)],
        ["test_batch"],
        b"labels",
    ),
    "cifar100": ("cifar-100-python", ["train"], ["test"], b"fine_labels"),
}
# Address and MD5 of every published archive, as the sets' own pages and torchvision state them.
_SOURCES = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
    ),
    "cifar100": (
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"},
    ),
}


def read_images(
    name: str, folder: Path | None, split: str, download: bool = False
) -> tuple[Array, Array]:
    """(x, y) of an image set: x float32 [N, C, H, W] in [0, 1], y [N].

    Looks for FOLDER/<name>.npz, then for torchvision's layout; `download` fetches the latter.
    Raises DataError where nothing is found or a file is not what its name says.
    """
    found = _find(name, folder, split)
    if found is None and download and folder is not None:
        _download(name, folder)
        found = _find(name, folder, split)
    if found is None:
        wanted = [
            f"{name}.npz (x_train, y_train, x_test, y_test)",
            f"{_layout(name)} (torchvision's layout)",
        ]
        how = (
            f"Get it with --download (download=True), from {_SOURCES[name][0]},"
            " or use the built-in 'digits'."
        )
        raise missing(name, folder, wanted, how)
    x, y = found
    if len(x) != len(y):
        raise DataError(
            f"data: '{name}' has {len(x)} images and {len(y)} labels; the files do not belong"
            f" together"
        )
    return _scale(name, x), y


def read_own(name: str, folder: Path, split: str) -> tuple[Array, Array, int]:
    """(x, y, number of classes) of FOLDER/<name>.npz, a set of the user's own.

    Pixels of uint8 become k/255; floats are taken as they are. Raises DataError for anything else.
    """
    path = folder / f"{name}.npz"
    parts = {part: _own_part(path, part) for part in ("train", "test")}
    shapes = {x.shape[1:] for x, _ in parts.values()}
    if len(shapes) > 1:
        raise DataError(
            f"data: '{path}' has samples of shape {' and '.join(map(str, sorted(shapes)))} in train and"
            " test; one shape is needed"
        )
    classes = 1 + max(int(y.max(initial=0)) for _, y in parts.values())
    x, y = _both(split, parts.__getitem__)
    return x, y, classes


def _own_part(path: Path, part: str) -> tuple[Array, Array]:
    x, y = _npz(path, part)
    if len(x) != len(y) or y.ndim != 1:
        raise DataError(
            f"data: '{path}' has x_{part} {x.shape} and y_{part} {y.shape}; one label a sample is needed"
        )
    if y.dtype.kind not in "iu" or y.min(initial=0) < 0:
        raise DataError(
            f"data: '{path}': y_{part} must be whole numbers from 0 (classes), not {y.dtype}"
        )
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        return _scale(path.stem, x), y
    if x.dtype.kind != "f" or x.ndim not in (3, 4):
        raise DataError(
            f"data: '{path}' has x_{part} of {x.dtype} and shape {x.shape}; wanted uint8 [n, h, w] or"
            " [n, h, w, channels], or floats [n, h, w] or [n, channels, h, w]"
        )
    if not np.isfinite(x).all():
        raise DataError(f"data: '{path}': x_{part} holds values that are not finite")
    return np.asarray(x[:, None] if x.ndim == 3 else x, np.float32), y


def _layout(name: str) -> str:
    return _IDX_FOLDERS[name][0] if name in _IDX_FOLDERS else _CIFAR[name][0]


def _scale(name: str, x: Array) -> Array:
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise DataError(
            f"data: '{name}' has images of {x.dtype} and shape {x.shape}; wanted uint8 [n, h,"
            f" w] or [n, h, w, channels]"
        )
    channels_first = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    # divided, not multiplied by 1/255: k/255 correctly rounded, so that round(255 x) gives k back
    return np.divide(channels_first, np.float32(255), dtype=np.float32)


def _find(name: str, folder: Path | None, split: str) -> tuple[Array, Array] | None:
    if folder is None:
        return None
    for path in (folder / f"{name}.npz", folder / name / f"{name}.npz"):
        if path.is_file():
            return _both(split, lambda part: _npz(path, part))  # noqa: B023  called at once
    if name in _IDX_FOLDERS:
        for place in _IDX_FOLDERS[name]:
            if _idx_path(folder / place, _IDX_FILES["test"][1]) is not None:
                return _both(split, lambda part: _idx_pair(folder / place, part))  # noqa: B023
        return None
    place_, train, test, key = _CIFAR[name]
    if not (folder / place_ / test[0]).is_file():
        return None
    files = {"train": train, "test": test}
    return _both(split, lambda part: _cifar(folder / place_, files[part], key))


def _both(split: str, read: Any) -> tuple[Array, Array]:
    if split != "all":
        return read(split)
    (x0, y0), (x1, y1) = read("train"), read("test")
    return np.concatenate([x0, x1]), np.concatenate([y0, y1])


def _npz(path: Path, split: str) -> tuple[Array, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            lacking = [k for k in (f"x_{split}", f"y_{split}") if k not in file]
            if lacking:
                raise DataError(
                    f"data: '{path}' has no array '{lacking[0]}', only {', '.join(file) or 'nothing'};"
                    " wanted x_train, y_train, x_test, y_test"
                )
            return file[f"x_{split}"], file[f"y_{split}"]
    except DataError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"data: '{path}' cannot be read as npz: {error}") from error
    except Exception as error:  # zipfile.BadZipFile, zlib.error: a cut or damaged archive
        raise DataError(f"data: '{path}' is damaged: {error}") from error


def _idx_path(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _idx_pair(folder: Path, split: str) -> tuple[Array, Array]:
    arrays = []
    for name in _IDX_FILES[split]:
        path = _idx_path(folder, name)
        if path is None:
            raise DataError(
                f"data: '{folder}' has no {name}[.gz], though its sister files are there"
            )
        arrays.append(read_idx(path))
    return arrays[0], arrays[1]


def read_idx(path: Path) -> Array:
    """The uint8 array in an idx file, gzipped or not. Raises DataError where it is not one."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError) as error:
        raise DataError(f"data: '{path}' cannot be read: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"data: '{path}' is no idx file of bytes (it starts with {raw[:4]!r})")
    start = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != int(np.prod(shape)):
        raise DataError(
            f"data: '{path}' holds {len(raw) - start} bytes, but its header says {shape}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dicts, lists, bytes and numpy arrays, and nothing that could run code."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which a data file has no need of"
            )
        if name == "encode":  # bytes as Python 3 writes them in an old protocol
            return lambda text, _codec: text.encode("latin1")
        if name == "_reconstruct":
            multiarray = getattr(np, "_core", None) or np.core  # numpy 2 moved it
            return multiarray.multiarray._reconstruct
        return getattr(np, name)


def _cifar(folder: Path, names: list[str], key: bytes) -> tuple[Array, Array]:
    xs, ys = [], []
    for name in names:
        path = folder / name
        try:
            batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
            xs.append(np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32))
            ys.append(np.asarray(batch[key], np.uint8))
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise DataError(f"data: '{path}' cannot be read as a CIFAR batch: {error}") from error
    return np.concatenate(xs).transpose(0, 2, 3, 1), np.concatenate(ys)


def _download(name: str, folder: Path) -> None:
    base, files = _SOURCES[name]
    for file, md5 in files.items():
        if name in _IDX_FOLDERS:
            fetch(base + file, folder / _layout(name) / file, md5)
        else:
            archive = fetch(base + file, folder / file, md5)
            with tarfile.open(archive) as tar:
                members = [
                    m
                    for m in tar.getmembers()
                    if m.isfile() and Path(m.name).parts[0] == _layout(name)
                ]
                for member in members:
                    _extract(tar, member, folder)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    parts = Path(member.name).parts
    if ".." in parts or Path(member.name).is_absolute():
        raise DataError(f"data: the archive wants to write outside '{folder}': {member.name}")
    content = tar.extractfile(member)
    with atomic_write(folder.joinpath(*parts)) as part:
        part.write_bytes(content.read() if content else b"")


def fetch(url: str, path: Path, md5: str) -> Path:
    """`path`, downloaded from `url` unless it is there with this checksum.

    Raises DataError where that fails or the checksum differs.
    """
    if path.is_file() and hashlib.md5(path.read_bytes()).hexdigest() == md5:
        return path
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise DataError(
            f"data: cannot download {url}: {error}. Fetch it elsewhere and put it at '{path}'"
        ) from error
    if (found := hashlib.md5(content).hexdigest()) != md5:
        raise DataError(
            f"data: {url} has MD5 {found}, not {md5}: the download is damaged or was replaced"
        )
    with atomic_write(path) as part:
        part.write_bytes(content)
    return path
