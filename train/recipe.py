"""Recipes: one TOML file a training, and the run folder that it leaves.

A recipe has the tables [data], [model], [train] and, where it repeats a publication, [published].
A run folder holds recipe.json, model.json, metrics.csv, metrics.json, checkpoint.safetensors and
weights.safetensors; `load_run` makes a network of it again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from ranvier.train.errors import FormatError, RanvierError
from ranvier.train.settings import Settings, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from ranvier.train.data import Dataset
    from ranvier.train.loop import FitResult

RECIPES = Path(__file__).parent / "recipes"
RECIPE = "recipe.json"


class DataPart(BaseModel):
    """[data]: the arguments of load_dataset; steps None takes the model's."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    size: int | None = None
    steps: int | None = None
    encoding: Literal["direct", "rate", "latency", "delta"] = "direct"
    bins: Literal["number", "time"] = "number"
    limit_train: int | None = None
    limit_test: int | None = None


class Published(BaseModel):
    """[published]: what the source of this setting reports, for comparison."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str
    accuracy: float | None = None
    note: str = ""


class Recipe(BaseModel):
    """One training, complete: data, model, settings.

    model   arguments of create_model; in_channels, num_classes and image_size follow from the data
    device  where it takes bearable time: cpu or gpu
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    description: str = ""
    device: Literal["cpu", "gpu"] = "cpu"
    data: DataPart
    model: dict[str, Any]
    train: Settings = Field(default_factory=Settings)
    published: Published | None = None


