"""Checkpoints without pickle: one safetensors file, with what is no tensor as JSON in its header.

One file, since two could not be replaced in one step: a training killed at any moment leaves the
old or the new
checkpoint, never half of each.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ranvier.train.errors import FormatError
from ranvier.train.files import atomic_write

HEADER = "ranvier"  # key of the JSON text in the safetensors header
FORMAT = 1


@dataclass
class Checkpoint:
    """Everything a training needs to continue to the bit.

    tensors  flat name -> tensor: model.*, ema.*, optimizer.<index>.<key>, rng.*
    meta     JSON values: epoch, batch, step, history, running sums, optimizer groups, RNG
             positions, settings
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix.`, without it."""
        cut = len(prefix) + 1
        return {name[cut:]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}

    def add(self, prefix: str, tensors: dict[str, Tensor]) -> None:
        self.tensors.update({f"{prefix}.{name}": t for name, t in tensors.items()})


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Writes a safetensors file with `meta` as JSON in its header, whole and through to the disk.

    Raises RanvierError where it cannot be written (a full disk); the old file then stands
    untouched.
    """
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = to_bytes(plain, {HEADER: json.dumps({"format": FORMAT, **meta})})
    with atomic_write(path) as part, open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) of a safetensors file.

    Raises FormatError where it is missing, damaged or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"train: there is no file '{path}'")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        return tensors, json.loads(header.get(HEADER, "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise FormatError(
            f"train: '{path}' is no safetensors file, or is damaged: {error}"
        ) from error


def save_weights(
    path: str | os.PathLike[str], net: nn.Module, dtype: torch.dtype | None = None, **meta: Any
) -> str:
    """Writes net's state (as `dtype` where given, such as torch.float16); returns its digest."""
    state = {
        name: value.to(dtype) if dtype and value.is_floating_point() else value
        for name, value in net.state_dict().items()
    }
    digest = state_digest(state)
    write_tensors(path, state, {"digest": digest, **meta})
    return digest


def load_weights(net: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Fills net with the weights in `path`, all and nothing else; returns the header's JSON.

    Half-precision weights are widened to net's own type.
    Raises FormatError naming the file and the first tensor that differs where the file is of
    another model.
    """
    tensors, meta = read_tensors(path)
    fill(net, tensors, path)
    return meta


def fill(net: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Copies `tensors` into net's state.

    Raises FormatError, before anything is changed, unless all names and shapes fit.
    """
    own = net.state_dict()
    if (problem := first_difference(own, tensors)) is not None:
        raise FormatError(
            f"train: '{path}' holds the weights of another model than {type(net).__name__}:"
            f" {problem}. "
            "Rebuild the model with the configuration saved beside the file (model.json)"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def first_difference(own: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    """The first tensor that is missing, unexpected or of another shape; None if all fit."""
    for name, value in own.items():
        if name not in found:
            return f"'{name}' {tuple(value.shape)} is missing"
        if found[name].shape != value.shape:
            return f"'{name}' is {tuple(found[name].shape)}, wanted {tuple(value.shape)}"
    for name, value in found.items():
        if name not in own:
            return f"'{name}' {tuple(value.shape)} has no place in it"
    return None


def state_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes: equal digests mean weights equal to the bit."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ---- optimizer ---------------------------------------------------------------------------------
# ---------------------


def optimizer_parts(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON) of an optimizer: momentum and the like, and the settings of its groups."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else values)[f"{index}.{key}"] = value
    return tensors, {"values": values, "groups": state["param_groups"]}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Puts back what `optimizer_parts` gave."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**meta["values"], **tensors}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in meta["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# ---- random numbers ----------------------------------------------------------------------------
# ---------------------


def rng_parts() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON) of the global generators of torch (CPU and CUDA), numpy and Python."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, *rest = np.random.get_state()
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, internal, gauss = random.getstate()
    tensors["python"] = torch.tensor(internal, dtype=torch.int64)
    return tensors, {"numpy": [kind, *rest], "python": [version, gauss]}


def restore_rng(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Puts back what `rng_parts` gave."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        states = [
            tensors[f"cuda{i}"] for i in range(torch.cuda.device_count()) if f"cuda{i}" in tensors
        ]
        if len(states) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(states)
    kind, *rest = meta["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))
    version, gauss = meta["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
