"""What happens: reference, engines, Trace and Ledger, energy, comparison, report."""

from __future__ import annotations

import importlib
from typing import Any

# public name -> the module that makes it, loaded on first use. No module bears a public name: importing it
# would put the module where the function belongs.
_HOME = {
    "run": "runner",
    "compare": "comparison",
    "study_residual": "study",
    "evaluate": "stream",
    "energy": "energy_models",
    "algorithmic": "operations",
    "messages_by_core": "traffic",
    "first_difference": "difference",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"ranvier.sim.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ranvier.sim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
