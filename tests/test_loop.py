"""The loop: it learns, and every option does what it says."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import snntorch as snn
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from ranvier.train import Dataset, evaluate, fit, load_dataset
from ranvier.train.augmentation import augment, flip, mix, shift
from ranvier.train.checkpoint import load_weights, read_tensors, save_weights, state_digest
from ranvier.train.devices import part_of_batch
from ranvier.train.errors import (
    FormatError,
    RangeError,
    RanvierError,
    ShapeError,
    UnsupportedError,
)
from ranvier.train.losses import make_loss, rate_penalty
from ranvier.train.rates import FiringRates
from ranvier.train.schedule import Ema, Schedule, make_optimizer


class Small(nn.Module):
    """A plain snntorch network, run step by step: the loop needs none of ranvier's own models."""

    def __init__(self, n: int = 10, steps: int = 3) -> None:
        super().__init__()
        self.steps = steps
        self.fc1, self.lif = nn.Linear(64, 32), snn.Leaky(beta=0.5)
        self.fc2 = nn.Linear(32, n)

    def sequence(self, x: torch.Tensor) -> torch.Tensor:
        mem, out = self.lif.init_leaky(), []
        for _ in range(self.steps):
            spikes, mem = self.lif(self.fc1(x.flatten(1)), mem)
            out.append(self.fc2(spikes))
        return torch.stack(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sequence(x).mean(0)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits"), load_dataset("digits", split="test")


@pytest.fixture()
def few(digits):
    return digits[0].subset(slice(0, 48))


def small(seed: int = 0, **config) -> Small:
    torch.manual_seed(seed)
    return Small(**config)


def weights(net: nn.Module) -> str:
    return state_digest(net.state_dict())


# ---- it learns


def test_it_learns_digits_and_says_so(digits, tmp_path):
    net = small()
    before = evaluate(net, digits[1])["accuracy"]
    result = fit(net, *digits, epochs=6, batch_size=32, lr=1e-2, out_dir=tmp_path)
    assert before < 0.3 and result.metrics["accuracy"] > 0.9
    after = evaluate(net, digits[1])
    assert after["accuracy"] == result.metrics["accuracy"] and after["n"] == 360
    assert not net.training
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["test_accuracy"]) == after["accuracy"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == result.metrics and metrics["digest"] == weights(net)
    assert 0 < metrics["firing_rate"] < 1 and metrics["images_per_s"] > 0
    other = small(1)
    load_weights(other, tmp_path / "weights.safetensors")
    assert weights(other) == weights(net)


def test_evaluate_counts_by_hand(few):
    net = small().eval()
    with torch.no_grad():
        logits = net(few.x)
    found = evaluate(net, few, batch_size=7)
    assert found["accuracy"] == (logits.argmax(1) == few.y).double().mean().item()
    loss = nn.functional.cross_entropy(logits, few.y).item()
    assert_allclose(found["loss"], loss, rtol=1e-6)  # float32 sums in another order
    spikes = []
    net.lif.register_forward_hook(lambda m, i, o: spikes.append(o[0]))
    net(few.x)
    rate = torch.stack(spikes).double().mean().item()
    assert_allclose(found["firing_rate"], rate, rtol=1e-6)
    assert found["firing_rates"] == {"lif": pytest.approx(rate)}


def test_evaluate_leaves_the_mode_and_no_graph(few):
    net = small()
    net.train()
    evaluate(net, few)
    assert net.training and net.fc1.weight.grad is None
    net(few.x).sum().backward()  # states made in inference mode must not leak into training


def test_same_seed_same_weights_another_seed_others(few):
    runs = []
    for seed in (0, 0, 1):
        net = small()
        fit(net, few, epochs=2, batch_size=16, seed=seed, augment="shift", mixup=0.2)
        runs.append(weights(net))
    assert runs[0] == runs[1] != runs[2]


# ---- options


def test_accumulating_batches_equals_one_large_batch(few):
    """Mean of equal parts' means is the mean; float32 sums in another order leave 1e-5."""
    nets = []
    for batch_size, accumulate in ((16, 1), (4, 4)):
        net = small()
        options = {"optimizer": "sgd", "lr": 0.1, "epochs": 2}
        fit(net, few, batch_size=batch_size, accumulate=accumulate, **options)
        nets.append(net)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert_allclose(a.detach(), b.detach(), atol=1e-5)


def test_clipping_bounds_the_step(few):
    net, start = small(), small()
    fit(net, few, epochs=1, batch_size=48, optimizer="sgd", lr=1.0, schedule="constant", clip=0.01)
    moved = sum(
        float((a - b).detach().pow(2).sum())
        for a, b in zip(net.parameters(), start.parameters(), strict=True)
    )
    assert 0.0099 < math.sqrt(moved) < 0.0101


def test_ema_is_the_average_and_swaps_back():
    net = nn.Linear(2, 2)
    ema = Ema(net, 0.75)
    first = net.weight.detach().clone()
    with torch.no_grad():
        net.weight += 1
    ema.update(net)
    ema.swap(net)
    assert_allclose(net.weight.detach(), first + 0.25, rtol=1e-6)
    ema.swap(net)
    assert_array_equal(net.weight.detach(), first + 1)
    with pytest.raises(RangeError, match="ema is 1"):
        Ema(net, 1)


def test_ema_weights_are_tested_and_kept(few):
    plain, averaged = small(), small()
    fit(plain, few, few, epochs=2, batch_size=16)
    result = fit(averaged, few, few, epochs=2, batch_size=16, ema=0.9)
    assert weights(plain) != weights(averaged)
    assert evaluate(averaged, few)["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)


def test_early_stop_and_keep_best(few):
    net = small()
    options = {"batch_size": 16, "optimizer": "sgd", "lr": 1e-9, "schedule": "constant"}
    result = fit(net, few, few, epochs=20, early_stop=3, keep="best", **options)
    assert result.metrics["epochs"] == 4 and result.best["epoch"] == 1
    assert result.metrics["kept_epoch"] == 1
    assert evaluate(net, few)["accuracy"] == result.best["test_accuracy"]


@pytest.mark.parametrize("loss", ["ce", "mse", "tet"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_losses_and_optimizers_bring_the_loss_down(digits, loss, optimizer):
    lr = 0.3 if optimizer == "sgd" else 1e-2
    result = fit(
        small(), digits[0].subset(slice(0, 300)), epochs=5, batch_size=32, lr=lr, loss=loss,
        optimizer=optimizer, label_smoothing=0.05,
    )  # fmt: skip
    assert result.history[-1]["train_loss"] < 0.8 * result.history[0]["train_loss"]


def test_rate_penalty_makes_a_silent_network(digits):
    rates = {}
    for weight in (0.0, 50.0):
        net = small()
        fit(net, digits[0], epochs=2, lr=1e-2, rate_weight=weight, rate_target=0.02)
        rates[weight] = evaluate(net, digits[1])["firing_rate"]
    assert rates[50.0] < 0.5 * rates[0.0]
    assert rate_penalty([torch.tensor(0.3), torch.tensor(0.1)], 0.2).item() == pytest.approx(0.005)


def test_bf16_learns_and_fp16_needs_cuda(digits):
    result = fit(small(), digits[0], epochs=3, lr=1e-2, amp="bf16")
    assert result.metrics["train_accuracy"] > 0.7
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="fp16' needs a CUDA device"):
            fit(small(), digits[0], amp="fp16")


def test_labels_of_every_step():
    """Classes that change from step to step can only be learnt from a loss of every step."""

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def sequence(self, x):
            return self.fc(x.flatten(2))

        def forward(self, x):
            return self.sequence(x).mean(0)

    torch.manual_seed(0)
    y = torch.randint(0, 3, (40, 6))
    x = nn.functional.one_hot(y, 4).float()[..., None, None]
    y[:, 0] = -1  # unlabelled
    data = Dataset(x, y, 3, "toy", timed=True)
    net = Sequence()
    result = fit(net, data, data, epochs=30, batch_size=10, lr=0.1, loss="per-step")
    assert result.metrics["accuracy"] == 1.0
    with pytest.raises(UnsupportedError, match="a label a step; use loss per-step"):
        fit(net, data, loss="ce")


def test_a_hook_is_around_every_forward_pass(few):
    calls = []

    @contextlib.contextmanager
    def zeroed(net):
        calls.append(net.training)
        kept = net.fc2.weight.data
        net.fc2.weight.data = torch.zeros_like(kept)
        yield
        net.fc2.weight.data = kept

    net = small()
    result = fit(net, few, few, epochs=1, batch_size=24, qat=zeroed)
    assert calls == [True, True, False, False]
    assert result.metrics["accuracy"] < 0.3 and net.fc2.weight.abs().sum() > 0


# ---- the parts


def test_losses_by_hand():
    torch.manual_seed(0)
    out, y = torch.randn(4, 5, 3), torch.randint(0, 3, (5,))
    ce = nn.functional.cross_entropy
    assert_allclose(make_loss("ce")(out, y), ce(out.mean(0), y), rtol=1e-6)
    assert_allclose(make_loss("tet")(out, y), sum(ce(o, y) for o in out) / 4, rtol=1e-6)
    hot = nn.functional.one_hot(y, 3).float()
    assert_allclose(make_loss("mse")(out, y), ((out.mean(0) - hot) ** 2).mean(), rtol=1e-6)
    steps = torch.randint(0, 3, (4, 5))
    each = ce(out.flatten(0, 1), steps.flatten())
    assert_allclose(make_loss("per-step")(out, steps), each, rtol=1e-6)
    assert_allclose(make_loss("ce")(out, hot), make_loss("ce")(out, y), rtol=1e-6)
    assert make_loss("ce", 0.1)(out, y) != make_loss("ce")(out, y)
    with pytest.raises(ShapeError, match=r"'tet' needs the output of every step"):
        make_loss("tet")(out[0], y)
    with pytest.raises(UnsupportedError, match="no loss 'hinge'; known: ce"):
        make_loss("hinge")


def test_schedules():
    cosine = Schedule("cosine", 1.0, n_steps=11, n_warmup=1)
    assert cosine(0) == 1.0 and cosine(6) == pytest.approx(0.5) and cosine(11) == pytest.approx(0)
    step = Schedule("step", 1.0, n_steps=30, n_per_step=10)
    assert [round(step(i), 3) for i in (0, 9, 10, 20)] == [1.0, 1.0, 0.1, 0.01]
    one = Schedule("onecycle", 1.0, n_steps=100)
    rates = [one(i) for i in range(100)]
    assert rates[0] == pytest.approx(0.04) and max(rates) == pytest.approx(1) and rates[-1] < 0.01
    assert rates.index(max(rates)) == 30
    assert {Schedule("constant", 0.3, 10)(i) for i in range(10)} == {0.3}


def test_decay_spares_biases_and_thresholds():
    groups = make_optimizer(small(), "adamw", 0.1, 0.5).param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert all(p.ndim <= 1 for p in groups[1]["params"])


@pytest.mark.parametrize("timed", [False, True])
def test_augmentation_moves_samples_alike_at_all_steps(timed):
    x = torch.rand(6, 2, 9, 9)
    sequence = x.expand(4, *x.shape) if timed else x
    for kind in ("shift", "flip-crop", "events"):
        out = augment(sequence, kind, torch.Generator().manual_seed(3))
        assert out.shape == sequence.shape and (out != sequence).any()
        assert_array_equal(out, augment(sequence, kind, torch.Generator().manual_seed(3)))
        if timed:
            assert_array_equal(out[0], out[3])


def test_shift_and_flip_by_hand():
    x = torch.zeros(50, 1, 9, 9)
    x[:, :, 4, 4] = 1
    moved = shift(x, 2, torch.Generator().manual_seed(0))
    assert_array_equal(moved.sum((1, 2, 3)), 1)
    rows = moved.sum((0, 1, 3))
    assert rows[:2].sum() == 0 and rows[7:].sum() == 0 and (rows[2:7] > 0).all()
    ramp = torch.arange(9.0).expand(50, 1, 9, 9)
    mirrored = (flip(ramp, torch.Generator().manual_seed(0))[:, 0, 0, 0] == 8).sum()
    assert 10 < mirrored < 40


@pytest.mark.parametrize("mixup, cutmix", [(0.5, 0.0), (0.0, 1.0)])
def test_mixing_keeps_the_share_of_pixels_and_labels(mixup, cutmix):
    x, y = torch.eye(4).reshape(4, 4, 1, 1).expand(4, 4, 8, 8), torch.arange(4)
    for seed in range(5):
        mixed, p = mix(x, y, 4, mixup, cutmix, torch.Generator().manual_seed(seed))
        assert_allclose(p.sum(1), 1, rtol=1e-6)
        assert_allclose(mixed.mean((2, 3)), p, atol=1e-6)  # channel c holds sample c's pixels


def test_part_of_batch_is_the_joint_mean():
    loss = np.random.default_rng(0).random(7)
    for n in (1, 2, 3, 7):
        for world in (1, 2, 3, 4):
            parts = [part_of_batch(n, rank, world) for rank in range(world)]
            mean = np.mean([share * loss[:n][part].mean() for part, share in parts])
            assert_allclose(mean, loss[:n].mean(), rtol=1e-12)


def test_firing_rates_counts_only_while_entered(few):
    net = small()
    with FiringRates(net) as rates:
        net(few.x)
    once = rates.mean()
    net(few.x)
    assert rates.mean() == once > 0
    assert not net.lif._forward_hooks


# ---- what goes wrong


class Spoilt(Dataset):
    """The same samples, as NaN from the second epoch on."""

    def batch(self, index):
        x, y = super().batch(index)
        calls = vars(self).setdefault("calls", [])
        calls.append(index)
        return (x if len(calls) <= 3 else x * math.nan), y


class Analog(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


@pytest.mark.parametrize(
    "kind, match",
    [
        (Analog, r"the loss is nan at epoch 2, batch 1 of 3 \(lr .*Lower lr, set clip=1.0"),
        # a neuron hides NaN from the loss (NaN > threshold is no spike), not from the weights
        (Small, "'model.fc1.weight' is not finite in epoch 2: no checkpoint is written. Lower lr"),
    ],
)
def test_nan_is_reported_and_the_last_checkpoint_survives(few, tmp_path, kind, match):
    data = Spoilt(few.x, few.y, 10, few.name)
    with pytest.raises(RanvierError, match=match) as error:
        fit(kind(), data, epochs=3, batch_size=16, out_dir=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    assert f"the last good checkpoint is '{path}'" in str(error.value)
    tensors, meta = read_tensors(path)
    assert meta["epoch"] == 1
    assert all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())


def test_a_full_disk_is_reported_and_the_last_checkpoint_survives(few, tmp_path):
    """The limit on file size stands in for the full disk: a write fails half way, for real."""
    fit(small(), few, epochs=1, batch_size=16, out_dir=tmp_path)
    checkpoint = tmp_path / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(RanvierError, match=r"cannot write .*checkpoint.*File too large"):
            fit(small(), few, epochs=2, batch_size=16, out_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "previous-checkpoint.safetensors").read_bytes() == before
    assert not [p for p in tmp_path.iterdir() if "part" in p.name]


def test_wrong_options_name_the_nearest(few):
    with pytest.raises(UnsupportedError, match="no setting 'epoch'; did you mean 'epochs'"):
        fit(small(), few, epoch=3)
    with pytest.raises(RangeError, match="batch_size is 0"):
        fit(small(), few, batch_size=0)
    with pytest.raises(RangeError, match="needs out_dir"):
        fit(small(), few, resume=True)
    with pytest.raises(ShapeError, match="4 outputs, and 'digits' has 10 classes"):
        fit(small(n=4), few)
    with pytest.raises(RangeError, match="is empty"):
        fit(small(), few.subset(slice(0, 0)))
    with pytest.raises(RangeError, match="no trainable parameters"):
        fit(nn.Identity(), few)


def test_a_network_with_another_output_is_named(few):
    class Pair(Small):
        def forward(self, x):
            return super().forward(x), 1

    with pytest.raises(ShapeError, match="Pair returned tuple"):
        fit(Pair(), few)


def test_weights_of_another_model_name_the_first_difference(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, small())
    with pytest.raises(
        FormatError, match=r"w.safetensors.*'fc2.weight' is \(10, 32\), wanted \(4, 32\)"
    ):
        load_weights(small(n=4), path)
    with pytest.raises(
        FormatError, match=r"another model than Linear: 'weight' \(3, 2\) is missing"
    ):
        load_weights(nn.Linear(2, 3), path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(FormatError, match="no safetensors file"):
        load_weights(small(), path)
    with pytest.raises(FormatError, match="there is no file"):
        load_weights(small(), tmp_path / "nothing")


def test_half_precision_weights_widen(tmp_path):
    net = small()
    save_weights(tmp_path / "h.safetensors", net, torch.float16)
    other = small(1)
    load_weights(other, tmp_path / "h.safetensors")
    assert other.fc1.weight.dtype == torch.float32
    assert_array_equal(other.fc1.weight.detach(), net.fc1.weight.detach().half().float())


# ---- several processes

DDP = {
    "epochs": 3, "batch_size": 20, "lr": 0.1, "optimizer": "sgd", "mixup": 0.2, "clip": 1.0,
    "accelerator": "cpu", "progress": False,
}  # fmt: skip
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_loop import DDP, small
from ranvier.train import fit, load_dataset
data = load_dataset("digits", limit=203)
fit(small(), data, data, devices=2, out_dir={out!r}, **DDP)
"""


def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    """Joint batches of 20, the last of 3; float32 sums in another order leave 1e-4 of the loss."""
    data = load_dataset("digits", limit=203)
    one = fit(small(), data, data, **DDP)
    script = tmp_path / "two.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["n_processes"] == 2
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        curve = [float(row[name]) for row in rows]
        assert_allclose(curve, [row[name] for row in one.history], rtol=1e-4)
    assert curve[-1] > curve[0]
