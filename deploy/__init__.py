"""The target: chips, quantization, the integer Program, alignment, placement, lint, Lava."""

from __future__ import annotations

import importlib
from typing import Any

# public name -> the module that makes it, loaded on first use. No module bears a public name: importing it
# would put the module where the function belongs.
_HOME = {
    "Program": "program",
    "compile": "compiler",
    "lint": "linter",
    "place": "placement",
    "LOIHI1": "chip",
    "LOIHI2": "chip",
    "describe": "lava",
    "read_program": "netx_file",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"ranvier.deploy.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ranvier.deploy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
