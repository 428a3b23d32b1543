"""Spike-domain inference: known blocks, chains of causes, measured values inside inferred ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranvier.export.domains import Domain, binary_only, infer_domains, verdicts
from ranvier.export.graph import Graph
from ranvier.export.neurons import IF, LI, LIF, CubaLIF, Relay, SlidingWindow, Threshold
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
    Opaque,
    Output,
    Pool,
    Scale,
    Subsample,
    Upsample,
)

SHAPE = (2, 6, 6)


class Builder:
    """Adds nodes in a row; each method returns the new node's name."""

    def __init__(self, seed: int = 0, **entry) -> None:
        self.rng = np.random.default_rng(seed)
        entry = {"shape": SHAPE, "lo": 0.0, "hi": 1.0, **entry}
        self.nodes: list[Node] = [Input(name="x", **entry)]

    def add(self, made, name: str, /, *inputs: str, **fields) -> str:
        self.nodes.append(made(name=name, inputs=inputs, **fields))
        return name

    def conv(self, name: str, source: str, c_in: int, c_out: int, kernel: int = 3, **fields) -> str:
        weight = self.rng.normal(0.1, 0.5, (c_out, c_in, kernel, kernel))
        pad = (kernel // 2,) * 2
        return self.add(Conv, name, source, weight=weight, **{"padding": pad, **fields})

    def norm(self, name: str, source: str, channels: int) -> str:
        r = self.rng
        parts = {"mean": r.normal(0, 1, channels), "var": r.uniform(0.2, 2, channels)}
        parts |= {"gamma": r.normal(0, 1, channels), "beta": r.normal(0.3, 0.5, channels)}
        return self.add(Norm, name, source, **parts)

    def neuron(self, name: str, source: str, model=None) -> str:
        return self.add(Neuron, name, source, model=model or LIF(beta=0.5))

    def graph(self, last: str, **fields) -> Graph:
        return Graph.of([*self.nodes, Output(name="y", inputs=(last,))], **{"steps": 4, **fields})


def residual(join: str, blocks: int = 3, shortcut: str = "none", seed: int = 0) -> Graph:
    """Stem, `blocks` blocks of one convolution, mean over space, classes."""
    b = Builder(seed)
    a = b.norm("stem.norm", b.conv("stem", "x", 2, 4), 4)
    if join != "ms":
        a = b.neuron("stem.neuron", a)
    for i in range(blocks):
        a = _block(b, join, f"b{i}", a, shortcut if i == 1 else "none")
    if join == "ms":
        a = b.neuron("last", a)
    size = b.graph(a).shapes[a][-1]
    a = b.add(Pool, "pool", a, op="avg", kernel=(size, size), stride=(size, size))
    a = b.add(Flatten, "flatten", a)
    channels = b.graph(a).shapes[a][0]
    a = b.add(Dense, "fc", a, weight=b.rng.normal(0, 1, (3, channels)), bias=np.ones(3))
    return b.graph(a)


def _block(b: Builder, join: str, name: str, a: str, shortcut: str) -> str:
    stride = (1, 1) if shortcut == "none" else (2, 2)
    c_in = b.graph(a).shapes[a][0]
    c_out = c_in if shortcut == "none" else 2 * c_in
    x = b.neuron(f"{name}.top", a) if join == "ms" else a
    x = b.norm(f"{name}.norm", b.conv(f"{name}.conv", x, c_in, c_out, stride=stride), c_out)
    if join in ("sew", "or", "and", "iand"):
        x = b.neuron(f"{name}.neuron", x)
    s = a
    if shortcut == "conv":
        s = b.conv(f"{name}.short", a, c_in, c_out, 1, stride=stride)
        s = s if join in ("ms", "vanilla") else b.neuron(f"{name}.shortneuron", s)
    elif shortcut == "A":
        s = b.add(Subsample, f"{name}.short", a, stride=stride, pad_channels=(0, c_in))
    op = "add" if join in ("sew", "ms", "vanilla") else join
    x = b.add(Join, f"{name}.join", x, s, op=op)
    return b.neuron(f"{name}.neuron", x) if join == "vanilla" else x


def measured_inside(graph: Graph, x: np.ndarray) -> None:
    domains = infer_domains(graph)
    names = tuple(n.name for n in graph)
    _, values = graph.run(x, record=names)
    for name in names:
        assert domains[name].holds(values[name], 1e-4), (
            f"'{name}' is {domains[name]}, measured {values[name].min()}..{values[name].max()}"
        )


@pytest.mark.parametrize("blocks", [1, 3, 6])
def test_sew_add_counts_its_joins(blocks):
    domains = infer_domains(residual("sew", blocks))
    for i in range(blocks):
        assert domains[f"b{i}.join"] == Domain("integer", 0.0, i + 2.0, 1.0)


def test_a_shortcut_neuron_restarts_the_count():
    domains = infer_domains(residual("sew", 3, "conv"))
    assert [domains[f"b{i}.join"].hi for i in range(3)] == [2, 2, 3]


def test_parameter_free_shortcut_does_not():
    domains = infer_domains(residual("sew", 3, "A"))
    assert [domains[f"b{i}.join"].hi for i in range(3)] == [2, 3, 4]


@pytest.mark.parametrize("join", ["or", "and", "iand", "vanilla"])
@pytest.mark.parametrize("shortcut", ["none", "A", "conv"])
def test_binary_joins_are_binary_only(join, shortcut):
    graph = residual(join, 3, shortcut)
    assert binary_only(graph) == (True, [])


def test_ms_is_binary_only_but_for_its_shortcut_convolutions():
    assert binary_only(residual("ms", 3, "A"))[0]
    holds, broken = binary_only(residual("ms", 3, "conv"))
    assert not holds
    assert [(e.source, e.target, e.domain.kind) for e in broken] == [
        ("b0.join", "b1.short", "real")
    ]


def test_sew_add_breaks_every_later_convolution():
    holds, broken = binary_only(residual("sew", 3))
    assert not holds
    assert [e.target for e in broken] == ["b1.conv", "b2.conv", "fc"]
    assert str(broken[0]) == "b0.join -> b1.conv (integer 0..2)"


def test_verdicts_name_the_chain():
    found = verdicts(residual("sew", 3))
    assert found["stem"].kind == "multiply" and found["stem"].stem
    assert found["b0.conv"].kind == "accumulate-only" and found["b0.conv"].chain == ()
    assert found["b2.conv"].kind == "graded accumulate"
    assert found["b2.conv"].chain == ("b0.join", "b1.join")
    assert "2 joins in a row" in found["b2.conv"].reason
    short = verdicts(residual("ms", 3, "conv"))["b1.short"]
    assert short.kind == "multiply" and not short.stem and short.chain[-1] == "b0.join"


def test_average_pool_is_whole_after_scale():
    graph = residual("or", 2)
    fc = verdicts(graph)["fc"]
    assert fc.kind == "graded accumulate"
    assert fc.domain.whole_after_scale and fc.domain.grid == pytest.approx(1 / 36)
    assert fc.merged.kind == "binary" and "merged" in fc.reason
    assert binary_only(graph)[0]
    assert [e.target for e in binary_only(graph, merge_pools=False)[1]] == ["fc"]


def test_binary_input_makes_the_stem_accumulate():
    b = Builder(integer=True)
    graph = b.graph(b.neuron("n", b.conv("c", "x", 2, 3)))
    assert verdicts(graph)["c"].kind == "accumulate-only"


def test_products_and_gates():
    b = Builder()
    s1 = b.neuron("s1", b.conv("c1", "x", 2, 4))
    s2 = b.neuron("s2", b.conv("c2", "x", 2, 4))
    both = b.add(Join, "and", s1, s2, op="mul")
    summed = b.add(Join, "sum", s1, s2, op="add")
    b.add(Join, "gated", both, summed, op="mul")
    product = b.add(Join, "product", summed, "c1", op="mul")
    gate = b.add(Opaque, "gate", product, kind="sigmoid", reason="a real gate", shape=(4, 6, 6))
    graph = b.graph(gate)
    found = verdicts(graph)
    assert found["and"].kind == "accumulate-only"
    assert found["gated"].kind == "graded accumulate"
    assert found["product"].kind == "multiply"
    assert found["gate"].kind == "multiply" and "real gate" in found["gate"].reason
    domains = infer_domains(graph)
    assert domains["gate"] == Domain("real", 0.0, 1.0)
    assert {e.target for e in binary_only(graph)[1]} == {"gated", "product", "gate"}


def test_attention_product_of_spikes_is_whole():
    b = Builder(shape=(8,), integer=True)
    n = b.neuron("n", "x", Threshold())
    b.add(Opaque, "qk", n, n, kind="matmul", reason="a product of two spike tensors", shape=(8,))
    assert infer_domains(b.graph("qk"))["qk"] == Domain("integer", 0.0, np.inf, 1.0)


def test_iand_and_ternary():
    b = Builder(shape=(3,), integer=True)
    n = b.neuron("n", "x", Threshold())
    minus = b.add(Scale, "minus", n, scale=np.asarray(-1.0))
    both = b.add(Join, "both", n, minus, op="add")
    domains = infer_domains(b.graph(b.add(Join, "iand", n, n, op="iand")))
    assert domains["minus"] == Domain("ternary", -1.0, 0.0, 1.0)
    assert domains[both].kind == "ternary" and domains["iand"].kind == "binary"


def test_a_silenced_branch_leaves_the_shortcut_as_it_was():
    """gamma = beta = 0 in the last normalization: the neuron provably never fires."""
    graph = residual("sew", 2)
    zero = np.zeros(4)
    nodes: list[Node] = [
        Norm(name=n.name, inputs=n.inputs, mean=n.mean, var=n.var, gamma=zero, beta=zero)
        if isinstance(n, Norm) and n.name.startswith("b")
        else n
        for n in graph
    ]
    domains = infer_domains(graph.with_nodes(nodes))
    assert str(domains["b1.neuron"]) == "always 0" and domains["b1.join"].kind == "binary"


def loop(model, gain: float = 0.5, steps: int | None = None) -> Graph:
    nodes: list[Node] = [
        Input(name="x", shape=(2,), lo=0.0, hi=1.0, integer=True),
        Delay(name="past", inputs=("n",), steps=1, shape=(2,)),
        Dense(name="back", inputs=("past",), weight=np.eye(2) * gain),
        Join(name="sum", inputs=("x", "back"), op="add"),
        Neuron(name="n", inputs=("sum",), model=model),
        Output(name="y", inputs=("n",)),
    ]
    return Graph.of(nodes, steps=steps)


def test_cycles_reach_their_fixed_point():
    assert infer_domains(loop(LIF(beta=0.5)))["n"].kind == "binary"
    grown = infer_domains(loop(Relay(), gain=2.0))["n"]
    assert (grown.kind, grown.lo, grown.hi) == ("integer", 0.0, np.inf)
    assert infer_domains(loop(LI(beta=0.9)))["n"].hi == np.inf  # widened: no bound can be proved


@pytest.mark.parametrize("model", [LIF(beta=0.5), Relay(), LI(beta=0.9), CubaLIF(alpha=0.3)])
def test_cycles_hold_what_they_measure(model):
    x = np.random.default_rng(1).integers(0, 2, (20, 4, 2)).astype(np.float64)
    measured_inside(loop(model), x)


def always_firing(join: str) -> Graph:
    """The same net, with a bias that makes every neuron fire in every step."""
    graph = residual(join, 4)
    nodes: list[Node] = []
    for n in graph:
        if isinstance(n, Norm):
            n = Norm(
                name=n.name, inputs=n.inputs, mean=n.mean, var=n.var, gamma=n.gamma,
                beta=np.full(4, 500.0),
            )  # fmt: skip
        nodes.append(n)
    return graph.with_nodes(nodes)


@pytest.mark.parametrize("join", ["sew", "or", "and"])
def test_inferred_maxima_are_reached(join):
    """Tight: the residual nets send exactly what is inferred."""
    graph = always_firing(join)
    domains = infer_domains(graph)
    joins = tuple(n.name for n in graph if isinstance(n, Join))
    x = np.random.default_rng(0).uniform(0, 1, (4, 2, *SHAPE))
    _, values = graph.run(x, record=joins)
    for name in joins:
        assert values[name].max() == domains[name].hi


def test_ms_bounds_are_reached_by_the_worst_input():
    """One convolution from binary spikes: the bound is the sum of its positive weights."""
    b = Builder(shape=(2, 3, 3), integer=True)
    weight = b.rng.normal(0, 1, (1, 2, 3, 3))
    graph = b.graph(b.add(Conv, "c", "x", weight=weight))
    best = (weight > 0).astype(np.float64)
    out = graph.run(best[None])
    assert out.item() == pytest.approx(infer_domains(graph)["c"].hi)


JOINS = ("sew", "ms", "or", "and", "iand", "vanilla")


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(JOINS), st.integers(1, 4), st.sampled_from(["none", "A", "conv"]),
    st.integers(0, 10**6),
)  # fmt: skip
def test_measured_ranges_lie_inside(join, blocks, shortcut, seed):
    graph = residual(join, blocks, shortcut if blocks > 1 else "none", seed)
    measured_inside(graph, np.random.default_rng(seed).uniform(0, 1, (4, 3, *SHAPE)))


