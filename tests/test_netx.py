"""The border to lava-dl's netx: files read and written, against lava-dl's own reader in Lava."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from tests import netx_targets

from ranvier.deploy.align import align
from ranvier.deploy.cells import Cell
from ranvier.deploy.lava_compat import available
from ranvier.deploy.lava_guard import run_guarded
from ranvier.deploy.netx_file import read_program
from ranvier.deploy.program import (
    ConvMap,
    DenseMap,
    OneToOne,
    Population,
    Program,
    Projection,
    Readout,
)
from ranvier.export import read_net, write_net
from ranvier.export.netx_layers import read_layers
from ranvier.export.netx_weights import applied_weights
from ranvier.sim.reference import run_reference
from ranvier.train.errors import FormatError, RanvierError, UnsupportedError

needs_netx = pytest.mark.skipif(
    bool(available(netx=True)), reason=available(netx=True) or "", allow_module_level=False
)


def even(rng, *shape, top=60):
    return (2 * rng.integers(-top, top + 1, shape)).astype(np.int16)


def chain(*parts, shape, high=1, steps=None):
    """A Program of one population behind the other; parts: (name, cell, map, projection)."""
    populations = {"in": Population(name="in", shape=shape, lo=-high if high > 1 else 0, hi=high)}
    projections, before = {}, "in"
    for name, cell, linear, options in parts:
        populations[name] = Population(name=name, shape=linear.out_shape, cell=cell)
        p = Projection(name=f">{name}", source=before, target=name, map=linear, **options)
        projections[p.name] = p
        before = name
    readout = Readout(population=before)
    return Program(populations=populations, projections=projections, readout=readout, steps=steps)


def dense_chain(rng):
    """Dense layers with a bias, thresholds and decays of each neuron, an exponent, a delay."""
    cells = [
        Cell(dv=128, vth=rng.integers(40, 200, 9), bias_mant=rng.integers(-20, 40, 9), bias_exp=6),
        Cell(du=700, dv=300, vth=150),
        Cell(du=rng.integers(0, 4096, 5), dv=0, vth=200),
    ]  # fmt: skip
    return chain(
        ("a", cells[0], DenseMap(weight=even(rng, 9, 12)), {}),
        ("b", cells[1], DenseMap(weight=np.abs(even(rng, 7, 9, top=30))), {"exponent": 1}),
        ("c", cells[2], DenseMap(weight=even(rng, 5, 7)), {"lag": 3}),
        shape=(12,),
    )


def conv_chain(rng):
    """Convolutions of every geometry, one to one, and a matrix behind; whole numbers come in."""
    shapes = {"in_shape": (2, 9, 7), "out_shape": (6, 5, 4)}
    a = ConvMap(weight=even(rng, 6, 1, 3, 2), **shapes, stride=(2, 2), padding=(1, 1), groups=2)
    shapes = {"in_shape": (6, 5, 4), "out_shape": (4, 3, 2)}
    b = ConvMap(weight=even(rng, 4, 6, 2, 2), **shapes, dilation=(2, 2))
    c = OneToOne(weight=rng.integers(1, 200, (4, 1, 1)).astype(np.int16), shape=(4, 3, 2))
    channels = rng.integers(100, 2000, (6, 1, 1))
    cell = Cell(du=4095, dv=100, vth=channels, bias_mant=rng.integers(-9, 9, (6, 5, 4)), bias_exp=7)
    return chain(
        ("a", cell, a, {}),
        ("b", Cell(du=4095, dv=0, vth=90), b, {"exponent": 1}),
        ("c", Cell(du=-1, dv=4095, vth=300), c, {}),
        ("d", Cell(du=4095, dv=10, vth=60), DenseMap(weight=even(rng, 5, 24)), {}),
        shape=(2, 9, 7), high=100, steps=8,
    )  # fmt: skip


def recurrent(rng):
    """A recurrent layer, and one behind it."""
    first = chain(
        ("a", Cell(du=4095, dv=200, vth=90), DenseMap(weight=even(rng, 6, 10)), {}),
        ("b", Cell(du=4095, dv=200, vth=60), DenseMap(weight=even(rng, 4, 6)), {}),
        shape=(10,),
    )
    back = Projection(
        name="a>a", source="a", target="a", map=DenseMap(weight=even(rng, 6, 6)), lag=1
    )
    return first.with_parts(projections={**first.projections, "a>a": back})


PROGRAMS = {"dense": dense_chain, "conv": conv_chain, "recurrent": recurrent}


@pytest.fixture
def rng():
    return np.random.default_rng(7)


STORED = ("oxford/network", "mnist_mlp/trained_mnist_network", "tiny/tiny")
STEPS = 40


def spikes_for(program, seed=7):
    """Random input `[STEPS, 1, *shape]` over the whole range of a program's input."""
    rng = np.random.default_rng(seed)
    return rng.integers(program.input.lo, program.input.hi + 1, (STEPS, 1, *program.input.shape))


