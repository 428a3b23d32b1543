"""NIR files that we wrote -> the very Graph: metadata first, then proof that the file still says
the same.
"""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from ranvier.export.graph import Graph
from ranvier.export.neurons import MODELS, NeuronModel
from ranvier.export.nir_raw import RawNode
from ranvier.export.nir_words import KEY, VERSION
from ranvier.export.nir_write import encode
from ranvier.export.nodes import NODES, Node
from ranvier.train.errors import FormatError, RanvierError


def rebuild(raw: RawNode) -> Graph | None:
    """The Graph that `encode` wrote as `raw`; None where it did not, or where another tool changed
    it.

    Raises FormatError where the metadata cannot be read at all.
    """
    if not isinstance(raw.meta.get(KEY), str):
        return None
    said = _json(raw.meta[KEY], "the graph")
    if said.get("version") != VERSION or "order" not in said:
        raise FormatError(
            f"nir: its ranvier metadata have version {said.get('version')}; "
            f"this ranvier reads version {VERSION}"
        )
    try:
        graph = _graph(raw, said)
    except RanvierError as error:
        raise FormatError(f"nir: its ranvier metadata make no network: {error}") from error
    except Exception as error:  # any shape of JSON may stand there
        raise FormatError(
            f"nir: its ranvier metadata cannot be read ({type(error).__name__}: {error})"
        ) from error
    return graph if same_raw(encode(graph)[0], raw) else None


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"nir: the ranvier metadata of {where} are no JSON") from error
    if not isinstance(said, dict):
        raise FormatError(f"nir: the ranvier metadata of {where} are no JSON object")
    return said


def _graph(raw: RawNode, said: dict[str, Any]) -> Graph:
    found: dict[str, Node] = {}
    for name, text in said["dissolved"].items():
        found[name] = _build(text, RawNode(""))
    for key, node in raw.nodes.items():
        own = _json(node.meta[KEY], f"'{key}'") if KEY in node.meta else {}
        if "node" in own:
            built = _build(own, node)
            found[built.name] = built
    order = [found[name] for name in said["order"]]
    steps, dt = said["steps"], said["dt"]
    return Graph.of(
        order,
        steps=None if steps is None else int(steps),
        dt=None if dt is None else float(dt),
        spec="lowered" if said["spec"] == "lowered" else "source",
        meta=dict(said.get("meta", {})),
    )


def _build(said: dict[str, Any], raw: RawNode) -> Node:
    kind = NODES[said["node"]]
    fields = _fields(kind, said["fields"], raw)
    inputs = tuple(str(i) for i in said["inputs"])
    meta, source = dict(said.get("meta", {})), str(said.get("source", ""))
    return kind(name=str(said["name"]), inputs=inputs, source=source, meta=meta, **fields)


def _fields(kind: type[Any], said: dict[str, Any], raw: RawNode) -> dict[str, Any]:
    hints = get_type_hints(kind)
    unknown = set(said) - set(hints)
    if unknown:
        raise FormatError(f"{kind.__name__} has no field {sorted(unknown)[0]!r}")
    return {k: _value(hints[k], v, raw) for k, v in said.items()}


def _value(hint: Any, value: Any, raw: RawNode) -> Any:
    """A JSON value as the field wants it: an array by reference, a tuple, a model, a float."""
    if isinstance(value, dict) and "@" in value:
        return _array(value["@"], raw)
    if isinstance(value, dict) and "model" in value:
        return _model(value, raw)
    if isinstance(value, list):
        return tuple(int(v) for v in value)
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise FormatError(f"{value!r} is none of {', '.join(map(str, get_args(hint)))}")
    wants_number = hint is float or hint is int or hint is bool
    if wants_number and not isinstance(value, (int, float, bool)):
        raise FormatError(f"{value!r} stands where a number belongs")
    return float(value) if hint is float else value


def _array(where: list[Any], raw: RawNode) -> np.ndarray:
    key, *rest = where
    held = raw.meta if str(key).startswith(f"{KEY}:") else raw.data
    array = np.asarray(held[key])
    return array[tuple(int(i) for i in rest[0])] if rest else array


def _model(said: dict[str, Any], raw: RawNode) -> NeuronModel:
    kind = MODELS[said["model"]]
    rest = {k: v for k, v in said.items() if k != "model"}
    hints = get_type_hints(kind)
    fields: dict[str, Any] = {}
    for key, value in rest.items():
        fields[key] = _value(hints[key], value, raw)
        if isinstance(fields[key], (dict, tuple)):
            raise FormatError(f"{kind.__name__}.{key} is no number")
    return kind(**fields)


def same_raw(a: RawNode, b: RawNode) -> bool:
    """Whether two NIR graphs hold the same nodes, fields and edges; metadata aside."""
    if set(a.nodes) != set(b.nodes) or set(a.edges) != set(b.edges):
        return False
    return all(_same_node(a.nodes[k], b.nodes[k]) for k in a.nodes)


def _same_node(a: RawNode, b: RawNode) -> bool:
    if a.type != b.type or set(a.data) != set(b.data):
        return False
    return all(np.array_equal(np.asarray(v), np.asarray(b.data[k])) for k, v in a.data.items())
