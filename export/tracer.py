"""torch -> Graph: a module is run once on real tensors, and what it did is written down.

Three kinds of module are taken:

    step    our networks, by their `.step(x_t)`, `.steps`, `.readout`
    step    a module whose forward is one time step: x_t -> spikes, or (spikes, membrane)
    loop    a module whose forward loops over time itself, and stacks, sums or averages

How it is run says `trace_plan`; `trace_record` listens, and `trace_values` is what it learns. What
the operations mean is said in `trace_functions`, `trace_joins` and `trace_shapes` (functions and
operators), `trace_modules` and `trace_layers` (layers), `trace_neurons` (snntorch's and ours) and
`trace_opaque` (all else). Every trace is then run beside the module (`trace_verify`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ranvier.export.graph import Graph
from ranvier.export.nodes import Delay, Dense, Input, Join, Neuron, Output, Reduce
from ranvier.export.trace_plan import (
    Plan,
    as_given,
    batch_axis,
    chosen,
    is_ours,
    make_plan,
    rested,
    time_axis,
)
from ranvier.export.trace_values import At, Final, Layout, Series, Sum, Value
from ranvier.train.errors import RangeError, ShapeError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ranvier.export.trace_record import Chain, Recorder

    Tensor = torch.Tensor

TRACED_STEPS = 4  # two in which feedback may settle, and two to compare


def trace(
    net: nn.Module,
    sample: Any,
    *,
    steps: int | None = None,
    verify: bool = True,
    output: int | str = 0,
) -> Graph:
    """The source Graph of a torch module, in eval mode; the module is left as it was.

    net     snntorch neurons and torch layers: one of our networks, a module that computes one time
            step, or one whose forward loops over time
    sample  [batch, ...], held at every step, or [time, batch, ...]; torch or numpy
    steps   time steps of the graph, where neither module nor sample says
    verify  also run graph and module on the sample and on random input: spikes must be equal, other
            values within 1e-5 (float32: 1e-4) of the largest
    output  which one, where the module returns several: an index, or a key

    What no chip can run becomes an Opaque node with the reason.
    Raises UnsupportedError, naming the line, for what a graph cannot say, and where graph and
    module differ, naming the layer and the step where that starts; ShapeError or RangeError for a
    sample that does not fit.
    """
    import torch

    if not isinstance(net, torch.nn.Module):
        raise UnsupportedError(
            f"trace: {type(net).__name__} is no torch.nn.Module; give the module"
        )
    x = sample if torch.is_tensor(sample) else _tensor(sample)
    if x.ndim < 2 or 0 in x.shape:
        raise ShapeError(
            f"trace: the sample has the shape {tuple(x.shape)}; [batch, ...] or [time, batch, ...] "
            "is needed, nothing empty"
        )
    x = x.to(next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32))
    if steps is not None and steps < 1:
        raise RangeError(f"trace: steps is {steps}; at least 1 is needed")
    learned = (*net.named_parameters(), *(b for b in net.named_buffers() if "running_" in b[0]))
    for name, value in learned:
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise RangeError(f"trace: '{name}' holds NaN; train the network again, or load weights")
    plan = make_plan(net, x, output)
    graph, recorder, plan = _trace_as(net, x, plan)
    graph = replace(graph, steps=_steps_of(net, x, plan, steps))
    if not verify:
        return graph
    try:
        return _verified(graph, net, x, plan, recorder)
    except UnsupportedError:
        if not any(isinstance(n, Delay) for n in graph):
            raise
        try:  # the loop may start otherwise: with no past at all instead of a past of zeros
            other, recorder, plan = _trace_as(net, x, replace(plan, delay_sources=False))
            return _verified(replace(other, steps=graph.steps), net, x, plan, recorder)
        except UnsupportedError:
            pass
        raise


def _tensor(sample: Any) -> Tensor:
    import torch

    array = np.array(sample)
    if array.dtype.kind not in "biuf":
        raise ShapeError(f"trace: the sample is no array of real numbers, but of {array.dtype}")
    return torch.from_numpy(array)


def _verified(graph: Graph, net: nn.Module, x: Tensor, plan: Plan, recorder: Recorder) -> Graph:
    from ranvier.export.trace_verify import verified

    return verified(graph, net, x, plan, list(recorder.chains.values()))


def _trace_as(net: nn.Module, x: Tensor, plan: Plan) -> tuple[Graph, Recorder, Plan]:
    """The graph as the plan says; the plan may learn on the way that the sample has a time axis."""
    from ranvier.export.trace_record import OneStep, Recount, TimeAxis

    try:
        graph, recorder = _record(net, x, plan, can_restart=plan.axis is None)
    except TimeAxis as axis:
        return _trace_as(net, x, replace(plan, axis=axis.axis))
    except Recount as count:
        return _trace_as(net, x, replace(plan, total=count.total))
    except OneStep as neuron:
        if plan.axis is not None:
            raise UnsupportedError(_one_step(neuron)) from None
        plan = replace(plan, loop=True, total=1)
        graph, recorder = _record(net, x, plan, can_restart=False)
    first = [n for n in graph if graph.inputs[0].name in n.inputs]
    vectors = all(isinstance(n, (Dense, Neuron, Join, Delay)) for n in first)
    if not plan.loop and plan.axis is None and x.ndim == 3 and vectors:
        plan = replace(plan, axis=0)  # [time, batch, features]: a Linear takes any shape
        graph, recorder = _record(net, x, plan, can_restart=False)
    return graph, recorder, plan


def _one_step(which: Any) -> str:
    return (
        f"trace: the module sets {which} to zero at every call, so it computes one step and no "
        "more; keep the states between calls (init_hidden=True), or loop over time inside forward"
    )


def _record(net: nn.Module, x: Tensor, plan: Plan, can_restart: bool) -> tuple[Graph, Recorder]:
    """One run under the recorder; a module that cannot be followed becomes Opaque as a whole.

    One that says itself why no chip can run it (`host_only`) does so at once, so that it is one reason
    and not one for each of its operations.
    """
    said = {name: getattr(m, "host_only", None) for name, m in net.named_modules() if name}
    opaque = {k: str(why) for k, why in said.items() if why and _may_be_opaque(net, k, plan)}
    while True:
        try:
            return _record_once(net, x, plan, can_restart, opaque)
        except UnsupportedError as error:
            name = error.__dict__.get("module", "")
            while name and (name in opaque or not _may_be_opaque(net, name, plan)):
                name = name.rpartition(".")[0]
            if not name:
                raise
            opaque[name] = str(error).removeprefix("trace: ")


def _may_be_opaque(net: nn.Module, name: str, plan: Plan) -> bool:
    """Whether the module can be run again without its states: it has none, or starts from rest."""
    import snntorch

    from ranvier.export.trace_record import is_leaf

    module = dict(net.named_modules()).get(name)
    if module is None or is_leaf(module):
        return False
    holds = any(isinstance(m, snntorch.SpikingNeuron) for m in module.modules())
    return plan.method == "sequence" or not holds


def _record_once(
    net: nn.Module, x: Tensor, plan: Plan, can_restart: bool, opaque: dict[str, str]
) -> tuple[Graph, Recorder]:
    import torch

    from ranvier.export.trace_record import Recorder, drive, recording

    made = rested(net)
    if is_ours(net) and x.shape[batch_axis(replace(plan, repeat=False))] == 1:
        # two samples, so that an axis of 1 is never taken for the batch
        x = torch.cat([x, x], batch_axis(replace(plan, repeat=False)))
    x = as_given(x, plan)
    shape = [n for i, n in enumerate(x.shape) if i not in (time_axis(x, plan), batch_axis(plan))]
    entry = Input(name="input", shape=tuple(shape))
    recorder = Recorder(made, entry, plan.total if plan.loop else None)
    recorder.opaque = opaque
    recorder.builder.delay_sources = plan.delay_sources
    recorder.can_restart = can_restart and plan.loop
    with recording(recorder):
        if plan.loop:
            held = x.clone()
            recorder.know(held, _sample_value(time_axis(x, plan), x, entry))
            run = getattr(made, plan.method) if plan.method else made
            returned = drive(partial(run, held))
            value = recorder.value(chosen(returned, plan.output))
        else:
            value = _drive_steps(recorder, made, x, plan)
    return _graph_of(recorder, made, value, plan), recorder


def _sample_value(axis: int | None, x: Tensor, entry: Input) -> Value:
    if axis is None:
        return At(entry.name, None)
    layout: Layout = "time" if axis == 0 else "batch" if axis == 1 else "last"
    return Series(entry.name, tuple(range(x.shape[axis])), layout=layout)


def _drive_steps(recorder: Recorder, net: nn.Module, x: Tensor, plan: Plan) -> Value | None:
    """Runs a step module for a few steps; the value of its output at the last."""
    from ranvier.export.trace_record import drive

    step = cast(Any, net).step if is_ours(net) else net
    values: list[Value | None] = []
    for t in range(TRACED_STEPS):
        given = (x if plan.axis is None else x[t % len(x)]).clone()
        recorder.driven = t
        recorder.know(given, At(recorder.entry.name, t))
        returned = drive(partial(step, given))
        values.append(recorder.value(chosen(returned, plan.output)))
    if values[-1] is None:
        return None
    places = [(v.node, v.port) if isinstance(v, At) else None for v in values]
    if places[-1] is None or places[-2] != places[-1]:
        raise UnsupportedError(
            "trace: the module's output does not come from the same layer at every step. A state "
            "that no snntorch neuron holds cannot be followed; use its neurons, and return one "
            "value a step"
        )
    return values[-1]


def _graph_of(recorder: Recorder, net: nn.Module, value: Value | None, plan: Plan) -> Graph:
    if value is None:
        raise UnsupportedError(
            "trace: what the module returns does not come from the sample by operations that can "
            "be followed; avoid numpy and .item() on the way"
        )
    from ranvier.export.trace_record import Recount

    n = plan.total if plan.loop and plan.total else TRACED_STEPS
    lengths = {len(chain.inputs) for chain in recorder.chains.values()}
    if plan.loop and len(lengths) == 1 and lengths != {n}:
        raise Recount(lengths.pop())  # one neuron module serves several populations
    for chain in recorder.chains.values():
        _connect(recorder, chain, n)
    made = recorder.builder.nodes
    for name, leader in recorder.followers:
        made[name] = replace(made[name], inputs=made[leader].inputs)
    node, reduce, port = _readout(recorder, net, value, plan, n)
    nodes = recorder.builder.ordered(node)
    if recorder.entry not in nodes:
        raise UnsupportedError("trace: the output does not depend on the sample")
    nodes = [recorder.entry, *(k for k in nodes if k is not recorder.entry)]
    unused = sorted(set(recorder.chains) - {k.name for k in nodes})
    names = recorder.builder.final_names(nodes)
    nodes = [
        replace(k, name=names[k.name], inputs=tuple(names[i] for i in k.inputs)) for k in nodes
    ]
    for chain in recorder.chains.values():
        chain.node = names.get(chain.node, chain.node)
    end = Output(name="output", inputs=(names[node],), observe=port, reduce=reduce)
    return Graph.of([*nodes, end], meta={"unused": unused} if unused else {})


def _connect(recorder: Recorder, chain: Chain, n: int) -> None:
    """Gives a population the input that it has at every step after the first."""
    if len(chain.inputs) != n:
        raise UnsupportedError(
            f"trace: '{chain.node}' runs {len(chain.inputs)} of {n} steps ({chain.sources[0]}); "
            "every neuron must run once a step"
        )
    taken = [v.node for v in chain.inputs if v is not None]
    settled = min(max(1, recorder.builder.reach(taken[-1])), n - 2)
    for t in range(max(settled, 0), n):
        if taken[t] != taken[-1]:
            raise UnsupportedError(
                f"trace: '{chain.node}' takes '{taken[t]}' at step {t} ({chain.sources[t]}) and "
                f"'{taken[-1]}' at step {n - 1}; every step must do the same. A state that no "
                "snntorch neuron holds cannot be followed"
            )
    node = recorder.builder.nodes[chain.node]
    recorder.builder.nodes[chain.node] = replace(node, inputs=(taken[-1],))


def _readout(
    recorder: Recorder, net: nn.Module, value: Value, plan: Plan, n: int
) -> tuple[str, Reduce, Any]:
    """(node, reduction over time, port) that make the module's output."""
    from ranvier.export.trace_ops import operand, scaled

    known: dict[str, Reduce] = {"mean": "mean", "sum": "sum", "last": "last"}
    whole = isinstance(value, Series) and len(value.steps) == n
    if not plan.loop or (plan.method and whole):
        how = getattr(net, "readout", "none") if is_ours(net) else "none"
        return value.node, known.get(how, "none"), value.port
    if isinstance(value, Series) and whole and value.layout in ("time", "batch"):
        return value.node, "none", value.port
    if isinstance(value, Sum) and len(value.steps) == n:
        if value.scale == 1.0:
            return value.node, "sum", value.port
        if abs(value.scale * n - 1) < 1e-9:
            return value.node, "mean", value.port
        done = operand(recorder, replace(value, scale=1.0))
        assert done is not None
        return scaled(recorder, value.node, value.scale), "sum", "out"
    if isinstance(value, Final):
        return value.node, value.how, value.port
    if isinstance(value, At) and value.t in (None, n - 1):
        return value.node, "last", value.port
    raise UnsupportedError(
        f"trace: the output uses only some of the {n} steps of '{value.node}'; return all of them, "
        "their mean or sum, or the last"
    )


def _steps_of(net: nn.Module, x: Tensor, plan: Plan, steps: int | None) -> int | None:
    """The graph's number of steps, from what says it; all that do must agree."""
    found = None
    if plan.loop:
        found = plan.total
        if plan.axis is not None and x.shape[plan.axis] != found and not plan.method:
            raise UnsupportedError(
                f"trace: the sample has {x.shape[plan.axis]} steps, the module's loop runs {found}"
            )
    elif is_ours(net):
        found = int(cast(Any, net).steps)
    elif plan.axis is not None and steps is None:
        found = int(x.shape[0])
    if plan.loop and steps is not None and steps != found:
        if found == 1:
            raise RangeError(_one_step("a neuron"))
        raise RangeError(f"trace: steps is {steps}, but the module's own loop runs {found}")
    return steps if steps is not None else found
