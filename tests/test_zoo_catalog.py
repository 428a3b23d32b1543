"""The catalog knows every network and neuron, and counts what the code builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from ranvier.train import catalog, list_models
from ranvier.train.errors import RangeError
from ranvier.train.networks import NEURONS


def test_every_name_is_described():
    assert set(catalog.FACTS) == set(list_models())
    assert set(catalog.NEURON_FACTS) == set(NEURONS)


def test_the_page_is_up_to_date_in_names_and_verdicts():
    """Counting all of it again takes minutes; `python -m ranvier.train.catalog` does."""
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines()}
    for name, facts in catalog.FACTS.items():
        assert rows[name].endswith(f"| {facts.verdict} |"), f"regenerate docs/models.md: {name}"
    assert page.endswith(catalog.neuron_table())


def test_rows_of_small_networks_are_those_of_the_code():
    """Whole rows, counted again; so a changed layout, source or figure shows."""
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    names = ["cnn", "mlp", "resnet-digits", "resnet8", "dvs-snn"]
    for line in catalog.model_table(names).splitlines()[2:]:
        assert f"\n{line}\n" in page, f"regenerate docs/models.md: {line.split(' | ')[0]}"


@pytest.mark.slow
def test_the_page_is_what_the_code_prints():
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    assert page == catalog.page()


def test_rows_are_counted():
    row = catalog.describe("resnet32")
    assert (row.n_parameters, row.join, row.steps) == (464_154, "vanilla", 4)
    assert row.mega_flops == 72.500608
    line = catalog.model_table(["resnet32"]).splitlines()[-1]
    assert "| 464,154 |" in line and "| 72.5 |" in line


def test_what_is_not_recorded_is_refused(monkeypatch):
    monkeypatch.setattr(catalog, "FACTS", {})
    with pytest.raises(RangeError, match="FACTS"):
        catalog.describe("mlp")


def test_the_neuron_table():
    assert len(catalog.neuron_table().splitlines()) == len(NEURONS) + 2
