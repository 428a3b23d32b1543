"""HDF5 groups of strangers: plain numbers and words are read, of a size that the file really has.

Links out of the file are not followed, and nothing is executed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ranvier.train.errors import FormatError

MAX_NEURONS = 2**24  # of one layer; a chip holds 2**20


class Group:
    """A group of a file of `size` bytes; `where` names it in errors."""

    def __init__(self, group: Any, size: int, where: str = "") -> None:
        self.group, self.size, self.where = group, size, where

    def __contains__(self, key: str) -> bool:
        return key in self.group

    def keys(self) -> list[str]:
        return list(self.group)

    def error(self, reason: str) -> FormatError:
        return FormatError(f"{self.where}: {reason}" if self.where else reason)

    def _item(self, key: str) -> Any:
        import h5py

        if not isinstance(self.group.get(key, getlink=True), h5py.HardLink):
            raise self.error(f"'{key}' is missing, or points out of the file")
        return self.group[key]

    def sub(self, key: str, where: str) -> Group:
        import h5py

        item = self._item(key)
        if not isinstance(item, h5py.Group):
            raise self.error(f"'{key}' is no group")
        return Group(item, self.size, where)

    def _value(self, key: str) -> Any:
        import h5py

        item = self._item(key)
        if not isinstance(item, h5py.Dataset):
            raise self.error(f"'{key}' is no array")
        n_bytes = math.prod(int(n) for n in item.shape) * item.dtype.itemsize
        if item.external or item.is_virtual or n_bytes > 100 * self.size:
            raise self.error(f"'{key}' claims {n_bytes:,} bytes, which the file does not hold")
        if item.dtype.kind not in "biuf" and h5py.check_string_dtype(item.dtype) is None:
            raise self.error(f"'{key}' holds {item.dtype}; only numbers and text are read")
        return item[()]

    def text(self, key: str) -> str:
        """A word: a scalar or the first of an array of them, as lava-dl writes it."""
        value = np.asarray(self._value(key)).reshape(-1)
        if value.size != 1 or not isinstance(value[0], (bytes, str)):
            raise self.error(f"'{key}' is no single word")
        word = value[0]
        return word.decode("ascii", "replace") if isinstance(word, bytes) else word

    def whole(self, key: str) -> np.ndarray:
        """Numbers as int64; fractions are cut off, as netx does."""
        value = np.asarray(self._value(key))
        if value.dtype.kind not in "iufb" or value.dtype.itemsize > 8:
            raise self.error(f"'{key}' holds {value.dtype}; only plain numbers are read")
        if not np.isfinite(value).all() or np.abs(value.astype(np.float64)).max(initial=0) > 2**31:
            raise self.error(f"'{key}' holds numbers that no chip takes")
        return value.astype(np.int64)

    def one(self, key: str, default: int | None = None) -> int:
        """A single whole number."""
        if default is not None and key not in self:
            return default
        value = self.whole(key)
        if value.size != 1:
            raise self.error(f"'{key}' has shape {value.shape}; it must be a single number")
        return int(value.reshape(()))

    def shape(self, key: str) -> tuple[int, ...]:
        found = tuple(int(n) for n in self.whole(key).reshape(-1))
        if not 1 <= len(found) <= 4 or min(found) < 1 or math.prod(found) > MAX_NEURONS:
            raise self.error(f"shape {found}: a layer has 1 to {MAX_NEURONS:,} neurons")
        return found

    def pair(self, key: str, default: int, least: int) -> tuple[int, int]:
        """(H, W) of a geometry that may be a single number."""
        value = self.whole(key).reshape(-1) if key in self else np.array([default])
        if value.size not in (1, 2) or value.min() < least or value.max() > 2**15:
            raise self.error(f"'{key}' is {value.tolist()}; one or two numbers from {least} on")
        return int(value[0]), int(value[-1])
