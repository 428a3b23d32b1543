"""Leaf modules while a network is traced: layers, neurons, our joins, and the unknown."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ranvier.export import trace_neurons as border
from ranvier.export.neurons import LI, LIF, CubaLI, CubaLIF
from ranvier.export.nodes import Join, JoinOp, Neuron, Node, Opaque, Scale, Subsample
from ranvier.export.trace_layers import module_nodes
from ranvier.export.trace_record import Chain, OneStep, Recorder
from ranvier.export.trace_values import At, Series, Value


def record_module(
    rec: Recorder, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Says what the outputs of a leaf module stand for."""
    import snntorch

    from ranvier.export.trace_joins import join
    from ranvier.export.trace_ops import Done, apply_nodes
    from ranvier.export.trace_shapes import reshape
    from ranvier.train.blocks import Add, And, Iand, Or, ShortcutA

    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    known = [a for a in tensors if rec.value(a) is not None]
    rec.check_followed(tensors)
    if rec.path[-1] not in rec.opaque and isinstance(module, snntorch.SpikingNeuron):
        record_neuron(rec, module, args, kwargs, out)
        return
    if not known:
        return  # constants in, constants out
    if rec.path[-1] in rec.opaque:
        opaque_module(rec, module, args, kwargs, out, rec.opaque[rec.path[-1]])
        return
    if isinstance(module, nn.Flatten):
        merged = reshape(rec, known[0], out, rec.path[-1])
        if merged is None or isinstance(merged, Done):
            opaque_module(rec, module, args, kwargs, out, "it merges more than one sample's axes")
        else:
            rec.know(out, merged)
        return
    if isinstance(module, (Add, And, Iand, Or)) and len(known) == 2:
        ops: dict[type[nn.Module], JoinOp] = {Add: "add", And: "and", Iand: "iand", Or: "or"}
        op = ops[type(module)]
        rec.know(out, join(rec, op, known[0], known[1], rec.path[-1]))
        return
    if isinstance(module, ShortcutA):
        stride = (module.stride, module.stride)
        node = Subsample(name="", stride=stride, pad_channels=module.pad)
        rec.know(out, apply_nodes(rec, [node], known[0], rec.path[-1], out))
        return
    if len(tensors) == 1 and isinstance(out, Tensor):
        shape, after = _sample_shapes(rec, known[0], out)
        key = (id(module), shape, after)
        if key not in rec.layers:
            rec.layers[key] = module_nodes(module, shape, after)
        made = rec.layers[key]
        if isinstance(made, list):
            rec.know(out, apply_nodes(rec, made, known[0], rec.path[-1], out))
            return
        reason = made or f"no chip has a word for {type(module).__name__}"
    else:
        reason = f"no chip has a word for {type(module).__name__}"
    opaque_module(rec, module, args, kwargs, out, reason)


def _sample_shapes(rec: Recorder, x: Tensor, out: Tensor) -> tuple[Any, Any]:
    """The shapes of one sample before and after the module."""
    value = rec.value(x)
    assert value is not None
    shape = rec.builder.shapes[value.node]
    return shape, tuple(out.shape)[x.ndim - len(shape) :]


def opaque_module(
    rec: Recorder,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    out: Any,
    reason: str,
) -> None:
    """The outputs of an unknown module as Opaque nodes that run it again."""
    from ranvier.export.trace_opaque import opaque

    def call(*given: Any, **more: Any) -> Any:
        like = next(a for a in given if isinstance(a, Tensor))
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        cast = {k: v.to(like.dtype) if v.is_floating_point() else v for k, v in state.items()}
        return torch.func.functional_call(module, cast, given, more)

    opaque(rec, type(module).__name__, reason, call, args, kwargs, out, rec.path[-1], id(module))


# neurons


