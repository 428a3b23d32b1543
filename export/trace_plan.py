"""How a module is run to be traced: as one step, as a loop of its own, or all steps at once."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from ranvier.train.errors import RangeError, RanvierError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn

    Tensor = torch.Tensor


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


def is_ours(net: Any) -> bool:
    """Whether the module has the interface of our networks."""
    return callable(getattr(net, "step", None)) and isinstance(getattr(net, "steps", None), int)


def rested(net: nn.Module) -> nn.Module:
    """A copy in eval mode, its neurons at rest, so that no run touches the module itself."""
    import snntorch

    try:
        made = copy.deepcopy(net, _detached(net))
    except RuntimeError as error:  # tensors with a gradient in places where we do not look
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


def _detached(net: nn.Module) -> dict[int, Any]:
    """What deepcopy shall take for the tensors that carry a gradient: states after training."""
    memo: dict[int, Any] = {}

    def visit(value: Any, depth: int) -> None:
        import torch

        if torch.is_tensor(value):
            if value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
        elif depth and isinstance(value, (list, tuple)):
            for v in value:
                visit(v, depth - 1)
        elif depth and isinstance(value, dict):
            for v in value.values():
                visit(v, depth - 1)

    for module in net.modules():
        visit({k: v for k, v in vars(module).items() if k != "_modules"}, 3)
    return memo


def make_plan(net: nn.Module, x: Tensor, output: int | str) -> Plan:
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


def chosen(returned: Any, output: int | str) -> Any:
    """One of several returned values; a list of tensors, one a step, becomes one tensor."""
    import torch

    if isinstance(returned, (tuple, list, dict)):
        try:
            picked = returned[cast(Any, output)]
            many = isinstance(picked, (tuple, list)) and all(torch.is_tensor(p) for p in picked)
            return torch.stack(list(picked)) if many and picked else picked
        except (KeyError, IndexError, TypeError):
            have = list(returned) if isinstance(returned, dict) else len(returned)
            raise RangeError(
                f"trace: output={output!r} is none of what the module returns ({have})"
            ) from None
    return returned
