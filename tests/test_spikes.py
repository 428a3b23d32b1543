"""Packed spikes: nothing is lost, and the engines hold nothing larger between layers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from random_programs import random_input, random_program

from ranvier.sim import bench_nets, dense, events
from ranvier.sim.layers import Walk
from ranvier.sim.spikes import Spikes


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 1000, 2048 + 3])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_round_trip(n: int, rate: float) -> None:
    plain = (np.random.default_rng(n).random((3, 5, n)) < rate).astype(np.uint8)
    packed = Spikes.of(plain)
    assert packed.shape == plain.shape and len(packed) == 3
    assert_array_equal(packed.bits, np.packbits(plain, axis=-1, bitorder="little"))
    assert_array_equal(packed.plain(), plain)
    assert packed.count() == plain.sum()


def test_steps_are_cut_joined_and_quiet() -> None:
    plain = (np.random.default_rng(0).random((4, 2, 13)) < 0.5).astype(np.uint8)
    packed = Spikes.of(plain)
    assert_array_equal(packed[1:3].plain(), plain[1:3])
    late = Spikes.joined([packed.quiet(2), packed])[:4]
    assert_array_equal(late.plain(), np.concatenate([np.zeros_like(plain[:2]), plain[:2]]))


def test_a_view_of_other_memory() -> None:
    """Every second step of a larger array: neither contiguous nor at its start."""
    plain = (np.random.default_rng(1).random((8, 2, 24)) < 0.5).astype(np.uint8)
    assert_array_equal(Spikes.of(plain[1::2]).plain(), plain[1::2])
    assert_array_equal(Spikes.of(plain)[1::2].plain(), plain[1::2])


@pytest.mark.parametrize("engine", [dense, events])
@pytest.mark.parametrize("join", ["vanilla", "or", "sew"])
def test_what_waits_between_layers_is_packed(
    engine: object, join: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = bench_nets.resnet(1, join, 4, 0)
    x = program.encode(bench_nets.random_spikes(program, 0.2, 2))
    seen: dict[str, object] = {}
    keep = Walk._keep

    def watched(self: Walk, name: str, done: object) -> None:
        seen[name] = done.sent  # type: ignore[attr-defined]
        keep(self, name, done)  # type: ignore[arg-type]

    monkeypatch.setattr(Walk, "_keep", watched)
    Walk(engine.backend(program), x, (), {}).run()  # type: ignore[attr-defined]
    assert set(seen) == set(program.populations)
    for name, population in program.populations.items():
        assert isinstance(seen[name], Spikes) != population.graded, name
    assert sum(isinstance(m, Spikes) for m in seen.values()) > 5


def test_cyclic_programs_hold_what_is_still_to_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the number of steps."""
    program = random_program(3, cyclic=True)
    x = program.encode(random_input(program, 1))
    held = max((p.lag for p in program.projections.values()), default=0) + 1
    walk = Walk(dense.backend(program), np.concatenate([x] * 10), (), {})
    most = 0
    drive = dense.DenseBackend.drive

    def watched(*args: object) -> object:
        nonlocal most
        most = max(most, *(len(kept) for kept in walk.recent.values()))
        return drive(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(dense.DenseBackend, "drive", watched)
    walk.run()
    assert 0 < most <= held < walk.steps
