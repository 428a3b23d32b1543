"""The ledger's counts against counting by hand, one synapse at a time; and its forms."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from random_programs import random_input, random_program

from ranvier.deploy.cells import Cell
from ranvier.deploy.program import ConvMap, Population, Program, Projection, Readout
from ranvier.sim.ledger import Ledger, payload_bits
from ranvier.sim.runner import run
from ranvier.sim.traffic import messages_by_core
from ranvier.train.errors import FormatError, RangeError, ShapeError

SEEDS = range(6)


def matrix(linear: object, n_in: int, weight: np.ndarray) -> np.ndarray:
    """`[out, in]`: a map with other weights, as the columns that unit vectors give."""
    from dataclasses import replace

    other = replace(linear, weight=weight)  # type: ignore[type-var]
    unit = np.eye(n_in, dtype=np.int64).reshape(n_in, *other.in_shape)
    return other.apply(unit).reshape(n_in, -1).T


def result(seed: int, **kwargs: bool):
    program = random_program(seed, **kwargs)
    return program, run(program, random_input(program, seed), "dense", ("spikes",))


@pytest.mark.parametrize("seed", SEEDS)
def test_synops_are_the_synapses_that_messages_meet(seed: int) -> None:
    program, r = result(seed, cyclic=seed % 2 == 1)
    for p in program.projections.values():
        source = program.populations[p.source]
        linear = p.map
        used = matrix(linear, source.size, (linear.weight != 0).astype(np.int64)).astype(bool)
        exists = matrix(linear, source.size, np.ones_like(linear.weight, np.int64)).astype(bool)
        sent = np.asarray(r.trace[p.source].spikes, np.int64).reshape(5, 3, -1)
        want = np.zeros((4, 5), np.int64)
        for t in range(p.lag, 5):
            for message in sent[t - p.lag]:
                some = message != 0
                graded = some & (message != 1) if source.graded else some & False
                want[:, t] += (
                    some.sum(), used[:, some].sum(), (exists & ~used)[:, some].sum(),
                    used[:, graded].sum(),
                )  # fmt: skip
        counts = r.ledger.projections[p.name]
        got = [counts[k] for k in ("n_events", "n_synops", "n_synops_zero", "n_mults")]
        assert_array_equal(got, want)


@pytest.mark.parametrize("seed", SEEDS)
def test_population_counts(seed: int) -> None:
    program, r = result(seed)
    for p in program:
        sent = np.asarray(r.trace[p.name].spikes, np.int64).reshape(5, -1)
        counts = r.ledger.populations[p.name]
        assert_array_equal(counts["n_spikes"], (sent != 0).sum(1))
        assert_array_equal(counts["n_payload"], np.abs(sent).sum(1))
        graded = ((sent != 0) & (sent != 1)).sum(1) if p.graded else np.zeros(5)
        assert_array_equal(counts["n_graded"], graded)
        assert_array_equal(counts["n_updates"], np.full(5, 0 if p.is_input else 3 * p.size))
        by_neuron = (np.asarray(r.trace[p.name].spikes) != 0).reshape(15, -1).sum(0)
        assert_array_equal(r.ledger.neurons[p.name], by_neuron)
        assert r.ledger.rate(p.name) == (sent != 0).mean()


@pytest.mark.parametrize("engine", ["reference", "dense", "events"])
def test_ledgers_of_two_halves_add_to_the_whole(engine: str) -> None:
    program = random_program(4)
    x = random_input(program, 4)
    whole = run(program, x, engine).ledger
    parts = [run(program, x[:, a:b], engine).ledger for a, b in ((0, 1), (1, 3))]
    total = parts[0] + parts[1]
    assert total.same_counts(whole)
    assert not parts[1].same_counts(whole)
    for name, counts in whole.neurons.items():
        assert_array_equal(total.neurons[name], counts)


def test_only_ledgers_of_one_program_add() -> None:
    with pytest.raises(ShapeError, match="same program"):
        _ = result(1)[1].ledger + result(2)[1].ledger


def test_steps_add_to_the_whole() -> None:
    ledger = result(3)[1].ledger
    first, rest = ledger.steps(0, 2), ledger.steps(2, None)
    assert first.n_steps == 2 and rest.n_steps == 3
    for key in ("n_spikes", "n_synops", "n_updates", "n_mults"):
        assert first.total(key) + rest.total(key) == ledger.total(key)


def test_only_some_parts() -> None:
    program, r = result(3)
    name = next(iter(program.projections))
    part = r.ledger.only(name)
    assert part.n_synops == int(r.ledger.projections[name]["n_synops"].sum())
    assert not part.populations
    with pytest.raises(RangeError, match="named 'nothing'"):
        r.ledger.only("nothing")


@pytest.mark.parametrize("suffix", ["json", "h5"])
def test_round_trip(tmp_path, suffix: str) -> None:
    ledger = result(5)[1].ledger
    path = tmp_path / f"counts.{suffix}"
    ledger.save(path)
    again = Ledger.load(path)
    assert again.to_dict() == ledger.to_dict()
    if suffix == "h5":
        assert list(again.neurons) == list(ledger.neurons)
        for name, counts in ledger.neurons.items():
            assert_array_equal(again.neurons[name], counts)


def test_files_that_are_no_ledger(tmp_path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(FormatError, match="is not a ledger"):
        Ledger.load(path)
    path.write_text(json.dumps({"format": "ranvier-ledger", "version": 99}))
    with pytest.raises(FormatError, match="version 99; this one reads 1"):
        Ledger.load(path)
    (tmp_path / "x.h5").write_bytes(b"no")
    with pytest.raises(FormatError, match="is not a ledger"):
        Ledger.load(tmp_path / "x.h5")
    with pytest.raises(FormatError, match=r"ends in '\.csv'"):
        result(1)[1].ledger.save(tmp_path / "x.csv")


def test_pandas_has_every_count() -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    ledger = result(5)[1].ledger
    table = ledger.to_pandas()
    assert table[table["count"] == "n_synops"]["value"].sum() == ledger.n_synops
    assert set(table["step"]) == set(range(5))


def test_trace_as_nir_data() -> None:
    program = random_program(5)
    r = run(program, random_input(program, 5), "dense", ("spikes", "v"))
    data = r.trace.to_nir(dt=1e-3)
    for p in program:
        grid = data.nodes[p.name].observables
        assert grid["spikes"].data.shape == (3, 5, p.size)
        assert grid["spikes"].data.dtype == (np.int32 if p.graded else bool)
        assert_array_equal(grid["voltage"].data[1, 2], r.trace[p.name].v[2, 1].reshape(-1))


@pytest.mark.parametrize(
    ("lo", "hi", "bits"), [(0, 1, 0), (0, 2, 2), (0, 255, 8), (0, 256, 9), (-1, 1, 2), (-8, 7, 4)]
)
def test_payload_bits(lo: int, hi: int, bits: int) -> None:
    assert payload_bits(Population(name="p", shape=(1,), lo=lo, hi=hi)) == bits


def test_payload_bits_of_messages() -> None:
    entry = Population(name="in", shape=(1, 2, 2), lo=0, hi=15)
    out = Population(name="out", shape=(1, 2, 2), cell=Cell(vth=1))
    conv = ConvMap(weight=np.full((1, 1, 1, 1), 2), in_shape=(1, 2, 2), out_shape=(1, 2, 2))
    program = Program(
        populations={"in": entry, "out": out},
        projections={"p": Projection(name="p", source="in", target="out", map=conv)},
        readout=Readout(population="out"),
    )
    ledger = run(program, np.array([[[[[3.0, 1.0], [0.0, 15.0]]]]]), "dense").ledger
    assert (ledger.n_payload_bits, ledger.n_mults, ledger.n_synops) == (3 * 4, 2, 3)
    assert ledger.total("n_spikes") == 3 and ledger.n_messages == 6


@pytest.mark.parametrize("seed", SEEDS)
def test_messages_by_core(seed: int) -> None:
    """Against a walk over every spike and every synapse; neurons are dealt to cores at random."""
    program, r = result(seed)
    rng = np.random.default_rng(seed)
    placed = [
        SimpleNamespace(
            core=int(rng.integers(3)),
            part=SimpleNamespace(population=p.name, c0=c, c1=c + 1, r0=0, r1=10**6),
        )
        for p in program
        if not p.is_input
        for c in range(p.shape[0])
    ]
    placed[0].core = 2
    placement = SimpleNamespace(program=program, slices=placed, n_cores=3)
    home = {p.name: np.full(p.shape, 3) for p in program}
    for s in placed:
        home[s.part.population][s.part.c0] = s.core
    want = np.zeros((4, 3), np.int64)
    for p in program:
        targets: list[set[int]] = [set() for _ in range(p.size)]
        for q in program.out_of(p.name):
            full = matrix(q.map, p.size, (q.map.weight != 0).astype(np.int64))
            for i in range(p.size):
                targets[i] |= set(home[q.target].reshape(-1)[full[:, i] > 0].tolist())
        for i in np.argwhere(np.asarray(r.trace[p.name].spikes).reshape(15, -1))[:, 1]:
            for core in targets[i]:
                want[home[p.name].reshape(-1)[i], core] += 1
    traffic = messages_by_core(r.ledger, placement)  # type: ignore[arg-type]
    assert_array_equal(traffic.between, want)
    assert traffic.n_on_core + traffic.n_between + traffic.n_from_outside == want.sum()


def test_traffic_needs_counts_by_neuron() -> None:
    program, r = result(1)
    placement = SimpleNamespace(program=program, slices=[], n_cores=0)
    with pytest.raises(ShapeError, match="no counts by neuron"):
        messages_by_core(r.ledger.steps(0, 1), placement)  # type: ignore[arg-type]
