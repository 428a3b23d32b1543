"""A traced graph beside its module: spikes equal, or the layer and step where they part.

Both run in double precision, so that the order in which a sum is taken decides no spike; the
module is a copy. Where a module does not run in double, both run in single precision. A membrane
that meets its threshold to within rounding is a tie, which proves nothing: the input is drawn
again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ranvier.export.graph import Graph
from ranvier.export.neurons import Membrane, NeuronModel, SlidingWindow, Threshold
from ranvier.export.nodes import Neuron
from ranvier.export.trace_plan import Plan, as_given, chosen, is_ours, rested, time_first
from ranvier.export.trace_record import Chain
from ranvier.train.errors import UnsupportedError

STEPS = 6  # of random input, for graphs that say none
TRIES = 3  # of a random input that ended in a tie


class InDouble(TorchFunctionMode):
    """Single precision asked for by name becomes double: snntorch's spikes are .float()."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(_wide(a) for a in args)
        return func(*args, **{k: _wide(v) for k, v in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def precision(double: bool) -> Iterator[None]:
    before = torch.get_default_dtype()
    try:
        if double:
            torch.set_default_dtype(torch.float64)
            with torch.no_grad(), InDouble():
                yield
        else:
            with torch.no_grad():
                yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Runs:
    """What one run of the module gave: its output, and each population's spikes [time, ...]."""

    output: Tensor
    spikes: dict[str, Tensor]


def verified(graph: Graph, net: nn.Module, x: Tensor, plan: Plan, chains: list[Chain]) -> Graph:
    """The graph, with what was compared under meta["verified"].

    Raises UnsupportedError naming the layer and the step where graph and module part.
    """
    double = _runs_in_double(net, x, plan)
    generator = torch.Generator().manual_seed(0)
    ties = 0
    fired: dict[str, int] = {}
    for gain in (0.0, 1.0, 8.0):
        if gain > 1.0 and fired and all(fired.values()):
            break  # only silent populations need a louder input
        for _ in range(TRIES):
            given = x if gain == 0.0 else random_like(x, plan, graph, gain, generator)
            tie, counts = _compare(graph, net, given, plan, chains, double)
            fired = {k: fired.get(k, 0) + n for k, n in counts.items()} or fired
            ties += tie
            if not tie or gain == 0.0:
                break
    found = {
        "spikes": sum(fired.values()),
        "silent": sum(n == 0 for n in fired.values()),  # populations that never fired
        "ties": ties,
        "dtype": "float64" if double else "float32",
    }
    return replace(graph, meta={**graph.meta, "verified": found})


def _runs_in_double(net: nn.Module, x: Tensor, plan: Plan) -> bool:
    try:
        held = x[None] if not plan.loop and plan.axis is None else x
        run_module(net, held, plan, [], True)
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def random_like(
    x: Tensor, plan: Plan, graph: Graph, gain: float, generator: torch.Generator
) -> Tensor:
    """Random input of the sample's kind: 0/1 as dense as it, or its range widened by `gain`."""
    shape = tuple(x.shape)
    if plan.axis is None and not plan.loop:
        shape = ((graph.steps or STEPS), *shape)
    noise = torch.rand(shape, generator=generator, dtype=torch.float64)
    if bool(((x == 0) | (x == 1)).all()):
        density = min(max(float(x.double().mean()), 0.1), 0.9)
        return (noise < density).to(x)
    low, high = float(x.min()), float(x.max())
    return ((low + noise * (high - low)) * gain).to(x)


def run_module(net: nn.Module, x: Tensor, plan: Plan, chains: list[Chain], double: bool) -> Runs:
    """The module's output and spikes on x; the calls of each population as they were traced."""
    made = rested(net)
    if double:
        made, x = made.double(), x.double()
    modules = dict(made.named_modules())
    heard: dict[str, list[Tensor]] = {}
    for name in {c.module_name for c in chains if c.module_name in modules}:
        modules[name].register_forward_hook(_listen(heard.setdefault(name, [])))
    with precision(double):
        output = _outputs(made, x, plan)
    n = len(next(iter(heard.values()))) if heard else 0
    spikes = {}
    for c in chains:
        sent = heard.get(c.module_name, [])
        if c.whole:
            spikes[c.node] = sent[c.calls[0]]
            continue
        stride = c.calls[1] - c.calls[0] if len(c.calls) > 1 else max(n, 1)
        own = sent[c.calls[0] :: stride] if stride > 0 else []
        if own:
            spikes[c.node] = torch.stack(own)
    return Runs(output, spikes)


def _listen(heard: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        first = out[0] if isinstance(out, tuple) else out
        heard.append((first != 0).to(first.dtype))

    return hook


def _outputs(net: nn.Module, x: Tensor, plan: Plan) -> Tensor:
    if plan.loop:
        run = getattr(net, plan.method) if plan.method else net
        return cast(Tensor, chosen(run(as_given(x, plan)), plan.output))
    step = cast(Any, net).step if is_ours(net) else net
    return torch.stack([chosen(step(x_t.clone()), plan.output) for x_t in x])


def _compare(
    graph: Graph, net: nn.Module, x: Tensor, plan: Plan, chains: list[Chain], double: bool
) -> tuple[bool, dict[str, int]]:
    """(whether a tie spoilt the comparison, population -> spikes); raises where they differ."""
    n = graph.steps or STEPS
    if not plan.loop and x.ndim == len(graph.inputs[0].shape) + 1:
        x = x[None].repeat(n, *[1] * x.ndim)
    theirs = run_module(net, x, plan, chains, double)
    names = tuple(k.name for k in graph.populations if k.name in theirs.spikes and k.model.binary)
    fed = (graph.inputs[0].name, *(i for k in names for i in graph[k].inputs))
    series = time_first(x.double() if double else x, plan)
    if plan.loop and not plan.method and plan.axis is None:
        series = series[None].repeat(n, *[1] * series.ndim)
    with precision(double):
        ours, kept = graph.run(series, record=(*names, *fed))
        output = graph.readout(ours) if plan.loop and not plan.method else ours
    first = _first_difference(names, theirs.spikes, kept)
    if first is not None:
        name, t = first
        node = cast(Neuron, graph[name])
        differ = kept[name][t] != theirs.spikes[name][t]
        if _is_tie(node, kept[node.inputs[0]][: t + 1], differ, 1e-6 if double else 1e-4):
            return True, {}
        raise UnsupportedError(
            f"trace: graph and module part at '{name}' ({node.source or 'no line'}), step {t}: "
            f"{int(differ.sum())} of {differ.numel()} spikes differ. Look there for a value "
            "read out of torch (.item(), numpy), or a state that stands outside the neurons"
        )
    _compare_outputs(theirs.output, output, plan, double)
    return False, {name: int(theirs.spikes[name].sum()) for name in names}


def _compare_outputs(theirs: Tensor, ours: Tensor, plan: Plan, double: bool) -> None:
    if (
        theirs.shape != ours.shape
        and theirs.ndim > 1
        and theirs.transpose(0, 1).shape == ours.shape
    ):
        theirs = theirs.transpose(0, 1)  # the module stacks time behind the batch
    if theirs.shape != ours.shape:
        raise UnsupportedError(
            f"trace: the module's output has the shape {tuple(theirs.shape)}, the graph's "
            f"{tuple(ours.shape)}"
        )
    gap = float((theirs - ours).abs().max())
    allowed = (1e-5 if double else 1e-4) * max(1.0, float(theirs.abs().max()))
    if not gap <= allowed:
        step = ""
        if ours.ndim == theirs.ndim and not plan.loop:
            far = ((theirs - ours).abs().flatten(1).amax(1) > allowed).nonzero()
            step = f", from step {int(far[0])} on" if len(far) else ""
        raise UnsupportedError(
            f"trace: all spikes are equal, but the outputs differ by {gap:.3g} (allowed "
            f"{allowed:.1g}){step}. The trace is wrong behind the last population"
        )


def _first_difference(
    names: tuple[str, ...], theirs: dict[str, Tensor], ours: dict[str, Tensor]
) -> tuple[str, int] | None:
    """The earliest step at which a population differs, and the first population that does then."""
    found: tuple[int, str] | None = None
    for name in names:
        wrong = (theirs[name] != ours[name]).flatten(1).any(1).nonzero()
        if len(wrong) and (found is None or int(wrong[0]) < found[0]):
            found = (int(wrong[0]), name)
    return None if found is None else (found[1], found[0])


def _is_tie(node: Neuron, currents: Tensor, differ: Tensor, within: float) -> bool:
    """Whether the membranes that differ met their threshold to within rounding."""
    model: Any = node.model
    threshold = torch.as_tensor(getattr(model, "v_threshold", 0.0), dtype=currents.dtype)
    h = _compared(model, currents)
    if h is None:
        return False
    distance = (h - threshold).abs() / threshold.abs().clamp(min=1.0)
    return bool((distance[differ] < within).all())


def _compared(model: NeuronModel, currents: Tensor) -> Tensor | None:
    """What the model compares with its threshold at the last of these steps."""
    if isinstance(model, Threshold):
        return currents[-1]
    if isinstance(model, SlidingWindow):
        seen = zip(model.taps[::-1], reversed(list(currents)), strict=False)
        return torch.stack([float(w) * x for w, x in seen]).sum(0)
    if not isinstance(model, Membrane):
        return None
    state = model.initial(currents[0])
    for x in currents[:-1]:
        _, state = model.step(state, x)
    # the membrane before its reset: what the last step compares with the threshold
    if model.timing == "immediate":
        last: Any = replace(model, reset="none")
    else:
        last = replace(model, timing="discard" if model.timing == "discard" else "delayed")
    _, state = last.step(state, currents[-1])
    h: Tensor = state["v"]
    return h
