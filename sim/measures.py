"""Measures of the literature on residual spiking networks, each with the paper that it is from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ranvier.export.graph import Graph
from ranvier.export.nodes import Input, Join, Node
from ranvier.train.errors import RangeError

if TYPE_CHECKING:
    from ranvier.deploy.program import Program

SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # of Wang et al. 2004, for values in 0..1


def blocks_of(net: Any) -> list[tuple[str, Any]]:
    """(name, block) of a torch network's residual blocks, in order."""
    from ranvier.train.blocks import ResidualBlock

    return [(n, m) for n, m in net.named_modules() if isinstance(m, ResidualBlock)]


def identity_at_init(net: Any, x: Any) -> dict[str, float]:
    """block -> how much of its shortcut an untrained block passes on: 1.0 where it is the identity.

    Equal values over those that are not zero in both; starting as the identity lets depth train.
    Source: SEW-ResNet (Fang et al. 2021), section 3; MS-ResNet (Hu et al. 2024).
    """
    import torch

    seen: dict[str, float] = {}

    def listen(name: str, block: Any) -> Any:
        kept: list[Any] = []
        block.shortcut.register_forward_hook(lambda m, args, out: kept.append(out))

        def hook(module: Any, args: Any, out: Any) -> None:
            a, b = out.flatten(), kept.pop().flatten()
            active = (a != 0) | (b != 0)
            n = int(active.sum())
            seen[name] = float((a == b)[active].sum()) / n if n else 1.0

        return hook

    from ranvier.export.trace_plan import rested

    made = rested(net)
    for name, block in blocks_of(made):
        block.register_forward_hook(listen(name, block))
    with torch.no_grad():
        made(x)
    return seen


