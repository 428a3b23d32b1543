"""The fast engines against the reference: spikes, u, v, readout and ledger, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from random_programs import random_input, random_program

from ranvier.deploy.cells import Cell
from ranvier.deploy.program import ConvMap, DenseMap, Population, Program, Projection, Readout
from ranvier.sim import auto, bench_nets
from ranvier.sim.race import TURNS, Race
from ranvier.sim.runner import Result, run
from ranvier.train.errors import FormatError, RangeError, ShapeError

STATES = ("spikes", "u", "v")
KINDS = {"plain": {}, "hot": {"hot": True}, "cyclic": {"cyclic": True}}


def first_difference(a: Result, b: Result) -> str | None:
    """The first population, in order, and index at which two results differ; None if nowhere."""
    for name in a.trace:
        for key in STATES:
            one, two = getattr(a.trace[name], key), getattr(b.trace[name], key)
            if one.shape != two.shape:
                return f"{name}.{key}: shape {one.shape} against {two.shape}"
            where = np.argwhere(one != two)
            if len(where):
                at = tuple(where[0])
                return f"{name}.{key}{list(map(int, at))}: {one[at]} against {two[at]}"
    return None


def assert_equal(a: Result, b: Result) -> None:
    assert first_difference(a, b) is None
    assert_array_equal(a.output_spikes, b.output_spikes)
    assert_array_equal(a.output, b.output)
    assert a.ledger.to_dict() == b.ledger.to_dict()


@pytest.mark.parametrize("engine", ["dense", "events", "auto"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("seed", range(12))
def test_engine_equals_reference(
    engine: str, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = random_program(seed, **KINDS[kind])
    x = random_input(program, seed)
    if engine == "auto":
        monkeypatch.setattr("ranvier.sim.auto.SMALL", 0 if seed % 2 else 10**9)
    want = run(program, x, "reference", STATES)
    assert_equal(want, run(program, x, engine, STATES))


def one_dense(n: int = 4, **cell: object) -> Program:
    """An input of n spikes into two neurons."""
    weight = np.arange(2 * n).reshape(2, n) * 2
    out = Population(name="out", shape=(2,), cell=Cell(vth=5, **cell))  # type: ignore[arg-type]
    return Program(
        populations={"in": Population(name="in", shape=(n,)), "out": out},
        projections={
            "p": Projection(name="p", source="in", target="out", map=DenseMap(weight=weight))
        },
        readout=Readout(population="out"),
    )


ENGINES = ["reference", "dense", "events", "auto"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.zeros((3, 2, 5)), ShapeError, r"x has shape \(3, 2, 5\); it takes \[time, batch, 4\]"),
        (np.zeros((2, 4)), ShapeError, "no time axis and no number of steps"),
        (np.zeros((3, 0, 4)), RangeError, "3 steps and 0 samples"),
        (np.zeros((0, 2, 4)), RangeError, "0 steps and 2 samples"),
        (np.full((3, 2, 4), 2.0), RangeError, "input 'in' sends 0..1"),
        (np.full((3, 2, 4), 0.5), RangeError, "declared binary, and x is not 0 or 1"),
        (np.full((3, 2, 4), np.nan), RangeError, "not finite"),
    ],
)
def test_bad_input(engine: str, x: np.ndarray, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(one_dense(), x, engine)


def test_unknown_engine_record_and_device() -> None:
    x = np.zeros((1, 1, 4))
    with pytest.raises(RangeError, match="engine 'abacus' is none of reference, dense"):
        run(one_dense(), x, "abacus")
    with pytest.raises(RangeError, match="cannot record 'w'; any of spikes, u, v"):
        run(one_dense(), x, "dense", ("w",))
    with pytest.raises(RangeError, match="device 'tpu' is not available"):
        run(one_dense(), x, "dense", device="tpu")


def test_a_program_of_another_version(tmp_path: Path) -> None:
    import h5py

    path = tmp_path / "p.h5"
    one_dense().save(path)
    with h5py.File(path, "r+") as file:
        assert file.attrs["version"] == 1
        file.attrs["version"] = 99
    with pytest.raises(FormatError, match="99"):
        Program.load(path)


@pytest.mark.parametrize("engine", ["dense", "events", "auto"])
@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int64, np.float32, np.float64])
def test_number_types_of_x(engine: str, kind: type) -> None:
    x = (np.random.default_rng(0).random((4, 3, 4)) < 0.5).astype(kind)
    assert_equal(run(one_dense(), x, "reference", STATES), run(one_dense(), x, engine, STATES))


@pytest.mark.parametrize("engine", ["dense", "events", "auto"])
def test_parts_of_a_batch_do_not_matter(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one sample each, as a large network has them."""
    program = random_program(3)
    x = random_input(program, 4, batch=4)
    want = run(program, x, "reference", STATES)
    monkeypatch.setattr("ranvier.sim.dense.CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr("ranvier.sim.events.CHUNK_BYTES", 1)
    assert_equal(want, run(program, x, engine, STATES))


@pytest.mark.parametrize("engine", ["dense", "events", "auto"])
def test_some_samples_held_in_time(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the batch that is the same at every step, and another that is not."""
    monkeypatch.setattr("ranvier.sim.dense.CHUNK_BYTES", {"cpu": 1})
    monkeypatch.setattr("ranvier.sim.events.CHUNK_BYTES", 1)
    program = one_dense()
    x = (np.random.default_rng(0).random((4, 3, 4)) < 0.5).astype(np.uint8)
    x[:, 0] = x[0, 0]
    assert_equal(run(program, x, "reference", STATES), run(program, x, engine, STATES))


def test_the_check_finds_one_changed_state() -> None:
    """The control of `assert_equal`."""
    program = random_program(1)
    x = random_input(program, 1)
    a, b = (run(program, x, "reference", STATES) for _ in range(2))
    name = list(program.populations)[-1]
    b.trace[name].v[2, 1].flat[0] += 1
    assert first_difference(a, b) == f"{name}.v{[2, 1, *[0] * len(program.output.shape)]}: " + (
        f"{a.trace[name].v[2, 1].flat[0]} against {b.trace[name].v[2, 1].flat[0]}"
    )
    with pytest.raises(AssertionError):
        assert_equal(a, b)


@pytest.mark.parametrize("engine", ["dense", "events", "auto"])
def test_wide_sums_take_the_wide_path(engine: str) -> None:
    """Sums beyond 24, 32 and 53 bits: the proof must refuse the narrow types."""
    for payload in (2**10, 2**20, 2**31 - 1):
        entry = Population(name="in", shape=(1, 3, 3), lo=-payload, hi=payload)
        conv = ConvMap(
            weight=np.array([[[[254, -256, 128]]]]), in_shape=(1, 3, 3), out_shape=(1, 3, 1)
        )
        relay = Population(
            name="r", shape=(1, 3, 1), cell=Cell(kind="relay"), lo=-(2**31), hi=2**31
        )
        out = Population(name="out", shape=(4,), cell=Cell(vth=1, du=0, reset="subtract"))
        program = Program(
            populations={"in": entry, "r": relay, "out": out},
            projections={
                "a": Projection(name="a", source="in", target="r", map=conv, exponent=15),
                "b": Projection(
                    name="b", source="r", target="out", exponent=15,
                    map=DenseMap(weight=np.array([[254, 254, 254], [2, 0, 0], [-256, 4, 0], [0, 0, 2]])),
                ),
            },
            readout=Readout(population="out"),
        )  # fmt: skip
        rng = np.random.default_rng(payload % 97)
        x = rng.integers(-payload, payload + 1, (4, 3, 1, 3, 3))
        assert_equal(run(program, x, "reference", STATES), run(program, x, engine, STATES))


@pytest.mark.parametrize("join", ["vanilla", "sew", "or", "ms"])
def test_benchmark_networks(join: str) -> None:
    """A residual network of each kind, all engines, at the rate that was asked for."""
    program = bench_nets.calibrated(
        bench_nets.resnet(1, join, 2, 0), 0.1, bench_nets.random_spikes(
            bench_nets.resnet(1, join, 2, 0), 0.1, 2)
    )  # fmt: skip
    x = bench_nets.random_spikes(program, 0.1, 2, seed=5)
    want = run(program, x, "reference", ("spikes",))
    for engine in ("dense", "events", "auto"):
        got = run(program, x, engine, ("spikes",))
        for name in program.populations:
            assert_array_equal(got.trace[name].spikes, want.trace[name].spikes)
        assert got.ledger.same_counts(want.ledger)
    assert 0.05 < want.ledger.rate("block0.b" if join != "ms" else "block0.a") < 0.2


@pytest.mark.parametrize("kind", list(KINDS))
def test_auto_gives_the_same_bits_in_every_lane(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the trial, and with each lane as the winner of the race."""
    monkeypatch.setattr(auto, "SMALL", 0)
    monkeypatch.setattr(auto, "TRIALS", 1)
    program = random_program(3, **KINDS[kind])
    x = random_input(program, 1)
    want = run(program, x, "reference", STATES)
    assert_equal(want, run(program, x, "auto", STATES))
    (found,) = auto.backend(program).found.values()
    assert found.choices and all(min(c.seconds.values()) > 0 for c in found.choices.values())
    for lane in (auto.OWN, *auto.WAYS):
        found.race.winner = lane
        assert_equal(want, run(program, x, "auto", STATES))
    assert list(auto.backend(program).found.values()) == [found]


def test_auto_decides_once_on_runs_that_keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "SMALL", 0)
    program = random_program(3)
    x = random_input(program, 1)
    run(program, x, "auto")
    (found,) = auto.backend(program).found.values()
    found.race = Race([auto.OWN, *auto.WAYS])
    run(program, x, "auto", STATES)
    assert not any(found.race.seconds.values())  # to keep states takes time of its own
    for _ in range(3 * TURNS):
        run(program, x, "auto")
    winner, before = found.race.winner, {k: list(v) for k, v in found.race.seconds.items()}
    assert winner in (auto.OWN, *auto.WAYS)
    run(program, x, "auto")
    assert found.race.seconds == before and found.race.winner == winner


def test_auto_looks_again_where_the_network_fires_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auto, "SMALL", 0)
    monkeypatch.setattr(auto, "WATCH", 2)
    program = random_program(3)
    x = random_input(program, 1)
    for _ in range(5):
        run(program, x, "auto")
    (found,) = auto.backend(program).found.values()
    assert found.parts == 4 and found.density > 0
    found.density *= 3
    run(program, x, "auto")
    assert list(auto.backend(program).found.values()) == [found]  # not looked at this time
    run(program, x, "auto")
    assert not auto.backend(program).found
    run(program, x, "auto")
    (again,) = auto.backend(program).found.values()
    assert again is not found


