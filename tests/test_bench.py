"""The benchmark's own honesty: sides do the same work, equality is checked, rows are complete."""

from __future__ import annotations

import csv
import functools
import time

import numpy as np
import pytest

from ranvier.sim import bench, bench_jelly, bench_nets
from ranvier.sim.bench_float import StepLoop, agreement
from ranvier.sim.runner import run
from ranvier.train.errors import DataError, RangeError, RanvierError


def small(join: str = "vanilla"):
    program = bench_nets.resnet(1, join, 4, 0)
    return bench_nets.calibrated(program, 0.15, bench_nets.random_spikes(program, 0.15, 4))


@pytest.mark.parametrize("join", ["vanilla", "sew", "or", "ms"])
def test_the_float_loop_is_the_same_network(join: str) -> None:
    """Decays round in integers and not in floats, so spikes differ in few places, rates hardly."""
    program = small(join)
    x = bench_nets.random_spikes(program, 0.15, 8, seed=3)
    want = run(program, x, "dense", ("spikes",))
    loop = StepLoop(program)
    total, rates = loop(x)
    for name in program.populations:
        if program.populations[name].graded or name == "out":
            continue  # ten outputs are too few for a rate
        assert abs(rates[name] - (np.asarray(want.trace[name].spikes[-1]) != 0).mean()) < 0.02, name
    ours = np.asarray(want.trace["out"].spikes, np.int64).sum(0)
    assert (np.abs(total.numpy() - ours) <= 1).mean() > 0.9


def test_rows(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        bench_nets.NETS, "tiny", lambda steps, seed: bench_nets.resnet(1, "vanilla", steps, seed)
    )
    seen: list[bench.Row] = []
    out = tmp_path / "rows.csv"
    rows = bench.run_suite(["tiny"], [0.1], steps=2, batch=2, rounds=2, out=out, show=seen.append)
    assert rows == seen and {r.side for r in rows} == set(bench.SIDES)
    assert all(r.synops == rows[0].synops > 0 and r.peak_mb > 10 for r in rows)
    with open(out, newline="") as file:
        table = list(csv.DictReader(file))
    assert [r["side"] for r in table] == [r.side for r in rows]
    assert all("x" in bench.line(r) for r in rows)


