"""Image folders: found, decoded, subset, trained on, and refused where they are broken."""

import numpy as np
import pytest
import torch
from PIL import Image

from ranvier.train import create_model, evaluate, fit, load_dataset
from ranvier.train.errors import DataError, RangeError, UnsupportedError

COLORS = {"blue": (0, 0, 200), "green": (0, 180, 0), "red": (220, 10, 20)}


@pytest.fixture
def root(tmp_path):
    """A set 'colors': three classes of one color each, sizes that differ, one class without a test image."""
    for split, n in (("train", 6), ("val", 2)):
        for name, color in COLORS.items():
            if split == "val" and name == "green":
                continue
            folder = tmp_path / "colors" / split / name
            folder.mkdir(parents=True)
            for i in range(n):
                image = Image.new("RGB", (40 + 3 * i, 33 + 7 * (i % 2)), color)
                image.save(folder / (f"{i}.png" if i % 2 else f"{i}.bmp"))
            (folder / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_becomes_a_set(root):
    train, test = (
        load_dataset("colors", root, size=16),
        load_dataset("colors", root, "test", size=16),
    )
    assert (len(train), len(test), train.n_classes) == (18, 4, 3)
    assert train.classes == ("blue", "green", "red")
    assert test.y.tolist() == [0, 0, 2, 2]  # a class without a test image keeps its number
    x, y = train.batch(torch.tensor([0, 7, 17]))
    assert x.shape == (3, 3, 16, 16)
    assert x.dtype == torch.float32
    for image, label in zip(x, y, strict=True):
        color = np.float32(list(COLORS.values())[label]) / np.float32(255)
        np.testing.assert_array_equal(image.numpy(), np.tile(color[:, None, None], (1, 16, 16)))
    assert len(load_dataset("colors", root, "all", size=16)) == 22


def test_the_middle_is_cropped(tmp_path):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 16:48] = 255  # the middle square is white
    folder = tmp_path / "square" / "train" / "one"
    folder.mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "a.png")
    image = load_dataset("square", tmp_path, size=28).x[0]  # scaled to 32 x 64, then 28 x 28
    assert image.min() == 1.0


def test_a_subset_decodes_nothing(root, monkeypatch):
    data = load_dataset("colors", root, size=8)
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail("decoded"))
    part = data.subset(slice(6, 9)).subset(torch.tensor([2, 0]))
    assert part.y.tolist() == [1, 1]
    assert [p.stem for p in part.x.paths] == ["2", "0"]
    assert len(load_dataset("colors", root, limit=5)) == 5


def test_a_network_trains_on_a_folder(root):
    net = create_model("cnn", in_channels=3, num_classes=3, image_size=8, steps=2, layers=(4, 0))
    train, test = (load_dataset("colors", root, split, size=8) for split in ("train", "test"))
    result = fit(net, train, test, epochs=12, batch_size=6, lr=0.05, progress=False)
    assert result.metrics["accuracy"] == 1.0
    assert evaluate(net, test, batch_size=3)["accuracy"] == 1.0


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_absent_set_says_what_is_wanted(tmp_path, split):
    part = "train" if split == "train" else "val"
    with pytest.raises(DataError, match=f"imagenet/{part}/<class>/<image>"):
        load_dataset("imagenet", tmp_path, split)


def test_broken_images_and_bad_options(root):
    path = root / "colors" / "train" / "blue" / "0.bmp"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"0\.bmp"):
        load_dataset("colors", root, size=8).batch(slice(0, 2))
    with pytest.raises(UnsupportedError, match="direct"):
        load_dataset("colors", root, encoding="rate", steps=4)
    with pytest.raises(RangeError, match="size"):
        load_dataset("colors", root, size=0)
    with pytest.raises(DataError, match="there is no set 'shapes'"):
        load_dataset("shapes", root)
    (root / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="no image"):
        load_dataset("empty", root)
