"""The smallest real Lava run: does Lava work on this machine?"""

from __future__ import annotations

from typing import Any

import numpy as np

from ranvier.deploy.lava_guard import run_guarded
from ranvier.train.errors import LavaError

STEPS = 6
# One input that spikes at every step, weight 4, threshold 3: each LIF fires from the step on at
# which its input arrives, and every projection takes one step. In steps 0..5 of the second LIF:
EXPECTED = (0, 0, 1, 1, 1, 1)


def probe(timeout_s: float = 60.0) -> str | None:
    """None if two Dense and two LIF, run in Loihi2SimCfg, spike as they must; else what went wrong.

    timeout_s  wall time in seconds; the run takes 1 to 3
    """
    try:
        spikes = run_guarded("ranvier.deploy.lava_probe:two_layers", {}, timeout_s=timeout_s)
    except LavaError as error:
        return str(error)
    found = tuple(int(spike) for spike in spikes["spikes"])
    if found != EXPECTED:
        return f"lava: the probe's last neuron spiked at {found}, it must at {EXPECTED}"
    return None


def two_layers(payload: dict[str, Any]) -> dict[str, Any]:
    """Spikes of the second of two chained LIFs, [steps]; runs in Lava's process."""
    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.proc.dense.process import Dense
    from lava.proc.io.sink import RingBuffer as Sink
    from lava.proc.io.source import RingBuffer as Source
    from lava.proc.lif.process import LIF

    source, sink = Source(data=np.ones((1, STEPS), np.int32)), Sink(shape=(1,), buffer=STEPS)
    synapses = [Dense(weights=np.array([[4]])) for _ in range(2)]
    neurons = [LIF(shape=(1,), vth=3, du=4095, dv=0) for _ in range(2)]
    out = source.s_out
    for dense, lif in zip(synapses, neurons, strict=True):
        out.connect(dense.s_in)
        dense.a_out.connect(lif.a_in)
        out = lif.s_out
    out.connect(sink.a_in)
    sink.run(condition=RunSteps(num_steps=STEPS), run_cfg=Loihi2SimCfg(select_tag="fixed_pt"))
    spikes = sink.data.get()[0].astype(np.int64)
    sink.stop()
    return {"spikes": spikes}
