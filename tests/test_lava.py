"""Programs as Lava Processes: what is stock, what is refused, and that Lava computes the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ranvier.deploy.align import align
from ranvier.deploy.cells import Cell
from ranvier.deploy.lava import describe, expected_seconds, run_lava
from ranvier.deploy.lava_plan import Stream, by_sign, few_groups, kept_by_lava, make_plan
from ranvier.deploy.program import (
    ConvMap,
    DenseMap,
    OneToOne,
    Population,
    Program,
    Projection,
    Readout,
)
from ranvier.sim import run
from ranvier.sim.difference import Difference, first_difference, n_different
from ranvier.sim.lava_engine import run_all_on_lava
from ranvier.sim.runner import engines
from ranvier.train.errors import LavaError, ShapeError, UnsupportedError

STATES = ("spikes", "u", "v")


def even(rng, *shape, top=100):
    return (2 * rng.integers(-top // 2, top // 2 + 1, shape)).astype(np.int16)


def program(shape, populations, projections, readout=None, aligned=True, **input_options):
    """A Program: populations (name, shape, Cell), projections (source, target, map, options)."""
    named = {"in": Population(name="in", shape=shape, **input_options)}
    for name, size, cell, *more in populations:
        named[name] = Population(name=name, shape=size, cell=cell, **(more[0] if more else {}))
    wired = {}
    for k, (source, target, linear, *more) in enumerate(projections):
        p = Projection(
            name=f"p{k}", source=source, target=target, map=linear, **(more[0] if more else {})
        )
        wired[p.name] = p
    made = Program(
        populations=named,
        projections=wired,
        readout=readout or Readout(population=populations[-1][0]),
    )
    return align(made) if aligned else made


def reference(made, x, record=STATES):
    return engines()["reference"](made, x, record)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


# What is stock


def kinds(made):
    return {name: (kind, why) for name, kind, why in describe(made)}


def test_stock_is_what_lavas_own_processes_compute(rng):
    """LIF, a relay, a matrix with a delay, a convolution: nothing of ours."""
    conv = ConvMap(weight=even(rng, 2, 1, 3, 3), in_shape=(1, 4, 4), out_shape=(2, 2, 2))
    made = program(
        (1, 4, 4),
        [("a", (2, 2, 2), Cell(vth=9, timing="delayed")), ("r", (8,), Cell(kind="relay"))],
        [("in", "a", conv), ("a", "r", DenseMap(weight=even(rng, 8, 8))),
         ("in", "r", DenseMap(weight=even(rng, 8, 16)))],
    )  # fmt: skip
    assert {kind for _, kind, _ in describe(made)} == {"stock"}


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ({"reset": "subtract"}, "subtractive reset"),
        ({"reset": "none"}, "no reset"),
        ({"v_reset": 64}, "reset to a value other than zero"),
        ({"strict": False}, "fires at the threshold itself"),
        ({"strict": False, "timing": "delayed"}, "fires at the threshold itself"),
    ],
)
def test_what_needs_microcode_is_called_custom(cell, why):
    one = OneToOne(weight=np.array(2, np.int16), shape=(3,))
    made = program((3,), [("a", (3,), Cell(**cell))], [("in", "a", one)])
    assert kinds(made)["a"] == ("custom", why) and kinds(made)["in"] == ("stock", "")


def test_feedback_and_delayed_convolutions_are_called_custom(rng):
    conv = ConvMap(weight=even(rng, 1, 1, 1, 1), in_shape=(1, 3, 3), out_shape=(1, 3, 3))
    made = program(
        (1, 3, 3),
        [("a", (1, 3, 3), Cell(vth=9)), ("b", (1, 3, 3), Cell(vth=9))],
        [("in", "a", conv), ("a", "b", conv), ("in", "b", conv),
         ("b", "b", DenseMap(weight=even(rng, 9, 9)), {"lag": 1})],
    )  # fmt: skip
    assert kinds(made)["p2"] == ("custom", "delay of 1 before a conv")
    assert kinds(made)["b"] == ("custom", "silent outside its samples")
    assert kinds(made)["a"] == ("stock", "")


# Plans, made without Lava


def test_plan_of_weights_keeps_every_weight(rng):
    """Lava halves nothing: even mixed ones as they are, odd mixed ones as two matrices."""
    mixed, odd = even(rng, 4, 5), rng.integers(-255, 256, (4, 5)).astype(np.int16)
    positive = rng.integers(0, 256, (4, 5)).astype(np.int16)
    for weight, modes in [
        (mixed, ["mixed"]),
        (odd, ["excitatory", "inhibitory"]),
        (positive, ["excitatory"]),
        (-positive, ["inhibitory"]),
        (np.full((4, 5), -256, np.int16), ["mixed"]),
    ]:
        p = Projection(name="p", source="a", target="b", map=DenseMap(weight=weight))
        parts = by_sign(p)
        assert [mode for _, _, mode, _ in parts] == modes
        for _, part, mode, bits in parts:
            np.testing.assert_array_equal(kept_by_lava(part, mode, bits), part)
        np.testing.assert_array_equal(sum(part for _, part, _, _ in parts), weight)
    assert (kept_by_lava(odd, "mixed", 8) != odd).any()  # the control: why odd ones need two


@pytest.mark.parametrize("groups", [127, 128, 131, 256])
def test_many_groups_become_few(rng, groups):
    weight = even(rng, 2 * groups, 3, 2, 2)
    size = {"in_shape": (3 * groups, 3, 3), "out_shape": (2 * groups, 2, 2)}
    many = ConvMap(weight=weight, groups=groups, **size)
    few = few_groups(many)
    assert few.groups == {127: 127, 128: 64, 131: 1, 256: 64}[groups]
    x = rng.integers(0, 2, (2, 3 * groups, 3, 3))
    np.testing.assert_array_equal(few.apply(x), many.apply(x))


def test_plan_refuses_what_no_matrix_holds():
    weight = np.array([[-256, 3]], np.int16)
    one = [("in", "a", DenseMap(weight=weight))]
    made = program((2,), [("a", (1,), Cell())], one)
    with pytest.raises(UnsupportedError, match="'p0' has odd weights beside -256"):
        make_plan(made, np.zeros((2, 1, 2)))


def test_plan_refuses_a_delay_beyond_the_synapse():
    one = OneToOne(weight=np.array(2, np.int16), shape=(2,))
    made = program((2,), [("a", (2,), Cell())], [("in", "a", one, {"delay": 63})], aligned=False)
    with pytest.raises(UnsupportedError, match="'p0' has a delay of 63 .* 0..62"):
        make_plan(made, np.zeros((2, 1, 2)))


def test_a_stream_lays_samples_out_and_cuts_them_back(rng):
    x = rng.integers(0, 9, (4, 3, 2))
    stream = Stream(length=4, interval=6, n=3)
    rows = stream.lay_out(x, depth=2, total=25)
    assert rows.shape == (25, 2) and not rows[:2].any() and not rows[6:8].any()
    np.testing.assert_array_equal(stream.cut(rows, depth=2), x)


def test_wrong_shapes_are_named():
    one = OneToOne(weight=np.array(2, np.int16), shape=(3,))
    made = program((3,), [("a", (3,), Cell())], [("in", "a", one)])
    for x in (np.zeros((4, 3)), np.zeros((4, 1, 2)), np.zeros((0, 1, 3)), np.zeros((4, 0, 3))):
        with pytest.raises(ShapeError, match=r"lava: x is \(.*"):
            run_lava(made, x)


def test_time_limit_grows_with_the_network(rng):
    small = program((3,), [("a", (3,), Cell())], [("in", "a", DenseMap(weight=even(rng, 3, 3)))])
    conv = ConvMap(weight=even(rng, 64, 64, 3, 3), in_shape=(64, 4, 4), out_shape=(64, 2, 2))
    large = program((64, 4, 4), [("a", (64, 2, 2), Cell())], [("in", "a", conv)])
    seconds = [
        expected_seconds(p, make_plan(p, np.zeros((100, 1, *p.input.shape))))
        for p in (small, large)
    ]
    assert seconds[1] > 5 * seconds[0]


# In Lava


def wide(rng):
    """130 groups, which Lava keeps in 8 bits; 13-bit biases; a payload of 20 bits."""
    kernel = rng.integers(1, 4, (130, 1, 2, 2)).astype(np.int16)
    conv = ConvMap(weight=kernel, in_shape=(130, 3, 2), out_shape=(130, 2, 1), groups=130)
    made = program(
        (130, 3, 2),
        [("a", (130, 2, 1), Cell(vth=20000, bias_mant=4095, bias_exp=7, dv=64)),
         ("b", (4,), Cell(vth=30, bias_mant=9, bias_exp=6))],
        [("in", "a", conv, {"exponent": 2}), ("a", "b", DenseMap(weight=abs(even(rng, 4, 260))))],
        lo=0, hi=2**12,
    )  # fmt: skip
    return made, rng.integers(0, 2**12, (5, 2, 130, 3, 2))


def delayed(rng):
    """Every map behind every kind of delay, from spikes, numbers and relays."""
    conv = ConvMap(weight=even(rng, 2, 2, 1, 1), in_shape=(2, 3, 3), out_shape=(2, 3, 3))
    one = OneToOne(weight=rng.integers(1, 9, (2, 1, 1)).astype(np.int16), shape=(2, 3, 3))
    matrix = DenseMap(weight=even(rng, 18, 18))
    size, relay = (2, 3, 3), Cell(kind="relay")
    made = program(
        size,
        [("a", size, Cell(vth=3000)), ("r", size, relay, {"lo": -(2**14), "hi": 2**14}),
         ("b", size, Cell(vth=3000)), ("c", size, Cell(vth=2**14)), ("d", (18,), Cell(vth=90))],
        [("in", "a", matrix), ("a", "r", conv), ("in", "r", one), ("r", "b", one),
         ("in", "c", conv), ("a", "c", conv), ("r", "c", one), ("b", "c", matrix),
         ("in", "c", matrix), ("c", "d", matrix), ("a", "d", matrix, {"exponent": 1})],
        lo=-128, hi=127,
    )  # fmt: skip
    return made, rng.integers(-128, 128, (6, 3, *size))


def unaligned(rng):
    """Delays that fit nothing: a sample hears what the one before it sent, as on the chip."""
    matrix = [DenseMap(weight=even(rng, 6, 6)) for _ in range(3)]
    made = program(
        (6,),
        [("a", (6,), Cell(vth=20), {"depth": 1}), ("b", (6,), Cell(vth=20, dv=99), {"depth": 2})],
        [("in", "a", matrix[0]), ("a", "b", matrix[1], {"delay": 3}), ("in", "b", matrix[2])],
        aligned=False,
    )
    return made, rng.integers(0, 2, (4, 3, 6))


def lonely(rng):
    """A population that nothing feeds, one that feeds nothing, and a readout of v."""
    made = program(
        (4,),
        [("tick", (3,), Cell(vth=100, bias_mant=rng.integers(50, 99, 3), bias_exp=6)),
         ("end", (2,), Cell(vth=30)), ("out", (3,), Cell(reset="none", dv=50))],
        [("in", "end", DenseMap(weight=even(rng, 2, 4))),
         ("in", "out", DenseMap(weight=even(rng, 3, 4)))],
        readout=Readout(population="out", kind="membrane", reduce="last"),
    )  # fmt: skip
    return made, rng.integers(0, 2, (7, 2, 4))


def hot(rng):
    """Sums of 2**28, so that u passes 24 and then 32 bits."""
    one = OneToOne(weight=np.array(1, np.int16), shape=(20,))
    cells = [Cell(du=0, dv=10, vth=1000), Cell(du=-1, dv=9, vth=9, reset="subtract")]
    made = program(
        (20,),
        [("a", (20,), cells[0]), ("b", (20,), cells[1])],
        [("in", "a", one), ("in", "b", one, {"exponent": 1})],
        lo=-(2**28), hi=2**28,
    )  # fmt: skip
    return made, rng.integers(-(2**28), 2**28 + 1, (9, 2, 20))


def groups(n):
    """As many groups as Lava takes as they are (127), merged by twos (128), all in one (131)."""

    def case(rng):
        conv = ConvMap(
            weight=even(rng, n, 1, 1, 2), in_shape=(n, 1, 3), out_shape=(n, 1, 2), groups=n,
            padding=(0, 1), stride=(1, 2),
        )  # fmt: skip
        made = program((n, 1, 3), [("a", (n, 1, 2), Cell(vth=10))], [("in", "a", conv)])
        return made, rng.integers(0, 2, (4, 1, n, 1, 3))

    return case


def logic(rng):
    """Logic behind a convolution, numbers and delays, with a threshold for each neuron; AND, IAND."""
    size = (2, 2, 3)
    conv = ConvMap(weight=even(rng, 2, 2, 1, 1), in_shape=size, out_shape=size)
    one, minus = (OneToOne(weight=np.array(w, np.int16), shape=size) for w in (1, -1))
    vth = rng.integers(0, 90, size)
    made = program(
        size,
        [("a", size, Cell(kind="logic", vth=vth)),
         ("b", size, Cell(kind="logic", vth=vth[:, :1, :1], strict=False)),
         ("and", size, Cell(kind="logic", vth=1)), ("iand", size, Cell(kind="logic", vth=0)),
         ("zero", size, Cell(kind="logic", vth=0, strict=False))],
        [("in", "a", conv), ("in", "b", conv, {"exponent": 1}), ("a", "and", one),
         ("b", "and", one, {"lag": 1}), ("b", "iand", one), ("and", "iand", minus),
         ("and", "zero", minus), ("iand", "zero", conv)],
        lo=-3, hi=9,
    )  # fmt: skip
    return made, rng.integers(-3, 10, (7, 3, *size))


def resets(rng):
    """The rules of reset that no random Program draws, firing at the threshold itself as well."""
    rules = [("none", "delayed"), ("none", "carry"), ("none", "discard"), ("zero", "carry"),
             ("subtract", "discard")]  # fmt: skip
    cells = [
        Cell(vth=rng.integers(4, 20, 6), dv=99, bias_mant=64, bias_exp=1, reset=reset,
             timing=timing, strict=k % 2 == 0, v_reset=-77 if reset == "zero" else 0)
        for k, (reset, timing) in enumerate(rules)
    ]  # fmt: skip
    populations = [(f"n{k}", (6,), cell) for k, cell in enumerate(cells)]
    wires = [("in", name, DenseMap(weight=even(rng, 6, 6, top=30))) for name, _, _ in populations]
    return program((6,), populations, wires), rng.integers(0, 2, (9, 2, 6))


def late(rng):
    """Delays of our own before matrices that Lava's delayed ones build too slowly; beyond 62: relays."""
    n = 400
    dense = [DenseMap(weight=even(rng, n, n)) for _ in range(2)]
    one = OneToOne(weight=np.full((), 90, np.int16), shape=(n,))
    made = program(
        (n,),
        [("a", (n,), Cell(vth=100)), ("b", (n,), Cell(vth=100)), ("c", (n,), Cell(vth=80))],
        [("in", "a", dense[0]), ("a", "b", dense[1], {"lag": 3}), ("in", "b", one, {"lag": 45}),
         ("in", "c", one, {"lag": 70})],
    )  # fmt: skip
    return made, (rng.random((74, 1, n)) < 0.3).astype(np.int64)


