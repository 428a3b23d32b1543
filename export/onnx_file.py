"""The border to ONNX: `write_onnx`, and `run_onnx` on ONNX Runtime.

A full sequence is one Scan over time whose body is one step; a one-step model has the states as inputs
and outputs. All operators are standard, opset 17; the batch axis is dynamic; values are float32.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import helper

from ranvier.export.graph import Graph
from ranvier.export.nodes import Input, Output, Reduce, Shape
from ranvier.export.onnx_build import BATCH, INT64, IR_VERSION, OPSET, Body, tensor
from ranvier.export.onnx_step import add_step, state_shapes
from ranvier.train.errors import FormatError, RangeError, ShapeError, UnsupportedError
from ranvier.train.files import atomic_write

if TYPE_CHECKING:
    from ranvier.deploy.program import Program

NEXT = ".next"  # what a state is called on its way out


def write_onnx(
    graph: Graph | Program,
    path: str | os.PathLike[str],
    steps: int | None = None,
    *,
    static: bool = False,
) -> None:
    """Writes the network as ONNX, checked by onnx.checker, atomically.

    steps=T  one model for the whole sequence: "input" [T, batch, *shape] -> "output" [T, batch, ...],
             and "readout" [batch, ...] where the output is reduced over time
    steps=None  one step: "input" [batch, *shape] and each state "<population>.v" ... -> "output" and
             "<population>.v.next" ...; zeros begin a sequence (`initial_states`)
    static   with steps=T: "input" is [batch, *shape], held for all T steps

    A Program is written in integer arithmetic, equal to its engine bit for bit.

    Raises UnsupportedError naming a node that ONNX cannot say, RangeError for steps below 1.
    """
    if steps is not None and steps < 1:
        raise RangeError(f"onnx: steps is {steps}; a sequence has at least 1")
    if static and steps is None:
        raise UnsupportedError("onnx: a static input is held for a number of steps; give steps=T")
    if not isinstance(graph, Graph):
        from ranvier.export.onnx_program import program_model

        model = program_model(graph, steps, static)
    elif steps is None:
        model = _one_step(graph)
    else:
        model = _sequence(graph, steps, static)
    onnx.checker.check_model(model, full_check=True)
    with atomic_write(path) as part:
        part.write_bytes(model.SerializeToString())


def _names(nodes: list[Any], word: str) -> dict[str, str]:
    """Node -> its name outside: the first is `word`, further ones keep their own."""
    return {n.name: n.name if i else word for i, n in enumerate(nodes)}


def _one_step(graph: Graph) -> onnx.ModelProto:
    constants: dict[str, onnx.TensorProto] = {}
    body = Body(constants)
    entries = _names(graph.inputs, "input")
    inputs = [tensor(entries[n.name], (BATCH, *n.shape)) for n in graph.inputs]
    states = state_shapes(graph)
    inputs += [tensor(name, (BATCH, *shape)) for name, shape in states.items()]
    for info in inputs:
        body.infos[info.name] = info
    outputs = _step_outputs(body, graph, entries, states)
    proto = body.graph("step", inputs, outputs)
    return _model(proto, constants, {"steps": None, "static": False, "states": states})


def _step_outputs(
    body: Body, graph: Graph, entries: dict[str, str], states: dict[str, Shape]
) -> list[str]:
    """Adds the step and names its ends: outputs first, then new states."""
    values, new = add_step(body, graph, entries)
    outputs = []
    for node, name in _names(graph.outputs, "output").items():
        body.rename(values[node], name)
        outputs.append(name)
    for state in states:
        body.rename(new[state], state + NEXT)
        outputs.append(state + NEXT)
    return outputs


def _sequence(graph: Graph, steps: int, static: bool) -> onnx.ModelProto:
    constants: dict[str, onnx.TensorProto] = {}
    outer, inner = Body(constants), Body(constants)
    entries = _names(graph.inputs, "input")
    states = state_shapes(graph)
    lead = (BATCH,) if static else (steps, BATCH)
    inputs = [tensor(entries[n.name], (*lead, *n.shape)) for n in graph.inputs]
    taken = _slices(inner, graph, entries, static)
    arrive = [tensor(name, (BATCH, *shape)) for name, shape in states.items()]
    for info in [*arrive, *taken]:
        inner.infos[info.name] = info
    steps_in = entries if static else {k: f"{v}.now" for k, v in entries.items()}
    ends = _step_outputs(inner, graph, steps_in, states)
    order = [e for e in ends if e.endswith(NEXT)] + [e for e in ends if not e.endswith(NEXT)]
    step = inner.graph("step", [*arrive, *taken], order)
    first = _zeros(outer, states, entries[graph.inputs[0].name], 0 if static else 1)
    clock = [outer.constant(np.zeros(steps), np.float32)] if static else list(entries.values())
    outs = _scan(outer, graph, step, first, clock, states, steps)
    outs += _readouts(outer, graph)
    proto = outer.graph("sequence", inputs, outs)
    said = {"steps": steps, "static": static, "states": states}
    return _model(proto, constants, said)


def _slices(inner: Body, graph: Graph, entries: dict[str, str], static: bool) -> list[Any]:
    """What the loop brings into a step: a slice of each input, or a clock where the input is held."""
    if static:
        for node in graph.inputs:
            inner.infos[entries[node.name]] = tensor(entries[node.name], (BATCH, *node.shape))
        return [tensor("clock", ())]
    return [tensor(f"{entries[n.name]}.now", (BATCH, *n.shape)) for n in graph.inputs]


def _zeros(outer: Body, states: dict[str, Shape], like: str, axis: int) -> list[str]:
    """Zero states for the batch size that `like` has."""
    if not states:
        return []
    size = outer.op("Shape", [like], (1,), dtype=INT64, lead=(), start=axis, end=axis + 1)
    made: dict[Shape, str] = {}
    for shape in states.values():
        if shape not in made:
            rest = outer.constant(list(shape), np.int64)
            full = outer.op("Concat", [size, rest], (1 + len(shape),), dtype=INT64, lead=(), axis=0)
            made[shape] = outer.op("ConstantOfShape", [full], shape)
    return [made[shape] for shape in states.values()]


def _scan(
    outer: Body,
    graph: Graph,
    step: onnx.GraphProto,
    first: list[str],
    sequences: list[str],
    states: dict[str, Shape],
    steps: int,
) -> list[str]:
    """Adds the Scan; returns the names of its series."""
    named = _names(graph.outputs, "output")
    last = [f"{name}.last" for name in states]
    series = list(named.values())
    outer.nodes.append(
        helper.make_node(
            "Scan",
            [*first, *sequences],
            [*last, *series],
            name="time",
            body=step,
            num_scan_inputs=len(sequences),
        )
    )
    for name, shape in zip(last, states.values(), strict=True):
        outer.infos[name] = tensor(name, (BATCH, *shape))
    for node, name in named.items():
        outer.infos[name] = tensor(name, (steps, BATCH, *graph.shapes[node]))
    return series


def _readouts(outer: Body, graph: Graph) -> list[str]:
    found = []
    for node, name in _names(graph.outputs, "output").items():
        how = next(o.reduce for o in graph.outputs if o.name == node)
        if how != "none":
            readout = "readout" if name == "output" else f"{name}.readout"
            found.append(_reduced(outer, name, readout, how, graph.shapes[node]))
    return found


def _reduced(outer: Body, series: str, name: str, how: Reduce, shape: Shape) -> str:
    if how == "sum":
        axes = outer.constant([0], np.int64)
        return outer.op("ReduceSum", [series, axes], shape, name, keepdims=0)
    if how == "last":
        return outer.op("Gather", [series, outer.constant(-1, np.int64)], shape, name, axis=0)
    kind = {"mean": "ReduceMean", "max": "ReduceMax"}[how]
    return outer.op(kind, [series], shape, name, axes=[0], keepdims=0)


def _model(
    proto: onnx.GraphProto, constants: dict[str, onnx.TensorProto], said: dict[str, Any]
) -> onnx.ModelProto:
    proto.initializer.extend(constants.values())
    model = helper.make_model(
        proto,
        producer_name="ranvier",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, {"ranvier": json.dumps(said)})
    return model


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

    Raises FormatError where the file is no model that `write_onnx` made, ShapeError where x does not fit.
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
