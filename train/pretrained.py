"""Stored weights: half precision, with the configuration, recipe and figures that they come from.

`WEIGHTS/<model>-<join>-<tag>.safetensors` and `.json` beside it. The configuration in the JSON is
what `create_model(name, join=..., pretrained=tag)` builds.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from ranvier.train.errors import FormatError, RangeError
from ranvier.train.files import write_text

MAX_BYTES = 2_000_000  # they travel with the package


def publish(
    run: str | os.PathLike[str],
    tag: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Stores the weights of a run folder in half precision; returns the file's path.

    tag     name of the weights; None: the data set's
    folder  where to; None: ranvier's own train/weights
    The figures stored beside are those of the rounded weights, tested anew.
    Raises FormatError where the run has no recipe, RangeError where the file exceeds 2 MB.
    """
    from ranvier.train.checkpoint import load_weights, save_weights
    from ranvier.train.evaluation import evaluate
    from ranvier.train.losses import make_loss
    from ranvier.train.models import weights_path
    from ranvier.train.recipe import load_run, recipe_data

    net, recipe, metrics = load_run(run)
    if recipe is None:
        raise FormatError(f"train: '{run}' has no recipe.json; publish what a recipe trained")
    config: Any = net.config
    path = weights_path(config.name, config.join, tag or recipe.data.name)
    path = path if folder is None else Path(folder) / path.name
    digest = save_weights(path, net, torch.float16)
    if (size := path.stat().st_size) > MAX_BYTES:
        path.unlink()
        raise RangeError(f"train: '{path.name}' has {size} bytes; {MAX_BYTES} are allowed")
    load_weights(net, path)
    loss = make_loss(recipe.train.loss, scale=recipe.train.logit_scale)
    tested = evaluate(net, recipe_data(recipe, data_dir)[1], loss=loss)
    beside = {
        "model": dataclasses.asdict(config),
        "recipe": recipe.model_dump(exclude_none=True),
        "metrics": {key: tested[key] for key in ("accuracy", "loss", "n", "firing_rate")},
        "training": metrics,
        "digest": digest,
    }
    write_text(path.with_suffix(".json"), json.dumps(beside, indent=2) + "\n")
    return path