def test_auto_measures_again_on_a_part_twice_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one sample says of the two ways is not what many say."""
    monkeypatch.setattr(auto, "SMALL", 0)
    program = random_program(3)
    x = np.repeat(random_input(program, 1)[:, :1], 3, 1)
    use = auto.backend(program)
    run(program, x[:, :1], "auto")
    (one,) = use.found.values()
    assert one.samples == 1
    run(program, x[:, :2], "auto")
    assert list(use.found.values()) == [one]
    run(program, x, "auto")
    (many,) = use.found.values()
    assert many is not one and many.samples == x.shape[1]
    run(program, x[:, :1], "auto")
    assert list(use.found.values()) == [many]
    monkeypatch.setattr("ranvier.sim.events.CHUNK_BYTES", 1)
    other = random_program(4)
    alike = np.repeat(random_input(other, 1)[:, :1], 3, 1)  # one density, whatever the parts
    run(other, alike, "auto")
    assert [f.samples for f in auto.backend(other).found.values()] == [np.inf]


@pytest.mark.parametrize("seed", range(8))
def test_auto_gives_the_same_bits_whatever_the_clock_says(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way, lane and size of a part may come up; only the bits may not differ."""
    drawn = np.random.default_rng(seed)
    ticks = np.cumsum(10.0 ** drawn.uniform(-5, -1, 10_000)).tolist()
    clock = iter(ticks)
    monkeypatch.setattr(auto.time, "thread_time", lambda: next(clock))
    monkeypatch.setattr(auto, "SMALL", 0)
    monkeypatch.setattr(auto, "WATCH", 3)
    monkeypatch.setattr("ranvier.sim.events.CHUNK_BYTES", 1)
    program = random_program(seed)
    x = random_input(program, seed)
    want = run(program, x, "reference")
    for _ in range(6):
        got = run(program, x, "auto")
        assert_array_equal(got.output_series, want.output_series)
        assert got.ledger.same_counts(want.ledger)
    assert len(list(clock)) < len(ticks) - 20  # it was asked


