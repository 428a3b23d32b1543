"""ranvier doctor: says what is here, and for what is not: what is off and how to turn it on."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from ranvier.cli import doctor
from ranvier.deploy import lava_compat, lava_probe


def shown(report) -> str:
    out = io.StringIO()
    doctor.show(report, Console(file=out, width=200))
    return out.getvalue()


def part(report, name):
    (found,) = [row for row in report["parts"] if row["name"] == name]
    return found


def test_report_is_plain_data_and_complete():
    report = json.loads(json.dumps(doctor.collect()))
    assert report["packages"]["snntorch"] == "1.0.0"
    assert all(version for version in list(report["packages"].values())[:16])
    for row in report["parts"]:
        assert row["here"] or (row["without"] and row["turn_on"]), row["name"]
    assert "snntorch" in shown(report)


def test_missing_lava_says_what_is_off_and_how_to_turn_it_on(monkeypatch):
    monkeypatch.setattr(lava_compat, "_is_there", lambda module: False)
    report = doctor.collect(lava_run=True)
    assert not part(report, "lava")["here"] and not part(report, "lava")["ran"]
    text = shown(report)
    assert "lava-nc 0.10.0" in text
    assert "off: the engine 'lava' and its column" in text
    assert "on:  make lava" in text


def test_data_folder_is_reported(monkeypatch, tmp_path):
    (tmp_path / "mnist.npz").touch()
    monkeypatch.setenv("RANVIER_DATA", str(tmp_path))
    assert part(doctor.collect(), "data")["detail"] == f"{tmp_path}: mnist"
    monkeypatch.setenv("RANVIER_DATA", str(tmp_path / "gone"))
    assert not part(doctor.collect(), "data")["here"]


@pytest.mark.lava
def test_lava_really_runs():
    row = part(doctor.collect(lava_run=True), "lava")
    assert row["here"] and row["ran"], row["detail"]


@pytest.mark.lava
def test_control_a_lava_that_spikes_otherwise_is_found(monkeypatch):
    monkeypatch.setattr(lava_probe, "EXPECTED", (1, 1, 1, 1, 1, 1))
    row = part(doctor.collect(lava_run=True), "lava")
    assert not row["here"] and not row["ran"]
    assert "(0, 0, 1, 1, 1, 1)" in row["detail"]
