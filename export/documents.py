"""Frozen values as HDF5 documents: one JSON text, the arrays beside it, and a digest over both.

Layout: attributes `format`, `version`, `digest`; dataset `document` (UTF-8 JSON as bytes); group
`arrays` with one plain dataset an array. A dataclass is written by the name of its class and its
fields, and read back against their annotations. A file is data: nothing in it is executed or
unpickled, and only classes that the reader names are built.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from ranvier.export.hdf5_guard import attribute, check_heaps
from ranvier.train.errors import FormatError, UnsupportedError
from ranvier.train.files import atomic_write

MAX_DEPTH = 32  # nesting of the JSON document; ours needs 8

Arrays = dict[str, np.ndarray]
Classes = Mapping[str, type[Any]]


def save_document(
    path: str | os.PathLike[str], kind: str, version: int, document: Any, arrays: Arrays
) -> None:
    """Writes a JSON-able `document` and its `arrays` as HDF5, atomically."""
    import h5py

    text = json.dumps(document, allow_nan=False).encode()
    with atomic_write(path) as part, h5py.File(part, "w") as file:
        file.attrs["format"], file.attrs["version"] = kind, version
        file.attrs["digest"] = content_digest(text, arrays)
        file.create_dataset("document", data=np.frombuffer(text, dtype=np.uint8))
        group = file.create_group("arrays")
        for key, array in arrays.items():
            group.create_dataset(key, data=array)


def load_document(
    path: str | os.PathLike[str], kind: str, version: int, build: Callable[[Any, Arrays], Any]
) -> Any:
    """What `build` makes of the document and arrays in `path`.

    Raises FormatError, with the file and the reason, where it is missing, is no HDF5, is damaged,
    or holds anything but what `save_document` wrote under the same kind and version.
    """
    where = kind.removeprefix("ranvier-")
    try:
        return build(*_read(Path(path), kind, version))
    except FormatError as error:
        raise FormatError(f"{where} file '{path}': {error}") from error
    except Exception as error:  # h5py and the shape rules raise many kinds on damaged files
        reason = str(error).strip() or type(error).__name__
        raise FormatError(f"{where} file '{path}': {reason}") from error


def content_digest(text: bytes, arrays: Arrays) -> str:
    state = hashlib.sha256(text)
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        state.update(f"{key} {array.dtype.str} {array.shape}".encode())
        state.update(array.tobytes())
    return state.hexdigest()


def plain(value: Any, where: str, arrays: Arrays) -> Any:
    """value as JSON; arrays go to `arrays`, and floats that JSON lacks become words."""
    if is_dataclass(value) and not isinstance(value, type):
        kept = {f.name: getattr(value, f.name) for f in fields(value) if f.name != "function"}
        inner = {k: plain(v, where, arrays) for k, v in kept.items()}
        return {"$class": type(value).__name__, "fields": inner}
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            raise UnsupportedError(
                f"file: '{where}' holds an array of {value.dtype}; only numbers can be saved"
            )
        key = str(len(arrays))
        arrays[key] = value
        return {"$array": key}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, (list, tuple)):
        items = [plain(v, where, arrays) for v in value]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping) and all(isinstance(k, str) and k[:1] != "$" for k in value):
        return {k: plain(v, where, arrays) for k, v in value.items()}
    raise UnsupportedError(
        f"file: '{where}' holds a {type(value).__name__}, which cannot be saved; "
        "use numbers, text, lists and arrays"
    )


def _read(path: Path, wanted: str, newest: int) -> tuple[Any, Arrays]:
    import h5py

    if not path.is_file():
        raise FormatError("there is no such file")
    size = path.stat().st_size
    check_heaps(path)
    if not h5py.is_hdf5(path):
        raise FormatError("it is no HDF5 file, or it is cut off")
    with h5py.File(path, "r") as file:
        kind, version = attribute(file, "format"), attribute(file, "version")
        if kind != wanted:
            raise FormatError(f"its format is {kind!r}; '{wanted}' is needed")
        if version != newest:
            raise FormatError(f"it is of version {version}; this ranvier reads version {newest}")
        text = _dataset(file, "document", size).tobytes()
        group = file["arrays"]
        arrays = {key: _dataset(group, key, size) for key in group}
        if attribute(file, "digest") != content_digest(text, arrays):
            raise FormatError("its content does not match its digest: it was damaged or edited")
    return json.loads(text.decode("utf-8")), arrays


def _dataset(group: Any, key: str, size: int) -> np.ndarray:
    """The array under `key`; only plain numbers that really stand in this file."""
    import h5py

    if not isinstance(group.get(key, getlink=True), h5py.HardLink):
        raise FormatError(f"'{key}' is missing, or points out of the file")
    item = group[key]
    if not isinstance(item, h5py.Dataset):
        raise FormatError(f"'{key}' is no array")
    if item.dtype.kind not in "fiub" or item.dtype.fields or item.dtype.itemsize > 16:
        raise FormatError(f"'{key}' holds {item.dtype}; only plain numbers are read")
    n_bytes = math.prod(int(n) for n in item.shape) * item.dtype.itemsize
    if n_bytes > size or item.chunks or item.external or item.is_virtual:
        raise FormatError(f"'{key}' claims {n_bytes:,} bytes that do not stand in the file")
    return np.asarray(item[()])


def fields_in(
    cls: type[Any],
    values: Any,
    arrays: Arrays,
    classes: Classes,
    where: str,
    skip: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Constructor arguments of the dataclass `cls`, each of the type that its annotation says."""
    if not isinstance(values, dict):
        raise FormatError(f"{where} has no fields")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls) if f.name not in skip}
    for key in values:
        if key not in known:
            raise FormatError(f"{where} has an unknown field '{key}'")
    for name, f in known.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise FormatError(f"{where} lacks its field '{name}'")
    found = {k: _value_in(v, arrays, classes, f"{where}: {k}") for k, v in values.items()}
    for key, value in found.items():
        if isinstance(value, (int, float)) and not fits(value, hints[key]):
            value = found[key] = np.asarray(value)  # a numpy scalar was saved for an array
        if not fits(value, hints[key]):
            raise FormatError(f"{where}: '{key}' is {value!r:.60}, which is no {hints[key]}")
    return found


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is what the annotation `hint` of a node's field allows."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in args
    if origin in (Union, UnionType):
        return any(fits(value, a) for a in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = [args[0]] * len(value) if args[-1] is ... else list(args)
        return len(value) == len(each) and all(map(fits, value, each))
    if origin is Callable:
        return False  # a file holds no functions
    if origin is Mapping:
        return isinstance(value, dict)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, (int, float))
    return isinstance(value, hint)


def _value_in(value: Any, arrays: Arrays, classes: Classes, where: str, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise FormatError(f"{where} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return [_value_in(v, arrays, classes, where, depth + 1) for v in value]
    if not isinstance(value, dict):
        return value
    if "$array" in value:
        if value["$array"] not in arrays:
            raise FormatError(f"{where} names an array that the file lacks")
        return arrays[value["$array"]]
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(_value_in(v, arrays, classes, where, depth + 1) for v in value["$tuple"])
    if "$class" in value:
        return object_in(value, arrays, classes, where)
    return {k: _value_in(v, arrays, classes, where, depth + 1) for k, v in value.items()}


def object_in(item: Any, arrays: Arrays, classes: Classes, where: str) -> Any:
    """The value of one of `classes` that `plain` wrote as `item`."""
    name = item.get("$class") if isinstance(item, dict) else None
    if not isinstance(name, str) or name not in classes:
        raise FormatError(f"{where}: a value is of class {name!r}; known are {', '.join(classes)}")
    cls = classes[name]
    return cls(**fields_in(cls, item.get("fields"), arrays, classes, f"{where} {name}"))
