"""Graphs on disk: nothing is lost, nothing is run, and a damaged file never becomes a network."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ranvier.export.documents import content_digest
from ranvier.export.graph import Graph
from ranvier.export.neurons import IF, LI, LIF, MODELS, CubaLI, CubaLIF, SlidingWindow, Threshold
from ranvier.export.nodes import (
    NODES,
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
    Subsample,
    Upsample,
)
from ranvier.train.errors import FormatError, RanvierError, UnsupportedError


def every_node() -> Graph:
    """A graph that holds every node type and every neuron model."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    carrying = LIF(beta=0.5, reset="subtract", timing="carry")
    per_channel = CubaLIF(alpha=0.5, beta=array(4, 1, 1), dt=1e-3)
    graph = Graph.of(
        [
            Input(name="input", shape=(2, 8, 8), lo=0.0, hi=1.0, meta={"pixels": True}),
            Conv(name="conv", inputs=("input",), weight=array(4, 2, 3, 3), padding=(1, 1)),
            Norm(
                name="bn",
                inputs=("conv",),
                mean=array(4),
                var=np.ones(4),
                gamma=array(4),
                beta=array(4),
                source="net.py:3",
            ),
            Neuron(name="if", inputs=("bn",), model=IF(v_threshold=array(4, 1, 1))),
            Delay(name="past", inputs=("cuba",), steps=1, shape=(4, 8, 8)),
            Join(name="add", inputs=("if", "past", "past"), op="add"),
            Neuron(name="lif", inputs=("add",), model=carrying),
            Neuron(name="cuba", inputs=("lif",), model=per_channel),
            Pool(name="pool", inputs=("cuba",), op="avg", kernel=(2, 2), stride=(2, 2)),
            Subsample(name="sub", inputs=("pool",), stride=(2, 2), pad_channels=(0, 2)),
            Upsample(name="up", inputs=("sub",), factor=(2, 2)),
            Scale(name="scale", inputs=("up",), scale=np.float32(0.5), shift=array(6, 1, 1)),
            Opaque(
                name="odd",
                inputs=("scale",),
                kind="softmax",
                reason="a chip has none",
                shape=(6, 4, 4),
                function=lambda x: x,
            ),
            Flatten(name="flat", inputs=("odd",)),
            Neuron(
                name="fir", inputs=("flat",), model=SlidingWindow(taps=array(3)), bias=array(96)
            ),
            Neuron(name="step", inputs=("fir",), model=Threshold(v_threshold=float("inf"))),
            Dense(name="fc", inputs=("step",), weight=array(5, 96), bias=array(5)),
            Neuron(name="li", inputs=("fc",), model=LI(beta=0.9)),
            Neuron(name="relay", inputs=("li",), model=MODELS["Relay"]()),
            Neuron(name="cubali", inputs=("relay",), model=CubaLI(alpha=0.1, beta=0.2)),
            Output(name="output", inputs=("cubali",), observe="v", reduce="mean"),
        ],
        steps=4,
        dt=1e-3,
        meta={"seed": 3, "list": [1, 2.5, None], "pair": (1, "a"), "inf": float("-inf")},
    )
    assert {type(n).__name__ for n in graph} == set(NODES)
    assert {type(n.model).__name__ for n in graph.populations} == set(MODELS)
    return graph


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "graph.h5"
    every_node().save(path)
    return path


def test_round_trip_loses_nothing(saved: Path) -> None:
    graph, back = every_node(), Graph.load(saved)
    assert graph.diff(back) == []
    assert dict(back.meta) == dict(graph.meta)
    for node, again in zip(graph, back, strict=True):
        assert (node.name, node.inputs, node.source) == (again.name, again.inputs, again.source)
        assert dict(node.meta) == dict(again.meta)
    assert graph["conv"].weight.dtype == back["conv"].weight.dtype
    assert back["odd"].function is None  # functions stay behind


def test_diff_sees_one_changed_weight(saved: Path) -> None:
    """The control: an equal diff means something."""
    graph, back = every_node(), Graph.load(saved)
    back["conv"].weight[0, 0, 0, 0] += 1
    assert graph.diff(back) == ["'conv': weight differs"]


def test_saving_twice_gives_equal_digests(saved: Path, tmp_path: Path) -> None:
    every_node().save(tmp_path / "again.h5")
    with h5py.File(saved) as a, h5py.File(tmp_path / "again.h5") as b:
        assert a.attrs["digest"] == b.attrs["digest"]


