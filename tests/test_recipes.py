"""Recipes: each loads, a wrong key names the right one, a run folder becomes a network again."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from ranvier.train import evaluate, list_recipes, load_dataset, load_recipe, load_run, train_recipe
from ranvier.train.checkpoint import state_digest
from ranvier.train.errors import FormatError, RanvierError
from ranvier.train.models import create_model

JOINS = ("vanilla", "sew", "ms", "or")


FAMILIES = (
    "digits", "mnist-resnet8", "mnist-wide", "fashion-resnet8", "cifar10-resnet8", "cifar10-resnet32"
)  # fmt: skip


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_is_valid_and_builds(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    net = create_model(**recipe.model)
    assert net.steps == recipe.model["steps"]


def test_there_is_a_recipe_for_every_join():
    names = list_recipes()
    for join in JOINS:
        for base in FAMILIES:
            assert f"{base}-{join}" in names
            assert load_recipe(f"{base}-{join}").model["join"] == join


def test_recipes_of_one_family_differ_in_the_join_alone():
    """Or the comparison of joins would compare something else as well."""
    for base in FAMILIES:
        recipes = [load_recipe(f"{base}-{join}") for join in JOINS]
        assert len({json.dumps(dataclasses.asdict(r.train)) for r in recipes}) == 1
        assert len({json.dumps({**r.model, "join": ""}) for r in recipes}) == 1


def test_overrides():
    recipe = load_recipe(
        "digits-ms",
        ["epochs=3", "train.lr=1e-4", "join=or", "model.widths=[4, 4, 8]", "limit_test=9"],
    )
    assert recipe.train.epochs == 3 and recipe.train.lr == 1e-4
    assert recipe.model["join"] == "or" and recipe.model["widths"] == [4, 4, 8]
    assert recipe.data.limit_test == 9


@pytest.mark.parametrize(
    "override, match",
    [
        ("epoch=3", "no key 'epoch'; did you mean 'epochs'"),
        ("model.widht=[1]", "no key 'model.widht'; did you mean 'widths'"),
        ("data.sise=3", "no key 'data.sise'; did you mean 'size'"),
        ("join=sow", "join 'sow' is unknown. Did you mean 'sew'"),
        ("model.name=restnet8", "Did you mean 'resnet8'"),
        ("epochs=many", "'train.epochs' is 'many'"),
        ("epochs=0", "epochs is 0; give 1 or more"),
        ("optimizer=lion", "'train.optimizer' is 'lion'.*adamw"),
        ("epochs", "is no key=value"),
    ],
)
def test_a_wrong_override_names_the_nearest(override, match):
    with pytest.raises(FormatError, match=match):
        load_recipe("digits-ms", [override])


@pytest.mark.parametrize(
    "text, match",
    [
        ('[data]\nname="digits"\n[modle]\nname="mlp"\n', "no key 'modle'; did you mean 'model'"),
        ('[data]\nnmae="digits"\n[model]\nname="mlp"\n', "no key 'data.nmae'; did you mean 'name'"),
        ('[data]\nname="digits"\n[model]\nname="mlp"\n[train]\nepoch=3\n', "did you mean 'epochs'"),
        ('[data]\nname="digits"\n[model]\nnam="mlp"\n', r"\[model\] has no name"),
        ("[data]\n", "is missing"),
        ("not toml", "cannot be read as TOML"),
    ],
)
def test_a_wrong_file_names_the_key(tmp_path, text, match):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(FormatError, match=match):
        load_recipe(path)


def test_an_unknown_recipe_names_the_nearest(tmp_path):
    with pytest.raises(FormatError, match="no recipe 'digits-mss'; did you mean 'digits-ms'"):
        load_recipe("digits-mss")
    with pytest.raises(FormatError, match="there is no file"):
        load_recipe(tmp_path / "nothing.toml")


# ---- run folders


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.set_num_threads(1)
    recipe = load_recipe("digits-sew", ["epochs=1", "limit_train=200", "widths=[4, 4, 8]"])
    return folder, recipe, train_recipe(recipe, folder, progress=False)


def test_a_run_comes_back_as_it_was(run):
    folder, recipe, result = run
    net, again, metrics = load_run(folder)
    assert again == recipe and metrics == result.metrics
    assert net.config.join == "sew" and not net.training
    assert state_digest(net.state_dict()) == metrics["digest"]
    assert evaluate(net, load_dataset("digits", split="test"))["accuracy"] == metrics["accuracy"]


def test_the_same_recipe_gives_the_same_bits(run, tmp_path):
    again = train_recipe(run[1], tmp_path, progress=False)
    assert again.metrics["digest"] == run[2].metrics["digest"]


def test_an_unfinished_run_gives_its_checkpoint(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    (folder / "weights.safetensors").unlink()
    (folder / "metrics.json").unlink()
    net, _, metrics = load_run(folder)
    assert metrics == {} and state_digest(net.state_dict()) == run[2].metrics["digest"]


def test_weights_of_another_model_name_file_and_tensor(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    config = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**config, "widths": [4, 8, 8]}))
    with pytest.raises(FormatError, match=r"weights.safetensors' holds.*'stage2\..*wanted"):
        load_run(folder)


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda f: (f / "model.json").unlink(), "no file .*model.json"),
        (lambda f: (f / "model.json").write_text("{"), "model.json' is no JSON"),
        (lambda f: (f / "model.json").write_text("[]"), "holds no JSON object"),
        (lambda f: (f / "model.json").write_text("{}"), "model.json"),
        (lambda f: (f / "recipe.json").write_text('{"name": "x"}'), "recipe.json.*is missing"),
        (lambda f: (f / "weights.safetensors").write_bytes(b"x" * 99), "no safetensors file"),
    ],
)
def test_a_spoilt_run_folder_is_named(run, tmp_path, spoil, match):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    spoil(folder)
    with pytest.raises(RanvierError, match=match):
        load_run(folder)
