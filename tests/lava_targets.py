"""Targets for tests/test_lava_guard.py: each is called in a process of its own, with Lava."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np


def echo(payload: dict[str, Any]) -> dict[str, Any]:
    return payload


def two_layers(payload: dict[str, Any]) -> dict[str, Any]:
    """Spikes of the last LIF of input -> Dense -> LIF -> Dense -> LIF, [neurons, steps]."""
    from lava.proc.dense.process import Dense
    from lava.proc.lif.process import LIF

    first, second = payload["weights"]
    lif1 = LIF(shape=(len(first),), **payload["neuron"])
    lif2 = LIF(shape=(len(second),), **payload["neuron"])
    dense1, dense2 = Dense(weights=first), Dense(weights=second)
    dense1.a_out.connect(lif1.a_in)
    lif1.s_out.connect(dense2.s_in)
    dense2.a_out.connect(lif2.a_in)
    return _run(payload["spikes"], dense1.s_in, lif2)


def conv_flatten_dense(payload: dict[str, Any]) -> dict[str, Any]:
    """Spikes of the last LIF of input -> Conv -> LIF -> flatten -> Dense -> LIF."""
    from lava.proc.conv.process import Conv
    from lava.proc.dense.process import Dense
    from lava.proc.lif.process import LIF

    spikes = payload["spikes"]
    conv = Conv(
        weight=payload["kernel"], input_shape=spikes.shape[:-1], groups=payload.get("groups", 1)
    )
    lif1 = LIF(shape=conv.output_shape, **payload["neuron"])
    dense = Dense(weights=payload["weights"])
    lif2 = LIF(shape=(len(payload["weights"]),), **payload["neuron"])
    conv.a_out.connect(lif1.a_in)
    lif1.s_out.flatten().connect(dense.s_in)
    dense.a_out.connect(lif2.a_in)
    return _run(spikes, conv.s_in, lif2)


def without_reshape_patch(payload: dict[str, Any]) -> dict[str, Any]:
    from lava.magma.core.process.ports.ports import ReshapePort

    original = lambda port: functools.partial(np.reshape, newshape=port.shape)  # noqa: E731
    ReshapePort.get_transform_func_fwd = original
    return conv_flatten_dense(payload)


def without_conv_patch(payload: dict[str, Any]) -> dict[str, Any]:
    from lava.magma.core.model.py.type import LavaPyType
    from lava.proc.conv.models import AbstractPyConvModel

    for name in ("kernel_size", "stride", "padding", "dilation", "groups"):
        setattr(AbstractPyConvModel, name, LavaPyType(np.ndarray, np.int8, precision=8))
    return conv_flatten_dense(payload)


def _run(spikes: Any, entry: Any, last: Any) -> dict[str, Any]:
    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.proc.io.sink import RingBuffer as Sink
    from lava.proc.io.source import RingBuffer as Source

    source = Source(data=spikes)
    sink = Sink(shape=last.s_out.shape, buffer=spikes.shape[-1])
    source.s_out.connect(entry)
    last.s_out.connect(sink.a_in)
    last.run(
        condition=RunSteps(num_steps=spikes.shape[-1]), run_cfg=Loihi2SimCfg(select_tag="fixed_pt")
    )
    out = sink.data.get().astype(np.int64)
    run = Path(os.environ["TMPDIR"]).name
    blocks = [block.name for block in Path("/dev/shm").glob(f"psm_{run}.*")]
    last.stop()
    return {"spikes": out, "blocks": blocks}


def netx(payload: dict[str, Any]) -> dict[str, Any]:
    """Layer types of a .net file, as lava-dl reads them."""
    from ranvier.deploy import lava_compat

    lava_compat.apply(netx=True)
    from lava.lib.dl.netx import hdf5

    network = hdf5.Network(net_config=payload["file"])
    return {"layers": [type(layer).__name__ for layer in network.layers]}


def fail(payload: dict[str, Any]) -> dict[str, Any]:
    raise ValueError("the target's own error")


def die(payload: dict[str, Any]) -> dict[str, Any]:
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def segfault(payload: dict[str, Any]) -> dict[str, Any]:
    """The worker itself reads address 0."""
    print("last words", flush=True)
    ctypes.string_at(0)
    return {}


def two_layers_crashing(payload: dict[str, Any]) -> dict[str, Any]:
    """As `two_layers`, but the process of the last LIF ends by a signal in its third step."""
    from lava.proc.lif.models import PyLifModelBitAcc

    run_spk = PyLifModelBitAcc.run_spk

    def crash(self: Any) -> None:
        if self.time_step == 3 and len(self.v) == len(payload["weights"][1]):
            print("last words", flush=True)
            os.kill(os.getpid(), payload["signal"])
        run_spk(self)

    PyLifModelBitAcc.run_spk = crash
    return two_layers(payload)


def hang(payload: dict[str, Any]) -> dict[str, Any]:
    """Never ends, as a run whose ports wait for each other: children and shared memory included."""
    import multiprocessing
    from multiprocessing.managers import SharedMemoryManager

    manager = SharedMemoryManager()
    manager.start()
    block = manager.SharedMemory(4096)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    alive = Path(payload["alive"])
    part = alive.with_suffix(".part")
    part.write_text(f"{os.getpid()} {child.pid} {block.name}")
    part.rename(alive)
    time.sleep(600)
    return {}
