"""Damaged files of every format: an error of ours or a whole network, never anything else, and soon."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import GRAPHS, residual
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_programs import random_input, random_program

from ranvier.deploy.program import Program
from ranvier.export.graph import Graph
from ranvier.export.hdf5_guard import check_heaps
from ranvier.export.netx_file import read_net
from ranvier.export.nir_fields import Context
from ranvier.export.nir_file import read_nir, write_nir
from ranvier.export.nir_raw import RawNode
from ranvier.export.nir_read import decode
from ranvier.export.nir_write import encode
from ranvier.sim.ledger import Ledger
from ranvier.sim.runner import run
from ranvier.sim.stream import evaluate
from ranvier.train.errors import FormatError, RanvierError

COPIES = 12  # damaged copies of a file in one test; the figures in the report come from thousands
LONGEST = 10.0  # seconds for one file on a busy machine; a usual one takes 0.02


def damaged(data: bytes, seed: int) -> bytes:
    """A copy with a few bits flipped, bytes set, blocks swapped or zeroed, or the end cut off."""
    rng, b = random.Random(seed), bytearray(data)
    kind = rng.choice(["bits", "bits", "head", "cut", "zero", "high", "swap"])
    at = rng.randrange(len(b))
    if kind == "bits":
        for _ in range(rng.choice([1, 2, 8, 64])):
            b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
    elif kind == "head":
        for _ in range(rng.choice([1, 2, 4])):
            b[rng.randrange(min(len(b), 4096))] = rng.randrange(256)
    elif kind == "cut":
        del b[at:]
    elif kind == "zero":
        b[at : at + 64] = bytes(len(b[at : at + 64]))
    elif kind == "high":
        b[at : at + 8] = b"\xff" * len(b[at : at + 8])
    else:
        to = rng.randrange(len(b))
        b[at : at + 16], b[to : to + 16] = b[to : to + 16], b[at : at + 16]
    return bytes(b)


def fates(path: Path, read: Callable[[Path], Any], folder: Path, seeds: range) -> Counter[str]:
    """What became of the damaged copies; anything but a RanvierError passes through and fails."""
    data, found = path.read_bytes(), Counter[str]()
    copy = folder / f"copy{path.suffix}"
    for seed in seeds:
        copy.write_bytes(damaged(data, seed))
        start = time.perf_counter()
        try:
            read(copy)
            found["loads"] += 1
        except RanvierError as error:
            assert copy.name in str(error) or copy.stem in str(error), error
            found[type(error).__name__] += 1
        assert time.perf_counter() - start < LONGEST, f"seed {seed}"
    return found


def stored(folder: Path, suffix: str) -> list[Path]:
    return sorted(p for p in folder.rglob(f"*{suffix}") if p.is_file())


def test_damaged_stored_nir_files(data_file, tmp_path):
    found = Counter[str]()
    for path in stored(data_file("nir"), ".nir"):
        found += fates(path, read_nir, tmp_path, range(COPIES))
    assert found["FormatError"] > 10 and found["loads"] > 10


def test_damaged_stored_netx_files(data_file, tmp_path):
    found = Counter[str]()
    for path in stored(data_file("lava"), ".net"):
        found += fates(path, read_net, tmp_path, range(COPIES))
    assert found["FormatError"] > 2


@pytest.mark.parametrize("name", ["residual add", "recurrent cuba", "model window"])
def test_damaged_nir_files_of_ours(name, tmp_path):
    write_nir(GRAPHS[name], tmp_path / "a.nir")
    assert fates(tmp_path / "a.nir", read_nir, tmp_path, range(30))["FormatError"] > 3


def test_damaged_graph_files_never_become_another_network(tmp_path):
    """They carry a digest, so that what still loads is what was written."""
    graph = residual()
    graph.save(tmp_path / "a.h5")

    def read(path: Path) -> None:
        assert graph.diff(Graph.load(path)) == []

    assert fates(tmp_path / "a.h5", read, tmp_path, range(60))["FormatError"] > 10


def test_damaged_program_files_never_become_another_program(tmp_path):
    program = random_program(3)
    program.save(tmp_path / "a.h5")

    def read(path: Path) -> None:
        assert Program.load(path).digest() == program.digest()

    assert fates(tmp_path / "a.h5", read, tmp_path, range(60))["FormatError"] > 10


def test_control_a_reader_that_lets_an_error_out_is_noticed(tmp_path):
    import h5py

    write_nir(residual(), tmp_path / "a.nir")
    with pytest.raises((OSError, RuntimeError, KeyError)):
        fates(tmp_path / "a.nir", lambda p: h5py.File(p)["node"], tmp_path, range(200))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300))
def test_any_bytes(data, tmp_path):
    path = tmp_path / "a.nir"
    for head in (b"", b"\x89HDF\r\n\x1a\n", b"PK"):
        path.write_bytes(head + data)
        for read in (read_nir, read_net, Graph.load, Program.load):
            with pytest.raises(RanvierError):
                read(path)


def test_a_heap_that_never_ends_is_found_before_the_library_meets_it(tmp_path):
    """Free space of no bytes in the global heap: libhdf5 would walk on the spot for ever."""
    path = tmp_path / "a.nir"
    write_nir(residual(), path)
    check_heaps(path)
    data = bytearray(path.read_bytes())
    heap = data.find(b"GCOL")
    data[heap + 16 : heap + 32] = bytes(16)
    path.write_bytes(data)
    with pytest.raises(FormatError, match="heap at byte"):
        read_nir(path)


@pytest.mark.parametrize("key", ["format", "digest"])
def test_a_text_that_became_a_list_of_numbers_is_not_read(key, tmp_path):
    """One bit in the type of an attribute: libhdf5 2.0 would end the process."""
    path = tmp_path / "a.h5"
    residual().save(path)
    data = bytearray(path.read_bytes())
    kind = data.find(key.encode() + b"\0") + 8  # names are padded to 8 bytes
    assert data[kind : kind + 2] == b"\x19\x01", "variable-length, of text"
    data[kind + 1] = 0
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"'{key}' is neither a number nor a text"):
        Graph.load(path)


def test_a_text_without_a_place_in_the_file_is_not_read(tmp_path):
    """A dataset of no bytes, whose claim could not be looked at: 4 GiB would be set aside for it."""
    import h5py

    path = tmp_path / "a.nir"
    write_nir(residual(), path)
    with h5py.File(path) as file:
        item = file["node/type"]
        offset, size = item.id.get_offset(), item.id.get_storage_size()
    data = bytearray(path.read_bytes())
    layout = offset.to_bytes(8, "little") + size.to_bytes(8, "little")
    assert size == 16 and data.count(layout) == 1
    at = data.index(layout) + 8
    data[at : at + 8] = bytes(8)
    path.write_bytes(data)
    with pytest.raises(FormatError, match="no place in it for 1 texts"):
        read_nir(path)


def test_damaged_ledger_files(tmp_path):
    """In a file of its own, and as the partial results of an evaluation: the same, or refused."""
    program = random_program(3)
    x = random_input(program, 3)
    ledger = run(program, x, "reference").ledger
    ledger.save(tmp_path / "a.h5")
    data = x.swapaxes(0, 1)
    whole = evaluate(program, data, batch_size=2, resume_path=tmp_path / "b.h5")

    def read(path: Path) -> None:
        again = Ledger.load(path)
        assert again.to_dict() == ledger.to_dict()
        assert all((again.neurons[n] == ledger.neurons[n]).all() for n in ledger.neurons)

    def resumed(path: Path) -> None:
        again = evaluate(program, data, batch_size=2, resume_path=path)
        assert (again.predictions == whole.predictions).all()
        assert (again.outputs == whole.outputs).all()
        assert again.ledger.to_dict() == whole.ledger.to_dict()

    assert fates(tmp_path / "a.h5", read, tmp_path, range(60))["FormatError"] > 10

    assert fates(tmp_path / "b.h5", resumed, tmp_path, range(60))["FormatError"] > 10


# values of any kind in the right places: the file is whole, its contents are not

SHAPES = st.lists(st.integers(-2, 5), max_size=4)
NUMBERS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=5),
    SHAPES.map(lambda s: np.array(s, np.int64)),
    SHAPES.map(lambda s: np.ones([abs(n) for n in s], np.float32)),
    st.lists(st.floats(width=32), max_size=4).map(lambda v: np.array(v, np.float32)),
)


@st.composite
def spoiled(draw: Any) -> RawNode:
    """One of our graphs in NIR, without our metadata, with fields, types and edges changed."""
    raw, _ = encode(GRAPHS[draw(st.sampled_from(sorted(GRAPHS)))])
    raw.meta = {}
    names = sorted(raw.nodes)
    for node in raw.nodes.values():
        node.meta = {}
    for _ in range(draw(st.integers(1, 3))):
        node = raw.nodes[draw(st.sampled_from(names))]
        what = draw(st.sampled_from(["field", "drop", "type", "edge", "unedge"]))
        if what == "field" and node.data:
            node.data[draw(st.sampled_from(sorted(node.data)))] = draw(NUMBERS)
        elif what == "drop" and node.data:
            del node.data[draw(st.sampled_from(sorted(node.data)))]
        elif what == "type":
            node.type = draw(st.sampled_from(sorted({n.type for n in raw.nodes.values()})))
        elif what == "edge":
            raw.edges.append((draw(st.sampled_from(names)), draw(st.sampled_from(names))))
        elif raw.edges:
            raw.edges.pop(draw(st.integers(0, len(raw.edges) - 1)))
    return raw


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=spoiled())
def test_any_contents(raw):
    """Reading ends in a Graph or in an error of ours, without the net that read_nir spans below."""
    try:
        graph = decode(raw, Context(dt=1e-3, decay="euler"), 4)
    except RanvierError:
        return
    assert graph.shapes and graph.outputs


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_metadata(data, tmp_path):
    """Our own metadata with a value changed: an error, or the network that the rest describes."""
    import json

    from ranvier.export import nir_raw

    graph = GRAPHS[data.draw(st.sampled_from(sorted(GRAPHS)))]
    raw, _ = encode(graph)
    holders = [raw, *(n for n in raw.nodes.values() if "ranvier" in n.meta)]
    holder = holders[data.draw(st.integers(0, len(holders) - 1))]
    said = json.loads(holder.meta["ranvier"])
    key = data.draw(st.sampled_from(sorted(said)))
    odd = st.one_of(st.none(), st.integers(-9, 9), st.text(max_size=4), st.just([]), st.just({}))
    if isinstance(said[key], dict) and said[key] and data.draw(st.booleans()):
        said[key][data.draw(st.sampled_from(sorted(said[key])))] = data.draw(odd)
    else:
        said[key] = data.draw(odd)
    holder.meta["ranvier"] = json.dumps(said)
    nir_raw.store(tmp_path / "a.nir", raw)
    try:
        read_nir(tmp_path / "a.nir")
    except RanvierError:
        pass
