"""Data sets: exact pixels, every file layout, and an error that says what is missing."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import tarfile

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from ranvier.train import load_dataset
from ranvier.train.data import IGNORE, resize_images
from ranvier.train.data_events import Events, decode_events, integrate, split_per_class
from ranvier.train.data_files import fetch, read_idx
from ranvier.train.errors import DataError, RangeError, UnsupportedError


def _images(n: int, *shape: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), dtype=np.uint8), rng.integers(0, 10, n, dtype=np.uint8)


def _write_npz(path, *shape: int):
    x, y = _images(7, *shape)
    x_test, y_test = _images(3, *shape, seed=1)
    np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return x, y


def _idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


# ---- digits


def test_digits_split_is_fixed_whole_and_stratified():
    train, test, both = (load_dataset("digits", split=s) for s in ("train", "test", "all"))
    assert train.x.shape == (1437, 1, 8, 8) and test.x.shape == (360, 1, 8, 8) and len(both) == 1797
    assert_array_equal(train.x * 16, (train.x * 16).round())  # exactly k/16
    assert train.y.dtype == torch.int64 and train.x.dtype == torch.float32
    share = test.y.bincount() / (test.y.bincount() + train.y.bincount())
    assert share.min() > 0.19 and share.max() < 0.21  # 360 of 1797 is 0.2003
    keys = lambda d: {x.numpy().tobytes() for x in d.x}  # noqa: E731
    assert keys(train) | keys(test) == keys(both)
    assert_array_equal(load_dataset("digits").y, train.y)


def test_limit_and_batches():
    data = load_dataset("digits", limit=10)
    assert len(data) == 10 and data.input_shape == (1, 8, 8) and data.steps is None
    x, y = data.batch(torch.tensor([3, 1]))
    assert_array_equal(x, data.x[[3, 1]])
    assert_array_equal(y, data.y[[3, 1]])


# ---- image files


@pytest.mark.parametrize("name, shape", [("mnist", (28, 28)), ("cifar10", (32, 32, 3))])
def test_npz_pixels_are_whole_255ths(tmp_path, name, shape):
    x, y = _write_npz(tmp_path / f"{name}.npz", *shape)
    data = load_dataset(name, tmp_path)
    first = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    assert_array_equal((data.x.numpy() * 255).round().astype(np.uint8), first)
    assert_array_equal(data.x.numpy(), first.astype(np.float32) / np.float32(255))
    assert_array_equal(data.y, y)
    assert len(load_dataset(name, tmp_path, "all")) == 10


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_in_torchvisions_layout(tmp_path, zipped, monkeypatch):
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    x, y = _images(5, 28, 28)
    for part in ("train", "t10k"):
        for name, array in ((f"{part}-images-idx3-ubyte", x), (f"{part}-labels-idx1-ubyte", y)):
            content = _idx(array)
            path = folder / (f"{name}.gz" if zipped else name)
            path.write_bytes(gzip.compress(content) if zipped else content)
    monkeypatch.setenv("RANVIER_DATA", str(tmp_path))
    data = load_dataset("mnist", split="test")
    assert_array_equal((data.x[:, 0] * 255).round(), x)
    assert_array_equal(data.y, y)


def test_a_cut_or_foreign_idx_file_is_refused(tmp_path):
    path = tmp_path / "cut"
    path.write_bytes(_idx(np.zeros((3, 4), np.uint8))[:-1])
    with pytest.raises(DataError, match=r"cut' holds 11 bytes, but its header says \[3, 4\]"):
        read_idx(path)
    path.write_bytes(b"hello")
    with pytest.raises(DataError, match="is no idx file"):
        read_idx(path)


def _cifar_batches(folder, content):
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def test_cifar_batches(tmp_path):
    x, y = _images(4, 3, 32, 32)
    _cifar_batches(
        tmp_path / "cifar-10-batches-py", {b"data": x.reshape(4, -1), b"labels": y.tolist()}
    )
    data = load_dataset("cifar10", tmp_path)
    assert data.x.shape == (20, 3, 32, 32)
    assert_array_equal((data.x[:4] * 255).round(), x)
    assert_array_equal(data.y[:4], y)


class _Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    _cifar_batches(tmp_path / "cifar-10-batches-py", {b"data": _Evil(), b"labels": []})
    with pytest.raises(DataError, match=r"cannot be read as a CIFAR batch.*exec"):
        load_dataset("cifar10", tmp_path)


def test_missing_data_says_where_what_and_how(tmp_path, monkeypatch):
    monkeypatch.delenv("RANVIER_DATA", raising=False)
    with pytest.raises(DataError, match="no folder was given.*RANVIER_DATA.*mnist.npz"):
        load_dataset("mnist")
    with pytest.raises(DataError) as error:
        load_dataset("mnist", tmp_path)
    for part in (str(tmp_path), "mnist.npz", "x_train", "MNIST/raw", "--download", "digits"):
        assert part in str(error.value)
    with pytest.raises(DataError, match="does not exist"):
        load_dataset("cifar10", tmp_path / "nowhere")
    with pytest.raises(DataError, match="there is no set 'minst'"):
        load_dataset("minst")
    with pytest.raises(DataError, match="looked in.*nmnist.npz"):
        load_dataset("nmnist", tmp_path)
    with pytest.raises(DataError, match="QTDB_train.mat"):
        load_dataset("ecg", tmp_path)


@pytest.mark.parametrize(
    "content, match",
    [
        (b"no npz", "cannot be read as npz"),
        (None, "damaged|cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_a_damaged_npz_is_named(tmp_path, content, match):
    path = tmp_path / "mnist.npz"
    if content is None:
        _write_npz(path, 28, 28)
        content = path.read_bytes()[:-200]
    path.write_bytes(content)
    with pytest.raises(DataError, match=match):
        load_dataset("mnist", tmp_path)


def test_an_npz_without_the_arrays_or_of_floats_is_refused(tmp_path):
    np.savez(tmp_path / "mnist.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="no array.*x_train.*wanted x_train, y_train"):
        load_dataset("mnist", tmp_path)
    x, y = np.zeros((2, 28, 28)), np.zeros(2, np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y)
    with pytest.raises(DataError, match="images of float64.*wanted uint8"):
        load_dataset("mnist", tmp_path)
    np.savez(tmp_path / "mnist.npz", x_train=x.astype(np.uint8), y_train=y[:1])
    with pytest.raises(DataError, match="2 images and 1 labels"):
        load_dataset("mnist", tmp_path)


def test_fetch_checks_the_checksum(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"content")
    good = hashlib.md5(b"content").hexdigest()
    path = fetch(source.as_uri(), tmp_path / "folder" / "copy", good)
    assert path.read_bytes() == b"content"
    source.unlink()
    assert fetch(source.as_uri(), path, good) == path  # there already: not fetched again
    with pytest.raises(DataError, match="cannot download"):
        fetch(source.as_uri(), tmp_path / "other", good)
    source.write_bytes(b"another")
    with pytest.raises(DataError, match="not " + good):
        fetch(source.as_uri(), tmp_path / "other", good)
    assert not (tmp_path / "other").exists()


def test_download_unpacks_the_archive(tmp_path, monkeypatch):
    from ranvier.train import data_files

    x, y = _images(2, 3, 32, 32)
    remote = tmp_path / "remote"
    remote.mkdir()
    _cifar_batches(
        remote / "cifar-10-batches-py", {b"data": x.reshape(2, -1), b"labels": y.tolist()}
    )
    with tarfile.open(remote / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(remote / "cifar-10-batches-py", "cifar-10-batches-py")
    md5 = hashlib.md5((remote / "cifar-10-python.tar.gz").read_bytes()).hexdigest()
    source = (remote.as_uri() + "/", {"cifar-10-python.tar.gz": md5})
    monkeypatch.setitem(data_files._SOURCES, "cifar10", source)
    data = load_dataset("cifar10", tmp_path / "data", "test", download=True)
    assert_array_equal((data.x * 255).round(), x)


def test_size_pads_exactly_and_averages_to_255ths():
    x = torch.arange(28 * 28).reshape(1, 1, 28, 28).remainder(256) / 255
    padded = resize_images(x, 32)
    assert padded.shape == (1, 1, 32, 32)
    assert_array_equal(padded[..., 2:30, 2:30], x)
    assert padded.count_nonzero() == x.count_nonzero()
    small = resize_images(x, 14)
    assert_array_equal(small, (small * 255).round() / 255)
    blocks = x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert (small - blocks).abs().max() <= 0.5 / 255 + 1e-6  # half a 255th of rounding
    with pytest.raises(RangeError, match="size is 0"):
        resize_images(x, 0)


# ---- encodings


def test_rate_code_spikes_with_the_pixels_probability():
    data = load_dataset("digits", limit=50, encoding="rate", steps=400)
    assert data.x.shape == (50, 400, 1, 8, 8) and data.x.dtype == torch.uint8 and data.timed
    p = load_dataset("digits", limit=50).x
    error = (data.x.float().mean(1) - p).abs()
    assert error.max() < 5 * 0.5 / 400**0.5  # five standard deviations of the widest binomial
    assert_array_equal(data.x, load_dataset("digits", limit=50, encoding="rate", steps=400).x)
    other = load_dataset("digits", limit=50, encoding="rate", steps=400, seed=1)
    assert (other.x != data.x).any()


def test_encoding_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    load_dataset("digits", limit=5, encoding="rate", steps=3)
    assert_array_equal(torch.rand(3), first)


def test_latency_code_gives_one_spike_and_bright_pixels_first():
    data = load_dataset("digits", limit=20, encoding="latency", steps=8)
    x = load_dataset("digits", limit=20).x
    counts = data.x.sum(1)
    assert_array_equal(counts, (x > 0).int())
    times = data.x.float().argmax(1)
    assert times[x == 1].max() == 0 and times[x == 0.0625].min() >= 6


def test_encodings_that_do_not_fit_are_refused():
    with pytest.raises(UnsupportedError, match="no encoding 'morse'"):
        load_dataset("digits", encoding="morse")
    with pytest.raises(UnsupportedError, match="delta code needs a time axis"):
        load_dataset("digits", encoding="delta")
    with pytest.raises(RangeError, match="needs steps=1 or more"):
        load_dataset("digits", encoding="rate")


def test_delta_code_marks_rises_and_falls():
    from ranvier.train.data import Dataset
    from ranvier.train.encode import encode

    x = torch.tensor([0.0, 0.5, 0.5, 0.45, 0.0, 1.0]).reshape(1, 6, 1, 1, 1)
    data = encode(Dataset(x, torch.zeros(1, dtype=torch.int64), 2, "toy", timed=True), "delta")
    assert_array_equal(data.x.flatten(), [0, 1, 0, 0, -1, 1])


# ---- events


def _events(n: int, size: int, seed: int = 0) -> Events:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, size, (2, n))
    return Events(x, y, rng.integers(0, 2, n), np.sort(rng.integers(0, 10**6, n)))


@pytest.mark.parametrize("bins", ["number", "time"])
@pytest.mark.parametrize("size", [None, 8, 16, 17, 40])
def test_frames_lose_no_event(bins, size):
    frames = integrate(_events(1001, 34), 7, 34, 34, size=size, bins=bins)
    assert frames.sum() == 1001 and frames.shape == (7, 2, size or 34, size or 34)


def test_frames_by_number_hold_equally_many_and_by_time_what_fell_into_them():
    events = _events(1000, 34)
    by_number = integrate(events, 8, 34, 34).sum((1, 2, 3))
    assert_array_equal(by_number, 125)
    by_time = integrate(events, 8, 34, 34, bins="time").sum((1, 2, 3))
    edges = np.linspace(0, events.t[-1] - events.t[0] + 1, 9)
    assert_array_equal(by_time, np.histogram(events.t - events.t[0], edges)[0])


def test_frames_put_events_where_they_were():
    one = Events(*(np.array([v]) for v in (5, 9, 1, 77)))
    frames = integrate(one, 3, 34, 34)
    assert frames[0, 1, 9, 5] == 1 and frames.sum() == 1
    assert integrate(one, 3, 34, 34, size=17)[0, 1, 4, 2] == 1
    assert integrate(Events(*[np.zeros(0, int)] * 4), 3, 34, 34).sum() == 0


def test_decode_events_reads_the_five_bytes():
    events = decode_events(np.array([[3, 4, 0x80 | 1, 2, 3], [0, 33, 0x7F, 255, 255]], np.uint8))
    assert_array_equal(events.polarity, [1, 0])
    assert_array_equal(events.t, [(1 << 16) | (2 << 8) | 3, 2**23 - 1])
    assert_array_equal(events.x, [3, 0])


def test_split_per_class_is_whole():
    targets = np.repeat([3, 1, 2], 20)
    train, test = split_per_class(targets, "train"), split_per_class(targets, "test")
    assert len(train) == 54 and len(test) == 6
    assert sorted([*train, *test]) == list(range(60))


def test_tonic_sets_are_not_downloaded_unasked(tmp_path):
    pytest.importorskip("tonic")
    with pytest.raises(DataError, match="'shd' is missing.*SHD/.*--download"):
        load_dataset("shd", tmp_path)


def test_tonics_recordings_become_frames(tmp_path, monkeypatch):
    """A stand-in of tonic's form: structured events and named classes."""
    datasets = pytest.importorskip("tonic.datasets")

    class NCALTECH101:
        targets = ["cat"] * 10 + ["ant"] * 10

        def __init__(self, folder):
            self.folder = folder

        def __len__(self):
            return 20

        def __getitem__(self, i):
            kind = np.dtype([("x", int), ("y", int), ("t", int), ("p", int)])
            return np.array([(i, 1, 0, 0), (i, 2, 5, 1), (239, 179, 9, 1)], kind), self.targets[i]

    monkeypatch.setattr(datasets, "NCALTECH101", NCALTECH101)
    data = load_dataset("ncaltech101", tmp_path, steps=3, size=48)
    assert data.x.shape == (18, 3, 2, 48, 48) and data.x.sum() == 18 * 3
    assert sorted(set(data.y.tolist())) == [0, 1] and data.y[0] == 1  # cat after ant
    assert data.x[:, 2, 1, 47, 47].sum() == 18


