"""The language: Graph and neuron models; torch, NIR, ONNX and netx are its borders."""

from __future__ import annotations

import importlib
from typing import Any

# public name -> the module that makes it, loaded on first use. No module bears a public name: importing it
# would put the module where the function belongs.
_HOME = {
    "Graph": "graph",
    "infer_domains": "domains",
    "verdicts": "domains",
    "binary_only": "domains",
    "trace": "tracer",
    "to_snntorch": "to_torch",
    "read_nir": "nir_file",
    "write_nir": "nir_file",
    "write_onnx": "onnx_file",
    "read_net": "netx_file",
    "write_net": "netx_write",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"ranvier.export.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ranvier.export' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
