"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

WHERE = "where data sets lie (default: RANVIER_DATA)"

Target = Annotated[Path, typer.Argument(help="a run folder, or a file")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", "--data", help=WHERE)]
Limit = Annotated[int | None, typer.Option(help="samples at most")]
Chip = Annotated[str, typer.Option(help="loihi1 or loihi2")]
