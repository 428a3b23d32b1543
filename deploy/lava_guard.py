"""Runs a function that uses Lava where it can do no harm: in its own processes, with a time limit.

Lava starts an OS process for every Process. An exception in one of them is logged where nobody
looks, its neighbors wait for it for ever, and a killed run leaves shared memory behind (lava-nc
issues 178 and 231). So Lava never runs in the caller's process:

    caller -> supervisor (leader of a new session; `lava_worker`)
                -> worker (leader of a process group; calls the target) -> Lava's processes

The supervisor lives until the worker ends or the caller is gone, then kills the worker's group and
reaps what is left of it. Payload and result travel as files of plain data in a temporary folder
that also takes the run's sockets; its shared memory is named after the folder, so that what is
removed afterwards is this run's and nobody else's.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ranvier.deploy import lava_compat
from ranvier.deploy.lava_data import read_data, write_data
from ranvier.deploy.lava_worker import POLL_S, REAP_S, SIGNALED, remove_traces, signal_name
from ranvier.train.errors import LavaError

_LAST_LINES = 40  # of the output, shown where no traceback explains the failure
_GRACE_S = 0.3  # after the first traceback, for others that explain it
_SOCKET_FOLDER_MAX = 50  # AF_UNIX paths end at 104 to 108 bytes; the run's own part needs about 45
_ENTRY = """\
import json, sys
sys.path[:] = json.loads(sys.argv.pop())
from ranvier.deploy.lava_worker import supervise
supervise()
"""


def run_guarded(
    target: str, payload: Mapping[str, Any], *, timeout_s: float, patches: bool = True
) -> dict[str, Any]:
    """What the function `target` returns for `payload`, called in a fresh interpreter with Lava.

    target     "package.module:function" or "/path/to/file.py:function"; dict in, dict out
    payload    nested dicts with str keys, lists, str, numbers, bool, None, arrays of numbers
    timeout_s  wall time of the whole call in seconds; starting and importing Lava takes 1 to 3
    patches    whether `lava_compat.apply` is called before the target's module is imported
    Raises LavaError when Lava is not installed, the target or one of Lava's processes fails or is
    ended by a signal (a crash), or the time is over; the message ends in the traceback of the
    process that failed, or names the signal and ends in the last output. Afterwards none of the
    run's processes, shared memory and files is left, also after Ctrl-C and after the death of the
    caller. Raises UnsupportedError for a payload or a result that is not plain data.
    """
    if reason := lava_compat.available():
        raise LavaError(f"lava: {reason}")
    with _folder() as folder:
        write_data(folder / "payload", payload)
        spec = {"target": target, "caller": os.getpid(), "patches": patches}
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        with _supervisor(folder) as process:
            fault = _watch(process, folder, timeout_s)
        if fault:
            raise LavaError(_report(target, fault, folder))
        return read_data(folder / "result")


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A temporary folder for one run; removed at the end with everything that bears its name."""
    base = tempfile.gettempdir()
    if len(base) > _SOCKET_FOLDER_MAX and os.access("/tmp", os.W_OK):
        base = "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="rv", dir=base))
    try:
        yield folder
    finally:
        remove_traces(folder)


@contextlib.contextmanager
def _supervisor(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The running supervisor; at the end of the block its whole session is gone."""
    # One thread each: Lava's processes, dozens of them, compute at the same time.
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _ENTRY, str(folder), json.dumps(sys.path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, **one, "TMPDIR": str(folder)},
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Lets the supervisor take its group down; kills the session where that takes too long."""
    process.terminate()
    try:
        process.wait(REAP_S + 2)
    except subprocess.TimeoutExpired:
        _kill_session(process.pid)
        process.wait()


def _kill_session(session: int) -> None:
    import psutil

    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)


def _watch(process: subprocess.Popen[bytes], folder: Path, timeout_s: float) -> str | None:
    """Waits for the end of the run: None if it was good, otherwise what went wrong."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None:
        if _errors(folder):
            time.sleep(_GRACE_S)
            return "failed"
        if time.monotonic() > deadline:
            return f"did not end within {timeout_s:g} s and was stopped; allow more, or run less"
        time.sleep(POLL_S)
    if _errors(folder):
        return "failed"
    if (folder / "result.json").exists():
        return None
    return f"ended without a result ({_exit(process.returncode)})"


def _exit(status: int) -> str:
    """An exit status in words; the supervisor gives 128 + the signal that ended the worker."""
    number = -status if status < 0 else status - 128
    return f"ended by {signal_name(number)}" if number > 0 else f"exit status {status}"


def _errors(folder: Path) -> list[Path]:
    return sorted(folder.glob("error-*.txt"), key=lambda file: file.stat().st_mtime_ns)


def _report(target: str, fault: str, folder: Path) -> str:
    """The message of the LavaError: what happened, then tracebacks, or the end of the output."""
    files = _errors(folder)
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    if not files or any(file.name.startswith(SIGNALED) for file in files):  # crashes speak there
        output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        texts.append("\n".join(output.splitlines()[-_LAST_LINES:]))
    return "\n".join([f"lava: {target} {fault}", *dict.fromkeys(texts)]).rstrip()
