"""A training killed at any moment and continued equals one that was left alone, to the bit."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ranvier.train import Dataset, fit
from ranvier.train.checkpoint import (
    optimizer_parts,
    read_tensors,
    restore_optimizer,
    restore_rng,
    rng_parts,
    state_digest,
)
from ranvier.train.errors import FormatError

OPTIONS = {
    "epochs": 4,
    "batch_size": 8,
    "accumulate": 2,
    "ema": 0.9,
    "augment": "shift",
    "mixup": 0.3,
    "clip": 1.0,
    "keep": "best",
    "checkpoint_seconds": 0.0,
}


class Noisy(nn.Module):
    """Batch norm's running statistics and dropout's global generator must both come back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()
        )
        self.fc = nn.Linear(6 * 36, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


def data(n: int = 90) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 1, 8, 8, generator=generator)
    return Dataset(x, torch.randint(0, 10, (n,), generator=generator), 10, "noise")


def run(folder: Path, resume: bool = False, slow: float = 0.0, **options) -> str:
    """Trains; returns the digest of the weights. `slow` stretches every batch."""

    class Slow(Dataset):
        def batch(self, index):
            time.sleep(slow)
            return super().batch(index)

    torch.set_num_threads(1)
    torch.manual_seed(7)
    net, noise = Noisy(), data()
    train = Slow(noise.x, noise.y, 10, "noise") if slow else noise
    settings = {**OPTIONS, **options}
    fit(net, train, data(30), out_dir=folder, resume=resume, progress=False, **settings)
    return state_digest(net.state_dict())


def start(folder: Path, slow: float) -> subprocess.Popen:
    code = f"from test_resume import *; run(Path({str(folder)!r}), True, {slow})"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


def test_killed_at_random_moments_it_ends_in_the_same_bits(tmp_path, undisturbed):
    seed = int.from_bytes(os.urandom(2), "big")
    moment = random.Random(seed)
    print(f"seed of the moments: {seed}")
    seen = []
    for _ in range(2):
        process = start(tmp_path, slow=0.02)
        deadline = time.monotonic() + 120
        then = _position(tmp_path)
        while _position(tmp_path) == then and process.poll() is None:
            assert time.monotonic() < deadline, "no checkpoint appeared"
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate(timeout=30)
        assert process.returncode in (-signal.SIGKILL, 0), error.decode()
        seen.append(_position(tmp_path))
    assert None not in seen and seen[1] > seen[0]
    assert run(tmp_path, resume=True) == undisturbed


def _position(folder: Path) -> tuple[int, int] | None:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return None
    meta = read_tensors(path)[1]
    return meta["epoch"], meta["batch"]


@pytest.mark.parametrize("stop", range(1, 13, 3))
def test_stopped_after_any_batch_it_ends_in_the_same_bits(tmp_path, undisturbed, stop):
    with pytest.raises(KeyboardInterrupt):
        _stop_after(tmp_path, stop)
    assert run(tmp_path, resume=True) == undisturbed


def _stop_after(folder: Path, n: int) -> None:
    class Stopping(Dataset):
        left = [3 * n]

        def batch(self, index):
            self.left[0] -= 1
            if self.left[0] < 0 and not isinstance(index, slice):
                raise KeyboardInterrupt
            return super().batch(index)

    torch.manual_seed(7)
    noise = data()
    train = Stopping(noise.x, noise.y, 10, "noise")
    fit(Noisy(), train, data(30), out_dir=folder, progress=False, **OPTIONS)


def test_without_the_generators_the_bits_would_differ(tmp_path, undisturbed, monkeypatch):
    """The control: the comparison above notices a resume that forgets one part of the state."""
    with pytest.raises(KeyboardInterrupt):
        _stop_after(tmp_path, 4)
    monkeypatch.setattr("ranvier.train.resume.restore_rng", lambda *_: None)
    assert run(tmp_path, resume=True) != undisturbed


def test_a_finished_training_is_not_trained_again(tmp_path, undisturbed):
    run(tmp_path)
    rows = (tmp_path / "metrics.csv").read_text()
    assert run(tmp_path, resume=True) == undisturbed
    assert (tmp_path / "metrics.csv").read_text() == rows


def test_a_new_training_keeps_the_old_checkpoint_beside(tmp_path, undisturbed):
    run(tmp_path)
    old = (tmp_path / "checkpoint.safetensors").read_bytes()
    assert run(tmp_path) == undisturbed
    assert (tmp_path / "previous-checkpoint.safetensors").read_bytes() == old


def test_resume_refuses_other_settings_data_and_models(tmp_path):
    run(tmp_path)
    with pytest.raises(FormatError, match=r"was trained with ema=0.9, now ema=0.5; resume with"):
        run(tmp_path, resume=True, ema=0.5)
    with pytest.raises(FormatError, match="was trained on .'noise'.*not on"):
        fit(Noisy(), data(50), out_dir=tmp_path, resume=True, **OPTIONS)
    with pytest.raises(FormatError, match=r"another model than Sequential.*'1.weight'"):
        other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        fit(other, data(), out_dir=tmp_path, resume=True, **OPTIONS)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_damaged_checkpoint_is_named(tmp_path, cut):
    run(tmp_path, epochs=1)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(FormatError, match="checkpoint.safetensors' is no safetensors file"):
        run(tmp_path, resume=True, epochs=1)


def test_no_pickle_in_a_checkpoint(tmp_path):
    """Only tensors and JSON: reading one cannot run code."""
    run(tmp_path, epochs=1)
    tensors, meta = read_tensors(tmp_path / "checkpoint.safetensors")
    assert {name.split(".")[0] for name in tensors} == {
        "model", "ema", "best", "optimizer", "rng", "sums",
    }  # fmt: skip
    assert meta["settings"]["ema"] == 0.9


def test_generators_come_back():
    def draws():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss()

    random.gauss()  # leaves a second Gaussian in waiting
    np.random.standard_normal()
    state = rng_parts()
    first = draws()
    assert draws() != first
    restore_rng(*state)
    assert draws() == first


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_come_back(kind):
    def step(net, optimizer):
        net(torch.ones(2, 3)).pow(2).sum().backward()
        optimizer.step()

    options = {"lr": 0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    net, other = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer, again = (kind(n.parameters(), **options) for n in (net, other))
    step(net, optimizer)
    other.load_state_dict(net.state_dict())
    restore_optimizer(again, *copy.deepcopy(optimizer_parts(optimizer)))
    optimizer.zero_grad()
    step(net, optimizer)
    step(other, again)
    assert state_digest(net.state_dict()) == state_digest(other.state_dict())