def record_neuron(
    rec: Recorder, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """One call of an snntorch neuron: the next step of its population."""
    n = rec.n_calls.get(id(module), 0)
    rec.n_calls[id(module)] = n + 1
    reason = border.refusal(module)
    given = _bound(module, args, kwargs)
    x = given.pop("input_", None) if "input_" in given else args[0]
    if isinstance(rec.value(x), Series) and getattr(module, "multi_step", False):
        _neuron_over_time(rec, module, args, kwargs, out, x, n, reason)
        return
    if reason is not None:
        _opaque_neuron(rec, module, x, out, reason)
        return
    cell = border.cell(module)
    assert cell is not None
    chain = _chain(rec, module, given, cell, tuple(x.shape))
    chain.inputs.append(_population_input(rec, module, chain, x))
    chain.calls.append(n)
    chain.sources.append(rec.line())
    _know_outputs(rec, module, chain, cell, out)


def _neuron_over_time(
    rec: Recorder,
    module: nn.Module,
    args: Any,
    kwargs: Any,
    out: Any,
    x: Tensor,
    n: int,
    reason: str | None,
) -> None:
    """One of our neurons in multi-step mode: all steps in one call, from rest."""
    from ranvier.export.trace_ops import operand

    if reason is not None:
        opaque_module(rec, module, args, kwargs, out, reason)
        return
    value = operand(rec, rec.value(x))
    assert isinstance(value, Series)
    chain = _new_chain(rec, module, tuple(x.shape[1:]), hidden=True)
    node = value.node
    if getattr(module, "recurrent", None) is not None:
        node = _with_recurrence(rec, module, chain, node)
    chain.inputs = [At(node, t) for t in value.steps]
    chain.sources = [rec.line()] * len(value.steps)
    chain.calls, chain.whole = [n], True
    rec.know(out, Series(chain.node, value.steps))


def _bound(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    return {k: v for k, v in bound.arguments.items() if k != "self"}


def _chain(
    rec: Recorder, module: nn.Module, given: dict[str, Any], cell: border.Cell, shape: Any
) -> Chain:
    """The population that this call goes on with, by the states given, or the hidden ones."""
    states = {port: given[name] for name, port in cell.states if given.get(name) is not None}
    if not states:
        return rec.latest.get(id(module)) or _new_chain(rec, module, shape, hidden=True)
    known = {port: rec.value(s) for port, s in states.items()}
    if all(v is None for v in known.values()):
        for state in states.values():
            if state.numel() and bool((state != 0).any()):
                raise rec.refuse(
                    f"'{rec.path[-1]}' starts from a state that is not zero",
                    "start from reset_mem() or zeros",
                )
        if rec.driven and any(c.module is module for c in rec.chains.values()):
            raise OneStep(f"'{rec.path[-1]}'")
        return _new_chain(rec, module, shape, hidden=False)
    for port, value in known.items():
        chain = rec.chains.get(value.node) if isinstance(value, At) else None
        fits = (
            chain is not None
            and isinstance(value, At)
            and chain.module is module
            and value.port == port
            and value.t == len(chain.inputs) - 1
        )
        if not fits:
            raise rec.refuse(
                f"'{rec.path[-1]}' is given a state that is not its own of the step before",
                "pass on the state that it returned, unchanged",
            )
    first = next(v for v in known.values() if v is not None)
    return rec.chains[first.node]


def _new_chain(rec: Recorder, module: nn.Module, shape: Any, hidden: bool) -> Chain:
    sample = tuple(shape[1:])
    node = Neuron(
        name=rec.path[-1] or type(module).__name__.lower(),
        inputs=(rec.entry.name,),  # set when all steps are known
        model=border.model_of(module, sample),
        source=rec.line(),
    )
    name = rec.builder.unique(node.name)
    rec.builder.nodes[name] = replace(node, name=name)
    rec.builder.shapes[name] = sample
    chain = Chain(name, module, rec.names.get(id(module), "?"))
    rec.chains[name] = chain
    if hidden:
        rec.latest[id(module)] = chain
    return chain


def _population_input(rec: Recorder, module: nn.Module, chain: Chain, x: Tensor) -> Value | None:
    """What the population takes at this step: the call's input, and its own recurrence."""
    from ranvier.export.trace_ops import operand

    t = len(chain.inputs)
    value = operand(rec, rec.value(x)) if rec.value(x) is not None else None
    if value is None:
        raise rec.refuse(
            f"'{rec.path[-1]}' is fed by something that does not come from the input",
            "feed it from the sample",
        )
    if not isinstance(value, At):
        raise rec.refuse(
            f"'{rec.path[-1]}' is called on several steps at once",
            "call it once a step, inside the loop over time",
        )
    if value.t is not None and value.t > t:
        raise rec.refuse(
            f"'{rec.path[-1]}' runs its step {t} on a value of step {value.t}",
            "let its state pass on from each step to the next",
        )
    late = 0 if value.t is None else t - value.t
    node = rec.builder.delayed(value.node, late)
    if getattr(module, "recurrent", None) is not None:
        node = _with_recurrence(rec, module, chain, node)
    return At(node, None if value.t is None and late == 0 else t)


def _with_recurrence(rec: Recorder, module: nn.Module, chain: Chain, node: str) -> str:
    """x + recurrent(spikes of the step before) for RLeaky and RSynaptic."""
    m: Any = module
    made = module_nodes(m.recurrent, rec.builder.shapes[chain.node], ())
    inner: Node
    if isinstance(made, list):
        inner = made[0]
    else:
        gain = border.parameter(m.recurrent.V, rec.builder.shapes[chain.node])
        inner = Scale(name="", scale=np.asarray(gain))
    past = rec.builder.delayed(chain.node, 1)
    name = f"{chain.node}.recurrent"
    weight = rec.builder.add(
        replace(inner, name=name, inputs=(past,), source=rec.line()), (id(module), past)
    )
    total = Join(name=f"{chain.node}.sum", inputs=(node, weight), op="add", source=rec.line())
    return rec.builder.add(total)


def _know_outputs(
    rec: Recorder, module: nn.Module, chain: Chain, cell: border.Cell, out: Any
) -> None:
    t = len(chain.inputs) - 1
    tensors = dict(zip(cell.outputs, out if isinstance(out, tuple) else (out,), strict=False))
    for name, port in cell.states:  # also as attributes: lif.mem
        kept = getattr(module, name, None)
        if isinstance(kept, Tensor) and kept.shape == tensors["out"].shape:
            tensors.setdefault(port, kept)
            rec.know(kept, At(chain.node, t, port))
    factor = border.graded(module, rec.builder.shapes[chain.node])
    for port, tensor in tensors.items():
        value = At(chain.node, t, port)
        if port == "out" and factor is not None:
            graded = Scale(
                name=f"{chain.node}.graded", inputs=(chain.node,), scale=factor, source=rec.line()
            )
            value = At(rec.builder.add(graded), t)
        rec.know(tensor, value)


def _opaque_neuron(rec: Recorder, module: nn.Module, x: Tensor, out: Any, reason: str) -> None:
    """A neuron without a model, as an Opaque over all steps that runs it from its first state."""
    value = rec.value(x)
    if not isinstance(value, At):
        raise rec.refuse(f"'{rec.path[-1]}' ({type(module).__name__}): {reason}")
    first = out[0] if isinstance(out, tuple) else out
    key = ("neuron", id(module), value.node)
    name = rec.builder.made(key)
    if name is None:
        rec.inside += 1  # copying is no operation of the network
        function = _from_rest(module)
        rec.inside -= 1
        node = Opaque(
            name=rec.path[-1] or "neuron",
            inputs=(value.node,),
            kind=type(module).__name__,
            reason=reason,
            shape=tuple(first.shape[1:]),
            function=function,
            source=rec.line(),
            meta={"over_time": True},
        )
        name = rec.builder.add(node, key)
    step = rec.unknown_calls.get(key, 0)
    rec.unknown_calls[key] = step + 1
    rec.know(first, At(name, step if value.t is None else value.t))


def _from_rest(module: nn.Module) -> Any:
    """The neuron on a whole series [time, batch, ...], from its state at rest."""
    import copy

    rested: Any = copy.deepcopy(module)

    def run(series: Tensor) -> Tensor:
        neuron = copy.deepcopy(rested).to(series.dtype)
        zero = neuron.reset_mem()
        zero = zero if isinstance(zero, tuple) else (zero,)
        state: tuple[Any, ...] = () if neuron.init_hidden else zero
        sent = []
        for x in series:
            out = neuron(x, *state)
            sent.append(out[0] if isinstance(out, tuple) else out)
            state = () if neuron.init_hidden else tuple(out[1:])
        return torch.stack(sent)

    return run


def membrane(rec: Recorder, value: Value) -> str:
    """A node that sends the state `value.port` of a population, for layers that take it.

    Raises UnsupportedError where the population also resets: a chip's neuron sends spikes.
    """
    node = rec.builder.nodes[value.node]
    assert isinstance(node, Neuron)
    model: Any = node.model
    peak = np.min(model.v_threshold)
    if value.port == "u" or (model.reset != "none" and peak < 1e6):
        raise rec.refuse(
            f"the state '{value.port}' of '{value.node}' is used outside its neuron",
            "pass it on unchanged; only with reset_mechanism='none' can a neuron send its membrane",
        )
    return rec.builder.made(("membrane", value.node)) or _integrator(rec, node, model)


def _integrator(rec: Recorder, node: Neuron, model: Any) -> str:
    """The same population as a leaky integrator; its input is set with the others'."""
    common = {"beta": model.beta, "r": model.r, "v_leak": model.v_leak, "dt": model.dt}
    if isinstance(model, CubaLIF):
        sends: Any = CubaLI(alpha=model.alpha, w_in=model.w_in, **common)
    else:
        assert isinstance(model, LIF)
        sends = LI(**common)
    made = Neuron(name=f"{node.name}.v", inputs=(rec.entry.name,), model=sends, source=node.source)
    name = rec.builder.unique(made.name)
    rec.builder.nodes[name] = replace(made, name=name)
    rec.builder.shapes[name] = rec.builder.shapes[node.name]
    rec.followers.append((name, node.name))
    return rec.builder.remember(("membrane", node.name), name)
