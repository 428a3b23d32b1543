"""The border to ONNX: `write_onnx`, and `run_onnx` on ONNX Runtime.

A full sequence is one Scan over time whose body is one step; a one-step model has the states as
inputs and outputs. All operators are standard, opset 17; the batch axis is dynamic; values are
float32.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from ranvier.export.graph import Graph
from ranvier.export.onnx_build import Body
from ranvier.export.onnx_model import NEXT, Network, Port, add_reduction, one_step, sequence
from ranvier.export.onnx_step import add_step, state_shapes
from ranvier.train.errors import FormatError, RangeError, ShapeError, UnsupportedError
from ranvier.train.files import atomic_write


class Steppable(Protocol):
    """What can say itself as an ONNX step: a Program."""

    def onnx_network(self) -> Network: ...


def write_onnx(
    graph: Graph | Steppable,
    path: str | os.PathLike[str],
    steps: int | None = None,
    *,
    static: bool = False,
) -> None:
    """Writes the network as ONNX, checked by onnx.checker, atomically.

    steps=T  one model for the whole sequence: "input" [T, batch, *shape] -> "output" [T, batch,
             ...], and "readout" [batch, ...] where the output is reduced over time
    steps=None  one step: "input" [batch, *shape] and each state "<population>.v" ... -> "output"
                and
             "<population>.v.next" ...; zeros begin a sequence (`initial_states`)
    static   with steps=T: "input" is [batch, *shape], held for all T steps

    A Program is written in integer arithmetic, equal to its engine bit for bit: "input" takes
    `program.encode(x)`, "output" gives what the readout watches, "readout" float units [batch, n].

    Raises UnsupportedError naming a node that ONNX cannot say, RangeError for steps below 1.
    """
    if steps is not None and steps < 1:
        raise RangeError(f"onnx: steps is {steps}; a sequence has at least 1")
    if static and steps is None:
        raise UnsupportedError("onnx: a static input is held for a number of steps; give steps=T")
    if isinstance(graph, Graph):
        net = network(graph)
    elif hasattr(graph, "onnx_network"):
        net = graph.onnx_network()
    else:
        raise UnsupportedError(
            f"onnx: {type(graph).__name__} is no Graph and no Program; trace(net, sample) makes a Graph "
            "of a module"
        )
    model = one_step(net) if steps is None else sequence(net, steps, static)
    onnx.checker.check_model(model, full_check=True)
    with atomic_write(path) as part:
        part.write_bytes(model.SerializeToString())


def network(graph: Graph) -> Network:
    """The Graph as a step with named ends: its first ends are "input" and "output"."""
    entries = _names(graph.inputs, "input")
    ends = _names(graph.outputs, "output")

    def step(body: Body, values: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        made, states = add_step(body, graph, {n: values[entries[n]] for n in entries})
        return {ends[n]: made[n] for n in ends}, states

    def readouts(outer: Body) -> list[str]:
        found = []
        for node in graph.outputs:
            if node.reduce != "none":
                name = ends[node.name]
                readout = "readout" if name == "output" else f"{name}.readout"
                port = Port(graph.shapes[node.name])
                found.append(add_reduction(outer, name, readout, node.reduce, port))
        return found

    return Network(
        inputs={entries[n.name]: Port(n.shape) for n in graph.inputs},
        states={name: Port(shape) for name, shape in state_shapes(graph).items()},
        outputs={name: Port(graph.shapes[node]) for node, name in ends.items()},
        step=step,
        readouts=readouts,
    )


def _names(nodes: list[Any], word: str) -> dict[str, str]:
    """Node -> its name outside: the first is `word`, further ones keep their own."""
    return {n.name: f"{word}.{n.name}" if i else word for i, n in enumerate(nodes)}


# running


def initial_states(path: str | os.PathLike[str], batch: int) -> dict[str, np.ndarray]:
    """The zero states that begin a sequence of a one-step model: name -> [batch, *shape].

    Raises FormatError where the file is no model that `write_onnx` made, RangeError for no sample.
    """
    if batch < 1:
        raise RangeError(f"onnx: a batch of {batch}; at least 1 sample is needed")
    session = _session(path, 1)
    return _initial(session, _said(session, path), batch)


def _initial(session: Any, said: dict[str, Any], batch: int) -> dict[str, np.ndarray]:
    kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
    types = {i.name: kinds[i.type] for i in session.get_inputs()}
    if said["steps"] is not None:
        return {}
    return {name: np.zeros((batch, *s), types[name]) for name, s in said["states"].items()}


def run_onnx(
    path: str | os.PathLike[str], x: np.ndarray, *, threads: int = 1, output: str = "output"
) -> np.ndarray:
    """The model's series for x `[time, batch, *shape]` (or `[batch, *shape]` where it is static).

    A one-step model is run over all of x's steps, its states handed on. `output` may name "readout"
    or a further output. `threads` 0 leaves the number to ONNX Runtime.

    Raises FormatError where the file is no model that `write_onnx` made, ShapeError where x does
    not fit.
    """
    session = _session(path, threads)
    said = _said(session, path)
    x = _fitting(session, x, said)
    if said["steps"] is not None:
        return session.run([output], {"input": x})[0]
    states = _initial(session, said, x.shape[1])
    names = [output, *(f"{name}{NEXT}" for name in states)]
    series = []
    for now in x:
        out, *new = session.run(names, {"input": now, **states})
        series.append(out)
        states = dict(zip(states, new, strict=True))
    return np.stack(series)


def _session(path: str | os.PathLike[str], threads: int) -> Any:
    """A session on the file as it is now; the last few are kept, since making one takes a while."""
    try:
        now = os.stat(path)
    except OSError as error:
        raise FormatError(f"onnx: cannot read '{path}': {error.strerror or error}") from error
    return _made(str(Path(path).resolve()), now.st_mtime_ns, now.st_size, now.st_ino, threads)


@lru_cache(maxsize=4)
def _made(path: str, mtime: int, size: int, inode: int, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a class of its own for each way to fail
        first = str(error).splitlines()[0]
        raise FormatError(f"onnx: '{Path(path).name}' cannot be loaded: {first}") from error


def _said(session: Any, path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        said = json.loads(session.get_modelmeta().custom_metadata_map["ranvier"])
        return {"steps": said["steps"], "static": said["static"], "states": dict(said["states"])}
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"onnx: '{Path(path).name}' was not written by ranvier") from error


def _fitting(session: Any, x: np.ndarray, said: dict[str, Any]) -> np.ndarray:
    """x in the model's type, or a ShapeError."""
    entry = session.get_inputs()[0]
    wanted = entry.shape if said["steps"] is not None else ["time", *entry.shape]
    fits = len(wanted) == x.ndim and all(
        isinstance(w, str) or w == n for w, n in zip(wanted, x.shape, strict=True)
    )
    if not fits or 0 in x.shape:
        raise ShapeError(f"onnx: x has shape {x.shape}; the model takes {wanted}")
    kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
    return np.ascontiguousarray(x, dtype=kinds[entry.type])
