"""Lava in processes of its own: it runs, its failures become one error, nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.testing import assert_array_equal

from ranvier.deploy.lava_compat import available
from ranvier.deploy.lava_data import read_data, write_data
from ranvier.deploy.lava_guard import run_guarded
from ranvier.deploy.lava_worker import remove_traces
from ranvier.train.errors import LavaError, UnsupportedError

TARGETS = Path(__file__).with_name("lava_targets.py")
SHARED_MEMORY = Path("/dev/shm")
NEURON = {"vth": 3, "du": 4095, "dv": 0}
needs_lava = pytest.mark.lava


def target(name: str) -> str:
    return f"{TARGETS}:{name}"


@pytest.fixture
def own_tmp(tmp_path, monkeypatch):
    """A short temporary folder of this test's own, after pytest's; runs leave nothing in it."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    runs: list[str] = []

    def recording(run: Path) -> None:
        runs.append(run.name)
        remove_traces(run)

    monkeypatch.setattr("ranvier.deploy.lava_guard.remove_traces", recording)
    yield folder
    folder.rmdir()  # fails if a run left anything
    assert not [block for run in runs for block in SHARED_MEMORY.glob(f"*{run}*")]


def traces(names: list[str]) -> list[str]:
    """Which of the processes and shared memory blocks named by `hang` are still there."""
    pids, blocks = names[:2], names[2:]
    left = [pid for pid in pids if psutil.pid_exists(int(pid))]
    return left + [block for block in blocks if (SHARED_MEMORY / block.lstrip("/")).exists()]


def wait_for(condition, seconds: float = 15.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def step(weights, spikes, state):
    """One layer of NEURON (du: no memory of the current, dv: no leak), as lava.proc.lif does it."""
    v = state + ((weights @ spikes) << 6)
    fired = v > NEURON["vth"] << 6
    return np.where(fired, 0, v), fired.astype(np.int64)


def two_layers_by_hand(spikes, first, second):
    """Spikes of the second layer; every projection delivers one step later."""
    steps = spikes.shape[1]
    v1, v2 = np.zeros(len(first), np.int64), np.zeros(len(second), np.int64)
    before1, before2 = np.zeros(first.shape[1], np.int64), np.zeros(second.shape[1], np.int64)
    out = np.zeros((len(second), steps), np.int64)
    for t in range(steps):
        v1, fired1 = step(first, before1, v1)
        v2, out[:, t] = step(second, before2, v2)
        before1, before2 = spikes[:, t], fired1
    return out


@needs_lava
def test_two_layers_run_and_equal_numpy(own_tmp):
    rng = np.random.default_rng(1)
    spikes = rng.integers(0, 2, (5, 20))
    weights = [rng.integers(-4, 6, (7, 5)) * 2, rng.integers(-4, 6, (3, 7)) * 2]
    payload = {"spikes": spikes, "weights": weights, "neuron": NEURON}
    result = run_guarded(target("two_layers"), payload, timeout_s=60)
    expected = two_layers_by_hand(spikes, *weights)
    assert_array_equal(result["spikes"], expected)
    assert 0 < expected.sum() < expected.size
    assert result["blocks"], "control: the run's shared memory bears its name while it lasts"


@needs_lava
def test_flatten_between_conv_and_dense():
    rng = np.random.default_rng(2)
    spikes = rng.integers(0, 2, (3, 2, 2, 12))  # X, Y, C, steps
    kernel = np.full((2, 1, 1, 2), 4)  # every pixel's channels, summed into two equal channels
    dense = rng.integers(0, 4, (4, 12)) * 2
    payload = {"spikes": spikes, "kernel": kernel, "weights": dense, "neuron": NEURON}
    result = run_guarded(target("conv_flatten_dense"), payload, timeout_s=60)
    first = np.kron(np.eye(6, dtype=np.int64), np.full((2, 2), 4))
    expected = two_layers_by_hand(spikes.reshape(12, 12), first, dense)
    assert_array_equal(result["spikes"], expected)
    assert expected.any()


def wide_conv(groups: int) -> dict:
    spikes = np.ones((130, 1, groups, 6), np.int64)
    kernel = np.full((groups, 1, 1, 1), 4)
    payload = {"spikes": spikes, "kernel": kernel, "groups": groups, "neuron": NEURON}
    return {**payload, "weights": np.full((1, 130 * groups), 2)}


@needs_lava
def test_conv_of_a_wide_input_with_many_groups():
    result = run_guarded(target("conv_flatten_dense"), wide_conv(128), timeout_s=60)
    assert_array_equal(result["spikes"], [[0, 0, 1, 1, 1, 1]])


@needs_lava
@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.4.0", reason="this numpy still has what Lava relies on"
)
@pytest.mark.parametrize(
    ("name", "error"),
    [("without_reshape_patch", "TypeError.*newshape"), ("without_conv_patch", "OverflowError")],
)
def test_control_without_one_patch_it_fails(name, error, own_tmp):
    """Both break in a worker, where Lava alone would hang."""
    with pytest.raises(LavaError, match=f"(?s)Traceback.*{error}"):
        run_guarded(target(name), wide_conv(1), timeout_s=60)