def test_auto_changes_its_way_for_a_clear_gain_alone() -> None:
    def measured(dense: float, events: float) -> auto.Choice:
        return auto.Choice({"dense": dense, "events": events})

    before = [measured(1.0, 2.0), measured(1.0, 0.5)]  # together dense is quicker
    assert auto.better(measured(1.0, 0.9), before) == "dense"
    assert auto.better(measured(1.0, 0.8), before) == "events"
    assert auto.better(measured(1.0, 1.1), before) == "dense"
    assert auto.usual(before) == "dense"
    lanes = auto.settled(dict(zip("ab", before, strict=True)), 0.1).race.seconds
    assert list(lanes) == ["own", "dense", "events"]  # 1.0 + 0.5 against 2.0 and 2.5
    far = {"a": measured(1.0, 9.0), "b": measured(1.0, 0.2)}
    assert list(auto.settled(far, 0.1).race.seconds) == ["own", "dense"]  # events: 9.2 for 1.2
    even = {"a": measured(1.0, 1.1), "b": measured(1.0, 1.2)}
    assert list(auto.settled(even, 0.1).race.seconds) == ["dense", "events"]


@pytest.mark.parametrize("timing", ["immediate", "delayed", "carry", "discard"])
@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
def test_the_fast_scan_equals_the_reference(reset: str, timing: str) -> None:
    """Cells without current memory run in a kernel of their own where no state is recorded."""
    rng = np.random.default_rng(1)
    for hi, strict in [(1, True), (1, False), (700, True)]:  # 700: sums that fold
        cell = Cell(
            dv=rng.integers(0, 4097, 300), vth=rng.integers(1, 900, 300),
            bias_mant=rng.integers(-4000, 4000, 300), reset=reset, timing=timing, strict=strict,
            v_reset=-37,
        )  # fmt: skip
        weight = 2 * rng.integers(-127, 128, (300, 20))
        program = Program(
            populations={
                "in": Population(name="in", shape=(20,), lo=1 - hi, hi=hi),
                "out": Population(name="out", shape=(300,), cell=cell),
            },
            projections={
                "p": Projection(name="p", source="in", target="out", map=DenseMap(weight=weight))
            },
            readout=Readout(population="out"),
        )
        x = rng.integers(1 - hi, hi + 1, (9, 7, 20))
        want = run(program, x, "reference", ("spikes",))
        for engine in ("dense", "events"):
            got = run(program, x, engine, ("spikes",))
            assert_array_equal(got.trace["out"].spikes, want.trace["out"].spikes)
            assert got.ledger.same_counts(want.ledger)


