"""What is here, what is not, what each missing part switches off, and how to turn it on."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch snntorch numpy scipy numba nir onnx onnxruntime h5py lightning safetensors scikit-learn "
    "pydantic typer rich psutil lava-nc lava-dl tonic highspy torchvision"
).split()
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "firefox")


def collect(*, lava_run: bool = False) -> dict[str, Any]:
    """The state of this installation as plain data: versions, machine, parts.

    lava_run  also runs two Lava processes (1 to 3 s) and says whether they spike as they must
    `parts` is a list of {name, here, detail, without, turn_on}: `without` says what is switched off
    while the part is missing, `turn_on` the command that brings it; both are for a missing part.
    """
    return {
        "ranvier": _version("ranvier"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "parts": [_lava(lava_run), _netx(), _gpu(), _data(), *_extras(), _browser()],
    }


def show(report: dict[str, Any], console: Any = None) -> None:
    """Prints what `collect` returned as two tables on a rich Console; default: stdout."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    console.print(
        f"ranvier {report['ranvier']}, Python {report['python']}, {report['system']}, "
        f"{report['cpus']} CPUs\n[dim]{report['executable']}[/dim]"
    )
    packages = Table("package", "version", box=None, padding=(0, 3, 0, 0))
    for name, version in report["packages"].items():
        packages.add_row(name, version or "[dim]-[/dim]")
    parts = Table("part", "", "state", box=None, padding=(0, 3, 0, 0))
    for part in report["parts"]:
        parts.add_row(
            part["name"],
            "[green]yes[/green]" if part["here"] else "[yellow]no[/yellow]",
            _state(part),
        )
    console.print(packages, "", parts)


def _state(part: dict[str, Any]) -> str:
    from rich.markup import escape

    if part["here"]:
        return escape(part["detail"])
    lines = [part["detail"], f"off: {part['without']}", f"on:  {part['turn_on']}"]
    return escape("\n".join(line for line in lines if line))


def _part(name: str, here: bool, detail: str, without: str, turn_on: str) -> dict[str, Any]:
    return {"name": name, "here": here, "detail": detail, "without": without, "turn_on": turn_on}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _lava(run: bool) -> dict[str, Any]:
    from ranvier.deploy.lava_compat import INSTALL, available

    fault = available()
    detail = "installed (`ranvier doctor --lava-run` tries it)"
    if run and not fault:
        from ranvier.deploy.lava_probe import probe

        fault = probe()
        detail = "installed; two LIF populations ran and spiked as they must"
    part = _part("lava", not fault, fault or detail, "the engine 'lava' and its column", INSTALL)
    return {**part, "ran": bool(run and not fault)}


def _netx() -> dict[str, Any]:
    from ranvier.deploy.lava_compat import INSTALL, available

    fault = available(netx=True)
    without = "running a .net file in lava-dl's own netx (reading and writing .net needs no Lava)"
    return _part("netx", not fault, fault or "lava-dl's reader of .net files", without, INSTALL)


def _gpu() -> dict[str, Any]:
    without = "training and evaluation on the GPU, the fused Triton kernels"
    turn_on = "a CUDA build of torch, on a machine with an NVIDIA GPU"
    if importlib.util.find_spec("torch") is None:
        return _part("gpu", False, "torch is not installed", without, turn_on)
    import torch

    if not torch.cuda.is_available():
        return _part("gpu", False, f"torch {torch.__version__} sees none", without, turn_on)
    name = torch.cuda.get_device_name(0)
    return _part(
        "gpu", True, f"{torch.cuda.device_count()} x {name}, CUDA {torch.version.cuda}", "", ""
    )


def _data() -> dict[str, Any]:
    folder = os.environ.get("RANVIER_DATA")
    without = "every data set but 'digits'"
    turn_on = (
        "export RANVIER_DATA=DIR, or --data DIR; a set is DIR/<name>.npz or torchvision's layout"
    )
    if not folder:
        return _part("data", False, "RANVIER_DATA is not set", without, turn_on)
    if not Path(folder).is_dir():
        return _part("data", False, f"RANVIER_DATA is no folder: {folder}", without, turn_on)
    sets = sorted(file.stem for file in Path(folder).glob("*.npz"))
    return _part("data", True, f"{folder}: {', '.join(sets) or 'no .npz'}", without, turn_on)


def _extras() -> list[dict[str, Any]]:
    rows = (
        ("events", "tonic", "tonic's downloads of event data sets (--download)"),
        ("logs", "tensorboard", "TensorBoard files of a training (metrics.csv is always written)"),
        ("solver", "highspy", "placement by a solver; the greedy one works"),
        ("vision", "torchvision", "torchvision's augmentations in `train`"),
    )
    parts = []
    for extra, package, without in rows:
        version = _version(package)
        detail = f"{package} {version}" if version else f"{package} is not installed"
        turn_on = f"pip install -c constraints.txt -e '.[{extra}]'"
        parts.append(_part(extra, version is not None, detail, without, turn_on))
    return parts


def _browser() -> dict[str, Any]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    without = "tests that look at report.html as a browser draws it (the report itself needs none)"
    return _part("browser", found is not None, found or "", without, "apt-get install chromium")