def gradient_norms(
    join: str, depth: int = 50, *, width: int = 16, size: int = 8, steps: int = 4, batch: int = 8,
    zero_init: bool = True, seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """r [depth]: squared norm of the gradient at the input of each block, over that at the end.

    `depth` equal blocks, normalized by their own batch (tdBN), random spikes (ms: random membranes)
    in, a random vector back. 1 everywhere is block dynamical isometry.
    Source: Chen et al. 2020; tdBN (Zheng et al. 2021); MS-ResNet (Hu et al. 2024), section on
    gradient norm equality.
    """
    import torch

    from ranvier.train import create_model
    from ranvier.train.multistep import set_multi_step

    torch.manual_seed(seed)
    net: Any = create_model(
        "resnet", join=join, norm="tdbn", blocks=(depth,), widths=(width,), strides=(1,),
        in_channels=width, image_size=size, steps=steps, zero_init=zero_init,
    )  # fmt: skip
    net.train()
    set_multi_step(net, True)
    values = torch.randn(steps, batch, width, size, size)
    x = (values if join == "ms" else (values > 0.8).float()).requires_grad_()
    kept = [x]
    for _, block in blocks_of(net):
        kept.append(block(kept[-1]))
        kept[-1].retain_grad()
    (kept[-1] * torch.randn_like(kept[-1])).sum().backward()
    norms = np.array([float((k.grad**2).sum()) if k.grad is not None else 0.0 for k in kept])
    return norms[:-1] / norms[-1]


def isometry(r: np.ndarray) -> dict[str, float]:
    """What a profile of gradient norms comes to: its largest |log|, and log r a block (slope).

    A slope of 0 is equality; a gradient that vanishes or explodes has a constant slope.
    """
    log = np.log(np.maximum(r, 1e-300))
    back = np.arange(len(r), 0, -1)
    slope = float(np.polyfit(back, log, 1)[0]) if len(r) > 1 else 0.0
    return {"max_abs_log": float(np.abs(log).max()), "slope": slope}


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of firing-rate maps [C, H, W] in 0..1, a mean over channels; 1: equal.

    (2 ma mb + c1)(2 sab + c2) / ((ma^2 + mb^2 + c1)(sa^2 + sb^2 + c2)), over a whole map.
    Source: Wang et al. 2004; its use on firing patterns: MS-ResNet (Hu et al. 2024), figure 2. The
    constants are the usual ones; that paper does not print its own.
    """
    x, y = (m.reshape(m.shape[0], -1) for m in (a, b))
    mx, my = x.mean(1), y.mean(1)
    vx, vy = x.var(1), y.var(1)
    both = ((x - mx[:, None]) * (y - my[:, None])).mean(1)
    top = (2 * mx * my + SSIM_C1) * (2 * both + SSIM_C2)
    return float((top / ((mx**2 + my**2 + SSIM_C1) * (vx + vy + SSIM_C2))).mean())


def block_spikes(graph: Graph) -> list[str]:
    """The nodes that stand for a block's output: joins of spikes, or the neuron behind one."""
    from ranvier.export.domains import infer_domains

    domains, found = infer_domains(graph), []
    for node in graph:
        if not isinstance(node, Join) or node.op == "cat":
            continue
        if domains[node.name].kind != "real":
            found.append(node.name)
            continue
        after = [c for c in graph.consumers[node.name] if domains[c].kind == "binary"]
        found += after[:1]
    return found


def pattern_ssim(graph: Graph, x: np.ndarray) -> dict[str, float]:
    """ "block -> block" -> SSIM of the firing rates of consecutive blocks of equal shape.

    1.0: the second block passed on what the first fired, and did nothing.
    """
    names = block_spikes(graph)
    if not names:
        return {}
    _, series = graph.run(x, record=tuple(names))
    rates = {n: np.minimum(np.asarray(s).mean((0, 1)), 1.0) for n, s in series.items()}
    pairs = [
        (a, b) for a, b in zip(names, names[1:], strict=False) if rates[a].shape == rates[b].shape
    ]
    return {f"{a} -> {b}": ssim(rates[a], rates[b]) for a, b in pairs if rates[a].ndim == 3}


@dataclass(frozen=True)
class Pruning:
    """OR joins with a branch that never fired, dropped.

    rates      "join: branch" -> spikes a neuron and step, of every branch of every OR
    dropped    the branches with rate zero
    identical  whether the output without them is the same to the bit
    nodes      (before, after) of the graph
    """

    rates: Mapping[str, float]
    dropped: tuple[str, ...]
    identical: bool
    nodes: tuple[int, int]

    def figures(self) -> dict[str, Any]:
        return asdict(self)


def natural_pruning(graph: Graph, x: np.ndarray) -> Pruning:
    """Drops what an OR never needed on x, and says whether the output stayed the same.

    Source: SynA-ResNet (2311.06570): a branch of an OR whose firing rate is zero can be removed.
    """
    joins = [n for n in graph if isinstance(n, Join) and n.op == "or"]
    if not joins:
        raise RangeError(
            "natural pruning: the graph has no OR join; it is a property of OR shortcuts"
        )
    branches = {i for n in joins for i in n.inputs}
    before, series = graph.run(x, record=tuple(branches))
    rate = {i: float(np.asarray(series[i]).mean()) for i in branches}
    silent = {i for i in branches if rate[i] == 0.0}
    left = without(graph, silent)
    after = left.run(x)
    return Pruning(
        {f"{n.name}: {i}": rate[i] for n in joins for i in n.inputs},
        tuple(f"{n.name}: {i}" for n in joins for i in n.inputs if i in silent),
        bool(np.array_equal(before, after)),
        (len(graph.nodes), len(left.nodes)),
    )


def without(graph: Graph, silent: set[str]) -> Graph:
    """The graph with branches taken off its OR joins, and whatever led to those alone."""
    nodes: dict[str, Node] = {}
    for node in graph:
        if isinstance(node, Join) and node.op == "or":
            kept = tuple(i for i in node.inputs if i not in silent) or node.inputs[-1:]
            node = replace(node, inputs=kept)
        nodes[node.name] = node
    needed = {o.name for o in graph.outputs} | {n.name for n in graph if isinstance(n, Input)}
    todo = list(needed)
    while todo:
        for source in nodes[todo.pop()].inputs:
            if source not in needed:
                needed.add(source)
                todo.append(source)
    return graph.with_nodes([n for n in nodes.values() if n.name in needed])


def message_bits(program: Program) -> int:
    """Bits of the widest message between populations: 1 for plain spikes, with sign for others."""
    widest = 1
    for p in program:
        if p.graded and not p.is_input and program.out_of(p.name):
            widest = max(widest, max(abs(p.lo), abs(p.hi)).bit_length() + (1 if p.lo < 0 else 0))
    return widest
