"""torch -> Graph: a module is run once on real tensors, and what it did is written down.

Three kinds of module are taken:

    step    our networks, by their `.step(x_t)`, `.steps`, `.readout`
    step    a module whose forward is one time step: x_t -> spikes, or (spikes, membrane)
    loop    a module whose forward loops over time itself, and stacks, sums or averages

What the operations mean is said in `trace_functions` (functions, operators), `trace_modules` and
`trace_layers` (layers), `trace_neurons` (snntorch). Every trace is then run beside the module
(`trace_verify`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ranvier.export.graph import Graph
from ranvier.export.nodes import Delay, Dense, Input, Neuron, Output, Reduce
from ranvier.export.trace_values import At, Final, Layout, Series, Sum, Value
from ranvier.train.errors import RangeError, RanvierError, ShapeError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ranvier.export.trace_record import Chain, Recorder

    Tensor = torch.Tensor

TRACED_STEPS = 4  # two in which feedback may settle, and two to compare


@dataclass(frozen=True)
class Plan:
    """How a module is run: `loop` says whether forward is the whole loop or one step."""

    loop: bool
    axis: int | None = None  # the sample's time axis; None: held at every step
    total: int | None = None  # steps of the module's own loop
    method: str = ""  # of ours that runs all steps at once; empty: forward, or `step`
    repeat: bool = False  # whether that method is given a static sample once for each step
    delay_sources: bool = True  # see Builder.delayed
    output: int | str = 0  # which of several returned values


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
    x = sample if torch.is_tensor(sample) else torch.from_numpy(np.array(sample))
    if x.ndim < 2 or 0 in x.shape:
        raise ShapeError(
            f"trace: the sample has the shape {tuple(x.shape)}; [batch, ...] or [time, batch, ...] "
            "is needed, nothing empty"
        )
    if not x.is_floating_point():
        x = x.float()
    if steps is not None and steps < 1:
        raise RangeError(f"trace: steps is {steps}; at least 1 is needed")
    plan = _plan(net, x, output)
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


def _verified(graph: Graph, net: nn.Module, x: Tensor, plan: Plan, recorder: Recorder) -> Graph:
    from ranvier.export.trace_verify import verified

    return verified(graph, net, x, plan, list(recorder.chains.values()))


def is_ours(net: Any) -> bool:
    """Whether the module has the interface of our networks."""
    return callable(getattr(net, "step", None)) and isinstance(getattr(net, "steps", None), int)


def rested(net: nn.Module) -> nn.Module:
    """A copy in eval mode, its neurons at rest, so that no run touches the module itself."""
    import snntorch

    try:
        made = copy.deepcopy(net)
    except RuntimeError as error:  # states that carry a gradient
        raise UnsupportedError(
            f"trace: the module cannot be copied ({error}); call snntorch.utils.reset(net), or "
            "detach the tensors that it keeps between calls"
        ) from error
    made.eval()
    for module in made.modules():
        if isinstance(module, snntorch.SpikingNeuron) and hasattr(module, "reset_mem"):
            module.reset_mem()
    if is_ours(made) and callable(getattr(made, "reset", None)):
        cast(Any, made).reset()
    return made


def _plan(net: nn.Module, x: Tensor, output: int | str) -> Plan:
    """Whether forward is a step or a loop, found by running it and counting the neurons' calls."""
    shape = getattr(net, "input_shape", None)
    if is_ours(net):
        axis = 0 if shape is not None and x.ndim == len(shape) + 2 else None
        return _plan_ours(net, x, Plan(loop=False, axis=axis, output=output))
    try:
        counts = _count_calls(net, x)
    except Exception as error:
        try:
            counts = _count_calls(net, x[0])
        except Exception:
            counts = [2]
        if x.ndim < 3 or (counts and min(counts) > 1):
            raise UnsupportedError(
                f"trace: the module itself fails on the sample {tuple(x.shape)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return Plan(loop=False, axis=0, output=output)
    if counts and min(counts) > 1:
        return Plan(loop=True, total=min(counts), output=output)
    return Plan(loop=False, output=output)


def _plan_ours(net: nn.Module, x: Tensor, plan: Plan) -> Plan:
    """By `step` where that runs; else all steps at once, by `sequence`, which some neurons need."""
    import torch

    fails: Exception | None = None
    for axis in (plan.axis, 0):
        try:
            with torch.no_grad():
                cast(Any, rested(net)).step(x if axis is None else x[0])
        except Exception as error:
            fails = fails or error
        else:
            return replace(plan, axis=axis)
    assert fails is not None
    if callable(getattr(net, "sequence", None)):
        total = int(cast(Any, net).steps) if plan.axis is None else len(x)
        whole = replace(plan, loop=True, method="sequence", total=total)
        for repeat in (True, False) if plan.axis is None else (False,):
            found = replace(whole, repeat=repeat)
            try:
                with torch.no_grad():
                    cast(Any, rested(net)).sequence(as_given(x, found))
            except Exception:
                continue
            return found
    if isinstance(fails, RanvierError):
        raise fails
    raise UnsupportedError(
        f"trace: the module's own step fails on the sample {tuple(x.shape)}: "
        f"{type(fails).__name__}: {fails}"
    ) from fails


def _count_calls(net: nn.Module, x: Tensor) -> list[int]:
    """How often each neuron is called in one forward."""
    import snntorch
    import torch

    made = rested(net)
    counts: dict[int, int] = {}

    def count(module: nn.Module, args: Any, out: Any) -> None:
        counts[id(module)] = counts.get(id(module), 0) + 1

    for module in made.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            module.register_forward_hook(count)
    with torch.no_grad():
        made(x)
    return list(counts.values())


def _trace_as(net: nn.Module, x: Tensor, plan: Plan) -> tuple[Graph, Recorder, Plan]:
    """The graph as the plan says; the plan may learn on the way that the sample has a time axis."""
    from ranvier.export.trace_record import OneStep, TimeAxis

    try:
        graph, recorder = _record(net, x, plan, can_restart=plan.axis is None)
    except TimeAxis as found:
        plan = replace(plan, axis=found.axis)
        graph, recorder = _record(net, x, plan, can_restart=False)
    except OneStep as found:
        if plan.axis is not None:
            raise UnsupportedError(_one_step(found)) from None
        plan = replace(plan, loop=True, total=1)
        graph, recorder = _record(net, x, plan, can_restart=False)
    first = [n for n in graph if graph.inputs[0].name in n.inputs]
    vectors = all(isinstance(n, (Dense, Neuron)) for n in first)
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
    """One run under the recorder; a module that cannot be followed becomes Opaque as a whole."""
    opaque: dict[str, str] = {}
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


def as_given(x: Tensor, plan: Plan) -> Tensor:
    """The sample as the module takes it: `sequence` wants time first, if it can have it."""
    if plan.repeat and plan.total:
        return x[None].repeat(plan.total, *[1] * x.ndim)
    return x


def time_axis(x: Tensor, plan: Plan) -> int | None:
    """Where time stands in what `as_given` gives."""
    return 0 if plan.repeat else plan.axis


def batch_axis(plan: Plan) -> int:
    return 1 if plan.axis == 0 or plan.repeat else 0


def time_first(x: Tensor, plan: Plan) -> Tensor:
    """The sample as the graph takes it, [time, batch, ...], where it has a time axis."""
    axis = time_axis(x, plan)
    return x if axis is None else as_given(x, plan).movedim(axis, 0)


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
            "trace: the module's output is not the same layer at every step; return one "
            "value a step"
        )
    return values[-1]


def chosen(returned: Any, output: int | str) -> Any:
    """One of several returned values."""
    if isinstance(returned, (tuple, list, dict)):
        try:
            return returned[cast(Any, output)]
        except (KeyError, IndexError, TypeError):
            have = list(returned) if isinstance(returned, dict) else len(returned)
            raise RangeError(
                f"trace: output={output!r} is none of what the module returns ({have})"
            ) from None
    return returned


def _graph_of(recorder: Recorder, net: nn.Module, value: Value | None, plan: Plan) -> Graph:
    if value is None:
        raise UnsupportedError(
            "trace: what the module returns does not come from the sample by operations that can "
            "be followed; avoid numpy and .item() on the way"
        )
    n = plan.total if plan.loop and plan.total else TRACED_STEPS
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
