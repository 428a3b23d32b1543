"""input_bits="auto": levels of input against bits of the stem's weights, by their expected error."""

from __future__ import annotations

import numpy as np
import pytest
from tests.residual_graphs import images, residual_graph

from ranvier.deploy import LOIHI2, compile
from ranvier.deploy.calibration import measure
from ranvier.deploy.encoding import input_population
from ranvier.deploy.options import checked
from ranvier.deploy.stem import _error
from ranvier.export.graph import Graph
from ranvier.export.neurons import LIF
from ranvier.export.nodes import Conv, Input, Neuron, Output
from ranvier.sim import run
from ranvier.train.errors import RangeError


def stem(kernel: int = 7, seed: int = 0) -> Graph:
    weight = np.random.default_rng(seed).normal(size=(4, 3, kernel, kernel)) / kernel
    return Graph.of([
        Input(name="x", shape=(3, 12, 12)),
        Conv(name="c", inputs=("x",), weight=weight, padding=(kernel // 2,) * 2),
        Neuron(name="n", inputs=("c",), model=LIF(beta=0.5, v_threshold=1.0)),
        Output(name="o", inputs=("n",), reduce="sum"),
    ], steps=4)  # fmt: skip


def photos(seed: int = 1, n: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).random((n, 3, 12, 12)).astype(np.float32)


def options(weight_bits: int):
    return checked(
        LOIHI2, weight_bits, "auto", input_bits="auto", search=True, bias_correction=True,
        thresholds="population", rounding="nearest", like=None, calibrated=True,
    )  # fmt: skip


def wrong(graph: Graph, x: np.ndarray, **given: object) -> float:
    """The share of the stem's spikes that differ from float."""
    found = run(compile(graph, calibration=x, **given), x, engine="dense", record=("spikes",))
    return float((found.trace["n"].spikes != graph.run(x, record=("n",))[1]["n"]).mean())


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_auto_is_near_the_best_number_of_bits(weight_bits: int) -> None:
    graph, x = stem(), photos()
    each = {b: wrong(graph, x, weight_bits=weight_bits, input_bits=b) for b in range(4, 9)}
    auto = wrong(graph, x, weight_bits=weight_bits, input_bits="auto")
    assert auto <= 1.3 * min(each.values())
    assert each[8] > 1.5 * auto  # the control: the default is not near it


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_expected_error_is_the_one_that_comes(bits: int, weight_bits: int) -> None:
    """Of the arriving current, mean squared: its own estimate takes the pixels for independent."""
    graph, x = stem(), photos()
    lowered = graph.lower()
    series = np.broadcast_to(x, (4, *x.shape))
    program = compile(graph, calibration=x, weight_bits=weight_bits, input_bits=bits)
    source = input_population(lowered.inputs[0], series, bits, LOIHI2)
    node = next(n for n in lowered if isinstance(n, Neuron))
    expected = _error(
        node, source, lowered, series, measure(lowered, series).moments, options(weight_bits)
    )
    p, q = program.projections["c"], float(program.populations["n"].scale)
    arrived = (p.map.apply(program.encode(x)[0].astype(np.int64)) << p.exponent) / q
    exact = graph.run(x, record=("c",))[1]["c"][0]
    inside = (slice(None), slice(None), slice(3, -3), slice(3, -3))  # borders see fewer pixels
    off = (arrived.reshape(exact.shape) - exact)[inside]
    found = float((off**2).mean())
    assert found / 3 < expected < found * 3


def test_what_has_levels_of_its_own_keeps_them() -> None:
    graph, x = residual_graph("vanilla"), images(0, 16)
    assert compile(graph, calibration=x, input_bits="auto").input.hi == 16
    black = (x > 0.5).astype(np.float32)
    assert not compile(graph, calibration=black, input_bits="auto").input.graded


def test_a_template_keeps_its_levels_and_joins_both_take_them() -> None:
    graph, x = stem(), photos()
    first = compile(graph, calibration=x, input_bits="auto", weight_bits=4)
    assert 15 <= first.input.hi < 255
    again = compile(graph, calibration=photos(2), input_bits="auto", weight_bits=4, like=first)
    assert again.input.scale == first.input.scale


def test_other_words_are_refused() -> None:
    with pytest.raises(RangeError, match="input_bits 17 .*1..16, or auto"):
        compile(stem(), calibration=photos(), input_bits=17)