# ---- the real files


def test_real_mnist(data_file):
    data_file("mnist.npz")
    train, test = load_dataset("mnist"), load_dataset("mnist", split="test", size=32)
    assert train.x.shape == (60000, 1, 28, 28) and test.x.shape == (10000, 1, 32, 32)
    assert_array_equal(test.y.bincount(), [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009])
    assert round(float((train.x.double() * 255).mean()), 4) == 33.3184  # the set's known mean


def test_real_nmnist(data_file):
    data_file("nmnist")
    data = load_dataset("nmnist", split="test", steps=5, bins="time")
    assert data.x.shape == (100, 5, 2, 34, 34) and data.timed and data.steps == 5
    with np.load(data_file("nmnist", "nmnist.npz")) as file:
        n = np.diff(file["offsets"])[file["is_test"]]
    assert_array_equal(data.x.sum((1, 2, 3, 4)), n)


def test_real_gestures_have_no_test_split(data_file):
    data_file("dvs_gesture")
    assert load_dataset("dvs_gesture", steps=4, size=32).x.shape == (10, 4, 2, 32, 32)
    with pytest.raises(DataError, match="no test split"):
        load_dataset("dvs_gesture", split="test")


def test_real_ecg_has_a_label_a_step(data_file):
    data_file("ecg")
    data = load_dataset("ecg", split="test")
    assert data.x.shape == (141, 1301, 4, 1, 1) and data.y.shape == (141, 1301) and data.per_step
    assert set(data.y.unique().tolist()) <= {IGNORE, 0, 1, 2, 3, 4, 5}
    x, y = data.batch(slice(0, 3))
    assert x.shape == (1301, 3, 4, 1, 1) and y.shape == (1301, 3)
