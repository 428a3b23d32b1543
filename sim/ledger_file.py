"""Ledgers as files (JSON, HDF5) and tables (pandas), and traces as NIR data."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ranvier.sim.ledger import Ledger, Trace
from ranvier.train.errors import FormatError, UnsupportedError
from ranvier.train.files import atomic_write, write_text

if TYPE_CHECKING:
    import h5py
    import nir
    import pandas

FORMAT = "ranvier-ledger"
VERSION = 1
JSON, HDF5 = (".json",), (".h5", ".hdf5")


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
            _check(content, path)
            return Ledger.from_dict(content)
        return _load_hdf5(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"ledger: '{path}' is not a ledger: {error}") from error


def _check(content: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    if content.get("format") != FORMAT:
        raise FormatError(f"ledger: '{path}' is not a ledger")
    if content.get("version") != VERSION:
        raise FormatError(
            f"ledger: '{path}' has version {content.get('version')}; this one reads {VERSION}"
        )


def _save_hdf5(ledger: Ledger, path: str | os.PathLike[str]) -> None:
    import h5py

    with atomic_write(path) as part, h5py.File(part, "w") as file:
        write_into(file, ledger)


def write_into(file: h5py.Group, ledger: Ledger) -> None:
    """Writes the ledger into an open HDF5 file or group."""
    file.attrs.update({"format": FORMAT, "version": VERSION, "n_samples": ledger.n_samples})
    kept = ("sizes", "inputs", "payload_bits")
    plain = {k: v for k, v in ledger.to_dict().items() if k in kept}
    file.attrs["plain"] = json.dumps(plain)
    for kind in ("populations", "projections"):
        for i, (name, counts) in enumerate(getattr(ledger, kind).items()):
            _write_group(file, f"{kind}/{i}", name, counts)
    for i, (name, counts) in enumerate(ledger.neurons.items()):
        _write_group(file, f"neurons/{i}", name, {"n_spikes": counts})


def _write_group(file: h5py.Group, where: str, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    group = file.create_group(where)
    group.attrs["name"] = name
    for key, values in arrays.items():
        group.create_dataset(key, data=values, compression="gzip")


def _load_hdf5(path: str | os.PathLike[str]) -> Ledger:
    import h5py

    with h5py.File(path, "r") as file:
        _check(file.attrs, path)
        return read_from(file)


def read_from(file: h5py.Group) -> Ledger:
    """The ledger that `write_into` wrote."""
    plain = json.loads(file.attrs["plain"])

    def read(kind: str) -> dict[str, dict[str, np.ndarray]]:
        groups = [file[kind][k] for k in sorted(file.get(kind, {}), key=int)]
        return {g.attrs["name"]: {k: g[k][()] for k in g} for g in groups}

    neurons = {n: c["n_spikes"] for n, c in read("neurons").items()}
    return Ledger(
        read("populations"), read("projections"), plain["sizes"], int(file.attrs["n_samples"]),
        tuple(plain["inputs"]), {"payload_bits": plain["payload_bits"]}, neurons,
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
