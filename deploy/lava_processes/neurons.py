"""Own neurons, for what Lava's cannot do: other resets, `>=`, silence outside a sample's window.

On Loihi 2 each is a microcode program; Loihi 1 has no such thing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from lava.magma.core.decorator import implements, requires, tag
from lava.magma.core.model.py.model import PyLoihiProcessModel
from lava.magma.core.model.py.ports import PyInPort, PyOutPort
from lava.magma.core.model.py.type import LavaPyType
from lava.magma.core.process.ports.ports import InPort, OutPort
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.process.variable import Var
from lava.magma.core.resources import CPU
from lava.magma.core.sync.protocols.loihi_protocol import LoihiProtocol
from lava.proc.lif.models import AbstractPyLifModelFixed

from ranvier.deploy.lava_processes.tape import Recording


class Compartment(AbstractProcess):
    """Lava's LIF with another reset, threshold rule or window.

    reset, timing, v_reset, strict   as in `ranvier.deploy.cells.Cell`
    start, interval, length, n       for k < n it works in the `length` steps (counted from 1) from
                                     start + k * interval on, from rest each time; else it is silent
    """

    def __init__(self, *, shape: tuple[int, ...], **options: Any) -> None:
        super().__init__(shape=shape, **options)
        self.a_in = InPort(shape=shape)
        self.s_out = OutPort(shape=shape)
        self.u = Var(shape=shape, init=0)
        self.v = Var(shape=shape, init=0)
        for name in ("du", "dv", "vth"):
            setattr(self, name, Var(shape=(1,), init=options[name]))
        for name in ("bias_mant", "bias_exp"):
            setattr(self, name, Var(shape=shape, init=options[name]))


class Relay(AbstractProcess):
    """Sends what arrives, divided by 2**shift and rounded, in its window; as in `Compartment`."""

    def __init__(self, *, shape: tuple[int, ...], **options: Any) -> None:
        super().__init__(shape=shape, **options)
        self.a_in = InPort(shape=shape)
        self.s_out = OutPort(shape=shape)


class Logic(AbstractProcess):
    """Fires where more arrives than `gate`, in its window; as in `Compartment`.

    OR, AND and IAND of spikes, without a membrane.
    """

    def __init__(self, *, shape: tuple[int, ...], **options: Any) -> None:
        super().__init__(shape=shape, **options)
        self.a_in = InPort(shape=shape)
        self.s_out = OutPort(shape=shape)


def window_step(params: Any, time_step: int) -> int | None:
    """The step of the sample, from 0, or None outside every sample's window."""
    sample, step = divmod(time_step - params["start"], params["interval"])
    return step if 0 <= sample < params["n"] and step < params["length"] else None


class _Compartment(AbstractPyLifModelFixed):
    """Lava's own integration (`subthr_dynamics`) between our reset rules.

    What a delayed or carried reset takes away belongs into the sum before v saturates: it travels
    as part of the bias.
    """

    def run_spk(self) -> None:
        arriving = self.a_in.recv()
        step = window_step(self.proc_params, self.time_step)
        if not step:
            self.u[:], self.v[:] = 0, 0
        fired = np.zeros(self.v.shape, bool)
        if step is not None:
            fired = self._step(arriving)
        self.s_out.send(fired)

    def _step(self, arriving: np.ndarray) -> np.ndarray:
        """Whether each neuron fires, after one step of u and v."""
        reset, timing = self.proc_params["reset"], self.proc_params["timing"]
        late = self._above()
        if reset == "zero" and timing == "delayed":
            self.v[late] = self.proc_params["v_reset"]
        self.scale_bias()
        if reset == "subtract" and timing != "immediate":
            self.effective_bias -= late * self._jump()
        self.subthr_dynamics(arriving)
        if reset == "zero" and timing == "discard":
            self.v[late] = self.proc_params["v_reset"]
        fired = self._above()
        if reset == "zero" and timing not in ("delayed", "discard"):
            self.v[fired] = self.proc_params["v_reset"]
        if reset == "subtract" and timing not in ("delayed", "discard"):
            taken = fired.astype(np.int32) - (late if timing == "carry" else 0)
            limit = self.max_uv_val - 1
            self.v[:] = np.clip(self.v - taken * self._jump(), -limit, limit)
        return fired

    def _jump(self) -> Any:
        return np.left_shift(np.int32(self.vth), self.vth_shift)

    def _above(self) -> np.ndarray:
        above: np.ndarray = self.v > self._jump()
        return above if self.proc_params["strict"] else above | (self.v == self._jump())


@implements(proc=Compartment, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyCompartment(Recording, _Compartment):
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)
    vth: Any = LavaPyType(int, np.int32, precision=17)


class _Logic(PyLoihiProcessModel):
    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)

    def run_spk(self) -> None:
        fired = self.a_in.recv() > self.proc_params["gate"]
        if window_step(self.proc_params, self.time_step) is None:
            fired = np.zeros_like(fired)
        self.s_out.send(fired.astype(np.int32))


@implements(proc=Logic, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyLogic(Recording, _Logic):
    """Logic, recorded."""


class _Relay(PyLoihiProcessModel):
    a_in: PyInPort = LavaPyType(PyInPort.VEC_DENSE, np.int32, precision=24)
    s_out: PyOutPort = LavaPyType(PyOutPort.VEC_DENSE, np.int32, precision=24)

    def run_spk(self) -> None:
        arriving = self.a_in.recv()
        if window_step(self.proc_params, self.time_step) is None:
            arriving = np.zeros_like(arriving)
        shift = self.proc_params["shift"]
        half = 1 << (shift - 1) if shift else 0
        self.s_out.send((arriving + half) >> shift)


@implements(proc=Relay, protocol=LoihiProtocol)
@requires(CPU)
@tag("fixed_pt")
class PyRelay(Recording, _Relay):
    """Relay, recorded."""
