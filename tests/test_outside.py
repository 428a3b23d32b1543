"""What somebody from outside does with networks and files of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import snntorch as snn
import torch
from snntorch import utils
from torch import nn

from ranvier.deploy import Program, compile, lint, place
from ranvier.export import trace, write_net, write_nir, write_onnx
from ranvier.sim import run
from ranvier.sim.reference import run_chip_time, run_reference
from ranvier.train import evaluate, fit
from ranvier.train.errors import (
    DataError,
    RangeError,
    RanvierError,
    ShapeError,
    UnsupportedError,
)
from ranvier.train.trainer import Trainer


class Line(nn.Module):
    """Convolutions along one axis, strided, grouped and dilated, in a loop of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(2, 6, 5, stride=2, padding=2)
        self.n1 = snn.Leaky(beta=0.9, init_hidden=True, reset_mechanism="zero")
        self.c2 = nn.Conv1d(6, 6, 3, padding=2, dilation=2, groups=3)
        self.n2 = snn.Leaky(beta=0.7, init_hidden=True, reset_mechanism="zero")
        self.fc = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        utils.reset(self)
        steps = [self.n2(self.c2(self.n1(self.c1(frame)))) for frame in x]
        return torch.stack([self.fc(nn.functional.avg_pool1d(s, 2).flatten(1)) for s in steps])


@pytest.fixture(scope="module")
def line() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = Line().eval()
    for layer in (net.c1, net.c2):
        layer.weight.data *= 3  # so that both populations fire
    return net, (torch.rand(6, 4, 2, 32) < 0.3).float()


@pytest.mark.parametrize("engine", ["dense", "events", "auto"])
def test_a_line_of_convolutions_runs_alike_everywhere(
    line: tuple[nn.Module, torch.Tensor], engine: str
) -> None:
    net, x = line
    program = compile(trace(net, x), calibration=x)
    wanted = run(program, x, engine="reference", record=("spikes", "v"))
    found = run(program, x, engine=engine, record=("spikes", "v"))
    np.testing.assert_array_equal(found.output, wanted.output)
    for name, record in wanted.trace.items():
        np.testing.assert_array_equal(found.trace[name].spikes, record.spikes, err_msg=name)
        if record.v is not None:
            np.testing.assert_array_equal(found.trace[name].v, record.v, err_msg=name)
    assert wanted.trace["n2"].spikes.any(), "a silent network would prove nothing"


def test_a_line_of_convolutions_in_chip_time(line: tuple[nn.Module, torch.Tensor]) -> None:
    net, x = line
    program = compile(trace(net, x), calibration=x)
    sent = program.encode(x)
    wanted = run_reference(program, sent)
    for found in run_chip_time(program, [sent, sent]):
        for name in wanted.sent:
            np.testing.assert_array_equal(found.sent[name], wanted.sent[name], err_msg=name)


def test_a_trace_names_what_it_holds(line: tuple[nn.Module, torch.Tensor]) -> None:
    net, x = line
    result = run(compile(trace(net, x), calibration=x), x, record=("spikes",))
    assert list(result.trace) == list(result.trace.keys()) and "n1" in result.trace
    with pytest.raises(KeyError, match="no population 'c1' was recorded, only input, n1, n2"):
        result.trace["c1"]


# ---- a run folder that is used twice -------------------------------------------------------------

SMALL = ["-s", "limit_train=96", "-s", "limit_test=48", "-s", "batch_size=32"]


def ranvier(*words: str) -> int:
    from ranvier.cli.app import run_app

    return run_app([str(w) for w in words])