MODELS = (
    IF(reset="subtract"),
    LIF(beta=0.7, reset="none"),
    LIF(beta=0.9, v_reset=-0.5, timing="delayed"),
    LIF(beta=0.5, v_leak=0.4, r=0.5),
    LIF(beta=0.5, reset="subtract", timing="carry", strict=False),
    CubaLIF(alpha=0.4, beta=0.8, w_in=0.6),
    LI(beta=0.8, r=0.2, v_leak=-0.3),
    SlidingWindow(taps=np.array([-0.5, 0.2, 1.0])),
    Threshold(v_threshold=0.2),
    Relay(),
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MODELS), st.sampled_from(["avg", "sum", "max"]), st.integers(0, 10**6))
def test_measured_ranges_of_every_model_and_node(model, op, seed):
    b = Builder(seed, lo=-1.0)
    a = b.neuron("n1", b.conv("c1", "x", 1, 4, groups=2) if seed % 2 else "x", model)
    a = b.add(Pool, "pool", a, op=op, kernel=(2, 2), stride=(2, 2), padding=(1, 1))
    a = b.add(Upsample, "up", a, factor=(2, 2))
    channels = b.graph(a).shapes[a][0]
    a = b.add(
        Scale, "scale", a, scale=b.rng.normal(0, 2, (channels, 1, 1)), shift=np.full((1, 8, 8), 0.1)
    )
    a = b.add(Join, "cat", a, b.add(Scale, "two", a, scale=np.asarray(2.0)), op="cat")
    a = b.add(
        Join, "max", a, b.add(Delay, "late", a, steps=1, shape=(2 * channels, 8, 8)), op="max"
    )
    a = b.neuron("n2", b.add(Join, "mul", a, a, op="mul"), model)
    graph = b.graph(a)
    measured_inside(graph, np.random.default_rng(seed).uniform(-1, 1, (4, 2, *SHAPE)))