def test_a_value_without_a_word_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    entry = Input(name="input", shape=(2,), meta={"tool": object()})
    graph = Graph.of([entry, Output(name="output", inputs=("input",))])
    with pytest.raises(UnsupportedError, match="'input' holds a object"):
        graph.save(tmp_path / "graph.h5")
    assert list(tmp_path.iterdir()) == []


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="none.h5'.*no such file"):
        Graph.load(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no graph")
    with pytest.raises(FormatError, match="text.h5'.*no HDF5"):
        Graph.load(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(FormatError, match="format is None"):
        Graph.load(tmp_path / "other.h5")


def test_another_version_is_refused(saved: Path) -> None:
    with h5py.File(saved, "r+") as file:
        file.attrs["version"] = 99
    with pytest.raises(FormatError, match="version 99"):
        Graph.load(saved)


def rewrite(path: Path, change: object) -> None:
    """Edits the document and signs it anew, so that what is tested lies behind the digest."""
    with h5py.File(path, "r+") as file:
        document = json.loads(file["document"][()].tobytes())
        change(document)  # type: ignore[operator]
        text = json.dumps(document).encode()
        del file["document"]
        file["document"] = np.frombuffer(text, dtype=np.uint8)
        arrays = {k: file["arrays"][k][()] for k in file["arrays"]}
        file.attrs["digest"] = content_digest(text, arrays)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["nodes"][1].update({"$class": "Exec"}), "class 'Exec'"),
        (lambda d: d["nodes"][1]["fields"].update(stride={"$tuple": ["1", 1]}), "'stride'"),
        (lambda d: d["nodes"][1]["fields"].update(groups=0), "conv|zero|modulo"),
        (
            lambda d: d["nodes"][1]["fields"].update(weight={"$array": "77"}),
            "the file lacks",
        ),
        (lambda d: d["nodes"][1]["fields"].update(weight=None), "'weight' is None"),
        (lambda d: d["nodes"][1]["fields"].update(extra=1), "unknown field 'extra'"),
        (lambda d: d["nodes"][1]["fields"].pop("weight"), "lacks its field 'weight'"),
        (lambda d: d["nodes"][3]["fields"]["model"].update({"$class": "Bomb"}), "'Bomb'"),
        (lambda d: d["nodes"][12]["fields"].update(function="os.system"), "'function'"),
        (lambda d: d["nodes"].pop(0), "'input', which is no node"),
        (lambda d: d.update(nodes=3), "lists no nodes"),
        (lambda d: d["graph"].update(spec="other"), "'spec'"),
    ],
)
def test_a_wrong_document_is_refused_with_its_reason(
    saved: Path, change: object, reason: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(FormatError, match=reason):
        Graph.load(saved)


def test_rewriting_without_a_change_still_loads(saved: Path) -> None:
    """The control of the test above."""
    rewrite(saved, lambda d: None)
    assert every_node().diff(Graph.load(saved)) == []


def test_objects_huge_arrays_and_links_are_refused(saved: Path) -> None:
    def replaced(make: object) -> None:
        with h5py.File(saved, "r+") as file:
            del file["arrays/0"]
            make(file["arrays"])  # type: ignore[operator]
        with pytest.raises(FormatError, match="'0'"):
            Graph.load(saved)

    replaced(lambda g: g.create_dataset("0", data=["text"], dtype=h5py.string_dtype()))
    replaced(lambda g: g.create_dataset("0", shape=(10**6, 10**6), dtype="f4", chunks=(10, 10)))
    replaced(lambda g: g.__setitem__("0", h5py.ExternalLink("/etc/hosts", "/x")))
    replaced(lambda g: g.__setitem__("0", h5py.SoftLink("/document")))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_bytes_never_make_another_network(data: st.DataObject, tmp_path_factory) -> None:
    """Cut off or bits flipped: a FormatError, or the same graph where the bytes bear nothing."""
    folder = tmp_path_factory.mktemp("damaged")
    every_node().save(folder / "graph.h5")
    raw = bytearray((folder / "graph.h5").read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "graph.h5").write_bytes(bytes(raw))
    try:
        assert every_node().diff(Graph.load(folder / "graph.h5")) == []
    except RanvierError as error:
        assert "graph.h5" in str(error)
