"""Plain data as files, for the border to Lava's process: JSON and arrays, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ranvier.train.errors import UnsupportedError


def write_data(stem: Path, data: Mapping[str, Any]) -> None:
    """Writes `data` as <stem>.npz (its arrays) and, last and at once, <stem>.json (the rest).

    Raises UnsupportedError for anything but nested dicts with str keys, lists, tuples, str, bool,
    numbers, None and arrays of numbers.
    """
    arrays: dict[str, Any] = {}
    text = json.dumps(_plain(data, arrays, stem.name))
    np.savez(stem.with_suffix(".npz"), **arrays)
    part = stem.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.rename(stem.with_suffix(".json"))


def read_data(stem: Path) -> dict[str, Any]:
    """What `write_data` wrote; tuples have become lists, numpy scalars Python's."""
    with np.load(stem.with_suffix(".npz"), allow_pickle=False) as arrays:
        held = {key: arrays[key] for key in arrays.files}
    data: dict[str, Any] = _filled(json.loads(stem.with_suffix(".json").read_text("utf-8")), held)
    return data


def _plain(data: Any, arrays: dict[str, Any], where: str) -> Any:
    """`data` as JSON can hold it; its arrays go to `arrays` and leave their key behind."""
    match data:
        case np.ndarray() if data.dtype.kind in "biufU":
            key = f"a{len(arrays)}"
            arrays[key] = data
            return {"__array__": key}
        case None | bool() | int() | float() | str():
            return data
        case np.bool_() | np.integer() | np.floating():
            return data.item()
        case list() | tuple():
            return [_plain(item, arrays, f"{where}[{i}]") for i, item in enumerate(data)]
        case Mapping() if all(isinstance(key, str) for key in data):
            return {key: _plain(item, arrays, f"{where}[{key!r}]") for key, item in data.items()}
    raise UnsupportedError(
        f"lava: {where} is a {type(data).__name__}; only dicts with str keys, lists, str, numbers, "
        "None and arrays of numbers cross the border to Lava's process. Turn it into arrays first"
    )


def _filled(data: Any, arrays: Mapping[str, Any]) -> Any:
    match data:
        case {"__array__": key}:
            return arrays[key]
        case dict():
            return {key: _filled(item, arrays) for key, item in data.items()}
        case list():
            return [_filled(item, arrays) for item in data]
    return data
