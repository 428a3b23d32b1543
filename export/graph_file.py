"""Graphs as HDF5 files: see `ranvier.export.documents`. Functions of Opaque nodes are not saved."""

from __future__ import annotations

import os
from typing import Any

from ranvier.export.documents import (
    Arrays,
    fields_in,
    load_document,
    object_in,
    plain,
    save_document,
)
from ranvier.export.graph import Graph
from ranvier.export.neurons import MODELS
from ranvier.export.nodes import NODES
from ranvier.train.errors import FormatError

FORMAT = "ranvier-graph"
VERSION = 1


def save(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Writes `graph` as HDF5, atomically.

    Raises UnsupportedError where a node's meta holds something that is no plain value.
    """
    arrays: Arrays = {}
    head = {"steps": graph.steps, "dt": graph.dt, "spec": graph.spec, "meta": dict(graph.meta)}
    document = {
        "graph": {k: plain(v, "graph", arrays) for k, v in head.items()},
        "nodes": [plain(node, node.name, arrays) for node in graph],
    }
    save_document(path, FORMAT, VERSION, document, arrays)


def load(path: str | os.PathLike[str]) -> Graph:
    """The graph in the file `path`.

    Raises FormatError, with the file and the reason, where it is missing, is no HDF5, is damaged,
    or holds anything but a graph that `save` wrote.
    """
    graph: Graph = load_document(path, FORMAT, VERSION, _graph_in)
    return graph


def _graph_in(document: Any, arrays: Arrays) -> Graph:
    if not isinstance(document, dict) or not isinstance(document.get("nodes"), list):
        raise FormatError("its document lists no nodes")
    head = fields_in(Graph, document.get("graph"), arrays, {}, "graph", skip=("nodes",))
    classes = {**NODES, **MODELS}
    nodes = [object_in(item, arrays, classes, "nodes") for item in document["nodes"]]
    if not all(type(node).__name__ in NODES for node in nodes):
        raise FormatError("one of its nodes is no node")
    return Graph.of(nodes, **head)
