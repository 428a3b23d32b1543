"""The command line: the stages one by one from files, and one clear line for what cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ranvier.cli.app import run_app


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run of one short epoch on few digits."""
    folder = tmp_path_factory.mktemp("runs") / "ms"
    overrides = ["epochs=1", "limit_train=256", "limit_test=64"]
    argv = ["train", "digits-ms", "--out", str(folder), "--json"]
    for override in overrides:
        argv += ["-s", override]
    assert run_app(argv) == 0
    return folder


def test_the_stages_follow_each_other_from_files(run_folder: Path, capsys) -> None:
    run = str(run_folder)
    capsys.readouterr()
    assert run_app(["export", run, "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert [row["format"] for row in exported] == ["graph", "NIR", "ONNX"]
    for row in exported:
        assert float(row["largest difference to torch (measured)"]) < 1e-4
    assert run_app(["compile", run, "--json"]) == 0
    compiled = json.loads(capsys.readouterr().out)[0]
    assert compiled["populations"] > 5 and (run_folder / "program.h5").exists()
    assert run_app(["place", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_cores"] >= 1
    counts = run_folder / "ledger.json"
    argv = ["run", run, "--data", "digits", "--limit", "32", "--ledger", str(counts), "--json"]
    assert run_app(argv) == 0
    ran = json.loads(capsys.readouterr().out)[0]
    assert (
        ran["samples"] == 32
        and ran["synops"] > 0
        and json.loads(counts.read_text())["n_samples"] == 32
    )


def test_a_nir_file_alone_goes_to_the_chip(run_folder: Path, tmp_path: Path, capsys) -> None:
    assert run_app(["export", str(run_folder), "--nir", str(tmp_path / "n.nir")]) == 0
    argv = [
        "compile",
        str(tmp_path / "n.nir"),
        "--calibration",
        "digits",
        "-o",
        str(tmp_path / "n.h5"),
    ]
    assert run_app(argv) == 0
    from ranvier.deploy import Program

    assert Program.load(tmp_path / "n.h5").digest() == _compiled(run_folder, capsys)


def _compiled(run_folder: Path, capsys) -> str:
    from ranvier.deploy import Program

    capsys.readouterr()
    argv = [
        "compile",
        str(run_folder),
        "--calibration",
        "digits",
        "-o",
        str(run_folder / "again.h5"),
    ]
    assert run_app(argv) == 0
    return Program.load(run_folder / "again.h5").digest()


def test_compare_holds_the_engines_against_each_other(
    run_folder: Path, tmp_path: Path, capsys
) -> None:
    html = tmp_path / "report.html"
    argv = [
        "compare",
        str(run_folder),
        "--engines",
        "torch,onnx,dense",
        "--limit",
        "24",
        "--html",
        str(html),
    ]
    assert run_app(argv) == 0
    assert "<html" in html.read_text() and "torch" in capsys.readouterr().out
    assert run_app([*argv, "--max-drop", "-200"]) == 1


def test_lint_prints_a_table_json_and_sarif(run_folder: Path, capsys) -> None:
    run = str(run_folder)
    capsys.readouterr()
    assert run_app(["lint", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "RV201" in {f["code"] for f in found}
    assert run_app(["lint", run, "--sarif"]) == 0
    sarif = json.loads(capsys.readouterr().out)
    assert [r["ruleId"] for r in sarif["runs"][0]["results"]] == [f["code"] for f in found]
    assert run_app(["lint", "--all", "--pattern", "mlp", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["deploys"] == "yes"


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.strip().splitlines()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["run", "nothing.h5"], "'nothing.h5': there is no such file"),
        (["export", "nothing"], "'nothing': there is no such file or run folder"),
        (["compile", "{junk}"], "it is no HDF5 file"),
        (["run", "{junk}"], "it is no HDF5 file"),
        (["train", "digits-mss"], "digits-ms"),
        (["train", "digits-ms", "-s", "epocs=3"], "did you mean 'epochs'"),
        (["place", "{junk}", "--chip", "loihi9"], "it is no HDF5"),
        (["bench", "--suite", "none"], "suite 'none' is none of sim, train"),
        (["run"], "Missing argument"),
        (["lint"], "give a run folder or a file, or --all"),
        (["study", "residual", "--seeds", "x"], "seeds 'x' are no whole numbers"),
        (["study", "residual", "--recipe", "digitz"], "there is no recipe 'digitz'"),
        (["study", "residual", "-s", "lrr=1"], "did you mean 'lr'"),
        (["study", "residual", "--stored", "--runs", "x"], "exclude each other"),
        (["study", "depth", "--depths", "21"], "depth 21 is none of 8"),
        (["fly"], "No such command 'fly'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str], text: str, tmp_path: Path, capsys
) -> None:
    junk = tmp_path / "junk.h5"
    junk.write_bytes(b"this is no network" * 100)
    assert run_app([a.format(junk=junk) for a in argv]) == 2
    (line,) = lines(capsys)
    assert text in line and line.startswith("ranvier: ")


def test_a_checkpoint_of_another_model_is_named_with_its_first_difference(
    run_folder: Path, tmp_path: Path, capsys
) -> None:
    import shutil

    other = tmp_path / "other"
    artifacts = shutil.ignore_patterns("net.*", "graph.h5", "program.h5")
    shutil.copytree(run_folder, other, ignore=artifacts)
    model = json.loads((other / "model.json").read_text())
    model["widths"] = [8, 8, 16]
    (other / "model.json").write_text(json.dumps(model))
    capsys.readouterr()
    assert run_app(["export", str(other)]) == 2
    (line,) = lines(capsys)
    assert "weights.safetensors" in line and "conv" in line
    assert not (other / "net.nir").exists() and not (other / "graph.h5").exists()


def test_an_input_that_the_program_cannot_take_is_refused(
    run_folder: Path, tmp_path: Path, capsys
) -> None:
    assert run_app(["compile", str(run_folder)]) == 0
    np.savez(tmp_path / "wrong.npz", x=np.zeros((4, 1, 9, 9), np.float32))
    np.savez(tmp_path / "bright.npz", x=np.full((4, 1, 8, 8), 7.0, np.float32))
    capsys.readouterr()
    assert run_app(["run", str(run_folder), "--data", str(tmp_path / "wrong.npz")]) == 2
    assert "it takes [time, batch, 1, 8, 8]" in lines(capsys)[0]
    assert run_app(["run", str(run_folder), "--data", str(tmp_path / "bright.npz")]) == 2
    assert "sends 0..16" in lines(capsys)[0]


def test_debug_shows_the_traceback() -> None:
    from ranvier.train.errors import RanvierError

    with pytest.raises(RanvierError):
        run_app(["run", "nothing.h5", "--debug"])


def test_the_module_and_the_script_are_one_command() -> None:
    module = [sys.executable, "-m", "ranvier.cli"]
    script = [str(Path(sys.executable).with_name("ranvier"))]
    outs = [
        subprocess.run([*c, "models", "vgg*"], capture_output=True, text=True, timeout=120)
        for c in (module, script)
    ]
    assert outs[0].stdout == outs[1].stdout != "" and outs[0].returncode == 0
    bad = subprocess.run([*module, "run", "x.h5"], capture_output=True, text=True, timeout=120)
    assert bad.returncode == 2 and bad.stdout == "" and "Traceback" not in bad.stderr