@needs_lava
def test_netx_reads_a_file(data_dir):
    if reason := available(netx=True):
        pytest.skip(reason)
    file = data_dir / "lava" / "tiny" / "tiny.net"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    result = run_guarded(target("netx"), {"file": str(file)}, timeout_s=60)
    assert result["layers"][0] == "Input" and "Conv" in result["layers"]


@needs_lava
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Lava's own Python: it runs unpatched")
def test_control_without_the_patches_it_fails(own_tmp):
    payload = {"spikes": np.ones((2, 4), int), "weights": [np.eye(2)] * 2, "neuron": NEURON}
    with pytest.raises(LavaError, match="mutable default .*ByteEncoder"):
        run_guarded(target("two_layers"), payload, timeout_s=60, patches=False)


@needs_lava
def test_exception_in_a_lava_process_is_an_error_with_its_traceback(own_tmp):
    """A float threshold breaks the LIF's shift in a worker: Lava itself would hang."""
    payload = {
        "spikes": np.ones((2, 4), int),
        "weights": [np.eye(2, dtype=int)] * 2,
        "neuron": {**NEURON, "vth": 1.5},
    }
    start = time.monotonic()
    with pytest.raises(LavaError) as caught:
        run_guarded(target("two_layers"), payload, timeout_s=120)
    assert time.monotonic() - start < 60, "found by its traceback, not by the time limit"
    assert "Traceback (most recent call last)" in str(caught.value)
    assert "lava/proc/lif/models.py" in str(caught.value)
    assert "TypeError" in str(caught.value)


@needs_lava
def test_exception_of_the_target_is_an_error_with_its_traceback(own_tmp):
    with pytest.raises(LavaError, match=r"(?s)fail failed\nTraceback.*the target's own error"):
        run_guarded(target("fail"), {}, timeout_s=60)


@needs_lava
def test_killed_worker_is_an_error_with_its_output(own_tmp):
    with pytest.raises(LavaError, match=r"without a result \(ended by SIGKILL\)\nlast words"):
        run_guarded(target("die"), {}, timeout_s=60)


@needs_lava
def test_segfault_of_the_worker_is_an_error_that_says_where(own_tmp):
    with pytest.raises(LavaError, match=r"without a result \(ended by SIGSEGV\)\nlast words") as e:
        run_guarded(target("segfault"), {}, timeout_s=60)
    assert "Fatal Python error: Segmentation fault" in str(e.value)
    assert "lava_targets.py" in str(e.value) and "in segfault" in str(e.value)


@needs_lava
@pytest.mark.skipif(sys.platform != "linux", reason="a child cannot be looked at elsewhere")
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_crash_of_a_lava_process_is_an_error_that_names_the_signal(number, own_tmp):
    """The others wait for its messages for ever: only the worker can tell."""
    payload = {"spikes": np.ones((2, 8), int), "weights": [np.full((n, 2), 2) for n in (2, 3)]}
    payload |= {"neuron": NEURON, "signal": int(number)}
    start = time.monotonic()
    with pytest.raises(LavaError) as caught:
        run_guarded(target("two_layers_crashing"), payload, timeout_s=120)
    assert time.monotonic() - start < 60, "found by its end, not by the time limit"
    text = str(caught.value)
    assert f"was ended by {number.name}\n" in text and "last words" in text
    if number != signal.SIGKILL:
        assert "Fatal Python error" in text and "in crash" in text


