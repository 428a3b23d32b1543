"""Lowering keeps the output: every join, both mappings, pools, shortcuts, delays, windows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.residual_graphs import JOINS, images, residual_graph

from ranvier.export.graph import Graph
from ranvier.export.linear import ConvLin, DenseLin, DiagLin, compose
from ranvier.export.neurons import IF, LIF, Relay, SlidingWindow
from ranvier.export.nodes import (
    Conv,
    Delay,
    Dense,
    Flatten,
    Input,
    Join,
    Neuron,
    Norm,
    Opaque,
    Output,
    Pool,
    Scale,
    Upsample,
)
from ranvier.train.errors import UnsupportedError


def same(graph: Graph, x: np.ndarray, joins: str = "linear") -> Graph:
    """Asserts equal outputs in float64, where another order of summation flips no spike here."""
    lowered = graph.lower(joins)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(lowered.run(wide), graph.run(wide), atol=1e-6)
    assert lowered.spec == "lowered"
    return lowered


@pytest.mark.parametrize("joins", ["linear", "graded"])
@pytest.mark.parametrize("join", JOINS)
def test_residual_graphs_keep_their_output(join: str, joins: str) -> None:
    for seed in range(3):
        same(residual_graph(join, seed), images(seed, 5), joins)


@pytest.mark.parametrize(("join", "relays"), [("sew", 2), ("ms", 2), ("vanilla", 0), ("or", 0)])
def test_graded_joins_become_relays_and_linear_ones_do_not(join: str, relays: int) -> None:
    def count(graph: Graph) -> int:
        return sum(isinstance(p.model, Relay) for p in graph.populations) - 1  # the readout is one

    graph = residual_graph(join, blocks=3, down=False)
    assert count(graph.lower("linear")) == 0
    assert count(graph.lower("graded")) >= relays


def test_linear_sew_projects_from_each_source() -> None:
    lowered = residual_graph("sew", down=False).lower("linear")
    into = lowered["b1.neuron1"].inputs[0]
    sources = {lowered[m].inputs[0] for m in lowered[into].inputs}
    assert sources == {"stem.neuron", "b0.neuron2"}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    join=st.sampled_from(JOINS),
    blocks=st.integers(1, 3),
    side=st.integers(4, 7),
    down=st.booleans(),
    joins=st.sampled_from(["linear", "graded"]),
)
def test_random_residual_graphs(
    seed: int, join: str, blocks: int, side: int, down: bool, joins: str
) -> None:
    graph = residual_graph(join, seed, blocks=blocks, side=side, down=down, channels=2, steps=3)
    same(graph, images(seed, 2, side), joins)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    k_a=st.integers(1, 3),
    k_b=st.integers(1, 3),
    s_a=st.integers(1, 2),
    s_b=st.integers(1, 2),
    p_a=st.integers(0, 2),
    p_b=st.integers(0, 1),
    d_b=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
)
def test_composed_maps_equal_the_two(
    seed: int, k_a: int, k_b: int, s_a: int, s_b: int, p_a: int, p_b: int, d_b: int, groups: int
) -> None:
    rng = np.random.default_rng(seed)
    a = ConvLin(
        rng.normal(size=(4, 4 // groups, k_a, k_a)),
        (4, 9, 9),
        (s_a, s_a),
        (p_a, p_a),
        (1, 1),
        groups,
    )
    middle = a.out_shape
    if min(middle[1:]) + 2 * p_b < d_b * (k_b - 1) + 1:
        return
    b = ConvLin(rng.normal(size=(3, 4, k_b, k_b)), middle, (s_b, s_b), (p_b, p_b), (d_b, d_b))
    x = rng.normal(size=(2, 4, 9, 9))
    both = compose(b, a, "test")
    np.testing.assert_allclose(
        both.apply(x).reshape(2, -1), b.apply(a.apply(x)).reshape(2, -1), atol=1e-9
    )


def test_composition_with_padding_behind_a_kernel_is_a_matrix_not_a_wrong_convolution() -> None:
    a = ConvLin(np.ones((1, 1, 3, 3)), (1, 4, 4), padding=(1, 1))
    assert isinstance(compose(a, a, "x"), DenseLin)
    pointwise = ConvLin(np.ones((1, 1, 1, 1)), (1, 4, 4))
    assert isinstance(compose(a, pointwise, "x"), ConvLin)


def test_a_padded_convolution_behind_whole_pooling_tiles_stays_a_convolution() -> None:
    rng = np.random.default_rng(0)
    pool = ConvLin(np.full((2, 1, 2, 2), 0.25), (2, 6, 6), (2, 2), groups=2)
    conv = ConvLin(rng.normal(size=(3, 2, 3, 3)), (2, 3, 3), padding=(1, 1))
    both = compose(conv, pool, "x")
    assert isinstance(both, ConvLin) and both.weight.shape == (3, 2, 6, 6)
    x = rng.normal(size=(2, 2, 6, 6))
    np.testing.assert_allclose(both.apply(x), conv.apply(pool.apply(x)), atol=1e-12)
    rest = replace(pool, in_shape=(2, 7, 7))  # a rest of one row: padding would see it
    assert isinstance(compose(conv, rest, "x"), DenseLin)


def test_one_to_one_maps_compose() -> None:
    scale = DiagLin(np.arange(3.0).reshape(3, 1, 1), (3, 2, 2))
    conv = ConvLin(np.ones((2, 3, 1, 1)), (3, 2, 2))
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 2))
    np.testing.assert_allclose(compose(conv, scale, "x").apply(x), conv.apply(scale.apply(x)))


def lif(name: str, source: str) -> Neuron:
    return Neuron(name=name, inputs=(source,), model=LIF(beta=0.75, v_threshold=0.6))


def test_max_pool_of_spikes_is_an_or() -> None:
    rng = np.random.default_rng(0)
    graph = Graph.of([
        Input(name="x", shape=(2, 6, 6)),
        lif("n", "x"),
        Pool(name="p", inputs=("n",), op="max", kernel=(3, 3), stride=(2, 2), padding=(1, 1)),
        Conv(name="c", inputs=("p",), weight=rng.normal(size=(3, 2, 3, 3)).astype("f"), padding=(1, 1)),
        lif("m", "c"),
        Output(name="o", inputs=("m",)),
    ], steps=4)  # fmt: skip
    same(graph, rng.random((4, 3, 2, 6, 6)))


def test_max_pool_of_currents_is_refused() -> None:
    graph = Graph.of([
        Input(name="x", shape=(2, 6, 6)),
        Pool(name="p", inputs=("x",), op="max", kernel=(2, 2), stride=(2, 2)),
        lif("n", "p"),
        Output(name="o", inputs=("n",)),
    ])  # fmt: skip
    with pytest.raises(UnsupportedError, match="'p' takes a maximum over a window of 'x'"):
        graph.lower()


def test_sums_of_one_input_add_up() -> None:
    graph = Graph.of([
        Input(name="x", shape=(5,)),
        Join(name="j", inputs=("x", "x"), op="add"),
        lif("n", "j"),
        Output(name="o", inputs=("n",)),
    ])  # fmt: skip
    lowered = same(graph, np.random.default_rng(1).random((6, 2, 5)))
    (scale,) = [n for n in lowered if isinstance(n, Scale)]
    np.testing.assert_array_equal(np.unique(scale.scale), [2.0])


def test_concatenation_scale_norm_and_upsampling() -> None:
    rng = np.random.default_rng(2)
    c = 4
    graph = Graph.of([
        Input(name="x", shape=(2, 3, 3)),
        lif("a", "x"),
        lif("b", "a"),
        Join(name="j", inputs=("a", "b"), op="cat"),
        Norm(name="bn", inputs=("j",), mean=rng.random(c), var=rng.random(c) + 0.5,
             gamma=rng.random(c), beta=rng.random(c)),
        Upsample(name="u", inputs=("bn",), factor=(2, 2)),
        Scale(name="s", inputs=("u",), scale=rng.random((c, 6, 6)), shift=rng.random((c, 1, 1))),
        lif("m", "s"),
        Flatten(name="f", inputs=("m",)),
        Dense(name="d", inputs=("f",), weight=rng.normal(size=(3, c * 36)), bias=rng.random(3)),
        Output(name="o", inputs=("d",)),
    ])  # fmt: skip
    same(graph, rng.random((5, 2, 2, 3, 3)))


def test_a_norm_in_front_of_a_padded_stem_is_exact_at_the_border() -> None:
    rng = np.random.default_rng(3)
    graph = Graph.of([
        Input(name="x", shape=(1, 5, 5)),
        Norm(name="bn", inputs=("x",), mean=rng.random(1), var=rng.random(1), gamma=rng.random(1),
             beta=rng.random(1)),
        Conv(name="c", inputs=("bn",), weight=rng.normal(size=(2, 1, 3, 3)), padding=(1, 1)),
        lif("n", "c"),
        Output(name="o", inputs=("n",)),
    ])  # fmt: skip
    lowered = same(graph, rng.random((4, 3, 1, 5, 5)))
    bias = lowered["n"].bias
    assert bias.shape == (2, 5, 5) and np.ptp(bias[0]) > 0  # the border differs from the middle


@pytest.mark.parametrize("with_bias", [False, True])
def test_sliding_windows_become_lagged_projections(with_bias: bool) -> None:
    rng = np.random.default_rng(4)
    taps = np.array([0.2, -0.3, 0.9])
    graph = Graph.of([
        Input(name="x", shape=(6,)),
        lif("n", "x"),
        Dense(name="d", inputs=("n",), weight=rng.normal(size=(4, 6)),
              bias=rng.normal(size=4) if with_bias else None),
        Neuron(name="w", inputs=("d",), model=SlidingWindow(taps=taps, v_threshold=0.2)),
        Output(name="o", inputs=("w",)),
    ])  # fmt: skip
    lowered = same(graph, rng.random((8, 3, 6)))
    lags = sorted(n.steps for n in lowered if isinstance(n, Delay))
    assert lags[:2] == [1, 1] or lags == [1, 2]


def test_recurrence_through_a_delay() -> None:
    rng = np.random.default_rng(5)
    graph = Graph.of([
        Input(name="x", shape=(4,)),
        Delay(name="back", inputs=("n",), steps=1, shape=(4,)),
        Dense(name="r", inputs=("back",), weight=rng.normal(size=(4, 4))),
        Join(name="j", inputs=("x", "r"), op="add"),
        lif("n", "j"),
        Output(name="o", inputs=("n",)),
    ])  # fmt: skip
    x = rng.random((8, 3, 4))
    wanted = graph.run(x)
    lowered = Graph.of(list(graph.lower().nodes.values()), spec="lowered")
    np.testing.assert_allclose(lowered.run(x), wanted, atol=1e-9)


def test_opaque_nodes_are_refused_with_their_reason() -> None:
    graph = Graph.of([
        Input(name="x", shape=(4,)),
        Opaque(name="gate", inputs=("x",), kind="sigmoid", reason="it needs a table", shape=(4,)),
        Neuron(name="n", inputs=("gate",), model=IF()),
        Output(name="o", inputs=("n",)),
    ])  # fmt: skip
    with pytest.raises(UnsupportedError, match="'gate' is sigmoid: it needs a table"):
        graph.lower()


def test_lowered_graphs_refuse_what_has_no_place_in_them() -> None:
    graph = residual_graph("vanilla")
    with pytest.raises(UnsupportedError, match="has no place in it"):
        Graph.of(list(graph), spec="lowered")
