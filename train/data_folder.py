"""Image folders as torchvision's ImageFolder reads them: FOLDER/<set>/<split>/<class>/<image>.

Sets such as ImageNet do not fit into memory: the images are decoded when a batch asks for them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ranvier.train.data import Dataset, missing
from ranvier.train.errors import DataError, RangeError

SIZE = 224  # pixels a side, unless asked for otherwise
SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".ppm", ".webp")
_SPLITS = {"train": ("train",), "test": ("val", "test"), "all": ("train", "val", "test")}
Index = Tensor | slice | Sequence[int]


class ImageFiles:
    """Images on disk that index as a float32 tensor [N, 3, size, size] in [0, 1].

    An image is scaled until its shorter side is 8/7 of `size` (256 for 224) and cropped in the
    middle; a pixel is exactly k/255. Images are decoded by `threads` threads.
    Raises DataError at indexing where a file is no image.
    """

    def __init__(self, paths: Sequence[Path], size: int = SIZE, threads: int | None = None) -> None:
        if size < 1:
            raise RangeError(f"data: size is {size}; give 1 or more pixels")
        self.paths, self.size = list(paths), size
        self.threads = threads or min(8, os.cpu_count() or 1)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.paths), 3, self.size, self.size

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, index: Index) -> ImageFiles:
        """The same, of some images only; nothing is decoded."""
        chosen = np.arange(len(self.paths))[_plain(index)]
        return ImageFiles([self.paths[i] for i in chosen], self.size, self.threads)

    def __getitem__(self, index: int | Index) -> Tensor:
        if isinstance(index, int):
            return torch.from_numpy(self._decode(self.paths[index]))
        paths = self.take(index).paths
        with ThreadPoolExecutor(self.threads) as pool:
            images = list(pool.map(self._decode, paths))
        return torch.from_numpy(np.stack(images)) if images else torch.empty(0, *self.shape[1:])

    def _decode(self, path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        from PIL import Image

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # PIL's own are OSErrors
            raise DataError(f"data: '{path}' cannot be read as an image: {error}") from error
        width, height = image.size
        scale = self.size * 8 / 7 / min(width, height)
        width, height = max(self.size, round(width * scale)), max(self.size, round(height * scale))
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = np.asarray(image, np.uint8).transpose(2, 0, 1)
        return np.divide(pixels, np.float32(255), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class ImageFolder(Dataset):
    """A data set whose `x` is ImageFiles; `classes` are the folders' names, label 0 first."""

    x: Any  # ImageFiles
    classes: tuple[str, ...] = ()

    def subset(self, index: Index) -> Dataset:
        return replace(self, x=self.x.take(index), y=self.y[index])


def is_folder(name: str, folder: Path | None) -> bool:
    """Whether FOLDER/<name> holds the folders of an image set."""
    if folder is None or not name or Path(name).name != name:
        return False
    return any((folder / name / split).is_dir() for split in ("train", "val"))


def load_folder(name: str, folder: Path | None, split: str, size: int | None) -> ImageFolder:
    """FOLDER/<name>/{train, val or test}/<class>/<image>, classes numbered in sorted order.

    Raises DataError where there is no such folder, or no image in it.
    """
    wanted = [f"{name}/{part}/<class>/<image>" for part in _SPLITS[split][:2]]
    root = (folder or Path()) / name
    if folder is None or not root.is_dir():
        how = "Unpack the archives of the set so that every class has a folder."
        raise missing(name, folder, wanted, how)
    # The classes are those of all splits: a class without a test image keeps its number.
    parts = [root / part for part in ("train", "val", "test") if (root / part).is_dir()]
    classes = sorted({c.name for part in parts for c in part.iterdir() if c.is_dir()})
    paths: list[Path] = []
    labels: list[int] = []
    for part in _present(root, split):
        for number, found in enumerate(classes):
            images = _images_in(part / found)
            paths += images
            labels += [number] * len(images)
    if not paths:
        raise DataError(f"data: '{root}' holds no image of split '{split}'; wanted {wanted[0]}")
    files = ImageFiles(paths, SIZE if size is None else size)
    y = torch.tensor(labels, dtype=torch.int64)
    return ImageFolder(files, y, len(classes), name, split, classes=tuple(classes))


def _present(root: Path, split: str) -> list[Path]:
    """The folders of a split; `test` is val where there is one."""
    found = [root / part for part in _SPLITS[split] if (root / part).is_dir()]
    return found[:1] if split == "test" else found


def _images_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _plain(index: Index) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | slice:
    if isinstance(index, slice):
        return index
    return np.asarray(index, dtype=np.int64)
