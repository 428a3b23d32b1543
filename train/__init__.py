"""snntorch: neurons, residual blocks, networks, data, losses and the training loop."""

from __future__ import annotations

import importlib
from typing import Any

# public name -> the module that makes it, loaded on first use. No module bears a public name:
# importing it would put the module where the function belongs.
_HOME = {
    "create_model": "models",
    "list_models": "models",
    "flops": "models",
    "n_parameters": "models",
    "IF": "neurons",
    "LIF": "neurons",
    "PLIF": "neurons",
    "CUBA": "neurons",
    "set_multi_step": "multistep",
    "reset_states": "multistep",
    "load_dataset": "data",
    "Dataset": "data",
    "fit": "loop",
    "evaluate": "loop",
    "FitResult": "loop",
    "list_recipes": "recipe",
    "load_recipe": "recipe",
    "train_recipe": "recipe",
    "load_run": "recipe",
    "RanvierError": "errors",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"ranvier.train.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ranvier.train' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