def stored_input(name, program, folder):
    if name.startswith("tiny"):  # one image, held
        image = np.random.default_rng(7).integers(0, 256, (1, 1, *program.input.shape))
        return np.repeat(image, STEPS, 0)
    if name.startswith("oxford"):
        return np.load(folder / "oxford" / "in.npy").T[:STEPS, None].astype(np.int64)
    return (spikes_for(program, 3) * (spikes_for(program) == 1)).astype(np.int64)


@pytest.fixture(scope="module")
def in_netx(tmp_path_factory):
    """name -> (Program, x, what every layer did in netx), with one start of Lava for all."""
    folder, jobs, cases = tmp_path_factory.mktemp("nets"), [], {}
    for kind, make in PROGRAMS.items():
        program = make(np.random.default_rng(7))
        write_net(program, folder / f"{kind}.net")
        cases[kind] = (program, spikes_for(program), folder / f"{kind}.net")
    rng = np.random.default_rng(7)
    integrator = layer(shape=(4,), weight=even(rng, 4, 6), neuron=False)
    first = layer(shape=(6,), weight=even(rng, 6, 9), neuron__vThMant=60, bias=np.arange(6))
    path = write(folder / "integrator.net", first, integrator)
    cases["integrator"] = (read_program(path), spikes_for(read_program(path)), path)
    data = Path(os.environ.get("RANVIER_DATA", "")) / "lava"
    for name in STORED if (data / "tiny").exists() else ():
        program = read_program(data / f"{name}.net")
        cases[name] = (program, stored_input(name, program, data), data / f"{name}.net")
    for name, (program, x, path) in cases.items():
        starts_at_once = name.startswith("tiny")  # its input comes in as a bias
        jobs.append(
            {
                "path": str(path),
                "x": x[:1, 0] if starts_at_once else x[:, 0],
                "steps": STEPS + 8,
                "reset_interval": 10**6,
                "reset_offset": 0 if starts_at_once else 1,
                "message_bits": 8 if program.input.hi > 1 else 0,
            }
        )
    made = run_guarded(f"{netx_targets.__file__}:run_nets", {"jobs": jobs}, timeout_s=300)["runs"]
    return {n: (c[0], c[1], run) for (n, c), run in zip(cases.items(), made, strict=True)}


@pytest.mark.lava
@needs_netx
@pytest.mark.parametrize("name", [*PROGRAMS, "integrator", *STORED])
def test_runs_spike_identical_in_netx(name, in_netx):
    """Files that we wrote, and files that lava-dl wrote: every spike and v of every layer."""
    if name not in in_netx:
        pytest.skip("RANVIER_DATA holds no folder lava")
    program, x, run = in_netx[name]
    expected = run_reference(program, x)
    neurons = [p.name for p in program if p.cell is not None]
    first = 0 if name.startswith("tiny") else 1
    for k, population in enumerate(neurons):
        window = slice(k + first, k + first + STEPS)
        # The last layer of "integrator" never fires; its v is what is read.
        seen = expected.v if (name, k) == ("integrator", 1) else expected.sent
        assert seen[population].any(), population
        np.testing.assert_array_equal(run["sent"][k][window], expected.sent[population][:, 0])
        np.testing.assert_array_equal(run["v"][k][window], expected.v[population][:, 0])
    assert len(run["sent"]) == len(neurons)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_written_file_reads_back(kind, rng, tmp_path):
    program = PROGRAMS[kind](rng)
    x = rng.integers(program.input.lo, program.input.hi + 1, (25, 2, *program.input.shape))
    write_net(program, tmp_path / "n.net")
    back = read_program(tmp_path / "n.net")
    a, b = run_reference(program, x), run_reference(back, x)
    neurons = [p.name for p in program if p.cell is not None]
    for mine, read in zip(neurons, [p.name for p in back if p.cell is not None], strict=True):
        np.testing.assert_array_equal(a.sent[mine], b.sent[read])
        np.testing.assert_array_equal(a.v[mine], b.v[read])
    assert back.steps == program.steps


