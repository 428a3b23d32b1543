"""What the netx tests run inside Lava's guarded process: lava-dl's own reader and arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np

from ranvier.deploy import lava_compat


def run_nets(payload: dict[str, Any]) -> dict[str, Any]:
    """{"runs": [for each job {"sent": a row `[step, *shape]` a layer, "v": the same}]}."""
    lava_compat.apply(netx=True)
    return {"runs": [_run(job) for job in payload["jobs"]]}


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """What every layer of a .net file sends and holds when netx runs it.

    path, message_bits, reset_interval, reset_offset  as for netx' Network
    x      `[step, *shape]`, shape as (C, H, W): what comes in at net.inp, step after step; or, for
           a file with an input layer, one image `[1, *shape]` held as the bias of its neurons
    steps  Lava steps
    """
    from lava.lib.dl.netx.hdf5 import Network
    from lava.magma.core.run_conditions import RunSteps
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.proc.lif.models import PyLifModelBitAcc
    from lava.proc.lif.process import LIF, LIFReset

    from ranvier.deploy.lava_processes.stock import TapedLifReset
    from ranvier.deploy.lava_processes.synapses import Source
    from ranvier.deploy.lava_processes.tape import Recording, Tape

    class TapedLif(Recording, PyLifModelBitAcc):
        """LIF, recorded."""

    net = Network(
        net_config=job["path"],
        input_message_bits=job["message_bits"],
        reset_interval=job["reset_interval"],
        reset_offset=job["reset_offset"],
    )
    x = np.asarray(job["x"], np.int32)
    if hasattr(net.in_layer, "transform"):
        by = net.in_layer.transform
        net.in_layer.neuron.bias_mant.init = x[0].transpose() * by["weight"] + by["bias"]
    else:
        source = Source(data=np.ascontiguousarray(x.transpose(backwards_of(x))))
        source.s_out.connect(net.inp)
    tapes = []
    for layer in net.layers:
        tapes.append(Tape(job["steps"], layer.neuron.s_out.shape, ("sent", "v")))
        layer.neuron.proc_params["tape"] = tapes[-1]
    models = {LIF: TapedLif, LIFReset: TapedLifReset}
    config = Loihi2SimCfg(select_tag="fixed_pt", exception_proc_model_map=models)
    net.run(condition=RunSteps(num_steps=job["steps"]), run_cfg=config)
    net.stop()
    return {
        key: [t.rows[key].transpose(backwards_of(t.rows[key])) for t in tapes]
        for key in ("sent", "v")
    }


def backwards_of(rows: np.ndarray) -> tuple[int, ...]:
    """The axes of `[step, W, H, C]` that make it `[step, C, H, W]`, and back."""
    return (0, *range(rows.ndim - 1, 0, -1))


def dense_weights(payload: dict[str, Any]) -> dict[str, Any]:
    """{"applied": for each (part, whole) the weights that netx and Lava's Dense end up with}.

    None where sums are scaled back by more than the weights allow, or netx raises.
    """
    lava_compat.apply(netx=True)
    from lava.lib.dl.netx.utils import optimize_weight_bits
    from lava.utils.weightutils import clip_weights, determine_sign_mode, truncate_weights

    applied: list[Any] = []
    for part, whole in payload["pairs"]:
        columns = slice(0, part.shape[1])
        try:
            scaled, bits, exponent, _ = optimize_weight_bits(whole.copy())
        except (OverflowError, ValueError):
            applied.append(None)
            continue
        made = scaled[:, columns].astype(np.int32)
        mode = determine_sign_mode(made)
        made = truncate_weights(clip_weights(made, mode, num_bits=8), mode, bits)
        even = exponent <= 0 and not (made % 2**-exponent).any()
        applied.append(made // 2**-exponent if even else None)
    return {"applied": applied}
