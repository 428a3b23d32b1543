"""Runs the jobs of a folder through `suite.check` and writes the tally; see `suite.check_apart`.

A process of its own: where a compiled kernel ends it, the caller lives on and knows what ran.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

import suite


def main(folder: Path, lava: bool) -> None:
    faulthandler.enable(all_threads=False)

    def now(name: str, engine: str) -> None:
        (folder / "now").write_text(f"{name}\n{engine}")

    tally = suite.check(suite.read_jobs(folder), lava, now)
    part = folder / "tally.part"
    part.write_text(json.dumps(tally.to_data()))
    part.rename(folder / "tally.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "lava")
