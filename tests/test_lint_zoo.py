"""docs/lint.md is current, and what it says of the zoo is what `lint` and `compile` do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranvier.deploy.linter import codes_table
from ranvier.sim.lint_zoo import Row, counted, markdown, row
from ranvier.sim.zoo_cases import Case, cases
from ranvier.train.errors import RanvierError

PAGE = (Path(__file__).parent.parent / "docs" / "lint.md").read_text(encoding="utf-8")
CHEAP = (
    "mlp",
    "resnet-digits sew",
    "resnet-digits or",
    "cnn psn",
    "dvs-cnn",
    "ssnn-vgg9",
    "syna-resnet18",
)
by_title = {c.title: c for c in cases()}


def test_the_page_lists_every_code():
    assert codes_table().replace("## ", "### ") in PAGE, "regenerate docs/lint.md"


def test_the_page_lists_every_network():
    for case in cases():
        assert f"| {case.title} |" in PAGE, f"regenerate docs/lint.md: {case.title}"


@pytest.mark.parametrize("title", CHEAP)
def test_the_page_is_current(title):
    line = markdown([row(by_title[title])]).splitlines()[2]
    assert line in PAGE, f"regenerate docs/lint.md: now {line}"


@pytest.mark.parametrize("title", ["mlp", "cnn psn", "dvs-cnn"])
def test_the_verdict_is_the_compilers(title):
    from ranvier.sim.zoo import compiled

    said = row(by_title[title]).verdict == "yes"
    try:
        compiled(by_title[title])
    except RanvierError:
        assert not said
    else:
        assert said


def test_what_cannot_be_traced_is_told():
    refused = Row(Case("net"), refused="no")
    assert refused.verdict == "not traced" and "- net: no" in markdown([refused])
    assert counted(["RV2", "RV1", "RV2"]) == "RV1, RV2 x2"
