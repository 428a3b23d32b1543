"""NIR files as plain values: what is in the HDF5, checked for size before it is loaded, never
executed.

The layout is nir 1.0's: /version and /node, a NIRGraph with `nodes/<name>/<field>`, `edges` [n, 2]
and, for each node, an optional `metadata` group. Older files have the same layout with fields
missing.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ranvier.export.hdf5_guard import check_heaps, check_lengths
from ranvier.train.errors import FormatError, RangeError, UnsupportedError
from ranvier.train.files import atomic_write

MAX_BYTES = (
    2**30
)  # a whole file, decoded; the largest network of the repository takes a third of it
MOST_SQUEEZED = 1100  # bytes from one: gzip cannot do better, so that a file claiming more lies
MAX_TEXT = 2**24  # characters of names, types, edges and metadata in one file
MAX_OBJECTS = 400_000
MAX_DEPTH = 24
WRITES_AS = "1.0.8"  # the version of nir whose layout we write


@dataclass
class RawNode:
    """One NIR node: its type, its fields, its metadata; for a NIRGraph also nodes and edges."""

    type: str
    data: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    nodes: dict[str, RawNode] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)
    version: str = ""


def load(path: str | os.PathLike[str]) -> RawNode:
    """The NIRGraph in the file.

    Raises FormatError where it is no HDF5 or no NIR, RangeError where it would take too much
    memory, UnsupportedError where it points outside itself.
    """
    name = Path(path).name
    head = _head(path)
    import h5py

    try:
        check_heaps(Path(path))
        with h5py.File(path, "r") as file:
            reader = _Reader(Path(path))
            tree = reader.group(file, 0)
    except (RangeError, UnsupportedError):
        raise
    except FormatError as error:
        raise FormatError(f"nir: '{name}': {error}") from error
    except Exception as error:  # h5py raises many kinds for a damaged file; all mean the same here
        raise FormatError(_damaged(name, head, error)) from error
    root = tree.get("node")
    if not isinstance(root, dict):
        raise FormatError(f"nir: '{name}' is HDF5 but holds no NIR graph: it has no group 'node'")
    node = _node(name, "the graph", root)
    if node.type != "NIRGraph":  # a single primitive; nir 0.1 wrote such files
        node = RawNode("NIRGraph", nodes={"node": node}, edges=[])
    node.version = str(tree.get("version", ""))
    return node


def _head(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(8)
    except OSError as error:
        raise FormatError(f"nir: cannot read '{path}': {error.strerror or error}") from error


def _damaged(name: str, head: bytes, error: Exception) -> str:
    if head.startswith(b"PK"):
        return (
            f"nir: '{name}' is a zip archive (torch.save writes such), not HDF5; it is not "
            "unpickled. Export it again with its own tool's NIR writer"
        )
    if head != b"\x89HDF\r\n\x1a\n":
        return f"nir: '{name}' is not HDF5 (it starts with {head[:4]!r}); a NIR file is"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"nir: '{name}' is damaged: {reason}"


class _Reader:
    """HDF5 groups as dicts, within limits on bytes, text, objects and depth."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self.bytes, self.text, self.objects = 0, 0, 0
        self.limit = min(MAX_BYTES, MOST_SQUEEZED * path.stat().st_size)

    def group(self, group: Any, depth: int) -> dict[str, Any]:
        import h5py

        if depth > MAX_DEPTH:
            raise FormatError(f"nir: '{self.name}' nests groups deeper than {MAX_DEPTH}")
        found: dict[str, Any] = {}
        for key in group:
            self.objects += 1
            if self.objects > MAX_OBJECTS:
                raise RangeError(f"nir: '{self.name}' holds more than {MAX_OBJECTS} objects")
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise UnsupportedError(
                    f"nir: '{self.name}' links '{key}' to another place; links are not followed"
                )
            item = group[key]
            if isinstance(item, h5py.Group):
                found[key] = self.group(item, depth + 1)
            elif isinstance(item, h5py.Dataset):
                found[key] = self.dataset(item)
        return found

    def dataset(self, item: Any) -> Any:
        import h5py

        if item.shape is None:
            return None
        if item.external or item.is_virtual:
            raise UnsupportedError(
                f"nir: '{self.name}': '{item.name}' keeps its data in another file"
            )
        self.bytes += int(item.size) * max(1, item.dtype.itemsize)
        if self.bytes > self.limit or item.ndim > 16:
            raise RangeError(
                f"nir: '{self.name}': '{item.name}' {item.shape} takes the file past "
                f"{self.limit:,} bytes"
            )
        if h5py.check_string_dtype(item.dtype) is not None:
            return self.strings(item)
        if item.dtype.kind not in "biuf":
            raise FormatError(f"nir: '{self.name}': '{item.name}' holds {item.dtype}, not numbers")
        return item[()] if item.ndim else item[()].item()

    def strings(self, item: Any) -> Any:
        import h5py

        if item.size > MAX_OBJECTS:
            raise RangeError(f"nir: '{self.name}': '{item.name}' has {item.size:,} strings")
        if h5py.check_string_dtype(item.dtype).length is None:
            check_lengths(item, self.path)
        value = item.asstr()[()]
        self.text += len(value) if isinstance(value, str) else sum(map(len, value.ravel()))
        if self.text > MAX_TEXT:
            raise RangeError(f"nir: '{self.name}' holds more than {MAX_TEXT:,} characters of text")
        return value


