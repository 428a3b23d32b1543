"""The README's Python runs as it stands, and names only commands that exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language ("" for those without one)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [body for said, body in found if said == language]


def test_the_python_block_runs_and_leaves_its_files(tmp_path: Path) -> None:
    (code,) = blocks(README.read_text(), "python")
    (tmp_path / "example.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "tensor" in done.stdout or "[" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} >= {"net.nir", "net.onnx", "net.h5"}


def test_every_command_in_the_readme_exists() -> None:
    from typer.main import get_command

    from ranvier.cli.app import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    shell = "\n".join(blocks(README.read_text(), ""))
    used = set(re.findall(r"^ranvier (\w+)", shell, re.M))
    assert len(used) >= 8 and used <= known, used - known
    assert "fly" not in known  # the control: an invented command would be found


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.M))
    used = set(re.findall(r"^make (\w+)", "\n".join(blocks(README.read_text(), "")), re.M))
    assert {"demo", "test", "lava"} <= used <= targets
