"""What the commands print: rows as a table, or as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

UPRIGHT = 12  # columns that a line of a terminal can still hold


def show(rows: list[dict[str, Any]], as_json: bool, title: str = "") -> None:
    """Prints rows as a table, or as JSON; a single row of many columns stands upright."""
    if as_json:
        print(json.dumps(rows, indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    if len(rows) == 1 and len(rows[0]) > UPRIGHT:
        widest = max(map(len, rows[0]))
        print("\n".join(f"{key:<{widest}}  {cell(value)}" for key, value in rows[0].items()))
        return

    table = Table(title=title or None, title_justify="left")
    for key in rows[0] if rows else ():
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(cell(v) for v in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
