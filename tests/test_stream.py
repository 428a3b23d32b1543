"""`evaluate`: totals do not depend on batches, processes or interruptions; memory stays flat."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from random_programs import random_input, random_program

from ranvier.sim.runner import run
from ranvier.sim.stream import Evaluation, evaluate
from ranvier.train.errors import FormatError, RangeError, ShapeError

N = 23


def small():
    """(program, x `[n, time, *shape]`, labels)"""
    program = random_program(4)
    x = np.concatenate([random_input(program, s) for s in range(1, 9)], 1).swapaxes(0, 1)[:N]
    return program, x, np.arange(N) % 2


def assert_same(a: Evaluation, b: Evaluation) -> None:
    assert a.accuracy == b.accuracy and a.n == b.n
    assert_array_equal(a.predictions, b.predictions)
    assert_array_equal(a.outputs, b.outputs)
    assert_array_equal(a.confusion, b.confusion)
    assert a.ledger.to_dict() == b.ledger.to_dict()


@pytest.mark.parametrize("engine", ["reference", "dense", "events", "auto"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batches_do_not_matter(engine: str, batch_size: int) -> None:
    program, x, y = small()
    found = evaluate(program, x, y, engine=engine, batch_size=batch_size)
    whole = run(program, x.swapaxes(0, 1), "reference")
    assert_array_equal(found.outputs, whole.output)
    assert found.ledger.same_counts(whole.ledger)
    assert found.accuracy == (whole.output.argmax(1) == y).mean()
    assert found.confusion.sum() == N and np.trace(found.confusion) == found.accuracy * N


def test_forms_of_data() -> None:
    program, x, y = small()
    want = evaluate(program, x, y, batch_size=5)

    class Batches:
        def __len__(self) -> int:
            return N

        def batch(self, index: slice):
            return x[index].swapaxes(0, 1), y[index]

    assert_same(evaluate(program, (x, y), batch_size=5), want)
    assert_same(evaluate(program, Batches(), batch_size=5), want)
    unlabelled = evaluate(program, x, batch_size=5)
    assert np.isnan(unlabelled.accuracy) and unlabelled.confusion is None
    limited = evaluate(program, x, y, batch_size=5, limit=12, keep_outputs=False)
    assert limited.n == 12 and limited.outputs is None
    assert_array_equal(limited.predictions, want.predictions[:12])


def test_samples_without_time_are_held() -> None:
    program, x, _ = small()
    found = evaluate(program, x[:, 0], batch_size=4)
    assert_array_equal(found.outputs, run(program, x[:, 0], "reference").output)


@pytest.mark.parametrize("after", [1, 3])
def test_interrupt_and_resume(tmp_path: Path, after: int) -> None:
    program, x, y = small()
    path = tmp_path / "part.h5"
    calls: list[int] = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(program, x, y, batch_size=5, resume_path=path, on_batch=stop)
    assert path.exists()
    calls.clear()
    again = evaluate(
        program, x, y, batch_size=5, resume_path=path, on_batch=lambda done, _: calls.append(done)
    )
    assert len(calls) == 5 - after
    assert_same(again, evaluate(program, x, y, batch_size=5))
    calls.clear()
    done = evaluate(
        program, x, y, batch_size=5, resume_path=path, on_batch=lambda *a: calls.append(1)
    )
    assert_same(done, again)
    assert calls == []


def test_resume_of_something_else(tmp_path: Path) -> None:
    program, x, y = small()
    path = tmp_path / "part.h5"
    evaluate(program, x, y, batch_size=5, resume_path=path)
    with pytest.raises(FormatError, match="another program, data set or batch size"):
        evaluate(program, x, y, batch_size=6, resume_path=path)
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="cannot be read"):
        evaluate(program, x, y, batch_size=5, resume_path=path)


def test_bad_arguments() -> None:
    program, x, y = small()
    with pytest.raises(RangeError, match="batch_size is 0"):
        evaluate(program, x, y, batch_size=0)
    with pytest.raises(RangeError, match="at least one"):
        evaluate(program, x[:0])
    with pytest.raises(ShapeError, match="23 samples and 22 labels"):
        evaluate(program, x, y[:-1])
    with pytest.raises(ShapeError, match="one whole number each"):
        evaluate(program, x, y * 0.5)


WORKER = """
    import sys, numpy as np
    import torch; torch.set_num_threads(1)
    from test_stream import small
    from ranvier.sim.stream import evaluate
    program, x, y = small()
    found = evaluate(program, x[: int(sys.argv[2])], y[: int(sys.argv[2])], batch_size=4)
    if found and __import__("torch.distributed").distributed.get_rank() == int(sys.argv[3]):
        found.ledger.save(sys.argv[1] + ".h5")
        np.savez(sys.argv[1] + ".npz", p=found.predictions, o=found.outputs, c=found.confusion,
                 a=found.accuracy, n=found.n)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize(("n", "reporter"), [(N, 0), (3, 1)])
def test_two_processes_give_the_totals_of_one(tmp_path: Path, n: int, reporter: int) -> None:
    """With three samples the second process has no batch at all."""
    from ranvier.sim.ledger import Ledger

    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    common = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parent), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NUMBA_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(script), str(tmp_path / "found"), str(n), str(reporter)]
    workers = [
        subprocess.Popen(command, env={**common, "RANK": str(r)}, stderr=subprocess.PIPE)
        for r in range(2)
    ]
    errors = [w.communicate(timeout=120)[1].decode() for w in workers]
    assert [w.returncode for w in workers] == [0, 0], errors
    program, x, y = small()
    want = evaluate(program, x[:n], y[:n], batch_size=4)
    with np.load(tmp_path / "found.npz") as found:
        assert_array_equal(found["p"], want.predictions)
        assert_array_equal(found["o"], want.outputs)
        assert_array_equal(found["c"], want.confusion)
        assert (found["a"], found["n"]) == (want.accuracy, want.n)
    assert Ledger.load(tmp_path / "found.h5").to_dict() == want.ledger.to_dict()


ENDLESS = """
    import json, numpy as np, psutil
    from ranvier.sim.bench_nets import mlp
    from ranvier.sim.stream import evaluate
    seen, process = [], psutil.Process()

    class Endless:
        def __len__(self):
            return 20_000

        def batch(self, index):
            seen.append(process.memory_info().rss)
            rng, n = np.random.default_rng(index.start), len(range(20_000)[index])
            return (rng.random((4, n, 784)) < 0.05).astype(np.uint8), np.zeros(n, np.int64)

    evaluate(mlp(4, 0), Endless(), engine="dense", batch_size=500, keep_outputs=False)
    print(json.dumps(seen))
"""


def test_memory_does_not_grow_with_samples() -> None:
    """After the first fifth, a data set made up as it is read adds less than a batch takes.

    In a process of its own: what other tests left free is given back and taken again at any time.
    """
    command = [sys.executable, "-c", textwrap.dedent(ENDLESS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert len(seen) == 40 and max(seen[8:]) - seen[8] < 12 << 20
