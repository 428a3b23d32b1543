"""Trained networks for benchmarks: the stored weights, compiled, with the rates that they have."""

from __future__ import annotations

import json
import os

import numpy as np

from ranvier.deploy.program import Program
from ranvier.train.errors import RangeError

CALIBRATION = 64


def stored() -> list[str]:
    """Names of the stored networks whose data is here: <model>-<join>-<data set>."""
    from ranvier.train.models import WEIGHTS

    names = sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))
    here = ("digits", "mnist") if os.environ.get("RANVIER_DATA") else ("digits",)
    return [n for n in names if n.rpartition("-")[2] in here]


def trained(name: str, batch: int) -> tuple[Program, np.ndarray]:
    """(program, x `[steps, batch, C, H, W]`) of a stored network and images of its test set.

    Raises RangeError for a network that is not stored, DataError where its data is not here.
    """
    import torch

    from ranvier.deploy.compiler import compile
    from ranvier.export.tracer import trace
    from ranvier.train import create_model, load_dataset
    from ranvier.train.models import WEIGHTS

    if not (WEIGHTS / f"{name}.json").is_file():
        raise RangeError(f"bench: '{name}' is no stored network; there are {', '.join(stored())}")
    model = json.loads((WEIGHTS / f"{name}.json").read_text())["model"]
    tag = name.removeprefix(f"{model['name']}-{model['join']}-")
    network = create_model(model["name"], join=model["join"], pretrained=tag).eval()
    images = [
        np.asarray(load_dataset(tag, split=s, limit=n).x, np.float32)
        for s, n in (("train", CALIBRATION), ("test", batch))
    ]
    with torch.no_grad():
        program = compile(trace(network, torch.from_numpy(images[0][:4])), calibration=images[0])
    return program, np.broadcast_to(images[1], (program.steps or 4, *images[1].shape))
