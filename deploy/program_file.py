"""Programs as HDF5 files: see `ranvier.export.documents`."""

from __future__ import annotations

import os
from typing import Any

from ranvier.deploy.cells import Cell
from ranvier.deploy.program import MAPS, VERSION, Population, Program, Projection, Readout
from ranvier.export.documents import (
    Arrays,
    fields_in,
    load_document,
    object_in,
    plain,
    save_document,
)
from ranvier.train.errors import FormatError

FORMAT = "ranvier-program"


def save(program: Program, path: str | os.PathLike[str]) -> None:
    """Writes `program` as HDF5, atomically; the file keeps its digest."""
    arrays: Arrays = {}
    document = {
        "program": {"steps": program.steps, "meta": plain(dict(program.meta), "meta", arrays)},
        "populations": [plain(p, p.name, arrays) for p in program.populations.values()],
        "projections": [plain(p, p.name, arrays) for p in program.projections.values()],
        "readout": plain(program.readout, "readout", arrays),
    }
    save_document(path, FORMAT, VERSION, document, arrays)


def load(path: str | os.PathLike[str]) -> Program:
    """The program in `path`.

    Raises FormatError, with the file and the reason, where it is missing, is no HDF5, is damaged,
    of another version, or holds anything but a program that `save` wrote.
    """
    program: Program = load_document(path, FORMAT, VERSION, _program_in)
    return program


def _program_in(document: Any, arrays: Arrays) -> Program:
    keys = ("program", "populations", "projections", "readout")
    if not isinstance(document, dict) or any(k not in document for k in keys):
        raise FormatError(f"its document lacks one of {', '.join(keys)}")
    skip = ("populations", "projections", "readout")
    head = fields_in(Program, document["program"], arrays, {}, "program", skip=skip)
    return Program(
        populations=_named(document["populations"], arrays, Population),
        projections=_named(document["projections"], arrays, Projection),
        readout=object_in(document["readout"], arrays, {"Readout": Readout}, "readout"),
        **head,
    )


def _named(items: Any, arrays: Arrays, cls: type[Any]) -> dict[str, Any]:
    if not isinstance(items, list):
        raise FormatError(f"its {cls.__name__}s are no list")
    classes = {cls.__name__: cls, "Cell": Cell, **MAPS}
    values = [object_in(item, arrays, classes, cls.__name__) for item in items]
    named = {v.name: v for v in values if isinstance(v, cls)}
    if len(named) != len(values):
        raise FormatError(f"two of its {cls.__name__}s bear one name")
    return named
