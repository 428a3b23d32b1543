"""What a population sends and holds, written down inside the process that computes it.

Reading a Var of Lava from outside moves one element per message. A tape is an array in shared
memory, made before Lava forks, so that a process writes rows and the caller reads them at the end.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np


def shared_array(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, int32, that this process and all that it forks later see."""
    n = max(1, int(np.prod(shape)))
    return np.frombuffer(mmap.mmap(-1, 4 * n), np.int32, int(np.prod(shape))).reshape(shape)


class Tape:
    """Rows `[step, *shape]` of what one population sent, and of its u and v where asked for."""

    def __init__(self, steps: int, shape: tuple[int, ...], what: tuple[str, ...]) -> None:
        self.rows = {name: shared_array((steps, *shape)) for name in what}

    def write(self, time_step: int, name: str, values: Any) -> None:
        """Keeps the values of one step, counted from 1; nothing where `name` was not asked for."""
        rows = self.rows.get(name)
        if rows is not None and time_step <= len(rows):
            rows[time_step - 1] = values


class Recording:
    """Mixin for a ProcessModel: its run_spk as it is, with a tape beside it."""

    proc_params: Any
    time_step: int
    s_out: Any

    def run_spk(self) -> None:
        tape: Tape = self.proc_params["tape"]
        if not hasattr(self, "_untapped"):
            self._untapped = self.s_out.send
            self.s_out.send = self._send
        super().run_spk()  # type: ignore[misc]
        for name in ("u", "v"):
            if name in tape.rows:
                tape.write(self.time_step, name, getattr(self, name))

    def _send(self, data: Any) -> None:
        self.proc_params["tape"].write(self.time_step, "sent", data)
        self._untapped(data)