# Files that lava-dl wrote


def test_stored_files_read(data_file):
    shapes = {
        ("tiny", "tiny.net"): [(3, 16, 16), (3, 16, 16), (24, 6, 6), (36, 1, 1)],
        ("mnist_mlp", "trained_mnist_network.net"): [(784,), (128,), (64,), (10,)],
        ("oxford", "network.net"): [(200,), (256,), (200,)],
    }
    for parts, expected in shapes.items():
        path = data_file("lava", *parts)
        assert [p.shape for p in read_program(path)] == expected
        assert [n.name for n in read_net(path).populations] == [
            f"layer{k}" for k in range(len(expected) - 1)
        ]
    assert read_program(data_file("lava", "tiny", "tiny.net")).steps == 64


def test_oxford_ground_truth(data_file):
    """The stored spikes of its first layer, 256 neurons over 2,000 steps, to the last one."""
    program = read_program(data_file("lava", "oxford", "network.net"))
    x = np.load(data_file("lava", "oxford", "in.npy")).T[:, None].astype(np.int64)
    truth = np.load(data_file("lava", "oxford", "out.npy")).T
    run = run_reference(program, x)
    np.testing.assert_array_equal(run.sent["layer0"][:-1, 0], truth[1:])  # one synapse later
    # The picture that it was trained towards (neuron, -, step), two synapses later. Training did
    # not reach it: of its 10,178 spikes, 7,867 come at the very step.
    neuron, _, step = np.load(data_file("lava", "oxford", "ground_truth.npy")).astype(int).T
    wanted = np.zeros_like(run.sent["layer1"][:, 0])
    wanted[step, neuron] = 1
    assert (run.sent["layer1"][:-2, 0] * wanted[2:]).sum() > 0.75 * wanted.sum()


@pytest.mark.lava
@needs_netx
def test_applied_weights_are_those_of_netx():
    rng, pairs = np.random.default_rng(3), []
    for k in range(300):
        low, high = [(-128, 128), (-256, 255), (0, 256), (-255, 1), (-20, 300), (-256, 0)][k % 6]
        whole = rng.integers(low, high, (3, 4)) * 2 ** int(
            rng.integers(0, 2 if abs(high) < 130 else 1)
        )
        whole = np.where(rng.random(whole.shape) < 0.3, 0, whole)
        pairs.append((whole[:, : (4 if k % 4 else 2)], whole))
    pairs = [(p, w) for p, w in pairs if w.any()]
    target = f"{netx_targets.__file__}:dense_weights"
    made = run_guarded(target, {"pairs": pairs}, timeout_s=120)["applied"]
    refused = 0
    for (part, whole), expected in zip(pairs, made, strict=True):
        found = applied_weights(part, whole)
        refused += found is None
        if found is not None:  # where it is None, netx may still run: it is refused all the same
            np.testing.assert_array_equal(found, expected)
    assert refused < len(pairs) / 2


# What is refused, naming the layer


def layer(kind="dense", shape=(3,), weight=((2, -2), (4, 0), (0, 6)), neuron=True, **more):
    fields = {"type": kind, "shape": np.array(shape)}
    fields |= {} if weight is None else {"weight": np.asarray(weight)}
    if neuron:
        fields |= {
            "neuron/type": "CUBA",
            "neuron/iDecay": 4096,
            "neuron/vDecay": 0,
            "neuron/vThMant": 9,
        }
    return fields | {key.replace("__", "/"): value for key, value in more.items()}


def write(path, *layers):
    with h5py.File(path, "w") as file:
        for i, fields in enumerate(layers):
            for key, value in fields.items():
                if key == "type":
                    file.create_dataset(f"layer/{i}/type", (1,), "S10", [value.encode()])
                else:
                    file[f"layer/{i}/{key}"] = value
    return path