def test_holds_refuses_what_lies_outside():
    """The control: a checker that never fails would prove nothing."""
    assert Domain("integer", 0.0, 3.0, 1.0).holds([0, 1, 3])
    assert not Domain("integer", 0.0, 3.0, 1.0).holds([4])
    assert not Domain("integer", 0.0, 3.0, 1.0).holds([0.5])
    assert not Domain("real", -1.0, 1.0).holds([-1.1])
    with pytest.raises(AssertionError, match="'x'"):
        b = Builder(shape=(2, 3, 3))
        graph = b.graph(b.conv("c", "x", 2, 1))
        measured_inside(graph, np.full((1, 1, 2, 3, 3), 50.0) * np.sign(graph["c"].weight.sum()))


@pytest.mark.filterwarnings("error")
def test_an_unbounded_input_gives_bounds_without_warning():
    """A window of taps of one sign: 0 x infinity is 0 in a bound, not nan."""
    for taps in ([0.5, 1.0], [-0.5, -1.0]):
        model = SlidingWindow(taps=np.array(taps), v_threshold=1.0)
        nodes = [
            Input(name="x", shape=(2,), lo=-np.inf, hi=np.inf),
            Neuron(name="n", inputs=("x",), model=model),
            Output(name="y", inputs=("n",)),
        ]
        found = infer_domains(Graph.of(nodes, steps=4))
        assert found["n"].kind == "binary" and found["n"].hi == 1.0


@pytest.mark.filterwarnings("error")
def test_read_only_parameters_are_read_without_warning():
    graph = residual("ms", 2)
    for node in graph:
        for value in vars(node).values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
    graph.run(np.ones((4, 1, *SHAPE), np.float32))
