"""A look at an HDF5 file before libhdf5 reads it: damage on which the library would hang or crash.

The library walks a global heap (where variable-length text lives) by the sizes that it finds there; an
entry of free space that claims no bytes keeps it in one place for ever (hdf5 1.14 and 2.0). And one
flipped bit makes a variable-length text a variable-length list of numbers, whose reading ends the
process (2.0); so nothing is read here but what is of a type that ranvier's files use.
Source: HDF5 file format specification, III.E, Global Heap.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from ranvier.train.errors import FormatError

MAGIC = b"\x89HDF\r\n\x1a\n"
HEAP = b"GCOL"
REFERENCE = 10  # least bytes that point to a text: its length, a heap's address, a number in it


def check_heaps(path: Path) -> None:
    """Raises FormatError where a global heap of the file does not add up."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _check(data)


def check_lengths(item: Any, path: Path) -> None:
    """Raises FormatError where a dataset of variable-length text claims more than the file holds.

    libhdf5 sets memory for each claim aside before it looks for the text: up to 4 GiB for a bad one.
    Text in chunks is not looked into; no NIR writer makes any.
    """
    offset, size = item.id.get_offset(), int(item.size)
    if offset is None or not size:
        return
    stride = item.id.get_storage_size() // size
    with open(path, "rb") as file:
        file.seek(offset)
        raw = file.read(stride * size)
    whole = path.stat().st_size
    if stride < REFERENCE or len(raw) < stride * size:
        raise FormatError(f"it is damaged: '{item.name}' has no place in it for {size:,} texts")
    longest = max(int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), stride))
    if longest > whole:
        raise FormatError(f"it is damaged: '{item.name}' claims {longest:,} bytes")


def attribute(item: Any, key: str) -> Any:
    """An attribute of an open file, group or dataset: one number or text; None where it has none.

    Raises FormatError where it is of another type.
    """
    if key not in item.attrs:
        return None
    if not is_plain(item, key):
        raise FormatError(f"its attribute '{key}' is neither a number nor a text")
    return item.attrs[key]


def is_plain(item: Any, key: str) -> bool:
    """Whether an attribute is one number or text."""
    import h5py

    found = h5py.h5a.open(item.id, key.encode())
    plain = (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID, h5py.h5t.TypeStringID)
    return not found.shape and isinstance(found.get_type(), plain)


def numbers(group: Any, key: str) -> np.ndarray:
    """The dataset `key` of an open file or group.

    Raises FormatError where it is missing, or holds anything but numbers.
    """
    import h5py

    item = group.get(key)
    if not isinstance(item, h5py.Dataset) or item.dtype.kind not in "biuf":
        raise FormatError(f"'{key}' is missing, or holds no numbers")
    return np.asarray(item[()])


def _check(data: mmap.mmap) -> None:
    # the size of a length in this file: superblock version 0 and 1 keep it at byte 14, later ones at 10
    width = data[14] if data[8:9] in (b"\0", b"\1") and len(data) > 14 else data[10:11] or b"\x08"
    n = width if isinstance(width, int) else width[0]
    if n not in (2, 4, 8):
        raise FormatError(f"it is damaged: its lengths have {n} bytes")
    at = data.find(HEAP)
    while at >= 0:
        if data[at + 4 : at + 5] == b"\1" and not _adds_up(data, at, n):
            raise FormatError(f"it is damaged: its heap at byte {at} is broken")
        at = data.find(HEAP, at + 4)


def _adds_up(data: mmap.mmap, start: int, n: int) -> bool:
    """Whether a walk over the heap's entries moves on, and ends inside the heap."""
    end = start + int.from_bytes(data[start + 8 : start + 8 + n], "little")
    head = _up(8 + n)
    at = start + _up(8 + n)
    while end - at >= head:
        index = int.from_bytes(data[at : at + 2], "little")
        size = int.from_bytes(data[at + 8 : at + 8 + n], "little")
        at += size if index == 0 else head + _up(size)
        if size == 0 and index == 0:
            return False
    return at <= end <= len(data)


def _up(n: int) -> int:
    return n + -n % 8