CASES = {
    "wide": wide, "delayed": delayed, "lonely": lonely, "hot": hot, "groups 127": groups(127),
    "groups 128": groups(128), "groups 131": groups(131), "logic": logic, "resets": resets,
    "late": late,
}  # fmt: skip


@pytest.fixture(scope="module")
def lava_runs():
    """name -> (Program, x, its Result in Lava), with one start of Lava for all."""
    made = {n: f(np.random.default_rng(5)) for n, f in (CASES | {"unaligned": unaligned}).items()}
    results = run_all_on_lava(list(made.values()), STATES)
    return {n: (*case, result) for (n, case), result in zip(made.items(), results, strict=True)}


@pytest.mark.lava
@pytest.mark.parametrize("name", CASES)
def test_lava_equals_the_reference(name, lava_runs):
    made, x, found = lava_runs[name]
    expected = reference(made, x)
    assert first_difference(found, expected) is None
    np.testing.assert_array_equal(found.output, expected.output)
    assert found.ledger.same_counts(expected.ledger)
    assert all(found.trace[p.name].spikes.any() for p in made if not p.name == "out")


def test_the_late_case_needs_delays_of_our_own_and_relays(rng):
    made, x = late(rng)
    assert any("/relay" in p.name for p in made) and min(p.depth for p in made) == 0
    kinds = {node.name: node.kind for node in make_plan(made, x).nodes}
    behind = {e.target for e in make_plan(made, x).edges if kinds[e.source] == "delay"}
    assert {kinds[name] for name in behind} == {"dense", "one_to_one"}


