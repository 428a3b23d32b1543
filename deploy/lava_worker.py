"""The other side of `lava_guard`: the supervisor of a run, and the worker that calls the target."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import importlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

from ranvier.deploy import lava_compat
from ranvier.deploy.lava_data import read_data, write_data

POLL_S = 0.02
REAP_S = 5.0
SIGNALED = "error-signal-"  # files that tell of one of Lava's processes that a signal ended
_SHARED_MEMORY = Path("/dev/shm")
_SUBREAPER = 36  # Linux' PR_SET_CHILD_SUBREAPER: orphans become this process's children


def remove_traces(folder: Path) -> None:
    """Removes the run's folder and the shared memory that is named after it."""
    for block in _SHARED_MEMORY.glob(f"psm_{folder.name}.*"):
        block.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def supervise() -> NoReturn:
    """Main function of the supervisor: forks the worker, waits for it or the caller, cleans up.

    It has one thread and imports nothing of Lava, so that nothing of Lava can hold it up.
    """
    folder = Path(sys.argv[1])
    spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, _leave)
    worker = os.fork()
    if worker == 0:
        _work(folder, spec)
    status = 1
    try:
        status = _wait(worker, spec["caller"])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _reap(worker)
        if os.getppid() != spec["caller"]:
            remove_traces(folder)
        os._exit(status)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _wait(worker: int, caller: int) -> int:
    """The worker's exit status (128 + the signal that ended it), or 1 when the caller has gone."""
    while os.getppid() == caller:
        pid, status = os.waitpid(worker, os.WNOHANG)
        if pid == worker:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(POLL_S)
    return 1


def _reap(worker: int) -> None:
    """Kills the worker's group and waits until no child is left, adopted ones included."""
    deadline = time.monotonic() + REAP_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            os.killpg(worker, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(POLL_S)
        except ChildProcessError:
            return


def _work(folder: Path, spec: Mapping[str, Any]) -> NoReturn:
    """Main function of the worker: calls the target; what it raises becomes an error file."""
    status = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faulthandler.enable(all_threads=False)  # inherited by all of Lava's processes
        _name_shared_memory(folder.name)
        if spec["patches"]:
            lava_compat.apply()
            _report_exceptions(folder)
            _report_signals(folder)
        write_data(folder / "result", _function(spec["target"])(read_data(folder / "payload")))
        status = 0
    except BaseException:
        _save_traceback(folder, traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _name_shared_memory(run: str) -> None:
    """Names every block of shared memory of this process and its children after the run."""
    from multiprocessing import shared_memory

    names: Any = shared_memory
    names._SHM_NAME_PREFIX = f"/psm_{run}."
    names._SHM_SAFE_NAME_LENGTH = len(names._SHM_NAME_PREFIX) + 8


def _report_exceptions(folder: Path) -> None:
    """Makes Lava's processes write the traceback of an exception before anything can block.

    A ProcessModel that fails tells its runtime service, joins its ports - where it may wait for
    ever - and only then raises; Lava logs the traceback at a level that nobody sees. `join` is the
    first call after the exception that can be intercepted.
    """
    model: Any = importlib.import_module("lava.magma.core.model.py.model").AbstractPyProcessModel
    runtime: Any = importlib.import_module("lava.magma.runtime.runtime")
    join, target_fn = model.join, runtime.target_fn

    @functools.wraps(join)
    def reporting_join(self: Any) -> None:
        if sys.exc_info()[0] is not None:
            _save_traceback(folder, traceback.format_exc())
        join(self)

    @functools.wraps(target_fn)
    def reporting_target(*args: Any, **kwargs: Any) -> None:
        try:
            target_fn(*args, **kwargs)
        except Exception:
            _save_traceback(folder, traceback.format_exc())
            raise

    model.join, runtime.target_fn = reporting_join, reporting_target
    threading.excepthook = functools.partial(_save_thread_traceback, folder)


def _report_signals(folder: Path) -> None:
    """Makes the worker tell of a process of Lava's that a signal ended: a crash, or want of memory.

    Nobody in Lava would: the others wait for its messages for ever.
    """
    module = "lava.magma.runtime.message_infrastructure.multiprocessing"
    system_process: Any = importlib.import_module(module).SystemProcess
    start, running = system_process.start, set[int]()

    @functools.wraps(start)
    def watched_start(self: Any) -> None:
        start(self)
        running.add(self.pid)

    def watch() -> None:
        while True:
            for pid in list(running):
                _look_at(folder, pid, running)
            time.sleep(POLL_S)

    if sys.platform == "linux":  # elsewhere a child cannot be looked at without being reaped
        system_process.start = watched_start
        threading.Thread(target=watch, daemon=True).start()


def _look_at(folder: Path, pid: int, running: set[int]) -> None:
    """Takes a child that has ended out of `running`; it stays to be reaped by whoever joins it."""
    ended = None
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        running.discard(pid)
    if ended is not None:
        running.discard(pid)
        if ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
            text = f"Lava's process {pid} was ended by {signal_name(ended.si_status)}"
            _write_error(folder / f"{SIGNALED}{pid}.txt", text)


def signal_name(number: int) -> str:
    """SIGSEGV and its like."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _save_thread_traceback(folder: Path, args: threading.ExceptHookArgs) -> None:
    lines = traceback.format_exception(args.exc_type, args.exc_value, args.exc_traceback)
    _save_traceback(folder, "".join(lines))


def _save_traceback(folder: Path, text: str) -> None:
    """Writes this process's error file; its first exception is the one to see."""
    file = folder / f"error-{os.getpid()}.txt"
    if not file.exists():
        _write_error(file, text)


def _write_error(file: Path, text: str) -> None:
    """Writes the file at once, whole; where its folder is gone nobody wants it any more."""
    with contextlib.suppress(OSError):
        part = file.with_name(f"part-{file.name}")
        part.write_text(text, encoding="utf-8")
        part.rename(file)


def _function(target: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    where, _, name = target.rpartition(":")
    module = _load(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    function: Callable[[dict[str, Any]], dict[str, Any]] = getattr(module, name)
    return function


def _load(file: Path) -> ModuleType:
    """The module of a file outside any package, where Lava finds it by the file's name."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