@needs_lava
def test_hanging_run_is_stopped_in_time(own_tmp, tmp_path):
    alive = tmp_path / "alive"
    start = time.monotonic()
    with pytest.raises(LavaError, match="did not end within 5 s"):
        run_guarded(target("hang"), {"alive": str(alive)}, timeout_s=5, patches=False)
    assert time.monotonic() - start < 20
    assert not traces(alive.read_text().split())


@needs_lava
def test_control_traces_are_seen_while_a_run_hangs(tmp_path):
    """What the other tests find gone was there: two processes and a block of shared memory."""
    alive = tmp_path / "alive"
    run = threading.Thread(target=_expect_error, args=("hang", {"alive": str(alive)}, 5))
    run.start()
    names = wait_for(alive.exists) and alive.read_text().split()
    assert len(traces(names)) == 3
    run.join()
    assert not traces(names)


def _expect_error(name: str, payload: dict, seconds: float) -> None:
    with pytest.raises(LavaError):
        run_guarded(target(name), payload, timeout_s=seconds, patches=False)


CALLER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from ranvier.deploy.lava_guard import run_guarded
from ranvier.deploy.lava_worker import remove_traces
run_guarded(sys.argv[1], {"alive": sys.argv[2]}, timeout_s=300, patches=False)
"""


@needs_lava
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_caller_that_is_stopped(number, own_tmp, tmp_path):
    alive = tmp_path / "alive"
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, target("hang"), str(alive)],
        env={**os.environ, "TMPDIR": str(own_tmp)},
        stderr=subprocess.DEVNULL,
    )
    names = wait_for(alive.exists) and alive.read_text().split()
    assert len(traces(names)) == 3
    caller.send_signal(number)
    caller.wait(20)
    wait_for(lambda: not traces(names) and not any(own_tmp.iterdir()))


@needs_lava
def test_runs_in_a_spawned_process():
    payload = {"spikes": np.ones((2, 6), int), "neuron": NEURON}
    payload["weights"] = [4 * np.eye(2, dtype=int)] * 2
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        result = pool.submit(run_guarded, target("two_layers"), payload, timeout_s=60).result()
    assert_array_equal(result["spikes"], [[0, 0, 1, 1, 1, 1]] * 2)


@needs_lava
def test_two_runs_at_once_from_threads():
    """Each cleans up after itself alone, so that neither breaks the other."""
    results: list[dict] = []
    payload = {"spikes": np.ones((2, 6), int), "neuron": NEURON}
    payload["weights"] = [4 * np.eye(2, dtype=int)] * 2
    call = lambda: results.append(run_guarded(target("two_layers"), payload, timeout_s=60))  # noqa: E731
    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert_array_equal(results[0]["spikes"], [[0, 0, 1, 1, 1, 1]] * 2)
    assert_array_equal(results[0]["spikes"], results[1]["spikes"])


def test_data_survives_the_border(tmp_path):
    data = {
        "a": np.arange(6).reshape(2, 3),
        "n": {"x": [1, 2.5, None, True, "é"]},
        "t": (np.int8(3),),
    }
    write_data(tmp_path / "d", data)
    read = read_data(tmp_path / "d")
    assert_array_equal(read["a"], data["a"])
    assert read["n"] == data["n"] and read["t"] == [3]


@pytest.mark.parametrize("bad", [object(), {1: 2}, np.array([object()]), b"bytes"])
def test_only_plain_data_crosses_the_border(bad, tmp_path):
    with pytest.raises(UnsupportedError, match=r"d\['deep'\]\[0\] is a "):
        write_data(tmp_path / "d", {"deep": [bad]})


def test_without_lava_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("ranvier.deploy.lava_compat._is_there", lambda module: False)
    with pytest.raises(LavaError, match="lava-nc 0.10.0.* not installed; `make lava` installs it"):
        run_guarded(target("echo"), {}, timeout_s=1)
