"""Hand-made graphs that the border tests share: every node, every model, every reset and timing."""

from __future__ import annotations

import numpy as np

from ranvier.export.graph import Graph
from ranvier.export.neurons import (
    IF,
    LI,
    LIF,
    CubaLI,
    CubaLIF,
    NeuronModel,
    Relay,
    SlidingWindow,
    Threshold,
)
from ranvier.export.nodes import (
    Conv,
    Delay,
    Dense,
    Flatten,
    Input,
    Join,
    Neuron,
    Node,
    Norm,
    Output,
    Pool,
    Scale,
    Subsample,
    Upsample,
)


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def spikes(seed: int, *shape: int, rate: float = 0.4) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) < rate).astype(np.float32)


def column(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


MODELS: dict[str, NeuronModel] = {
    "threshold": Threshold(v_threshold=0.3),
    "threshold_loose": Threshold(v_threshold=0.0, strict=False),
    "relay": Relay(),
    "li": LI(beta=0.8, r=0.5, v_leak=0.1),
    "li_exponential": LI(beta=0.7, decay="exponential"),
    "integrator": LI(beta=1.0, r=0.25),
    "cuba_li": CubaLI(alpha=0.6, beta=0.9, r=0.5, w_in=1.5, v_leak=0.05),
    "window": SlidingWindow(taps=column(0.25, -0.5, 1.0), v_threshold=0.4),
    "leaky_if": LIF(beta=1.0, v_leak=0.3),
    "arrays": LIF(beta=np.linspace(0, 1, 6, dtype=np.float32), v_threshold=normal(5, 6) ** 2),
    "cuba_arrays": CubaLIF(
        alpha=np.linspace(0, 0.9, 6, dtype=np.float32), beta=0.5, w_in=normal(6, 6) ** 2
    ),
    "dt": LIF(beta=0.9, dt=1e-3, decay="exponential"),
}
for _reset in ("zero", "subtract", "none"):
    for _timing in ("immediate", "delayed", "carry", "discard"):
        for _strict in (True, False):
            _name = f"{_reset}_{_timing}{'' if _strict else '_loose'}"
            _fire = {"reset": _reset, "timing": _timing, "strict": _strict, "v_threshold": 0.75}
            MODELS[f"if_{_name}"] = IF(**_fire)
            MODELS[f"lif_{_name}"] = LIF(beta=0.9, v_leak=0.1, v_reset=-0.2, r=0.5, **_fire)
            MODELS[f"cuba_lif_{_name}"] = CubaLIF(alpha=0.5, beta=0.8, w_in=0.7, **_fire)


def neuron_graph(model: NeuronModel, n: int = 6) -> Graph:
    """5 inputs -> n neurons of `model` -> out."""
    return Graph.of(
        [
            Input(name="x", shape=(5,)),
            Dense(name="fc", inputs=("x",), weight=normal(1, n, 5), bias=normal(2, n, scale=0.1)),
            Neuron(name="pop", inputs=("fc",), model=model),
            Output(name="out", inputs=("pop",), reduce="sum"),
        ],
        steps=7,
        dt=1e-3,
    )


def chain(shape: tuple[int, ...], *nodes: Node, **kwargs: object) -> Graph:
    """An Input of `shape`, the nodes one after the other (unless they name inputs), an Output."""
    made: list[Node] = [Input(name="x", shape=shape)]
    from dataclasses import replace

    for node in nodes:
        made.append(node if node.inputs else replace(node, inputs=(made[-1].name,)))
    made.append(Output(name="out", inputs=(made[-1].name,)))
    return Graph.of(made, **kwargs)  # type: ignore[arg-type]


def norm(name: str, c: int, seed: int = 3) -> Norm:
    a = normal(seed, 4, c)
    return Norm(name=name, mean=a[0], var=a[1] ** 2 + 0.1, gamma=a[2], beta=a[3])


LAYERS: dict[str, Graph] = {
    "dense": chain((4,), Dense(name="a", weight=normal(1, 3, 4))),
    "dense_bias": chain((4,), Dense(name="a", weight=normal(1, 3, 4), bias=normal(2, 3))),
    "dense_shaped": chain((4,), Dense(name="a", weight=normal(1, 6, 4), out_shape=(2, 3, 1))),
    "dense_rows": chain((2, 4), Dense(name="a", weight=normal(1, 3, 4), bias=normal(2, 3))),
    "conv": chain((2, 6, 6), Conv(name="a", weight=normal(1, 3, 2, 3, 3))),
    "conv_bias": chain((2, 6, 6), Conv(name="a", weight=normal(1, 3, 2, 3, 3), bias=normal(2, 3))),
    "conv_stride": chain(
        (2, 7, 9), Conv(name="a", weight=normal(1, 3, 2, 3, 3), stride=(2, 1), padding=(1, 2))
    ),
    "conv_oblong": chain((2, 6, 8), Conv(name="a", weight=normal(1, 3, 2, 1, 5), padding=(0, 2))),
    "conv_dilated": chain((2, 8, 8), Conv(name="a", weight=normal(1, 3, 2, 3, 3), dilation=(2, 1))),
    "conv_groups": chain((4, 5, 5), Conv(name="a", weight=normal(1, 6, 2, 3, 3), groups=2)),
    "conv_depthwise": chain((4, 5, 5), Conv(name="a", weight=normal(1, 4, 1, 3, 3), groups=4)),
    "conv1d": chain(
        (3, 9),
        Conv(name="a", weight=normal(1, 4, 3, 3), stride=(2,), padding=(1,), dilation=(1,)),
    ),
    "avg": chain((2, 6, 6), Pool(name="a", op="avg", kernel=(2, 2), stride=(2, 2))),
    "avg_padded": chain(
        (2, 6, 5), Pool(name="a", op="avg", kernel=(3, 2), stride=(2, 1), padding=(1, 1))
    ),
    "sum": chain((2, 6, 6), Pool(name="a", op="sum", kernel=(2, 3), stride=(2, 3))),
    "max": chain((2, 6, 6), Pool(name="a", op="max", kernel=(3, 3), stride=(2, 2), padding=(1, 1))),
    "avg1d": chain((2, 6), Pool(name="a", op="avg", kernel=(2,), stride=(2,), padding=(0,))),
    "sum1d": chain((2, 6), Pool(name="a", op="sum", kernel=(3,), stride=(1,), padding=(1,))),
    "max1d": chain((2, 6), Pool(name="a", op="max", kernel=(2,), stride=(2,), padding=(0,))),
    "flatten": chain((2, 3, 4), Flatten(name="a")),
    "flatten_part": chain((2, 3, 4), Flatten(name="a", start=1, end=2)),
    "flatten_front": chain((2, 3, 4), Flatten(name="a", start=0, end=1)),
    "norm": chain((3, 4, 4), norm("a", 3)),
    "norm1d": chain((3, 5), norm("a", 3)),
    "norm_flat": chain((5,), norm("a", 5)),
    "scale": chain((3, 4, 4), Scale(name="a", scale=normal(1, 3, 1, 1))),
    "scale_one": chain((3,), Scale(name="a", scale=np.float32(0.5) * np.ones((), np.float32))),
    "scale_shift": chain(
        (3, 4, 4), Scale(name="a", scale=normal(1, 3, 1, 1), shift=normal(2, 3, 1, 1))
    ),
    "scale_shift_each": chain(
        (3, 2, 4), Scale(name="a", scale=normal(1, 3, 1, 1), shift=normal(2, 3, 2, 4))
    ),
    "subsample": chain((3, 5, 6), Subsample(name="a", stride=(2, 2), pad_channels=(1, 2))),
    "subsample1d": chain((3, 5), Subsample(name="a", stride=(2,), pad_channels=(0, 3))),
    "subsample_flat": chain((3,), Subsample(name="a", stride=(), pad_channels=(2, 0))),
    "upsample": chain((2, 3, 4), Upsample(name="a", factor=(2, 3))),
    "delay": chain((3,), Delay(name="a", steps=2, shape=(3,))),
}


def join_graph(op: str, inputs: tuple[str, ...], axis: int = 0) -> Graph:
    """Spikes a, b (two populations) joined into a third."""
    return Graph.of(
        [
            Input(name="x", shape=(4,)),
            Dense(name="wa", inputs=("x",), weight=normal(1, 5, 4)),
            Neuron(name="a", inputs=("wa",), model=IF()),
            Dense(name="wb", inputs=("x",), weight=normal(2, 5, 4)),
            Neuron(name="b", inputs=("wb",), model=LIF(beta=0.5)),
            Dense(name="wc", inputs=("x",), weight=normal(4, 5, 4)),
            Neuron(name="c", inputs=("wc",), model=LIF(beta=0.7)),
            Join(name="j", inputs=inputs, op=op, axis=axis),  # type: ignore[arg-type]
            Scale(name="half", inputs=("j",), scale=np.full((), 0.5, np.float32)),
            Neuron(name="d", inputs=("half",), model=LIF(beta=0.5)),
            Output(name="out", inputs=("d",), reduce="mean"),
        ]
    )


JOINS: dict[str, Graph] = {
    f"{op}_{''.join(inputs)}": join_graph(op, inputs)
    for op in ("add", "and", "iand", "or", "max", "mul", "cat")
    for inputs in (("a", "b"), ("b", "a"), ("a", "b", "c"), ("a", "a"), ("a", "b", "a"), ("a",))
}


def recurrent_graph(steps: int = 1, *, cuba: bool = False) -> Graph:
    """A population that drives itself through a Dense, `steps` late."""
    fire = {"v_threshold": 1.0, "reset": "subtract"}
    model = CubaLIF(alpha=0.5, beta=0.9, **fire) if cuba else LIF(beta=0.9, **fire)
    return Graph.of(
        [
            Input(name="x", shape=(4,)),
            Dense(name="fc", inputs=("x",), weight=normal(1, 6, 4)),
            Delay(name="back", inputs=("pop",), steps=steps, shape=(6,)),
            Dense(name="rec", inputs=("back",), weight=normal(2, 6, 6), bias=normal(3, 6)),
            Join(name="sum", inputs=("fc", "rec"), op="add"),
            Neuron(name="pop", inputs=("sum",), model=model),
            Dense(name="fc2", inputs=("pop",), weight=normal(4, 3, 6)),
            Neuron(name="read", inputs=("fc2",), model=LI(beta=0.9)),
            Output(name="out", inputs=("read",), reduce="last"),
        ],
        steps=9,
    )


def two_loops() -> Graph:
    """Two populations that drive each other and themselves."""
    return Graph.of(
        [
            Input(name="x", shape=(3,)),
            Delay(name="da", inputs=("a",), steps=1, shape=(4,)),
            Delay(name="db", inputs=("b",), steps=2, shape=(4,)),
            Dense(name="wx", inputs=("x",), weight=normal(1, 4, 3)),
            Dense(name="wba", inputs=("db",), weight=normal(2, 4, 4)),
            Dense(name="waa", inputs=("da",), weight=normal(3, 4, 4)),
            Join(name="ja", inputs=("wx", "wba", "waa"), op="add"),
            Neuron(name="a", inputs=("ja",), model=IF(reset="subtract")),
            Dense(name="wab", inputs=("a",), weight=normal(4, 4, 4)),
            Neuron(name="b", inputs=("wab",), model=LIF(beta=0.75)),
            Output(name="out", inputs=("b",)),
        ]
    )


def residual(op: str = "add") -> Graph:
    """A small convolutional residual network with norms, a max pool and a shortcut."""
    return Graph.of(
        [
            Input(name="x", shape=(2, 8, 8)),
            Conv(name="stem", inputs=("x",), weight=normal(1, 4, 2, 3, 3), padding=(1, 1)),
            norm_at("bn", 4, "stem"),
            Neuron(name="n0", inputs=("bn",), model=LIF(beta=0.5)),
            Pool(name="pool", inputs=("n0",), op="max", kernel=(2, 2), stride=(2, 2)),
            Conv(
                name="c1",
                inputs=("pool",),
                weight=normal(2, 6, 4, 3, 3),
                padding=(1, 1),
                stride=(2, 2),
            ),
            norm_at("bn1", 6, "c1"),
            Neuron(name="n1", inputs=("bn1",), model=LIF(beta=0.5)),
            Subsample(name="short", inputs=("pool",), stride=(2, 2), pad_channels=(1, 1)),
            Join(name="join", inputs=("n1", "short"), op=op),  # type: ignore[arg-type]
            Conv(name="c2", inputs=("join",), weight=normal(7, 6, 6, 3, 3), padding=(1, 1)),
            Join(name="sum", inputs=("c2", "join"), op="add"),
            Neuron(
                name="n2", inputs=("sum",), model=CubaLIF(alpha=0.3, beta=0.6, reset="subtract")
            ),
            Flatten(name="flat", inputs=("n2",)),
            Dense(name="fc", inputs=("flat",), weight=normal(9, 10, 24), bias=normal(10, 10)),
            Neuron(name="read", inputs=("fc",), model=LI(beta=0.9)),
            Output(name="out", inputs=("read",), reduce="mean"),
        ],
        steps=4,
    )


def norm_at(name: str, c: int, source: str) -> Norm:
    from dataclasses import replace

    return replace(norm(name, c), inputs=(source,))


def observed() -> Graph:
    """A readout of the membrane of a neuron that never resets."""
    return Graph.of(
        [
            Input(name="x", shape=(4,)),
            Dense(name="fc", inputs=("x",), weight=normal(1, 3, 4)),
            Neuron(name="pop", inputs=("fc",), model=LIF(beta=0.9, reset="none")),
            Output(name="out", inputs=("pop",), observe="v", reduce="max"),
        ]
    )


def biased() -> Graph:
    """Populations with a bias, per channel and per neuron, in a lowered graph."""
    return Graph.of(
        [
            Input(name="x", shape=(2, 5, 5)),
            Conv(name="c", inputs=("x",), weight=normal(1, 3, 2, 3, 3)),
            Join(name="s", inputs=("c",), op="add"),
            Neuron(name="n", inputs=("s",), model=IF(), bias=normal(2, 3, 1, 1)),
            Flatten(name="f", inputs=("n",)),
            Dense(name="d", inputs=("f",), weight=normal(3, 4, 27)),
            Join(name="t", inputs=("d",), op="add"),
            Neuron(name="m", inputs=("t",), model=LIF(beta=0.5), bias=normal(4, 4)),
            Output(name="out", inputs=("m",)),
        ],
        spec="lowered",
    )


GRAPHS: dict[str, Graph] = {
    **{f"layer {k}": g for k, g in LAYERS.items()},
    **{f"model {k}": neuron_graph(m) for k, m in MODELS.items()},
    **{f"join {k}": g for k, g in JOINS.items()},
    **{f"residual {op}": residual(op) for op in ("add", "and", "iand", "or")},
    "recurrent": recurrent_graph(),
    "recurrent 3": recurrent_graph(3),
    "recurrent cuba": recurrent_graph(cuba=True),
    "two loops": two_loops(),
    "observed": observed(),
    "biased": biased(),
}
