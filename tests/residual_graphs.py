"""Small random residual graphs, with every join, pools, shortcuts and norms between."""

from __future__ import annotations

import numpy as np

from ranvier.export.graph import Graph
from ranvier.export.neurons import LIF
from ranvier.export.nodes import (
    Conv,
    Dense,
    Flatten,
    Input,
    Join,
    Neuron,
    Node,
    Norm,
    Output,
    Pool,
    Subsample,
)

JOINS = ("vanilla", "sew", "sew-and", "sew-iand", "ms", "or")
OPS = {"sew": "add", "sew-and": "and", "sew-iand": "iand", "or": "or"}


def residual_graph(
    join: str,
    seed: int = 0,
    *,
    blocks: int = 2,
    channels: int = 4,
    side: int = 6,
    down: bool = True,
    reset: str = "zero",
    steps: int = 4,
) -> Graph:
    """stem, blocks (the last one halves the side if `down`), global average, 5 classes."""
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(np.prod(shape[1:])) * 2.5).astype(np.float32)

    def norm(name: str, source: str, c: int) -> Norm:
        mean, beta = rng.normal(size=(2, c)).astype(np.float32) * 0.1
        var, gamma = rng.uniform(0.5, 1.5, (2, c)).astype(np.float32)
        return Norm(name=name, inputs=(source,), mean=mean, var=var, gamma=gamma, beta=beta)

    def neuron(name: str, source: str) -> Neuron:
        return Neuron(name=name, inputs=(source,), model=LIF(beta=0.5, reset=reset))

    nodes: list[Node] = [
        Input(name="x", shape=(1, side, side)),
        Conv(name="stem", inputs=("x",), weight=weight(channels, 1, 3, 3), padding=(1, 1)),
        norm("stem.norm", "stem", channels),
    ]
    last, c = "stem.norm", channels
    if join != "ms":
        nodes.append(neuron("stem.neuron", last))
        last = "stem.neuron"
    for i in range(blocks):
        stride = 2 if down and i == blocks - 1 else 1
        wide = c * stride
        b, shortcut = f"b{i}", last
        if stride == 2:
            shortcut = f"{b}.shortcut"
            nodes.append(
                Subsample(name=shortcut, inputs=(last,), stride=(2, 2), pad_channels=(0, wide - c))
            )
        top = last
        if join == "ms":
            nodes.append(neuron(f"{b}.neuron0", last))
            top = f"{b}.neuron0"
        nodes += [
            Conv(name=f"{b}.conv1", inputs=(top,), weight=weight(wide, c, 3, 3),
                 stride=(stride, stride), padding=(1, 1)),
            norm(f"{b}.norm1", f"{b}.conv1", wide),
            neuron(f"{b}.neuron1", f"{b}.norm1"),
            Conv(name=f"{b}.conv2", inputs=(f"{b}.neuron1",), weight=weight(wide, wide, 3, 3),
                 padding=(1, 1)),
            norm(f"{b}.norm2", f"{b}.conv2", wide),
        ]  # fmt: skip
        branch = f"{b}.norm2"
        if join in OPS:
            nodes.append(neuron(f"{b}.neuron2", branch))
            branch = f"{b}.neuron2"
        op = OPS.get(join, "add")
        nodes.append(Join(name=f"{b}.join", inputs=(branch, shortcut), op=op))
        last, c = f"{b}.join", wide
        if join == "vanilla":
            nodes.append(neuron(f"{b}.neuron2", last))
            last = f"{b}.neuron2"
    if join == "ms":
        nodes.append(neuron("last", last))
        last = "last"
    size = -(-side // 2) if down else side
    nodes += [
        Pool(name="pool", inputs=(last,), op="avg", kernel=(size, size), stride=(size, size)),
        Flatten(name="flat", inputs=("pool",)),
        Dense(name="fc", inputs=("flat",), weight=weight(5, c), bias=weight(5, 1)[:, 0]),
        Output(name="out", inputs=("fc",), reduce="mean"),
    ]
    return Graph.of(nodes, steps=steps)


def images(seed: int, n: int, side: int = 6) -> np.ndarray:
    """n images of 16 grey levels, float32 [n, 1, side, side]."""
    return (np.random.default_rng(seed).integers(0, 17, (n, 1, side, side)) / 16).astype(np.float32)