def _node(file: str, name: str, tree: dict[str, Any]) -> RawNode:
    kind = tree.get("type")
    if not isinstance(kind, str):
        raise FormatError(f"nir: '{file}': {name} has no type")
    meta = tree.get("metadata")
    node = RawNode(kind, meta=meta if isinstance(meta, dict) else {})
    if kind != "NIRGraph":
        node.data = {k: v for k, v in tree.items() if k not in ("type", "metadata")}
        return node
    nodes, edges = tree.get("nodes"), tree.get("edges")
    if not isinstance(nodes, dict) or edges is None:
        raise FormatError(f"nir: '{file}': {name} is a NIRGraph without nodes or edges")
    for key, value in nodes.items():
        if not isinstance(value, dict):
            raise FormatError(f"nir: '{file}': node '{key}' is no group")
        node.nodes[key] = _node(file, f"node '{key}'", value)
    node.edges = _edges(file, edges)
    return node


def _edges(file: str, edges: Any) -> list[tuple[str, str]]:
    table = np.asarray(edges)
    if table.size == 0:
        return []
    if table.ndim != 2 or table.shape[1] != 2 or not all(isinstance(e, str) for e in table.ravel()):
        raise FormatError(f"nir: '{file}': edges have shape {table.shape}; they are pairs of names")
    return [(a, b) for a, b in table]


def store(path: str | os.PathLike[str], graph: RawNode) -> None:
    """Writes the graph, atomically. Raises RanvierError where the folder cannot be written."""
    import h5py

    with atomic_write(path) as part, h5py.File(part, "w") as file:
        file.create_dataset("version", data=WRITES_AS, dtype=h5py.string_dtype())
        _store_node(file.create_group("node"), graph)


def _store_node(group: Any, node: RawNode) -> None:
    _store_values(group, {"type": node.type, **node.data})
    if node.meta:
        _store_values(group.create_group("metadata"), node.meta)
    if node.type != "NIRGraph":
        return
    nodes = group.create_group("nodes")
    for key, child in node.nodes.items():
        _store_node(nodes.create_group(key), child)
    _store_edges(group, node.edges)


def _store_edges(group: Any, edges: Iterable[tuple[str, str]]) -> None:
    import h5py

    table = np.array(list(edges), dtype=object).reshape(-1, 2)
    group.create_dataset("edges", data=table, dtype=h5py.string_dtype())


def _squeezes(array: np.ndarray) -> bool:
    """Whether gzip is worth its time: not for trained weights, of which it saves a tenth."""
    start = np.ascontiguousarray(array.ravel()[:4096]).tobytes()
    return len(start) > 256 and len(zlib.compress(start, 1)) < 0.7 * len(start)


def _store_values(group: Any, values: Mapping[str, Any]) -> None:
    import h5py

    for key, value in values.items():
        if isinstance(value, str):
            group.create_dataset(key, data=value, dtype=h5py.string_dtype())
        elif isinstance(value, np.ndarray) and value.ndim and _squeezes(value):
            group.create_dataset(key, data=value, compression="gzip", compression_opts=1)
        else:
            group.create_dataset(key, data=value)