@pytest.mark.lava
def test_lava_equals_chip_time_where_samples_meet(lava_runs):
    """Without alignment the samples of a stream touch each other: Lava does what chip time says."""
    from ranvier.sim.reference import run_chip_time

    made, x, found = lava_runs["unaligned"]
    streamed = run_chip_time(made, [x[:, k : k + 1] for k in range(3)])
    spikes = np.concatenate([s.sent["b"] for s in streamed], axis=1)
    np.testing.assert_array_equal(found.trace["b"].spikes, spikes)
    assert (spikes != reference(made, x).trace["b"].spikes).any()  # the control: they do touch


@pytest.mark.lava
def test_the_engine_takes_floats_and_gives_floats(rng):
    """`run(..., engine="lava")`; without `record` nothing but the output is kept."""
    matrix = DenseMap(weight=even(rng, 3, 5))
    made = program((5,), [("a", (3,), Cell(vth=9))], [("in", "a", matrix)])
    x = (rng.random((6, 2, 5)) < 0.5).astype(float)
    calls = []
    found = run(made, x, engine="lava", progress=lambda *steps: calls.append(steps))
    expected = run(made, x, engine="reference")
    assert calls == sorted(calls) and calls[-1] == (13, 13)  # two samples of 6, and the depth
    assert found.engine == "lava" and len(found.trace) == 0
    assert first_difference(found, expected) is None
    assert n_different(found, expected) == (0, 0)