def test_8_bit_products_are_used_and_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are there; and a product that is wrong is found before it is used (the control)."""
    from ranvier.sim import dense, int8

    def network() -> Program:
        weight = 4 * np.random.default_rng(0).integers(-64, 64, (8, 3, 3, 3))
        conv = ConvMap(weight=weight, in_shape=(3, 6, 6), out_shape=(8, 6, 6), padding=(1, 1))
        return Program(
            populations={
                "in": Population(name="in", shape=(3, 6, 6)),
                "out": Population(name="out", shape=(8, 6, 6), cell=Cell(vth=99)),
            },
            projections={
                "p": Projection(name="p", source="in", target="out", map=conv, exponent=2)
            },
            readout=Readout(population="out"),
        )

    if not int8.available():
        pytest.skip("torch has no 8-bit products here")
    x = (np.random.default_rng(1).random((3, 5, 3, 6, 6)) < 0.4).astype(np.float32)
    program, other = network(), network()
    assert_equal(run(program, x, "reference", STATES), run(program, x, "dense", STATES))
    assert dense.backend(program)._synapses["p"].int8 is not None

    made = int8._conv
    monkeypatch.setattr(int8, "_conv", lambda *a: lambda message: made(*a)(message) + 1)
    assert_equal(run(other, x, "reference", STATES), run(other, x, "dense", STATES))
    assert dense.backend(other)._synapses["p"].int8 is None


@pytest.mark.parametrize(
    ("in_shape", "kernel", "stride", "padding", "dilation"),
    [
        ((2, 5, 1), (1, 1), (1, 2), (1, 1), (1, 2)),  # every column of outputs left and right of it
        ((4, 3, 1), (2, 1), (1, 2), (1, 1), (2, 2)),
        ((3, 1, 4), (1, 2), (2, 1), (1, 0), (1, 1)),  # the same in rows
        ((2, 3, 3), (2, 2), (1, 1), (2, 2), (1, 1)),  # the outermost ones alone
    ],
)
def test_outputs_that_read_only_padding(in_shape, kernel, stride, padding, dilation) -> None:  # type: ignore[no-untyped-def]
    """The first two end the process in oneDNN's 8-bit convolution; so none of them goes there."""
    from ranvier.sim import int8

    rows, cols = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(in_shape[1:], kernel, stride, padding, dilation, strict=True)
    )
    weight = np.random.default_rng(0).integers(-60, 60, (3, in_shape[0], *kernel)) * 2
    conv = ConvMap(
        weight=weight, in_shape=in_shape, out_shape=(3, rows, cols), stride=stride,
        padding=padding, dilation=dilation,
    )  # fmt: skip
    assert int8.sees_padding_only(conv) and not int8.fits(conv, weight >> 1)
    bias = np.arange(3 * rows * cols).reshape(3, rows, cols)
    program = Program(
        populations={
            "in": Population(name="in", shape=in_shape),
            "out": Population(
                name="out", shape=conv.out_shape, cell=Cell(vth=50, bias_mant=bias, bias_exp=6)
            ),
        },
        projections={"p": Projection(name="p", source="in", target="out", map=conv)},
        readout=Readout(population="out"),
    )
    x = np.random.default_rng(1).integers(0, 2, (4, 3, *in_shape))
    want = run(program, x, "reference", STATES)
    for engine in ("dense", "events"):
        assert_equal(want, run(program, x, engine, STATES))


