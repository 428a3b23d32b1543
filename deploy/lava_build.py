"""Makes a plan real: builds Lava's Processes, runs them, returns what they recorded.

Only for the guarded process (see `lava_guard`): imports Lava.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from lava.magma.compiler.compiler_graphs import ProcGroupDiGraphs
from lava.magma.core.process.process import AbstractProcess
from lava.magma.core.run_conditions import RunSteps
from lava.magma.core.run_configs import Loihi2SimCfg
from lava.proc.conv.process import Conv
from lava.proc.dense.process import DelayDense, Dense
from lava.proc.graded.process import GradedVec
from lava.proc.lif.process import LIFReset
from lava.proc.sparse.process import DelaySparse, Sparse
from lava.utils.weightutils import SignMode
from scipy.sparse import csr_matrix, diags

from ranvier.deploy.lava_processes.neurons import Compartment, Logic, Relay
from ranvier.deploy.lava_processes.stock import TapedGradedVec, TapedLifReset
from ranvier.deploy.lava_processes.synapses import Delay, Source
from ranvier.deploy.lava_processes.tape import Tape

_TAPED = {LIFReset: TapedLifReset, GradedVec: TapedGradedVec}


def execute_all(payload: dict[str, Any]) -> dict[str, Any]:
    """{"runs": [what each plan of payload["plans"] recorded]}; one network after the other.

    progress  of the payload: None, or a file whose size will be the steps done
    """
    _remember_models()
    for plan in payload["plans"]:
        for _, kind, args in plan["nodes"]:
            if kind == "source":
                args["progress"] = payload["progress"]
    return {"runs": [execute(plan) for plan in payload["plans"]]}


def _remember_models() -> None:
    """Lava looks for the models of every Process anew, and executes whole folders to find them."""
    find = ProcGroupDiGraphs._find_proc_models
    known: dict[type, list[Any]] = {}

    @functools.wraps(find)
    def find_once(proc: AbstractProcess) -> list[Any]:
        if type(proc) not in known:
            known[type(proc)] = find(proc)
        return list(known[type(proc)])

    ProcGroupDiGraphs._find_proc_models = staticmethod(find_once)


def execute(plan: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Population -> "sent", "u", "v" -> rows `[step, *shape]`, int32, of one run of the plan."""
    processes = {name: MAKERS[kind](**_shaped(args)) for name, kind, args in plan["nodes"]}
    tapes = {}
    for name, kept in plan["record"].items():
        process = processes[name]
        tapes[name] = Tape(plan["steps"], process.s_out.shape, tuple(kept))
        process.proc_params["tape"] = tapes[name]
    for source, target, views in plan["edges"]:
        _connect(processes[source], processes[target], views)
    _run(processes, plan["edges"], plan["steps"])
    return {name: tape.rows for name, tape in tapes.items()}


def _run(processes: dict[str, AbstractProcess], edges: Any, steps: int) -> None:
    """Runs every connected network among the processes; Lava starts what hangs together."""
    leader = {name: name for name in processes}
    for source, target, _ in edges:
        old, new = leader[source], leader[target]
        leader = {name: new if held == old else held for name, held in leader.items()}
    for name in set(leader.values()):
        config = Loihi2SimCfg(select_tag="fixed_pt", exception_proc_model_map=_TAPED)
        processes[name].run(condition=RunSteps(num_steps=steps), run_cfg=config)
        processes[name].stop()


def _connect(source: AbstractProcess, target: AbstractProcess, views: Any) -> None:
    port = source.s_out if hasattr(source, "s_out") else source.a_out
    for kind, numbers in views:
        port = getattr(port, kind)(tuple(numbers))
    port.connect(target.a_in if hasattr(target, "a_in") else target.s_in)


def _shaped(args: dict[str, Any]) -> dict[str, Any]:
    """Lists that crossed the border as JSON are tuples again."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}


def _lif(**args: Any) -> LIFReset:
    return LIFReset(**args)


def _graded(shape: tuple[int, ...]) -> GradedVec:
    return GradedVec(shape=shape, vth=0)


def _dense(sign_mode: str, delays: int = 0, **args: Any) -> Dense:
    args["sign_mode"] = SignMode[sign_mode]
    return DelayDense(delays=delays, **args) if delays else Dense(**args)


def _one_to_one(weights: np.ndarray, sign_mode: str, delays: int = 0, **args: Any) -> Sparse:
    matrix = csr_matrix(diags(weights.astype(np.int32), dtype=np.int32))
    args["sign_mode"] = SignMode[sign_mode]
    if not delays:
        return Sparse(weights=matrix, **args)
    steps = csr_matrix(diags(np.full(len(weights), delays), dtype=int))
    return DelaySparse(weights=matrix, delays=steps, max_delay=delays, **args)


MAKERS: dict[str, Callable[..., AbstractProcess]] = {
    "source": Source,
    "lif": _lif,
    "graded": _graded,
    "compartment": Compartment,
    "relay": Relay,
    "logic": Logic,
    "delay": Delay,
    "dense": _dense,
    "one_to_one": _one_to_one,
    "conv": Conv,
}