KERNEL = np.ones((2, 1, 2, 2))
IMAGE = {"type": "input", "shape": np.array([1, 4, 4])}
CONV = layer("conv", (2, 3, 3), KERNEL, stride=1, padding=0, dilation=1, groups=1)
REFUSED = {
    "pool": ([layer(), layer("pool")], "layer 1 .pool.: netx has no process"),
    "unknown": ([layer("residual")], "layer 0 .residual.: netx skips it"),
    "refractory": ([layer(neuron__refDelay=3)], "layer 0 .* ignores refDelay = 3"),
    "weight exponent": ([layer(neuron__wgtExp=2)], "layer 0 .* ignores wgtExp"),
    "SDNN": ([layer(neuron=False, neuron__type="SDNN")], "layer 0 .*'SDNN'"),
    "conv delay": ([IMAGE, CONV | {"delay": 3}], "layer 1 .* ignores the delay"),
    "conv without input": ([CONV], "layer 0 .* input is unknown"),
    "recurrent delay": (
        [layer("dense_rec", (2,), ((2, 4), (6, 8)), weight_rec=np.eye(2), delay=1)],
        "layer 0 .* with delays",
    ),
    "big conv weight": ([IMAGE, CONV | {"weight": 300 * KERNEL}], "layer 1 .* 300"),
    "complex": ([layer(weight=None, weight__real=np.eye(3), weight__imag=np.eye(3))], "complex"),
    "no threshold": ([layer(neuron=False), layer(weight=np.eye(3))], "layer 0 .*nothing follows"),
}  # fmt: skip
MALFORMED = {
    "inputs": ([layer(), layer(weight=((2, 2), (2, 2), (2, 2)))], "layer 1 .* takes 2 inputs"),
    "no flatten": ([IMAGE, CONV, layer(weight=np.ones((3, 18)))], "layer 2 .* 'flatten'"),
    "shape": ([IMAGE, CONV | {"shape": np.array([2, 9, 9])}], "layer 1 .* its shape is"),
    "groups": ([IMAGE, CONV | {"groups": 3}], "layer 1 .* groups"),
    "stride": ([IMAGE, CONV | {"stride": 0}], "layer 1 .* 'stride'"),
    "nan": ([layer(weight=np.full((3, 2), np.nan))], "layer 0 .* no chip takes"),
    "huge": ([{"type": "input", "shape": np.array([10**6] * 3)}], "layer 0 .* neurons"),
    "rank": ([layer(weight=np.ones((3, 2, 2)))], "layer 0 .* is .3, 2, 2."),
    "bias": ([layer(bias=np.ones(7))], "layer 0 .* 'bias'"),
    "delay": ([layer(delay=np.ones(9))], "layer 0 .* 'delay'"),
    "negative delay": ([layer(delay=-1)], "layer 0 .* negative"),
    "no weight": ([layer(weight=None)], "layer 0 .* 'weight' is missing"),
    "no type": ([{"shape": np.array([3])}], "layer 0: 'type' is missing"),
    "decay": ([layer() | {"neuron/iDecay": 5000}], "layer 0 .* iDecay"),
    "words": ([layer(weight=b"heavy")], "layer 0 .* plain numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_netx_cannot_do_is_refused_by_layer(case, tmp_path):
    layers, reason = REFUSED[case]
    for read in (read_program, read_net):
        with pytest.raises(UnsupportedError, match=reason):
            read(write(tmp_path / "n.net", *layers))


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_named(case, tmp_path):
    layers, reason = MALFORMED[case]
    with pytest.raises(RanvierError, match=f"n.net.*{reason}"):
        read_program(write(tmp_path / "n.net", *layers))


def test_a_sound_file_of_these_parts_reads(tmp_path):
    """The control of the two tests above: the same parts without the fault."""
    flat = {"type": "flatten", "shape": np.array([18, 1, 1])}
    path = write(tmp_path / "n.net", IMAGE, CONV, flat, layer(weight=np.ones((3, 18)), delay=2))
    assert [p.shape for p in read_program(path)] == [(1, 4, 4), (2, 3, 3), (3,)]


def test_other_files(tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        read_program(tmp_path / "none.net")
    (tmp_path / "text.net").write_text("hello")
    with pytest.raises(FormatError, match="no HDF5"):
        read_program(tmp_path / "text.net")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(FormatError, match="no group 'layer'"):
        read_net(tmp_path / "other.h5")


def test_words_about_the_file_are_kept_and_lists_passed_over(tmp_path):
    path = write(tmp_path / "n.net", layer())
    with h5py.File(path, "a") as file:
        file.attrs["author"] = "somebody"
        file.attrs["names"] = ["a", "b"]
        file.attrs["ragged"] = np.array([np.arange(2), np.arange(3)], object).astype(
            h5py.vlen_dtype(np.int32)
        )
    said = read_layers(path).attributes
    assert said["author"] == "somebody" and not {"names", "ragged"} & set(said)


def test_links_out_of_the_file_are_not_followed(tmp_path):
    secret = write(tmp_path / "secret.net", layer())
    path = write(tmp_path / "n.net", layer(weight=None))
    with h5py.File(path, "a") as file:
        file["layer/0/weight"] = h5py.ExternalLink(str(secret), "/layer/0/weight")
    with pytest.raises(FormatError, match="points out of the file"):
        read_program(path)


def test_cut_and_flipped_files_raise_nothing_else(tmp_path):
    whole = write(tmp_path / "n.net", IMAGE, CONV).read_bytes()
    rng, broken = np.random.default_rng(0), tmp_path / "broken.net"
    for k in range(60):
        data = bytearray(whole)
        if k % 2:
            data = data[: int(rng.integers(0, len(data)))]
        else:
            data[int(rng.integers(0, len(data)))] ^= 1 << int(rng.integers(0, 8))
        broken.write_bytes(data)
        try:
            read_program(broken)
        except RanvierError as error:
            assert "broken.net" in str(error)


# What write_net refuses


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reset": "subtract"}, "'b' is no neuron of netx .subtractive reset"),
        ({"strict": False}, "'b' is no neuron of netx .fires at the threshold"),
        ({"kind": "relay"}, "'b' is no neuron of netx .is a relay|'b' is no neuron"),
        ({"bias_mant": 1}, "'b' has a bias that is no multiple"),
    ],
)
def test_write_refuses_other_neurons(change, reason, tmp_path):
    matrix = DenseMap(weight=np.full((2, 3), 2, np.int16))
    program = chain(("a", Cell(vth=1), matrix, {}), ("b", Cell(**change), OneToOne(
        weight=np.array(2, np.int16), shape=(2,)), {}), shape=(3,))  # fmt: skip
    with pytest.raises(UnsupportedError, match=reason):
        write_net(program, tmp_path / "n.net")
    assert not list(tmp_path.iterdir())


def test_write_refuses_a_skip_and_weights_that_netx_changes(tmp_path, rng):
    program = dense_chain(rng)
    skip = Projection(name="skip", source="a", target="c", map=DenseMap(weight=even(rng, 5, 9)))
    joined = program.with_parts(projections={**program.projections, "skip": skip})
    with pytest.raises(UnsupportedError, match="'a' feeds b and c; netx is a chain"):
        write_net(joined, tmp_path / "n.net")
    large = DenseMap(weight=np.full((2, 3), 200, np.int16))
    odd = chain(("a", Cell(vth=1), large, {"exponent": 1}), shape=(3,))
    with pytest.raises(UnsupportedError, match="'>a' has weights 400..400"):
        write_net(odd, tmp_path / "n.net")


def test_a_file_without_decay_is_the_same_network_in_floats(tmp_path, rng):
    """Where nothing is rounded, the float Graph of a file and its Program fire alike."""
    cell = Cell(du=4095, dv=0, vth=70, bias_mant=3, bias_exp=6)
    program = chain(
        ("a", cell, DenseMap(weight=even(rng, 6, 8)), {}),
        ("b", cell, DenseMap(weight=even(rng, 4, 6)), {"lag": 2}),
        shape=(8,),
    )
    write_net(program, tmp_path / "n.net")
    x = rng.integers(0, 2, (20, 3, 8))
    spikes = run_reference(align(program), x).sent["b"]
    assert spikes.any()
    np.testing.assert_array_equal(read_net(tmp_path / "n.net").run(x.astype(np.float64)), spikes)