def list_recipes() -> list[str]:
    """Names of the recipes that come with ranvier, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name or from a .toml file, with "key=value" overrides.

    A key is one of [train], [model] or [data], such as "epochs=3" or "join=ms", looked up in that
    order; "data.steps=10" names its table. A value is TOML; what is no TOML is taken as text.
    Raises FormatError for an unknown recipe, key or value, naming the nearest right one.
    """
    path = _find(name_or_path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FormatError(f"recipe: '{path}' cannot be read as TOML: {error}") from error
    content.setdefault("name", path.stem)
    for override in overrides:
        _override(content, override, path.stem)
    return make_recipe(content, str(name_or_path))


def make_recipe(content: dict[str, Any], where: str) -> Recipe:
    """A Recipe from plain values. Raises FormatError naming the key, and the nearest right one."""
    try:
        recipe = Recipe.model_validate(content)
        _check_model(recipe.model)
    except ValidationError as error:
        raise FormatError(f"recipe '{where}': {_explain(error)}") from error
    except RanvierError as error:
        raise FormatError(f"recipe '{where}': {error}") from error
    return recipe


def train_recipe(
    recipe: Recipe,
    out: str | os.PathLike[str],
    resume: bool = False,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    progress: bool = True,
    devices: int = 1,
    accelerator: str = "auto",
) -> FitResult:
    """Trains as the recipe says, into the run folder `out`; returns the figures.

    The remaining arguments are those of load_dataset and fit.
    """
    from ranvier.train.loop import fit

    train, test = recipe_data(recipe, data_dir, download)
    net = build(recipe, train)
    text = recipe.model_dump_json(indent=2, exclude_none=True) + "\n"
    return fit(
        net,
        train,
        test,
        out_dir=out,
        resume=resume,
        progress=progress,
        devices=devices,
        accelerator=accelerator,
        beside={RECIPE: text},
        **recipe.train.as_dict(),
    )


def recipe_data(
    recipe: Recipe, data_dir: str | os.PathLike[str] | None = None, download: bool = False
) -> tuple[Dataset, Dataset]:
    """(train, test) of a recipe."""
    from ranvier.train.data import load_dataset

    part = recipe.data
    common: dict[str, Any] = {
        "steps": part.steps or recipe.model.get("steps"),
        "size": part.size,
        "encoding": part.encoding,
        "bins": part.bins,
        "download": download,
    }
    train = load_dataset(part.name, data_dir, "train", limit=part.limit_train, **common)
    return train, load_dataset(part.name, data_dir, "test", limit=part.limit_test, **common)


def build(recipe: Recipe, data: Dataset) -> nn.Module:
    """The recipe's network, freshly initialized from its seed, made to fit the data."""
    from ranvier.train.devices import seed_all
    from ranvier.train.models import create_model

    channels, height, width = data.input_shape
    fitting = {
        "in_channels": channels,
        "image_size": height if height == width else (height, width),
        "num_classes": data.n_classes,
    }
    seed_all(recipe.train.seed)
    return create_model(**{**fitting, **recipe.model})


def load_run(folder: str | os.PathLike[str]) -> tuple[nn.Module, Recipe | None, dict[str, Any]]:
    """(net, recipe, metrics) of a run folder: the network rebuilt, with its weights, in eval mode.

    An unfinished training gives its last checkpoint's weights and no metrics; a training by `fit`
    has no recipe.
    Raises FormatError where the folder is no run, or its weights are of another model.
    """
    from ranvier.train.checkpoint import fill, load_weights, read_tensors
    from ranvier.train.models import create_model
    from ranvier.train.resume import CHECKPOINT
    from ranvier.train.trainer import METRICS, MODEL, WEIGHTS

    folder = Path(folder)
    config = read_json(folder / MODEL, "a run folder has one")
    if "name" not in config:
        raise FormatError(f"train: '{folder / MODEL}' names no model")
    net = create_model(**config)
    if (folder / WEIGHTS).is_file():
        load_weights(net, folder / WEIGHTS)
    else:
        tensors, _ = read_tensors(folder / CHECKPOINT)
        cut = len("model.")
        own = {k[cut:]: v for k, v in tensors.items() if k.startswith("model.")}
        fill(net, own, folder / CHECKPOINT)
    metrics = read_json(folder / METRICS) if (folder / METRICS).is_file() else {}
    path = folder / RECIPE
    recipe = make_recipe(read_json(path), str(path)) if path.is_file() else None
    return net.eval(), recipe, metrics


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """The JSON object in `path`. Raises FormatError where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"train: there is no file '{path}'{hint and '; ' + hint}") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"train: '{path}' is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"train: '{path}' holds no JSON object")
    return content


# ---- names and keys ------------------------------------------------------------------------------


def _find(name_or_path: str | os.PathLike[str]) -> Path:
    path = Path(name_or_path)
    if path.suffix == ".toml":
        if path.is_file():
            return path
        raise FormatError(f"recipe: there is no file '{path}'")
    known = list_recipes()
    if str(name_or_path) in known:
        return RECIPES / f"{name_or_path}.toml"
    hint = nearest(str(name_or_path), known)
    raise FormatError(f"recipe: there is no recipe '{name_or_path}'{hint}")


def _tables(model: dict[str, Any]) -> dict[str, list[str]]:
    return {
        "train": [field.name for field in dataclasses.fields(Settings)],
        "model": model_keys(str(model.get("name"))),
        "data": list(DataPart.model_fields),
    }


def model_keys(name: str) -> list[str]:
    """The arguments that create_model(name) takes. Raises RangeError for an unknown model."""
    from ranvier.train.models import MODELS, create_model, make_config

    if name not in MODELS:
        create_model(name)  # raises, naming the nearest
    return [field.name for field in dataclasses.fields(make_config(name, MODELS[name], {}))]


def _override(content: dict[str, Any], override: str, where: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise FormatError(f"recipe '{where}': override '{override}' is no key=value")
    table, dot, inner = key.strip().partition(".")
    tables = _tables(content.get("model", {}))
    if not dot:
        inner = table
        table = next((name for name, keys in tables.items() if inner in keys), "")
    known = tables.get(table, [k for keys in tables.values() for k in keys])
    if not table or inner not in known:
        raise FormatError(f"recipe '{where}': there is no key '{key}'{nearest(inner, known)}")
    content.setdefault(table, {})[inner] = _value(text.strip())


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check_model(model: dict[str, Any]) -> None:
    """Raises RanvierError for a model, option or value that create_model would refuse."""
    from ranvier.train.models import MODELS, make_config

    if "name" not in model:
        raise FormatError("[model] has no name")
    model_keys(model["name"])
    make_config(
        model["name"], MODELS[model["name"]], {k: v for k, v in model.items() if k != "name"}
    )


def _explain(error: ValidationError) -> str:
    """The first problem, in one line."""
    wrong_key = ("extra_forbidden", "unexpected_keyword_argument")
    problems = error.errors()  # a wrong key first: what it meant to be is then missing as well
    first = next((p for p in problems if p["type"] in wrong_key), problems[0])
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] in wrong_key:
        tables = {
            "data": list(DataPart.model_fields),
            "train": [field.name for field in dataclasses.fields(Settings)],
            "published": list(Published.model_fields),
        }
        known = tables.get(place[0], []) if len(place) > 1 else list(Recipe.model_fields)
        return f"there is no key '{key}'{nearest(place[-1], known)}"
    if first["type"] in ("missing", "missing_argument"):
        return f"'{key}' is missing"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"'{key}' is {first.get('input')!r}: {first['msg']}"