def test_padding_that_the_kernel_sees_past_still_takes_8_bits() -> None:
    """The control of the test above."""
    from ranvier.sim import int8

    weight = np.ones((2, 3, 3, 3), np.int16)
    for stride in ((1, 1), (2, 2)):
        side = (6 - 1) // stride[0] + 1
        conv = ConvMap(
            weight=weight, in_shape=(3, 6, 6), out_shape=(2, side, side), stride=stride,
            padding=(1, 1),
        )  # fmt: skip
        assert not int8.sees_padding_only(conv)
        assert int8.fits(conv, weight) == int8.available()


def test_importing_sim_brings_in_neither_torch_nor_numba() -> None:
    code = (
        "import sys, ranvier.sim, ranvier.sim.runner, ranvier.sim.ledger\n"
        "print([m for m in ('torch', 'numba', 'onnx', 'lava', 'snntorch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("seed", range(12))
def test_cuda_equals_reference(kind: str, seed: int) -> None:
    program = random_program(seed, **KINDS[kind])
    x = random_input(program, seed)
    want = run(program, x, "reference", STATES)
    assert_equal(want, run(program, x, "dense", STATES, device="cuda"))


@pytest.mark.parametrize("seed", range(12))
def test_the_gpu_path_on_the_cpu(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would run, patches and the torch scan, is plain torch: held here as well."""
    from ranvier.sim import dense

    program = random_program(seed, hot=seed % 2 == 0, cyclic=seed % 3 == 0)
    x = random_input(program, seed)
    want = run(program, x, "reference", STATES)
    monkeypatch.setattr(dense, "convolve", dense.conv_by_patches)
    monkeypatch.setattr(
        dense,
        "scan_cpu",
        lambda plan, name, total, *rest: dense.backend(program)._scan_torch(
            name, torch.as_tensor(total), *rest
        ),
    )
    assert_equal(want, run(program, x, "dense", STATES))