def test_engines_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a kernel that loses a spike must not get a row."""
    from ranvier.sim import dense

    right = dense.scan_cpu

    def wrong(*args, **kwargs):
        done = right(*args, **kwargs)
        done.sent.bits.flat[0] ^= 1
        return done

    program = small()
    x = bench_nets.random_spikes(program, 0.1, 2)
    bench.agreed(program, x, ["dense"])
    monkeypatch.setattr(dense, "scan_cpu", wrong)
    with pytest.raises(RanvierError, match="dense and the reference differ in 'stem'"):
        bench.agreed(program, x, ["dense"])


def test_the_reference_and_trained_nets_have_rows() -> None:
    """A stored net runs at its own rate; the float loop of a compiled net does the same work."""
    name = "resnet-digits-vanilla-digits"
    rows = bench.run_suite(
        [name], [0.1, 0.2], ["events", "snntorch", "reference"], batch=2, rounds=1
    )
    assert [r.side for r in rows] == ["events", "snntorch", "reference"]  # once, not for each rate
    assert all(0.05 < r.rate < 0.6 and r.rate == rows[0].rate for r in rows)
    assert rows[2].batch == 1 and 0 < rows[2].synops < rows[0].synops
    assert all(r.cpu_seconds > 0 for r in rows)


def test_the_float_loop_of_a_compiled_net() -> None:
    """Thresholds and biases of each channel, analog input: rates as on the engines, nearly."""
    program, x = bench.case("resnet-digits-vanilla-digits", 0.0, 4, 16)
    want = run(program, x, "dense", ("spikes",))
    _, rates = StepLoop(program)(program.encode(x))
    for name, population in program.populations.items():
        if population.is_input or population.graded or population.size < 64:
            continue
        assert abs(rates[name] - np.asarray(want.trace[name].spikes[-1]).mean()) < 0.04, name


def test_spikingjelly_that_cannot_start(tmp_path) -> None:
    from ranvier.train.errors import DataError

    program = small()
    x = bench_nets.random_spikes(program, 0.1, 1)
    with pytest.raises(DataError, match="cannot be started"):
        with bench_jelly.Apart(str(tmp_path / "python"), program, x):
            pass
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\necho no\n")
    silent.chmod(0o755)
    with pytest.raises(DataError, match="needs ranvier and spikingjelly"):
        with bench_jelly.Apart(str(silent), program, x):
            pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rates", "0.1,lots"], "no list of numbers"),
        (["--rates", "1.5"], "between 0 and 1"),
        (["--sides", "abacus", "--nets", "mlp"], "side 'abacus' is none of"),
        (["--sides", "spikingjelly"], "name the Python"),
        (["--suite", "train", "--nets", "mlp"], "takes no nets"),
    ],
)
def test_bad_options(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    from ranvier.cli.app import run_app

    assert run_app(["bench", *arguments]) == 2
    assert message in capfd.readouterr().err


def test_unknown_names() -> None:
    with pytest.raises(RangeError, match="side 'gpu' is none of dense"):
        bench.run_suite(["mlp"], [0.1], ["gpu"])
    with pytest.raises(RangeError, match="net 'lenet' is none of mlp, vgg9"):
        bench.run_suite(["lenet"], [0.1])


def test_the_float_loop_is_held_against_the_engine() -> None:
    """Every layer given the engine's messages; a loop with other thresholds is found out."""
    program = small()
    x = program.encode(bench_nets.random_spikes(program, 0.15, 2, seed=3))
    assert "spikes differ layer by layer" in agreement(StepLoop(program), program, x)
    other = StepLoop(program)
    for neuron in other.neurons.values():
        neuron.threshold = neuron.threshold * 1.5
    with pytest.raises(RanvierError, match="differ in"):
        agreement(other, program, x)


@pytest.mark.parametrize("name", ["resnet-digits-or-digits", "resnet-digits-sew-digits"])
def test_the_float_loop_equals_a_compiled_net_layer_by_layer(name: str) -> None:
    """An OR without memory fires strictly above a threshold of 0, where spikes are 1."""
    program, x = bench.case(name, 0.0, 4, 2)
    compared, different = StepLoop(program).differing(
        {n: np.asarray(t.spikes) for n, t in run(program, x, "dense", ("spikes",)).trace.items()}
    )
    assert compared > 10_000 and different < 20


def test_stored_names_with_a_hyphen_in_the_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANVIER_DATA", raising=False)
    with pytest.raises(RangeError, match="is no stored network; there are resnet-digits-ms-digits"):
        bench.case("resnet8-nor-digits", 0.0, 4, 2)
    with pytest.raises(DataError, match="'mnist' is missing"):
        bench.case("resnet8-sew-and-mnist", 0.0, 4, 2)  # found; its images are not


def test_auto_against_the_better_side_is_paired_by_round() -> None:
    """A machine that slows down over the rounds slows all sides alike."""
    rounds = [1.0, 2.0, 8.0]
    times = {
        side: [(factor * r, 2 * factor * r) for r in rounds]
        for side, factor in (("dense", 3.0), ("events", 2.0), ("auto", 2.5))
    }
    assert bench.against_better(times) == (0.8, 0.8)
    assert bench.against_better({"auto": times["auto"]}) == (0.0, 0.0)


def test_quick_calls_get_more_rounds_in_another_order() -> None:
    took: list[str] = []

    def call(name: str) -> None:
        took.append(name)
        time.sleep(0.001)

    calls = {name: functools.partial(call, name) for name in "ab"}
    assert len(bench.timed(calls, 3, 0)["a"]) == 3
    took.clear()
    assert 3 < len(bench.timed(calls, 3, 0, enough_s=1.0)["b"]) <= bench.MOST_ROUNDS
    pairs = ["".join(took[i : i + 2]) for i in range(0, len(took), 2)]
    assert set(pairs) == {"ab", "ba"}
