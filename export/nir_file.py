"""The border to NIR: `read_nir` and `write_nir`. What each tool's words mean is in `nir_nodes` and
`nir_write`.

    python -m ranvier.export.nir_file FILES...     says of each file whether it loads, or why not
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

from ranvier.export import nir_own, nir_raw
from ranvier.export.graph import Graph
from ranvier.export.nir_fields import Context
from ranvier.export.nir_read import decode
from ranvier.export.nir_words import DEFAULT_DT
from ranvier.export.nir_write import encode
from ranvier.train.errors import FormatError, RangeError, RanvierError, expect


def read_nir(
    path: str | os.PathLike[str],
    *,
    dt: float = DEFAULT_DT,
    steps: int | None = None,
    decay: Literal["euler", "exponential"] = "euler",
) -> Graph:
    """The Graph in a NIR file.

    A file that `write_nir` wrote comes back structurally equal: exact decays, resets, names and
    all. Another tool's file is in seconds; it is discretised with steps of `dt` (see `nir_nodes`),
    a spike resets to v_reset and needs v > v_threshold, and what was migrated from an old dialect
    is noted in `graph.meta["nir"]["notes"]`.

    dt     seconds a step, for files that do not say
    steps  the number of time steps, if the file does not say
    decay  euler: beta = 1 - dt/tau, as NIR's discrete tools do; exponential: beta = exp(-dt/tau)

    Raises FormatError where the file is damaged or not NIR, ShapeError where its parts do not fit,
    RangeError where a number is out of range, UnsupportedError where its meaning is not clear.
    """
    if not 0.0 < dt < 1e6:
        raise RangeError(f"nir: dt is {dt} s; it takes seconds above 0")
    if decay not in ("euler", "exponential"):
        raise RangeError(f"nir: decay '{decay}' is neither euler nor exponential")
    name = Path(path).name
    raw = nir_raw.load(path)
    try:
        graph = nir_own.rebuild(raw)
        if graph is None:
            graph = decode(raw, Context(dt=dt, decay=decay), steps)
    except RanvierError as error:
        raise type(error)(f"'{name}': {error}") from error
    except Exception as error:  # a file can hold anything; nothing in it may end in a traceback
        raise FormatError(
            f"'{name}': nir: cannot be read as a network ({type(error).__name__}: {error})"
        ) from error
    return graph if steps is None or graph.steps == steps else replace(graph, steps=steps)


def write_nir(graph: Graph, path: str | os.PathLike[str]) -> list[str]:
    """Writes the graph as NIR 1.0, atomically; returns what other tools will read differently.

    Every node is standard NIR where NIR has a word that means the same (spike logic as Threshold
    and Scale, normalization as a 1x1 convolution, a membrane without reset as LI and Threshold);
    reset by subtraction is written as the nearest neuron, and what has no equal gets a type that
    other tools refuse. The exact values travel in the nodes' metadata under `ranvier`.

    Raises UnsupportedError for what cannot be written, RanvierError where the folder cannot be.
    """
    expect(graph, Graph, "write_nir", "trace(net, sample) makes one of a module")
    raw, notes = encode(graph)
    nir_raw.store(path, raw)
    return notes


def survey(paths: list[str]) -> list[tuple[str, str]]:
    """(file, what became of it) for each NIR file."""
    rows = []
    for path in paths:
        try:
            graph = read_nir(path)
        except RanvierError as error:
            rows.append((Path(path).name, f"{type(error).__name__}: {error}"))
            continue
        notes = graph.meta.get("nir", {}).get("notes", [])
        text = f"loads: {len(graph.nodes)} nodes, {len(graph.populations)} populations"
        rows.append((Path(path).name, "; ".join([text, *notes])))
    return rows


def main(paths: list[str]) -> int:
    rows = survey(paths)
    for name, text in rows:
        print(f"{name}\n    {text}")
    loaded = sum(text.startswith("loads") for _, text in rows)
    print(f"{loaded} of {len(rows)} load")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
