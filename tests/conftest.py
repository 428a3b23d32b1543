"""What every test may ask for: the user's data, and a reason to skip where something is missing."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from ranvier.deploy.lava_compat import available

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of data sets named by RANVIER_DATA: <name>.npz, nir/, lava/, nmnist/ and so on."""
    folder = os.environ.get("RANVIER_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("RANVIER_DATA names no folder of data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def data_file(data_dir):
    """A function: the path of a file or folder below RANVIER_DATA, or a skip that names it.

    data_file("mnist.npz"), data_file("nir"), data_file("lava", "tiny", "tiny.net")
    """

    def find(*parts: str) -> Path:
        path = data_dir.joinpath(*parts)
        if not path.exists():
            pytest.skip(f"{Path(*parts)} is not in RANVIER_DATA")
        return path

    return find


@pytest.fixture
def golden(request):
    """A function: golden(name, text) holds `text` against tests/golden/<name>.

    `make golden` (pytest --golden) writes the files anew instead; the difference is then read in
    git. A missing file is a failure, so that a test can't pass by having lost it.
    """

    def check(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert file.exists(), f"{file} is missing; `make golden` writes it"
        assert text == file.read_text(encoding="utf-8"), f"differs from {file}"

    return check


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write the golden files anew")


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each of several workers, so that they do not wait for each other."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {"lava": available, "gpu": _no_gpu}
    for marker, reason_of in reasons.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := reason_of()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def _no_gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"
