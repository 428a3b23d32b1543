"""Own Processes on the way of a message: the input, and delays longer than Lava's synapses have."""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol


class Source(AbstractProcess):
    """Sends data[t - 1] in step t, and zeros after its end; data is `[step, *shape]`, int32.

    progress  a file to which it adds a byte each step: its size is the steps done
    """

    def __init__(self, *, data: np.ndarray, **options: Any) -> None:
        super().__init__(data=data, **options)
        self.s_out = OutPort(shape=data.shape[1:])


@implements(proc=Source, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PySource(PyLoihiProcessModel):
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=32)

    def run_spk(self) -> None:
        data, now = self.proc_params["data"], self.time_step - 1
        if progress := self.proc_params.get("progress"):
            with open(progress, "ab") as file:
                file.write(b".")
        self.s_out.send(data[now] if now < len(data) else np.zeros_like(data[0]))


class Delay(AbstractProcess):
    """Sends what it received `delay` steps ago; an axonal delay, at least 1."""

    def __init__(self, *, shape: tuple[int, ...], delay: int, **options: Any) -> None:
        super().__init__(shape=shape, delay=delay, **options)
        self.s_in = InPort(shape=shape)
        self.s_out = OutPort(shape=shape)


@implements(proc=Delay, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyDelay(PyLoihiProcessModel):
    s_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=32)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=32)

    def __init__(self, proc_params: Any) -> None:
        super().__init__(proc_params)
        self.ring = np.zeros((proc_params["delay"], *proc_params["shape"]), np.int32)

    def run_spk(self) -> None:
        # Sends before it receives, so that a delay in a feedback loop cannot block it.
        slot = self.time_step % len(self.ring)
        self.s_out.send(self.ring[slot])
        self.ring[slot] = self.s_in.recv()
