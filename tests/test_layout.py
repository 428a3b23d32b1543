"""The house rules of the folders, each with a control: a planted violation that must be found."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("train", "export", "deploy", "sim", "cli")  # imports point to the left
HEAVY = ("torch", "onnx", "lava")


def folders_with_code(root: Path) -> set[str]:
    """ranvier.<folder>... of every folder below a stage that has an __init__.py."""
    found = [init.parent.relative_to(root) for init in root.glob("*/**/__init__.py")]
    return {".".join(("ranvier", *folder.parts)) for folder in found if folder.parts[0] in STAGES}


def listed_packages() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return set(project["tool"]["setuptools"]["packages"])


def sources() -> Iterator[Path]:
    for stage in STAGES:
        yield from (ROOT / stage).rglob("*.py")


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that can run: all but what stands under `if TYPE_CHECKING`, for the checkers."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and getattr(child.test, "id", "") == "TYPE_CHECKING"):
            yield from executed(child)


def imported(code: str) -> Iterator[str]:
    """Every module that the code can import, wherever the import stands."""
    for node in executed(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module)
        elif isinstance(node, ast.Call) and _is_import_module(node.func) and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value


def _is_import_module(function: ast.expr) -> bool:
    name = getattr(function, "attr", getattr(function, "id", ""))
    return name in ("import_module", "__import__")


def later_stages(stage: str, code: str) -> list[str]:
    """The imports of `code`, a file of `stage`, that point to a stage behind it."""
    later = {f"ranvier.{name}" for name in STAGES[STAGES.index(stage) + 1 :]}
    return [name for name in imported(code) if ".".join(name.split(".")[:2]) in later]


def bare_names(code: str) -> list[str]:
    """The imports of `code` that name a stage without `ranvier.`, relative ones included."""
    return [name for name in imported(code) if name.split(".")[0] in (*STAGES, "")]


def heavy_imports(statement: str) -> set[str]:
    """Which of HEAVY a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*(set(sys.modules) & {set(HEAVY)!r}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_package_list_equals_the_folders():
    assert listed_packages() == folders_with_code(ROOT)


def test_control_a_new_folder_is_noticed(tmp_path):
    (tmp_path / "sim" / "new").mkdir(parents=True)
    (tmp_path / "sim" / "new" / "__init__.py").touch()
    assert folders_with_code(tmp_path) == {"ranvier.sim.new"}


def test_no_file_lies_in_a_folder_without_init():
    """setuptools ships packages; a .py file in any other folder would be missing from the wheel."""
    assert not [file for file in sources() if not (file.parent / "__init__.py").exists()]


def test_no_stage_imports_a_later_one():
    wrong = {
        str(file.relative_to(ROOT)): names
        for file in sources()
        if (names := later_stages(file.relative_to(ROOT).parts[0], file.read_text("utf-8")))
    }
    assert not wrong


@pytest.mark.parametrize(
    "line",
    [
        "import ranvier.deploy.chip",
        "from ranvier.sim import run",
        "from ranvier import cli",
        "def f():\n    from ranvier.deploy.chip import LOIHI2",
        "import importlib; importlib.import_module('ranvier.sim.runner')",
    ],
)
def test_control_a_late_import_is_found(line):
    assert later_stages("export", line)
    assert not later_stages("cli", line)


def test_a_name_for_the_type_checkers_alone_is_no_import():
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ranvier.sim import run\n"
    assert not later_stages("export", code)


def test_nobody_imports_a_stage_by_its_bare_name():
    files = [*sources(), *(ROOT / "tests").rglob("*.py")]
    wrong = {str(f.relative_to(ROOT)): n for f in files if (n := bare_names(f.read_text("utf-8")))}
    assert not wrong


@pytest.mark.parametrize(
    "line",
    ["import train", "from export.graph import Graph", "from . import files", "import sim.x"],
)
def test_control_a_bare_name_is_found(line):
    assert bare_names(line)
    assert not bare_names("from ranvier.train import fit\nimport simplejson")


@pytest.mark.parametrize("stage", STAGES)
def test_importing_a_stage_loads_nothing_heavy(stage):
    assert not heavy_imports(f"import ranvier.{stage}")


def test_control_a_heavy_import_is_seen():
    assert heavy_imports("import onnx") == {"onnx"}


@pytest.mark.parametrize(
    "module",
    [
        "export.graph",
        "export.neurons",
        "deploy.program",
        "deploy.chip",
        "sim.reference",
        "sim.ledger",
    ],
)
def test_the_joints_load_nothing_heavy(module):
    """What the stages hand to each other is numpy alone."""
    if not (ROOT / f"{module.replace('.', '/')}.py").exists():
        pytest.skip(f"{module} is not there")
    assert not heavy_imports(f"import ranvier.{module}")


@pytest.mark.slow
def test_wheel_holds_every_source_file(tmp_path):
    copy = tmp_path / "copy"  # a build in the checkout would leave build/ there
    for stage in STAGES:
        shutil.copytree(ROOT / stage, copy / stage)
    for file in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / file, copy)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-q",
        "-w",
        str(tmp_path),
        str(copy),
    ]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"ranvier/{file.relative_to(ROOT)}" for file in sources()} <= names
    assert {f"ranvier/{stage}/py.typed" for stage in STAGES} <= names
    assert not [name for name in names if name.split("/")[0] in (*STAGES, "tests", "typings")]
