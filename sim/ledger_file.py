"""Ledgers as files (JSON, HDF5) and tables (pandas), and traces as NIR data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ranvier.export.documents import content_digest
from ranvier.export.hdf5_guard import attribute, check_heaps, numbers
from ranvier.sim.ledger import Ledger, Trace
from ranvier.train.errors import FormatError, UnsupportedError
from ranvier.train.files import atomic_write, write_text

if TYPE_CHECKING:
    import h5py
    import nir
    import pandas

FORMAT = "ranvier-ledger"
VERSION = 1  # of the JSON
HDF5_VERSION = 2  # 1 had no digest
JSON, HDF5 = (".json",), (".h5", ".hdf5")

Groups: TypeAlias = "dict[str, tuple[str, dict[str, np.ndarray]]]"  # place -> name and counts


def save(ledger: Ledger, path: str | os.PathLike[str]) -> None:
    """Writes JSON (counts by step) or HDF5 (those, and counts by neuron), by the suffix of `path`.

    Raises FormatError for another suffix, RanvierError where it cannot be written.
    """
    suffix = Path(path).suffix
    if suffix in JSON:
        content = {"format": FORMAT, "version": VERSION, **ledger.to_dict()}
        write_text(path, json.dumps(content) + "\n")
    elif suffix in HDF5:
        _save_hdf5(ledger, path)
    else:
        raise FormatError(
            f"ledger: '{path}' ends in '{suffix}'; {', '.join(JSON + HDF5)} are written"
        )


def load(path: str | os.PathLike[str]) -> Ledger:
    """The ledger in a file of `save`.

    Raises FormatError where it holds none, or one of another version.
    """
    try:
        if Path(path).suffix in JSON:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            _check(content, VERSION)
            return Ledger.from_dict(content)
        return _load_hdf5(path)
    except FormatError as error:
        raise FormatError(f"ledger: '{path}': {error}") from error
    except Exception as error:  # h5py and json raise many kinds on damaged files
        raise FormatError(f"ledger: '{path}' is not a ledger: {error}") from error


def _check(content: Mapping[str, Any], version: int) -> None:
    if content.get("format") != FORMAT:
        raise FormatError("it is not a ledger")
    if content.get("version") != version:
        raise FormatError(f"it has version {content.get('version')}; this one reads {version}")


def _save_hdf5(ledger: Ledger, path: str | os.PathLike[str]) -> None:
    import h5py

    with atomic_write(path) as part, h5py.File(part, "w") as file:
        write_into(file, ledger)


def write_into(file: h5py.Group, ledger: Ledger) -> None:
    """Writes the ledger into an open HDF5 file or group, with a digest over all of it."""
    kept = ("sizes", "inputs", "payload_bits")
    plain = json.dumps({k: v for k, v in ledger.to_dict().items() if k in kept})
    groups = {
        f"{kind}/{i}": (name, dict(counts))
        for kind in ("populations", "projections")
        for i, (name, counts) in enumerate(getattr(ledger, kind).items())
    }
    for i, (name, counts) in enumerate(ledger.neurons.items()):
        groups[f"neurons/{i}"] = (name, {"n_spikes": counts})
    for where, (name, arrays) in groups.items():
        group = file.create_group(where)
        group.attrs["name"] = name
        for key, values in arrays.items():
            group.create_dataset(key, data=values, compression="gzip")
    file.attrs.update(
        {
            "format": FORMAT, "version": HDF5_VERSION, "n_samples": ledger.n_samples, "plain": plain,
            "digest": _digest(plain, ledger.n_samples, groups),
        }
    )  # fmt: skip


def _digest(plain: str, n_samples: int, groups: Groups) -> str:
    names = [plain, n_samples, *((where, name) for where, (name, _) in sorted(groups.items()))]
    arrays = {f"{g}/{k}": v for g, (_, counts) in groups.items() for k, v in counts.items()}
    return content_digest(json.dumps(names).encode(), arrays)


def _load_hdf5(path: str | os.PathLike[str]) -> Ledger:
    import h5py

    check_heaps(Path(path))
    with h5py.File(path, "r") as file:
        return read_from(file)


def read_from(file: h5py.Group) -> Ledger:
    """The ledger that `write_into` wrote.

    Raises FormatError where it is none, is of another version, or differs from its digest; and
    what h5py raises on damaged files.
    """
    _check({k: attribute(file, k) for k in ("format", "version")}, HDF5_VERSION)
    plain, n_samples = attribute(file, "plain"), int(attribute(file, "n_samples"))
    groups: Groups = {}
    for kind in ("populations", "projections", "neurons"):
        for i in sorted(file.get(kind, {}), key=int):
            group = file[kind][i]
            groups[f"{kind}/{i}"] = attribute(group, "name"), {k: numbers(group, k) for k in group}
    if attribute(file, "digest") != _digest(plain, n_samples, groups):
        raise FormatError("its content does not match its digest: it was damaged or edited")

    def read(kind: str) -> dict[str, dict[str, np.ndarray]]:
        return dict(found for where, found in groups.items() if where.startswith(kind))

    said = json.loads(plain)
    return Ledger(
        read("populations"), read("projections"), said["sizes"], n_samples,
        tuple(said["inputs"]), {"payload_bits": said["payload_bits"]},
        {name: counts["n_spikes"] for name, counts in read("neurons").items()},
    )  # fmt: skip


def to_pandas(ledger: Ledger) -> pandas.DataFrame:
    """See `Ledger.to_pandas`. Raises UnsupportedError where pandas is not installed."""
    try:
        import pandas as pd
    except ImportError as error:
        raise UnsupportedError("ledger: tables need pandas: pip install pandas") from error
    rows = [
        (part, name, step, count, int(value))
        for part in ("populations", "projections")
        for name, counts in getattr(ledger, part).items()
        for count, values in counts.items()
        for step, value in enumerate(values)
    ]
    return pd.DataFrame(rows, columns=["part", "name", "step", "count", "value"])


def trace_to_nir(trace: Trace, dt: float) -> nir.NIRGraphData:
    """A trace as NIR's data format: a node for every recorded population.

    Series are `[samples, steps, neurons]`, dt in seconds; plain spikes are boolean.
    Raises UnsupportedError for a nir without data formats.
    """
    try:
        from nir.data_ir import NIRGraphData, NIRNodeData, TimeGriddedData
    except ImportError as error:
        raise UnsupportedError("trace: NIR data needs nir 1.0.6 or later") from error

    def grid(series: np.ndarray) -> Any:
        flat = np.moveaxis(series.reshape(*series.shape[:2], -1), 0, 1)
        return TimeGriddedData(flat.astype(bool) if series.dtype == np.uint8 else flat, dt)

    nodes = {}
    for name in trace:
        record = trace[name]
        seen = {"spikes": record.spikes, "current": record.u, "voltage": record.v}
        nodes[name] = NIRNodeData({k: grid(v) for k, v in seen.items() if v is not None})
    return NIRGraphData(nodes)
