"""Every lint rule: a graph that has the finding, and a control next to it that has not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_domains import Builder, residual

from ranvier.deploy import LOIHI1, LOIHI2, lint
from ranvier.deploy.chip import Limit
from ranvier.deploy.linter import GROUPS, LEVELS, codes_table, to_json, to_sarif
from ranvier.deploy.rules import RULES
from ranvier.export.graph import Graph
from ranvier.export.neurons import LI, LIF, CubaLIF, SlidingWindow, Threshold
from ranvier.export.nodes import (
    Conv,
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
)
from ranvier.train.errors import RangeError, UnsupportedError

Made = Callable[[], Graph]
CLEAN = LIF(beta=0.5)


def line(model: Any = CLEAN, weight: Any = None, **entry: Any) -> Graph:
    """Binary input, one dense layer, one population, output."""
    w = np.full((3, 8), 0.25) if weight is None else weight
    nodes: list[Node] = [
        Input(name="x", shape=(w.shape[1],), **{"lo": 0.0, "hi": 1.0, "integer": True, **entry}),
        Dense(name="fc", inputs=("x",), weight=w, source="net.py:12"),
        Neuron(name="n", inputs=("fc",), model=model, source="net.py:13"),
        Output(name="y", inputs=("n",)),
    ]
    return Graph.of(nodes, steps=4)


def image(make: Callable[[Builder], str], **entry: Any) -> Graph:
    b = Builder(**{"integer": True, **entry})
    return b.graph(make(b))


def pool(b: Builder, op: str, source: str) -> str:
    return b.add(Pool, "pool", source, op=op, kernel=(2, 2), stride=(2, 2))


def spikes(b: Builder, name: str = "s") -> str:
    return b.neuron(name, b.conv(f"{name}.conv", "x", 2, 2))


def gate(b: Builder) -> str:
    s = spikes(b)
    g = b.nodes.append(
        Opaque(name="gate", inputs=(s,), kind="sigmoid", reason="a real gate", shape=(2, 6, 6))
    )
    assert g is None
    return b.add(Join, "mul", s, "gate", op="mul")


def two_inputs() -> Graph:
    nodes: list[Node] = [
        Input(name=n, shape=(3,), lo=0.0, hi=1.0, integer=True) for n in ("x", "z")
    ]
    nodes += [
        Join(name="j", inputs=("x", "z"), op="add"),
        Neuron(name="n", inputs=("j",), model=CLEAN),
    ]
    return Graph.of([*nodes, Output(name="y", inputs=("n",))], steps=4)


def membrane_inside(model: Any) -> Graph:
    g = line(model)
    extra: list[Node] = [
        Dense(name="fc2", inputs=("n",), weight=np.eye(3)),
        Neuron(name="n2", inputs=("fc2",), model=CLEAN),
        Output(name="y", inputs=("n2",)),
    ]
    return Graph.of([*list(g)[:-1], *extra], steps=4)


def token_layer(flat: bool) -> Graph:
    nodes: list[Node] = [Input(name="x", shape=(4, 6), lo=0.0, hi=1.0, integer=True)]
    if flat:
        nodes.append(Flatten(name="f", inputs=("x",)))
    n_in = 24 if flat else 6
    nodes += [
        Dense(name="fc", inputs=(nodes[-1].name,), weight=np.full((3, n_in), 0.1)),
        Neuron(name="n", inputs=("fc",), model=CLEAN),
        Output(name="y", inputs=("n",)),
    ]
    return Graph.of(nodes, steps=4)


def cat_rows(axis: int) -> Graph:
    def make(b: Builder) -> str:
        joined = b.add(Join, "cat", spikes(b, "s"), spikes(b, "t"), op="cat", axis=axis)
        return b.neuron("n", b.conv("c", joined, 4 if axis == 0 else 2, 3))

    return image(make)


def long_skip(layers: int) -> Graph:
    b = Builder(shape=(2,), integer=True)
    a = first = b.neuron("n0", b.add(Dense, "d0", "x", weight=np.eye(2) * 2))
    for i in range(1, layers):
        a = b.neuron(f"n{i}", b.add(Dense, f"d{i}", a, weight=np.eye(2) * 2))
    joined = b.add(Join, "join", a, first, op="add")
    return b.graph(b.neuron("end", joined))


def scaled(inside: bool) -> Graph:
    scale = np.ones((2, 6, 6))
    if inside:
        scale[0, 0, 0] = 0.5

    def make(b: Builder) -> str:
        return b.neuron("n", b.add(Scale, "scale", spikes(b), scale=scale))

    return image(make)


def weight_with(outlier: float) -> np.ndarray:
    w = np.random.default_rng(0).normal(0, 0.05, (20, 40))
    w[0, 0] = outlier
    return w


def wide(n_out: int, n_in: int) -> Graph:
    return line(weight=np.full((n_out, n_in), 0.01))


def thresholds(n: int) -> Graph:
    levels = 1 + np.arange(40.0) % n
    return line(LIF(beta=0.5, v_threshold=levels), np.full((40, 8), 0.5))


# code -> (a graph with the finding, a control without it, the node it names)
CASES: dict[str, tuple[Made, Made, str]] = {
    "RV101": (lambda: image(gate), lambda: image(spikes), "gate"),
    "RV102": (
        lambda: image(lambda b: b.add(Join, "mul", spikes(b), "s.conv", op="mul")),
        lambda: image(lambda b: b.add(Join, "mul", spikes(b), spikes(b, "t"), op="mul")),
        "mul",
    ),
    "RV103": (
        lambda: image(lambda b: b.neuron("n", pool(b, "max", b.conv("c", "x", 2, 2)))),
        lambda: image(lambda b: pool(b, "max", spikes(b))),
        "pool",
    ),
    "RV106": (lambda: membrane_inside(LI(beta=0.9)), lambda: membrane_inside(CLEAN), "n"),
    "RV107": (lambda: token_layer(False), lambda: token_layer(True), "fc"),
    "RV108": (two_inputs, line, "x"),
    "RV199": (lambda: cat_rows(1), lambda: cat_rows(0), ""),
    "RV201": (lambda: line(integer=False), line, "fc"),
    "RV202": (lambda: residual("sew", 3), lambda: residual("or", 3), "b1.conv"),
    "RV203": (lambda: residual("ms", 3, "conv"), lambda: residual("ms", 3, "A"), "b1.short"),
    "RV204": (
        lambda: image(lambda b: b.neuron("n", b.conv("c", pool(b, "avg", spikes(b)), 2, 2))),
        lambda: image(lambda b: b.neuron("n", b.conv("c", pool(b, "max", spikes(b)), 2, 2))),
        "pool",
    ),
    "RV205": (lambda: residual("or", 1), lambda: residual("sew", 1), "b0.join"),
    "RV206": (lambda: line(LIF(beta=0.5, reset="subtract")), line, "n"),
    "RV207": (lambda: long_skip(66), lambda: long_skip(20), "end"),
    "RV301": (lambda: line(LIF(beta=0.5, strict=False)), line, "n"),
    "RV302": (lambda: line(LIF(beta=0.9999)), lambda: line(LIF(beta=1 - 1 / 4096)), "n"),
    "RV303": (
        lambda: line(LIF(beta=0.5, reset="subtract", timing="delayed")),
        lambda: line(LIF(beta=0.5, reset="subtract")),
        "n",
    ),
    "RV304": (lambda: line(LIF(beta=0.5, v_threshold=9.0)), line, "n"),
    "RV305": (
        lambda: line(LIF(beta=0.5, v_threshold=0.01), np.full((3, 8), 50.0)),
        lambda: line(LIF(beta=0.5, v_threshold=0.5)),
        "n",
    ),
    "RV306": (
        lambda: line(LIF(beta=1.0, v_threshold=1000.0), np.full((3, 200), 0.1)),
        lambda: line(LIF(beta=1.0, v_threshold=2.0), np.full((3, 200), 0.1)),
        "n",
    ),
    "RV307": (lambda: scaled(True), lambda: scaled(False), "scale"),
    "RV308": (lambda: line(hi=np.inf), line, "x"),
    "RV309": (
        lambda: line(weight=weight_with(4.0)),
        lambda: line(weight=weight_with(0.1)),
        "fc",
    ),
    "RV310": (lambda: line(LIF(beta=0.5, v_leak=0.2)), line, "n"),
    "RV311": (
        lambda: line(CubaLIF(alpha=0.95, beta=0.5)),
        lambda: line(CubaLIF(alpha=0.5, beta=0.5)),
        "n",
    ),
    "RV402": (lambda: wide(300, 64), lambda: wide(20, 64), "n"),
    "RV403": (lambda: wide(60, 8), lambda: wide(20, 8), "n"),
}
SMALL = replace(
    LOIHI2,
    n_cores=Limit(2, "test"),
    neurons_per_core=Limit(50, "test"),
    synapse_bits=Limit(2**14, "test"),
)
# the same for rules of the older chip
LOIHI1_CASES: dict[str, tuple[Made, Made, str]] = {
    "RV104": (lambda: line(integer=False), line, "x"),
    "RV105": (lambda: line(LIF(beta=0.5, reset="subtract")), line, "n"),
    "RV401": (lambda: wide(1, 5000), lambda: wide(1, 400), "n"),
    "RV404": (lambda: thresholds(40), lambda: thresholds(8), "n"),
}


def codes(graph: Graph, chip: Any = LOIHI2, code: str = "") -> list[str]:
    return [f.code for f in lint(graph, chip, select=[code] if code else None)]


@pytest.mark.parametrize("code", sorted(CASES))
def test_rule(code):
    bad, good, node = CASES[code]
    chip = SMALL if code.startswith("RV4") else LOIHI2
    found = lint(bad(), chip, select=[code])
    assert found and found[0].node == node, found
    assert found[0].severity == RULES[code].severity
    assert found[0].message and found[0].fix
    assert codes(good(), chip, code) == []


@pytest.mark.parametrize("code", sorted(LOIHI1_CASES))
def test_rule_of_the_older_chip(code):
    bad, good, node = LOIHI1_CASES[code]
    found = lint(bad(), LOIHI1, select=[code])
    assert found and found[0].node == node, found
    assert codes(good(), "loihi1", code) == []


def test_every_rule_has_a_case():
    """The control of this file: no rule without a graph that has its finding."""
    assert set(RULES) == set(CASES) | set(LOIHI1_CASES)


def test_a_clean_graph_has_no_finding():
    assert lint(line()) == []


def test_lint_errors_and_compile_agree():
    """What lint lets pass compiles; what it calls an error does not."""
    from ranvier.deploy import compile
    from ranvier.train.errors import RanvierError

    for code, (bad, good, _) in CASES.items():
        for made in (bad, good):
            graph = made()
            wrong = any(f.severity == "error" for f in lint(graph))
            x = np.zeros((2, *graph.inputs[0].shape), np.float32)
            try:
                compile(graph, calibration=x, search=False, bias_correction=False)
                refused = False
            except RanvierError:
                refused = True
            assert wrong == refused, code


def test_numbers_stand_in_the_message():
    (found,) = lint(line(LIF(beta=0.9999)), select=["RV302"])
    assert "0.9999" in found.message and "1e+04" in found.message and "12 bits" in found.message
    (large,) = lint(wide(300, 64), SMALL, select=["RV402"])
    assert "has 2" in large.message and "'n' alone" in large.message


def test_a_finding_names_the_source_line():
    (found,) = lint(line(LIF(beta=0.5, strict=False)), select=["RV301"])
    assert found.source == "net.py:13"
    assert str(found).startswith("net.py:13: RV301 warning: 'n' fires")


def test_select_and_ignore():
    graph = line(LIF(beta=0.9999, strict=False))
    assert codes(graph) == ["RV206", "RV301", "RV302"]
    assert [f.code for f in lint(graph, select=["RV3"])] == ["RV301", "RV302"]
    assert [f.code for f in lint(graph, ignore=["RV30"])] == ["RV206"]
    with pytest.raises(RangeError, match="begins with 'RV9'"):
        lint(graph, select=["RV9"])


def test_refusals():
    with pytest.raises(UnsupportedError, match="lowered"):
        lint(line().lower())
    with pytest.raises(RangeError, match="loihi3"):
        lint(line(), "loihi3")


def test_json_and_sarif():
    found = lint(line(LIF(beta=0.9999, strict=False), lo=0.0, hi=np.inf))
    assert [f["code"] for f in json.loads(to_json(found))] == [f.code for f in found]
    sarif = json.loads(to_sarif(found, "net.h5"))
    (run,) = sarif["runs"]
    assert sarif["version"] == "2.1.0" and len(run["results"]) == len(found)
    known = {r["id"] for r in run["tool"]["driver"]["rules"]}
    assert known == set(RULES)
    for result, finding in zip(run["results"], found, strict=True):
        assert result["ruleId"] in known and result["level"] == LEVELS[finding.severity]
        (place,) = result["locations"]
        physical = place["physicalLocation"]
        if finding.source:
            assert physical["artifactLocation"]["uri"] == "net.py"
            assert physical["region"]["startLine"] == int(finding.source.split(":")[1])
        else:
            assert physical["artifactLocation"]["uri"] == "net.h5"


def test_the_reference_lists_every_code():
    table = codes_table()
    assert all(f"`{code}`" in table for code in RULES)
    assert all(title.lower() in table for title in GROUPS.values())
    assert all(r.example for r in RULES.values()), "a rule's docstring is its example"


def test_a_dead_branch_is_found():
    graph = residual("sew", 2)
    nodes: list[Node] = [
        replace(n, gamma=np.zeros(4), beta=np.zeros(4))
        if isinstance(n, Norm) and n.name == "b1.norm"
        else n
        for n in graph
    ]
    assert [f.node for f in lint(graph.with_nodes(nodes), select=["RV304"])] == ["b1.neuron"]


def test_window_and_threshold_models():
    window = SlidingWindow(taps=np.array([0.2, 1.0]))
    assert "RV206" in codes(line(window)) and "RV206" not in codes(line(Threshold(v_threshold=0.5)))
    assert isinstance(line(window)["fc"], Dense) and not isinstance(line(window)["fc"], Conv)