def train(recipe: str, folder: Path, *words: str) -> int:
    return ranvier("train", recipe, "--out", folder, *SMALL, *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside") / "run"
    assert train("digits-ms", folder, "-s", "epochs=1") == 0
    assert ranvier("compile", folder) == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_program_of_earlier_weights_is_not_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("digits-ms", folder, "-s", "epochs=2") == 0
    for command in (["compare", folder, "--engines", "torch,dense", "--limit", 8], ["run", folder]):
        assert ranvier(*command) == 2
        assert "was trained again since. Run `ranvier compile" in capsys.readouterr().err
    assert ranvier("compile", folder) == 0
    assert ranvier("run", folder, "--limit", "8") == 0


def test_a_refused_resume_leaves_the_run_as_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert train("digits-sew", folder, "--resume", "-s", "epochs=1") == 2
    assert "network with join=ms, now join=sew" in capsys.readouterr().err
    assert train("digits-ms", folder, "--resume", "-s", "epochs=7") == 2
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_an_unfinished_second_training_is_not_taken_for_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_end_epoch", stop)
    capsys.readouterr()
    assert train("digits-sew", folder, "-s", "epochs=1") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "ranvier: interrupted"
    assert not (folder / "weights.safetensors").exists()
    assert ranvier("run", folder) == 2 and "trained again since" in capsys.readouterr().err
    assert (folder / "previous-weights.safetensors").exists()


def test_wrong_settings_leave_no_folder(tmp_path: Path) -> None:
    assert train("digits-ms", tmp_path / "run", "-s", "lr=nan") == 2
    assert not (tmp_path / "run").exists()


# ---- what no chip can run is one finding, with its reason ----------------------------------------


def test_attention_over_time_is_one_finding_each() -> None:
    from ranvier.train import create_model
    from ranvier.train.models_syna import Attention

    net = create_model("syna-resnet18", steps=2, widths=(4, 4, 4, 4), image_size=16).eval()
    graph = trace(net, torch.rand(2, 3, 16, 16))
    errors = [f for f in lint(graph) if f.severity == "error"]
    wanted = [name for name, m in net.named_modules() if isinstance(m, Attention)]
    assert sorted(f.node for f in errors) == sorted(wanted) and len(wanted) > 8
    assert all("computed from all steps" in f.message for f in errors)
    with pytest.raises(UnsupportedError, match="unit1_1.attention2.*computed from all steps"):
        compile(graph, calibration=torch.rand(2, 3, 16, 16))


class TimeGate(nn.Module):
    """A Linear along the time axis, in a user's own loop."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif, self.over_time = nn.Linear(6, 5), snn.Leaky(beta=0.5), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mem, sent = self.lif.init_leaky(), []
        for _ in range(4):
            spikes, mem = self.lif(self.fc(x), mem)
            sent.append(spikes)
        series = torch.stack(sent)
        return self.over_time(series.mean(2).t())


@pytest.mark.parametrize("batch", [3, 4])  # 4: as many samples as steps
def test_a_linear_along_time_is_refused_by_its_line(batch: int) -> None:
    said = r"test_outside.py:\d+: (a Linear weighs the time steps|t gives .* it mixes samples or steps)"
    with pytest.raises(UnsupportedError, match=said):
        trace(TimeGate().eval(), torch.rand(batch, 6))


# ---- a data set of one's own ---------------------------------------------------------------------


def save_set(folder: Path, **changes: Any) -> None:
    rng = np.random.default_rng(0)
    parts: dict[str, Any] = {
        "x_train": rng.integers(0, 256, (12, 8, 8), dtype=np.uint8), "y_train": np.arange(12) % 4,
        "x_test": rng.integers(0, 256, (4, 8, 8), dtype=np.uint8), "y_test": np.arange(4),
    }  # fmt: skip
    parts |= changes
    np.savez(folder / "mine.npz", **{k: v for k, v in parts.items() if v is not None})


def test_an_own_set_loads_by_its_file(tmp_path: Path) -> None:
    from ranvier.train import load_dataset

    save_set(tmp_path)
    found = load_dataset("mine", tmp_path, split="test")
    stored = np.load(tmp_path / "mine.npz")["x_test"]
    np.testing.assert_array_equal(found.x.numpy()[:, 0], stored / np.float32(255))
    assert found.n_classes == 4 and found.y.tolist() == [0, 1, 2, 3]
    assert len(load_dataset("mine", tmp_path, split="all")) == 16
    floats = np.linspace(-2, 2, 12 * 3 * 8 * 8).reshape(12, 3, 8, 8)
    save_set(tmp_path, x_train=floats, x_test=floats[:4])
    assert load_dataset("mine", tmp_path).input_shape == (3, 8, 8)
    np.testing.assert_array_equal(load_dataset("mine", tmp_path).x, floats.astype(np.float32))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"y_test": None}, "no array 'y_test', only x_train, y_train, x_test"),
        ({"y_train": np.arange(3)}, r"x_train \(12, 8, 8\) and y_train \(3,\)"),
        ({"y_train": np.arange(12) - 1}, "y_train must be whole numbers from 0"),
        ({"y_train": np.arange(12) / 2}, "y_train must be whole numbers from 0"),
        ({"x_train": np.full((12, 8, 8), np.nan)}, "x_train holds values that are not finite"),
        ({"x_train": np.zeros((12, 64))}, r"x_train of float64 and shape \(12, 64\)"),
        ({"x_test": np.zeros((4, 9, 9))}, "in train and test; one shape"),
        ({"x_train": np.array([{}] * 12)}, "cannot be read as npz"),
    ],
)
def test_an_own_set_that_cannot_be_used_says_why(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    from ranvier.train import load_dataset

    save_set(tmp_path, **changes)
    with pytest.raises(DataError, match=said):
        load_dataset("mine", tmp_path)


def test_an_own_set_is_named_where_it_is_missed(tmp_path: Path) -> None:
    from ranvier.train import load_dataset

    with pytest.raises(DataError, match=rf"or your own in '{tmp_path}': mine.npz with x_train"):
        load_dataset("mine", tmp_path)
    for name in ("../mine", "", str(tmp_path / "mine")):
        with pytest.raises(DataError, match="there is no set"):
            load_dataset(name, tmp_path / "inside")


def test_run_takes_an_own_set_and_says_what_is_wrong_with_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_set(tmp_path)
    assert ranvier("run", folder, "--data", "mine", "--data-dir", tmp_path) == 0
    (tmp_path / "cut.npz").write_bytes((tmp_path / "mine.npz").read_bytes()[:200])
    np.savez(tmp_path / "words.npz", x=np.array(["a"]))
    capsys.readouterr()
    for data, said in (
        (tmp_path, "is a folder; name the set"),
        (tmp_path / "none.npz", "there is no file"),
        (tmp_path / "cut.npz", "cannot be read as npz"),
        (tmp_path / "mine.npz", "an array 'x' is needed"),
        (tmp_path / "words.npz", "numbers, and one label a sample"),
    ):
        assert ranvier("run", folder, "--data", data) == 2
        assert said in capsys.readouterr().err


# ---- the wrong kind of thing ---------------------------------------------------------------------


def plain() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), snn.Leaky(beta=0.5, init_hidden=True), nn.Linear(5, 3))
    return net, torch.rand(4, 6)


def test_a_module_where_a_graph_belongs_is_told_the_way(tmp_path: Path) -> None:
    net, x = plain()
    graph: Any = trace(net, x, steps=3)
    program: Any = compile(graph, calibration=x)
    anything: Any = net
    for call in (
        lambda: write_nir(anything, tmp_path / "a.nir"),
        lambda: write_onnx(anything, tmp_path / "a.onnx", steps=2),
        lambda: lint(anything),
    ):
        with pytest.raises(UnsupportedError, match=r"Sequential is no Graph.*trace\(net, sample\)"):
            call()
    for call in (
        lambda: write_net(graph, tmp_path / "a.net"),
        lambda: place(graph),
        lambda: run(graph, x),
    ):
        with pytest.raises(UnsupportedError, match="Graph is no Program; compile"):
            call()
    with pytest.raises(UnsupportedError, match="NoneType is no Chip; give LOIHI1 or LOIHI2"):
        place(program, None)  # type: ignore[arg-type]
    assert place(program, "loihi2").n_cores == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("x", ["abc", None, np.array([None] * 24, object).reshape(4, 6)])
def test_what_is_no_array_of_numbers_is_told(x: Any) -> None:
    net, sample = plain()
    graph = trace(net, sample, steps=3)
    with pytest.raises(ShapeError, match="x is no array of real numbers"):
        graph.run(x)
    with pytest.raises(ShapeError, match="x is no array of real numbers"):
        run(compile(graph, calibration=sample), x)


def test_one_record_needs_no_tuple_and_ledgers_sum() -> None:
    net, x = plain()
    result = run(compile(trace(net, x, steps=3), calibration=x), x, record="spikes")
    assert result.trace["1"].spikes is not None
    assert sum([result.ledger, result.ledger]).n_synops == 2 * result.ledger.n_synops
    with pytest.raises(TypeError):
        result.ledger + 3


@pytest.mark.parametrize(
    ("bits", "said"),
    [(1, "weights of both signs, and one bit holds"), (4.5, "a whole number, 1..8")],
)
def test_weight_bits_that_hold_nothing(bits: Any, said: str) -> None:
    net, x = plain()
    with pytest.raises(RangeError, match=said):
        compile(trace(net, x, steps=3), calibration=x, weight_bits=bits)


def test_one_bit_is_enough_for_weights_of_one_sign() -> None:
    net, x = plain()
    for p in net.parameters():
        p.data.abs_()
    program = compile(trace(net, x, steps=3), calibration=x, weight_bits=1)
    weights = [p.map.weight for p in program.projections.values() if p.bits == 1]
    assert weights and all(set(np.unique(w)) <= {0, 128} for w in weights)
    np.testing.assert_array_equal(run(program, x).output, run(program, x, "reference").output)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8, bool])
def test_a_sample_of_any_numbers_is_traced(dtype: Any) -> None:
    net, x = plain()
    assert trace(net, (x.numpy() * 2).astype(dtype), steps=3).inputs[0].shape == (6,)


def test_a_sample_that_is_no_array_is_told() -> None:
    for wrong in (None, "abc", [object()] * 4):
        with pytest.raises(ShapeError, match="the sample is no array of real numbers"):
            trace(plain()[0], wrong)


# ---- the command line ----------------------------------------------------------------------------


def test_train_prints_figures_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("digits-ms", tmp_path / "run", "-s", "epochs=1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:1] == ["accuracy"] and float(line.split()[1]) > 0 for line in lines)
    assert train("digits-ms", tmp_path / "run", "-s", "epochs=1") == 0
    assert "holds an earlier training" in capsys.readouterr().err


def test_version_and_debug_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert ranvier("--version") == 0 and capsys.readouterr().out.startswith("ranvier 0.")
    assert ranvier("--help") == 0 and "--debug" in capsys.readouterr().out
    assert ranvier() == 2
    assert "Usage: ranvier" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lint", "--all", "--pattern", "zzz"], "no network's name matches 'zzz'"),
        (["compare", "RUN", "--engines", "torch", "--limit", "0"], "compare: limit is 0"),
        (["compare", "RUN", "--engines", "torch", "--lava-limit", "-1"], "lava_limit is -1"),
        (["compile", "RUN/net.nir"], "--calibration digits, or FILE.npz"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "RUN/net.nir" in words:
        assert ranvier("export", folder, "--nir", folder / "net.nir", "--no-verify") == 0
    capsys.readouterr()
    assert ranvier(*(w.replace("RUN", str(folder)) for w in words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_no_model_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert ranvier("models", "zzz") == 0 and "matches 'zzz'" in capsys.readouterr().err
    assert ranvier("models", "zzz", "--json") == 0 and capsys.readouterr().out.strip() == "[]"


# ---- training on what one has --------------------------------------------------------------------


def few() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return rng.random((24, 6)), np.arange(24) % 3


def test_fit_and_evaluate_take_a_pair_of_arrays() -> None:
    x, y = few()
    net = nn.Sequential(nn.Linear(6, 3))
    found = fit(net, (x, y), (x, y), epochs=2, batch_size=8, progress=False)
    assert found.metrics["n_test"] == 24
    tested = evaluate(net, (torch.from_numpy(x), torch.from_numpy(y)))
    assert tested["accuracy"] == found.metrics["accuracy"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": None}, "NoneType is no data set"),
        ({"train": few()[0]}, "ndarray is no data set"),
        ({"train": (few()[0], few()[1][:3])}, r"x \[n, ...\] and one class number"),
        ({"train": (few()[0], few()[1] - 1)}, r"x \[n, ...\] and one class number"),
        ({"train": (few()[0] * np.nan, few()[1])}, "'own' holds values that are not finite"),
        ({"epochs": "3"}, "epochs='3' has a wrong type"),
        ({"accelerator": "cuda"}, "accelerator='cuda' with 1 devices is not to be had"),
        ({"net": "net"}, "str is no Module; give the network"),
    ],
)
def test_fit_says_what_it_cannot_use(change: dict[str, Any], said: str) -> None:
    if change.get("accelerator") == "cuda" and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    options: dict[str, Any] = {
        "net": nn.Linear(6, 3),
        "train": few(),
        "epochs": 1,
        "progress": False,
    }
    with pytest.raises(RanvierError, match=said):
        fit(**(options | change))


def test_hidden_states_do_not_pass_from_batch_to_batch() -> None:
    x, y = few()
    net, _ = plain()
    fit(net, (x, y), epochs=2, batch_size=8, progress=False)
    once = evaluate(net, (x, y), batch_size=24)
    assert evaluate(net, (x, y), batch_size=1)["loss"] == pytest.approx(once["loss"], rel=1e-5)


def test_weights_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    """A membrane of NaN never fires, so the loss stays finite: only the weights tell."""
    x, y = few()
    net, _ = plain()
    net[0].weight.data[0, 0] = torch.nan
    for folder in (None, tmp_path):
        with pytest.raises(RanvierError, match="0.weight' is not finite in epoch 1"):
            fit(net, (x, y), epochs=2, out_dir=folder, progress=False)
    with pytest.raises(RangeError, match="'0.weight' holds NaN; train the network again"):
        trace(net, torch.rand(2, 6), steps=2)


def test_run_counts_a_label_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, _ = plain()
    rng = np.random.default_rng(0)
    x = (rng.random((5, 7, 6)) < 0.5).astype(np.float32)
    y = rng.integers(-1, 3, (5, 7))
    graph = trace(net, torch.from_numpy(x).transpose(0, 1))
    compile(graph, calibration=np.swapaxes(x, 0, 1)).save(tmp_path / "p.h5")
    np.savez(tmp_path / "steps.npz", x=x, y=y)
    words = [
        "run",
        tmp_path / "p.h5",
        "--data",
        tmp_path / "steps.npz",
        "--batch-size",
        2,
        "--json",
    ]
    assert ranvier(*words) == 0
    shown = json.loads(capsys.readouterr().out)[0]
    whole = run(Program.load(tmp_path / "p.h5"), np.swapaxes(x, 0, 1))
    right = whole.output.argmax(-1).T == y  # this readout keeps its steps
    assert shown["accuracy (simulated)"] == f"{100 * right[y >= 0].mean():.2f} %"
    assert shown["synops"] == whole.ledger.n_synops and shown["samples"] == 5


def test_a_run_on_spike_trains_is_calibrated_and_run_on_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sets have samples first and calibration time first; one was taken for the other."""
    from ranvier.cli.exporting import _calibration
    from ranvier.cli.sources import load_graph

    folder = tmp_path / "run"
    assert train("digits-ms", folder, "-s", "epochs=1", "-s", "steps=3", "-s", "encoding=rate") == 0
    graph = load_graph(folder)
    for named in (None, "digits"):
        x = _calibration(folder, graph, named, None)
        assert x.shape[0] == 3 and x.shape[1] >= 96 and x.shape[2:] == (1, 8, 8)
        assert set(np.unique(x)) == {0, 1}
    assert ranvier("compile", folder) == 0
    program = Program.load(folder / "program.h5")
    assert not program.input.graded
    assert ranvier("run", folder, "--data", "digits", "--limit", "9") == 0
    assert ranvier("compare", folder, "--engines", "torch,dense", "--limit", "9") == 0
    (folder / "program.h5").unlink()
    assert ranvier("compare", folder, "--engines", "torch,dense", "--limit", "9") == 0


@pytest.mark.parametrize("key", ["steps", "in_channels", "num_classes"])
@pytest.mark.parametrize("value", [1.5, "4"])
def test_counts_of_a_network_are_whole_numbers(key: str, value: Any) -> None:
    from ranvier.train import create_model, list_models

    with pytest.raises(RangeError, match=f"mlp: {key} is {value!r}; a whole number"):
        create_model("mlp", **{key: value})
    assert list_models(None) == list_models()


def test_the_recipe_of_events_trains_a_network_that_compiles() -> None:
    from ranvier.train import create_model, load_recipe

    recipe = load_recipe("nmnist-cnn")
    net = create_model(**recipe.model, in_channels=2, image_size=recipe.data.size).eval()
    x = (torch.rand(8, 2, *net.input_shape) < 0.1).float()
    assert compile(trace(net, x), calibration=x).latency == 4


def test_bench_shows_no_ratio_to_what_it_did_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["bench", "--quick", "--nets", "mlp", "--rates", "0.1", "--rounds", "1"]
    assert ranvier(*quick, "--sides", "dense") == 0
    out = capsys.readouterr().out
    assert "ms a sample-step" in out and "snntorch" not in out


def test_a_study_of_a_set_that_is_not_there_fails_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from ranvier.cli.app import run_app

    arguments = ["study", "residual", "--dataset", "nosuch", "--out", str(tmp_path / "study")]
    assert run_app(arguments) == 2
    told = capfd.readouterr().err.strip().splitlines()
    assert len(told) == 1 and "nosuch" in told[0]
    assert not (tmp_path / "study").exists()
