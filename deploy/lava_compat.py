"""Lava on Pythons and numpys that are younger than it is.

lava-nc 0.10.0 and lava-dl 0.6.0 are Lava's last releases and ask for Python 3.10, numpy below 2 and
torch 2.3. Five places in them fail on anything newer; `apply` mends those five from outside, in the
running process alone. Nothing in site-packages is edited, and nothing happens when this module is
imported. No patch changes a number that Lava computes; the one thing they repair on numpy 1 too is
that a Conv of 128 groups or more is silent there.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any
from unittest import mock

INSTALL = "make lava"
_NEEDED = {"lava.magma": "lava-nc 0.10.0", "asteval": "asteval", "networkx": "networkx"}
_NEEDED_BY_NETX = {"lava.lib.dl.netx": "lava-dl 0.6.0", "PIL": "pillow", "torch": "torch"}
_STUBS = {
    "cv2": (),
    "matplotlib": ("pyplot", "animation", "figure"),
    "torchvision": ("ops", "transforms"),
}
_applied: list[str] = []


def available(*, netx: bool = False) -> str | None:
    """None when Lava can run here; otherwise the reason, with the one command that installs it.

    netx  whether lava-dl's netx is needed too
    Nothing of Lava is imported, so that the answer is cheap and safe in any process.
    """
    if os.name != "posix":
        return "Lava starts its processes by fork, which this system lacks; use Linux or macOS"
    needed = {**_NEEDED, **(_NEEDED_BY_NETX if netx else {})}
    missing = [name for module, name in needed.items() if not _is_there(module)]
    return f"{', '.join(missing)} not installed; `{INSTALL}` installs it" if missing else None


def _is_there(module: str) -> bool:
    """Whether `module` can be found; its parents hold no code, so that nothing of Lava runs."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def apply(*, netx: bool = False) -> tuple[str, ...]:
    """Names of the patches in force, after applying those that this process still lacks.

    netx  also those that only lava-dl's netx needs: its import brings in torch, which takes seconds
    Only for the process that runs Lava: importing Lava sets multiprocessing's start method to fork.
    Raises RuntimeError where that method was set before (a test runner, a notebook): use
    `lava_guard.run_guarded`.
    """
    for patch in (_byte_encoder, _reshape, _conv_geometry) + ((_stubs, _scalars) if netx else ()):
        if patch.__name__ not in _applied:
            patch()
            _applied.append(patch.__name__)
    return tuple(name.lstrip("_") for name in _applied)


def _byte_encoder() -> None:
    """`x: ByteEncoder = ByteEncoder()`: Python 3.11 refuses an unhashable default in a dataclass.

    The class becomes hashable while its module is being imported. It only counts bytes for the
    hardware backend, which is not here; the CPU simulation never builds one. Without this no
    Process can be compiled.
    """
    original = dataclasses.dataclass

    def dataclass(cls: Any = None, /, **options: Any) -> Any:
        if cls is None:
            return functools.partial(dataclass, **options)
        if cls.__name__ == "ByteEncoder":
            options["unsafe_hash"] = True
        return original(cls, **options)

    with mock.patch.object(dataclasses, "dataclass", dataclass):
        importlib.import_module("lava.magma.compiler.var_model")


def _reshape() -> None:
    """`np.reshape(a, newshape=...)`: numpy 2.1 deprecated the keyword, numpy 2.4 removed it.

    Without this every `flatten()` and `reshape()` of a port raises TypeError in a worker, and the
    run hangs.
    """
    ports = importlib.import_module("lava.magma.core.process.ports.ports")

    def forward(port: Any) -> functools.partial[Any]:
        return functools.partial(_reshaped, shape=port.shape)

    def backward(port: Any) -> functools.partial[Any]:
        return functools.partial(_reshaped, shape=port.old_shape)

    ports.ReshapePort.get_transform_func_fwd = forward
    ports.ReshapePort.get_transform_func_bwd = backward


def _reshaped(data: Any, shape: tuple[int, ...]) -> Any:
    return data.reshape(shape)


def _conv_geometry() -> None:
    """Conv keeps its geometry (kernel, stride ... groups) as int8, and numpy 2 computes in int8.

    An input side of 128 or more is then an OverflowError in a worker (a hang), and so are 128
    groups, which on numpy 1 were 128 silent zeros. As int32 they mean what was asked for.
    """
    np = importlib.import_module("numpy")
    lava_type = importlib.import_module("lava.magma.core.model.py.type").LavaPyType
    model = importlib.import_module("lava.proc.conv.models").AbstractPyConvModel
    for name in ("kernel_size", "stride", "padding", "dilation", "groups"):
        setattr(model, name, lava_type(np.ndarray, np.int32, precision=32))


def _stubs() -> None:
    """lava-dl's slayer, which netx imports too, wants matplotlib, torchvision and cv2 at import.

    Where one of them is not installed, a stand-in without content is enough.
    """
    for package, modules in _STUBS.items():
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            for name in (package, *(f"{package}.{module}" for module in modules)):
                sys.modules[name] = _Stub(name)


class _Stub(types.ModuleType):
    """A module without content; calling anything of it says what is missing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        return sys.modules.get(full) or type(
            name, (), {"__init__": functools.partial(_refuse, full)}
        )


def _refuse(full: str, *_: Any, **__: Any) -> None:
    package = full.partition(".")[0]
    raise ImportError(f"{full}: {package} is not installed; a stand-in let lava-dl be imported")


def _scalars() -> None:
    """`int(array of size 1)`: numpy 2.4 allows it only for arrays without dimensions.

    netx reads the weight and the bias of an input layer so; its module gets an `int` of its own,
    which it only calls.
    """
    importlib.import_module("lava.lib.dl.netx.hdf5").__dict__["int"] = _int


def _int(value: Any) -> int:
    return int(value.item()) if getattr(value, "size", 0) == 1 else int(value)