@pytest.mark.lava
def test_sums_that_lava_does_not_define_are_refused():
    """Beyond 32 bits its convolution casts floats that no integer holds."""
    kernel = np.full((1, 1, 2, 2), 255, np.int16)
    conv = ConvMap(weight=kernel, in_shape=(1, 2, 2), out_shape=(1, 1, 1))
    made = program(
        (1, 2, 2), [("a", (1, 1, 1), Cell())], [("in", "a", conv, {"exponent": 7})], hi=2**20
    )
    with pytest.raises(UnsupportedError, match="'p0' takes messages up to 1048576"):
        run_lava(made, np.full((2, 1, 1, 2, 2), 2**20))


@pytest.mark.lava
def test_a_run_that_takes_too_long_is_stopped(rng):
    matrix = DenseMap(weight=even(rng, 3, 3))
    made = program((3,), [("a", (3,), Cell())], [("in", "a", matrix)])
    with pytest.raises(LavaError, match="did not end within 2 s"):
        run_lava(made, np.zeros((10**5, 1, 3), np.int64), timeout_s=2)


# Where two runs part


def test_first_difference_names_population_step_sample_neuron(rng):
    matrix = DenseMap(weight=even(rng, 3, 5))
    made = program(
        (5,),
        [("a", (3,), Cell(vth=30)), ("b", (3,), Cell(vth=5))],
        [("in", "a", matrix), ("a", "b", OneToOne(weight=np.array(9, np.int16), shape=(3,)))],
    )
    result = reference(made, rng.integers(0, 2, (5, 2, 5)))
    assert first_difference(result, result) is None
    spikes = result.trace["a"].spikes.copy()
    spikes[3, 1, 2] ^= 1
    v = result.trace["b"].v.copy()
    v[2, 0, 1] += 5
    records = dict(result.trace.records)
    records["a"] = replace(records["a"], spikes=spikes)
    later = replace(result, trace=replace(result.trace, records=records))
    assert first_difference(later, result) == Difference(
        "a", 3, 1, (2,), "spikes", (float(spikes[3, 1, 2]), float(1 - spikes[3, 1, 2]))
    )
    records["b"] = replace(records["b"], v=v)
    both = replace(result, trace=replace(result.trace, records=records))
    first = first_difference(both, result)
    assert first is not None and (first.population, first.what, first.step) == ("b", "v", 2)
    assert str(first).startswith("v of 'b': step 2, sample 0, neuron (1,): ")
    assert n_different(both, result)[1] == 2
    with pytest.raises(ShapeError, match="different populations"):
        first_difference(result, replace(result, trace=replace(result.trace, records={})))
