"""What all runs of a study share: data, network, one training setting for every join; from a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ranvier.train.errors import RangeError

CONV = "-conv"  # of a variant's name: 1x1 convolutions as shortcuts instead of none with parameters
STORED = "stored"  # of Setup.weights: the networks that come with ranvier
BASES = {
    "digits": "digits",
    "mnist": "mnist-resnet8",
    "fashion_mnist": "fashion-resnet8",
    "cifar10": "cifar10-resnet32",
}  # data set -> recipe, less its join
TRAINING = ("dataset", "model", "steps", "options", "train", "train_limit", "size", "weights")
LARGE = 2000  # test samples; beyond, ONNX Runtime, slow on one core, sees so many


@dataclass(frozen=True)
class Setup:
    """What all runs of a study share.

    model     a name of list_models(); joins and shortcuts vary, the rest is `options`
    train     settings of the training (train/settings.py); the seed is added for each run
    limit     test samples at most (None: all), train_limit the same for training samples
    onnx_limit   test samples at most in ONNX Runtime (None: all)
    ladder_limit, advice_limit   as in `compare`
    mapping   as `compile` takes joins; with "auto" both ways are measured, else this one alone
    weights   "": train; "stored": those that come with ranvier; else a folder of run folders
    """

    dataset: str = "digits"
    model: str = "resnet-digits"
    steps: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    weight_bits: int = 8
    limit: int | None = None
    train_limit: int | None = None
    onnx_limit: int | None = LARGE
    ladder_limit: int = 64
    advice_limit: int = 0
    data_dir: str | None = None
    size: int | None = None
    weights: str = ""
    mapping: str = "auto"

    def key(self) -> dict[str, Any]:
        """What a finished run must have been made with to be taken again."""
        made = asdict(self)
        del made["data_dir"]
        return dict(json.loads(json.dumps(made)))

    def training(self) -> dict[str, Any]:
        """The part of the key that a training depends on."""
        made = self.key()
        return {k: made[k] for k in TRAINING}


def parts_of(variant: str) -> tuple[str, str]:
    """(join, shortcut) of a variant such as "ms" or "ms-conv".

    Raises RangeError where the join is unknown.

    >>> parts_of("sew-and"), parts_of("ms-conv")
    (('sew-and', 'A'), ('ms', 'conv'))
    """
    from ranvier.train.models import JOIN_NAMES

    join, shortcut = variant, "A"
    if variant.endswith(CONV):
        join, shortcut = variant[: -len(CONV)], "conv"
    if join not in JOIN_NAMES:
        known = ", ".join(JOIN_NAMES)
        raise RangeError(f"study: '{variant}' is none of {known}, nor one of them with '{CONV}'")
    return join, shortcut


def base_recipe(dataset: str | None, recipe: str | None, settings: Sequence[str] = ()) -> Any:
    """The Recipe whose network and settings all joins share; its join plays no part.

    recipe    a recipe's name, with or without its join, or a TOML file; None: the data set's
    settings  "key=value", as `ranvier train -s` takes them
    Raises FormatError for an unknown recipe, key or value.
    """
    from ranvier.train.recipe import list_recipes, load_recipe

    name = recipe or BASES.get(dataset or "digits", BASES["mnist"])
    if not name.endswith(".toml") and name not in list_recipes():
        named = [r for r in list_recipes() if r.startswith(f"{name}-")]
        name = f"{name}-vanilla" if f"{name}-vanilla" in named else next(iter(named), name)
    chosen = [] if dataset is None else [f"data.name={dataset}"]
    return load_recipe(name, [*chosen, *settings])


def make_setup(
    dataset: str | None, recipe: str | None, settings: Sequence[str], model: str | None,
    epochs: int | None, given: dict[str, Any],
) -> Setup:  # fmt: skip
    """A Setup from a recipe, with what was given in Python instead of it.

    Raises RangeError for an unknown field, FormatError for an unknown recipe or setting.
    """
    known = set(Setup.__dataclass_fields__)
    for key in given:
        if key not in known:
            raise RangeError(f"study: option '{key}' is none of {', '.join(sorted(known))}")
    base = base_recipe(dataset, recipe, settings)
    shape = {k: v for k, v in base.model.items() if k not in ("name", "join", "shortcut", "steps")}
    options = shape if model in (None, base.model["name"]) else {}
    train = {**base.train.as_dict(), **given.pop("train", {})}
    train.pop("seed", None)
    if epochs is not None:
        train["epochs"] = epochs
    data = base.data
    made: dict[str, Any] = {
        "dataset": data.name, "model": model or base.model["name"], "train": train,
        "steps": data.steps or base.model.get("steps", 4), "size": data.size,
        "limit": data.limit_test, "train_limit": data.limit_train,
        "options": {**options, **given.pop("options", {})},
    }  # fmt: skip
    return Setup(**{**made, **{k: v for k, v in given.items() if v is not None}})


def recipe_of(setup: Setup, variant: str, seed: int) -> Any:
    """The Recipe of one run: `ranvier train` with it does the same, and its folder can be published."""
    from ranvier.train.recipe import make_recipe

    join, shortcut = parts_of(variant)
    data = {
        "name": setup.dataset, "size": setup.size, "limit_train": setup.train_limit,
        "limit_test": setup.limit,
    }  # fmt: skip
    model = {
        "name": setup.model, "join": join, "shortcut": shortcut, "steps": setup.steps,
        **setup.options,
    }  # fmt: skip
    content = {
        "name": f"{setup.dataset}-{setup.model}-{variant}",
        "description": "a run of `ranvier study residual`",
        "data": data, "model": model, "train": {**setup.train, "seed": seed},
    }  # fmt: skip
    return make_recipe(content, f"study {variant}")
