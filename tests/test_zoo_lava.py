"""The zoo's page: what compiles is compared value for value, what does not is refused with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ranvier.sim import zoo
from ranvier.sim.zoo_cases import Case, cases
from ranvier.train import list_models

PAGE = Path(__file__).parent.parent / "docs" / "zoo-lava.md"
TINY = Case("cnn", {"image_size": 8, "layers": (4, 0), "steps": 2}, "tiny")
OR = Case("resnet8", {"join": "or", "widths": (4, 4, 4), "image_size": 8, "steps": 2}, "tiny")
RELU = Case("dvs-cnn", {"layers": (4, 0), "image_size": 8}, "tiny")


def test_every_model_has_a_case():
    assert {c.name for c in cases()} == set(list_models())
    titles = [c.title for c in cases()]
    assert len(titles) == len(set(titles))


def test_what_compiles_is_compared_and_the_rest_refused():
    ran, refused = zoo.check([TINY, RELU], lava=False)
    assert ran.mismatches == {"dense": 0, "events": 0, "auto": 0}
    assert ran.n_spikes > 0 and ran.n_values > 500
    assert refused.mismatches is None and "ReLU" in refused.refusal
    page = zoo.page([ran, refused])
    assert (
        "1 networks compile; 0 ran in Lava" in page and "0 mismatches in all. 1 are refused" in page
    )
    assert page.count("not run") == 1


def test_control_a_wrong_value_is_counted(monkeypatch):
    honest = zoo._run

    def lying(program, x, engine):
        found = honest(program, x, engine)
        if engine == "dense":
            record = found.trace[program.readout.population]
            np.asarray(record.u).flat[0] += 1
        return found

    monkeypatch.setattr(zoo, "_run", lying)
    (outcome,) = zoo.check([TINY], lava=False)
    assert outcome.mismatches == {"dense": 1, "events": 0, "auto": 0}


def test_finished_networks_are_kept(tmp_path, monkeypatch):
    (first,) = zoo.check_all([TINY], False, tmp_path)
    monkeypatch.setattr(zoo, "compiled", None)  # not to be called again
    (again,) = zoo.check_all([TINY], False, tmp_path)
    assert again == first
    with pytest.raises(TypeError):  # another network of the same title is another network
        zoo.check_all([replace(TINY, size="other")], False, tmp_path)


def test_an_internal_error_is_no_refusal(monkeypatch):
    def broken(case):
        raise ZeroDivisionError

    monkeypatch.setattr(zoo, "compiled", broken)
    with pytest.raises(ZeroDivisionError):
        zoo.check([TINY], lava=False)


@pytest.mark.lava
def test_lava_computes_the_same():
    for outcome in zoo.check([TINY, OR]):
        assert outcome.mismatches == {"dense": 0, "events": 0, "auto": 0, "lava": 0}
        assert outcome.n_spikes > 0


def test_the_page_has_every_case_and_no_mismatch():
    """The figures take minutes; `python -m ranvier.sim.zoo > docs/zoo-lava.md` makes them again."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines if line[:1] == "|"}
    listed = {line.removeprefix("- ") for line in lines if line.startswith("- ")}  # not run yet
    assert {c.title for c in cases()} <= set(rows) | listed
    assert not listed & set(rows)
    assert "; 0 mismatches in all" in "\n".join(lines)
