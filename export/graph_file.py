"""Graphs as HDF5 files: one JSON document, the arrays beside it, and a digest over both.

Layout: attributes `format`, `version`, `digest`; dataset `document` (UTF-8 JSON as bytes); group
`arrays` with one plain dataset an array. What a node holds is written by its dataclass fields, and
read back against their annotations; a neuron model is written by the name of its class. A file is
data: nothing in it is executed or unpickled. Functions of Opaque nodes are not saved.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from ranvier.export.graph import Graph
from ranvier.export.neurons import MODELS, NeuronModel
from ranvier.export.nodes import NODES, Node
from ranvier.train.errors import FormatError, UnsupportedError
from ranvier.train.files import atomic_write

FORMAT = "ranvier-graph"
VERSION = 1
MAX_DEPTH = 32  # nesting of the JSON document; ours needs 6

Arrays = dict[str, np.ndarray]


def save(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Writes `graph` as HDF5, atomically.

    Raises UnsupportedError where a node's meta holds something that is no plain value.
    """
    import h5py

    arrays: Arrays = {}
    head = {"steps": graph.steps, "dt": graph.dt, "spec": graph.spec, "meta": dict(graph.meta)}
    document = {
        "graph": {k: _plain(v, "graph", arrays) for k, v in head.items()},
        "nodes": [_node_out(node, arrays) for node in graph],
    }
    text = json.dumps(document, allow_nan=False).encode()
    with atomic_write(path) as part, h5py.File(part, "w") as file:
        file.attrs["format"], file.attrs["version"] = FORMAT, VERSION
        file.attrs["digest"] = _digest(text, arrays)
        file.create_dataset("document", data=np.frombuffer(text, dtype=np.uint8))
        group = file.create_group("arrays")
        for key, array in arrays.items():
            group.create_dataset(key, data=array)


def load(path: str | os.PathLike[str]) -> Graph:
    """The graph in the file `path`.

    Raises FormatError, with the file and the reason, where it is missing, is no HDF5, is damaged,
    or holds anything but a graph that `save` wrote.
    """
    try:
        document, arrays = _read(Path(path))
        return _graph_in(document, arrays)
    except FormatError as error:
        raise FormatError(f"graph file '{path}': {error}") from error
    except Exception as error:  # h5py and the shape rules raise many kinds on damaged files
        reason = str(error).strip() or type(error).__name__
        raise FormatError(f"graph file '{path}': {reason}") from error


def _digest(text: bytes, arrays: Arrays) -> str:
    state = hashlib.sha256(text)
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        state.update(f"{key} {array.dtype.str} {array.shape}".encode())
        state.update(array.tobytes())
    return state.hexdigest()


def _node_out(node: Node, arrays: Arrays) -> dict[str, Any]:
    kept = {f.name: getattr(node, f.name) for f in fields(node) if f.name != "function"}
    return {
        "type": type(node).__name__,
        "fields": {k: _plain(v, node.name, arrays) for k, v in kept.items()},
    }


def _plain(value: Any, where: str, arrays: Arrays) -> Any:
    """value as JSON; arrays go to `arrays`, and floats that JSON lacks become words."""
    if isinstance(value, NeuronModel):
        params = {k: _plain(v, where, arrays) for k, v in value.params().items()}
        return {"$model": type(value).__name__, "params": params}
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            raise UnsupportedError(
                f"graph file: '{where}' holds an array of {value.dtype}; only numbers can be saved"
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
        items = [_plain(v, where, arrays) for v in value]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping) and all(isinstance(k, str) and k[:1] != "$" for k in value):
        return {k: _plain(v, where, arrays) for k, v in value.items()}
    raise UnsupportedError(
        f"graph file: '{where}' holds a {type(value).__name__}, which cannot be saved; "
        "use numbers, text, lists and arrays"
    )


def _read(path: Path) -> tuple[Any, Arrays]:
    import h5py

    if not path.is_file():
        raise FormatError("there is no such file")
    size = path.stat().st_size
    if not h5py.is_hdf5(path):
        raise FormatError("it is no HDF5 file, or it is cut off")
    with h5py.File(path, "r") as file:
        kind, version = file.attrs.get("format"), file.attrs.get("version")
        if kind != FORMAT:
            raise FormatError(f"its format is {kind!r}; '{FORMAT}' is needed")
        if version != VERSION:
            raise FormatError(f"it is of version {version}; this ranvier reads version {VERSION}")
        text = _dataset(file, "document", size).tobytes()
        group = file["arrays"]
        arrays = {key: _dataset(group, key, size) for key in group}
        if file.attrs.get("digest") != _digest(text, arrays):
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


def _graph_in(document: Any, arrays: Arrays) -> Graph:
    if not isinstance(document, dict) or not isinstance(document.get("nodes"), list):
        raise FormatError("its document lists no nodes")
    head = _fields_in(Graph, document.get("graph"), arrays, "graph", skip=("nodes",))
    return Graph.of([_node_in(item, arrays) for item in document["nodes"]], **head)


def _node_in(item: Any, arrays: Arrays) -> Node:
    kind = item.get("type") if isinstance(item, dict) else None
    if not isinstance(kind, str) or kind not in NODES:
        raise FormatError(f"a node is of type {kind!r}; known are {', '.join(NODES)}")
    where = f"{kind} {item.get('fields', {}).get('name')!r}"
    node: Node = NODES[kind](**_fields_in(NODES[kind], item.get("fields"), arrays, where))
    return node


def _fields_in(
    cls: type[Any], values: Any, arrays: Arrays, where: str, skip: tuple[str, ...] = ()
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
    found = {k: _value_in(v, arrays, f"{where}: {k}") for k, v in values.items()}
    for key, value in found.items():
        if isinstance(value, float) and not fits(value, hints[key]):
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


def _value_in(value: Any, arrays: Arrays, where: str, depth: int = 0) -> Any:
    if depth > MAX_DEPTH:
        raise FormatError(f"{where} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return [_value_in(v, arrays, where, depth + 1) for v in value]
    if not isinstance(value, dict):
        return value
    if "$array" in value:
        if value["$array"] not in arrays:
            raise FormatError(f"{where} names an array that the file lacks")
        return arrays[value["$array"]]
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(_value_in(v, arrays, where, depth + 1) for v in value["$tuple"])
    if "$model" in value:
        cls = MODELS.get(value["$model"])
        if cls is None:
            raise FormatError(f"{where}: no neuron model is named {value['$model']!r}")
        return cls(**_fields_in(cls, value.get("params"), arrays, where))
    return {k: _value_in(v, arrays, where, depth + 1) for k, v in value.items()}
