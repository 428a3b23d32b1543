"""The recorder: runs a module on real tensors and learns what each of them stands for.

Functions and operators come through torch's function mode, leaf modules through its global forward
hooks; what happens inside a leaf is not looked at. Tensors are known by identity, and kept alive so
that no identity is used twice. What an operation means is said in `trace_ops`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ranvier.export.nodes import Input
from ranvier.export.trace_values import At, Builder, Series, Value
from ranvier.train.errors import RanvierError, UnsupportedError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_HERE = os.path.dirname(os.path.abspath(__file__))


@dataclass
class Chain:
    """The calls of one population, step by step."""

    node: str
    module: nn.Module
    module_name: str = ""
    inputs: list[Value | None] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)  # places among all calls of the module
    sources: list[str] = field(default_factory=list)
    whole: bool = False  # one call on all steps


class OneStep(Exception):
    """The module sets its neurons to zero at every call: what it computes is a single step."""


class Recount(Exception):
    """The module's loop runs another number of steps than its neurons are called."""

    def __init__(self, total: int) -> None:
        self.total = total


class TimeAxis(Exception):
    """The sample turned out to have a time axis; the trace starts again with that known."""

    def __init__(self, axis: int) -> None:
        self.axis = axis


class Recorder(TorchFunctionMode):
    """What every tensor stands for, the nodes so far, and the populations' calls."""

    def __init__(self, net: nn.Module, entry: Input, total: int | None = None) -> None:
        """total  how many steps the module's own loop runs; None where the tracer drives it"""
        super().__init__()
        self.total = total
        self.builder = Builder(entry)
        self.entry = entry
        self.values: dict[int, Value] = {}
        self.alive: list[Any] = []
        self.chains: dict[str, Chain] = {}
        self.latest: dict[int, Chain] = {}  # module -> its last population, where states are hidden
        self.n_calls: dict[int, int] = {}
        self.names = {id(m): name for name, m in net.named_modules()}
        self.path: list[str] = []
        self.driven: int | None = None  # the step that the tracer drives
        self.inside = 0  # depth of leaf modules
        self.can_restart = True  # whether a time axis may still be found
        self.layers: dict[Any, Any] = {}  # module and shapes -> its nodes
        self.random: set[int] = set()  # tensors of random numbers
        self.lost: dict[int, UnsupportedError] = {}  # tensors that cannot be followed: why
        self.opaque: dict[str, str] = {}  # modules taken as a whole: why
        self.followers: list[tuple[str, str]] = []  # node -> the population whose input it shares
        self.unknown_calls: dict[Any, int] = {}  # neurons without a model: steps so far

    # what tensors stand for

    def value(self, x: Any) -> Value | None:
        return self.values.get(id(x)) if isinstance(x, Tensor) else None

    def know(self, x: Any, value: Value | None) -> None:
        """From now on the tensor x stands for `value` (None: a constant)."""
        self.alive.append(x)
        self.lost.pop(id(x), None)
        if value is None:
            self.values.pop(id(x), None)
            return
        self.values[id(x)] = value
        self._check_shape(x, value)

    def _check_shape(self, x: Tensor, value: Value) -> None:
        shape = self.builder.shapes[value.node]
        if isinstance(value, At) and tuple(x.shape[1:]) != shape:
            raise RanvierError(
                f"trace: '{value.node}' should have the shape {shape}, its tensor has "
                f"{tuple(x.shape[1:])} after the batch ({self.line()}); please report this net"
            )
        if isinstance(value, Series) and value.layout in ("time", "batch"):
            if tuple(x.shape[2:]) != shape:
                raise RanvierError(
                    f"trace: '{value.node}' should have the shape {shape}, its series has "
                    f"{tuple(x.shape[2:])} after time and batch ({self.line()})"
                )

    def lose(self, x: Any, why: UnsupportedError) -> None:
        """The tensor cannot be followed; that is refused where it meets the network again."""
        self.know(x, None)
        self.lost[id(x)] = why

    def check_followed(self, tensors: list[Any]) -> None:
        """Raises UnsupportedError where one of them cannot be followed."""
        for x in tensors:
            if id(x) in self.lost:
                raise self.lost[id(x)]

    def refuse(self, what: str, way_out: str = "") -> UnsupportedError:
        place = self.line() or ".".join(self.path[-1:]) or "the module"
        error = UnsupportedError(f"trace: {place}: {what}" + (f"; {way_out}" if way_out else ""))
        error.__dict__["module"] = self.path[-1] if self.path else ""
        return error

    # where we are

    def line(self) -> str:
        """file:line of the innermost frame of the user's code, empty where there is none."""
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code is drive.__code__:
                return ""
            if not _foreign(code.co_filename):
                return f"{_short(code.co_filename)}:{frame.f_lineno}"
            frame = frame.f_back  # type: ignore[assignment]
        return ""

    def name(self, kind: str) -> str:
        """A name for a functional operation here: "<module path>.add", to be numbered."""
        where = self.path[-1] if self.path else ""
        return f"{where}.{kind}" if where else kind

    # torch's hooks

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        from ranvier.export.trace_ops import record

        before = args
        if args and isinstance(args[0], Tensor) and _in_place(func):
            if self.value(args[0]) is None:  # a constant that may be changed in place
                before = (args[0].clone(), *args[1:])
        out = func(*args, **kwargs)
        record(self, func, before, kwargs, out)
        return out

    def is_whole(self, module: nn.Module) -> bool:
        """Whether nothing inside the module is looked at."""
        return self.names.get(id(module)) in self.opaque or is_leaf(module)

    def before(self, module: nn.Module, args: Any) -> None:
        self.path.append(self.names.get(id(module), type(module).__name__.lower()))
        self.inside += self.is_whole(module)

    def after(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        leaf = self.is_whole(module)
        self.inside -= leaf
        if leaf and not self.inside:
            from ranvier.export.trace_modules import record_module

            record_module(self, module, args, kwargs, out)
        self.path.pop()


def drive(run: Callable[[], Any]) -> Any:
    """Calls `run`; its frame ends the search for the user's line."""
    return run()


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Everything that torch does inside is recorded."""
    hooks = [
        register_module_forward_pre_hook(recorder.before),
        register_module_forward_hook(recorder.after, with_kwargs=True),
    ]
    try:
        with torch.no_grad(), recorder:
            yield recorder
    finally:
        for hook in hooks:
            hook.remove()


def is_leaf(module: nn.Module) -> bool:
    """Whether the module is taken as a whole: torch's, snntorch's, and ours with a meaning."""
    import snntorch

    from ranvier.train import blocks, norms

    if isinstance(module, _CONTAINERS):
        return False
    ours = (blocks.Join, blocks.ShortcutA, norms.ScaledTdBN2d, snntorch.SpikingNeuron)
    if isinstance(module, ours):
        return True
    home = getattr(type(module).forward, "__module__", "") or ""
    return home.startswith(("torch.nn.", "torch.ao.", "snntorch._neurons"))


def _in_place(func: Any) -> bool:
    name = func.__name__
    return name.endswith("_") and not name.endswith("__")


def _foreign(path: str) -> bool:
    """Whether a file belongs to torch, snntorch or this package, rather than to the user."""
    parts = path.replace("\\", "/").split("/")
    if "torch" in parts or "snntorch" in parts or path.startswith("<"):
        return True
    whole = os.path.abspath(path)
    plumbing = parts[-2:] == ["train", "multistep.py"]  # says nothing of the network
    return plumbing or os.path.dirname(whole) == _HERE


def _short(path: str) -> str:
    """The path as seen from here, or the file's name where it lies elsewhere."""
    near = os.path.relpath(path)
    return os.path.basename(path) if near.startswith("..") else near
