"""What a command is pointed at: a run folder or a file; and the data that it runs on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ranvier.train.errors import DataError, FormatError, RangeError

if TYPE_CHECKING:
    from ranvier.deploy.program import Program
    from ranvier.export.graph import Graph


def need(path: Path) -> Path:
    """The path, if something is there. Raises FormatError naming it."""
    if not path.exists():
        raise FormatError(f"'{path}': there is no such file or run folder")
    return path


def load_net(run: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(net, recipe, metrics) of a run folder that `ranvier train` wrote."""
    from ranvier.train.recipe import load_run

    if not need(run).is_dir():
        raise FormatError(
            f"'{run}' is a file; a run folder, as `ranvier train` writes it, is needed"
        )
    return load_run(run)


def recipe_of(run: Path) -> Any:
    """The Recipe of a run folder; None where it has none."""
    from ranvier.train.recipe import RECIPE, make_recipe, read_json

    path = run / RECIPE
    return make_recipe(read_json(path), str(path)) if path.is_file() else None


def load_graph(path: Path) -> Graph:
    """The graph of a run folder, a .nir file, a netx .net file, or a graph .h5."""
    from ranvier.export import Graph, read_net, read_nir, trace

    if need(path).is_dir():
        net, _, _ = load_net(path)
        import torch

        return trace(net, torch.zeros(2, *net.input_shape))
    if path.suffix == ".nir":
        return read_nir(path)
    if path.suffix == ".net":
        return read_net(path)
    return Graph.load(path)


def load_program(path: Path) -> Program:
    """The program in a .h5 file, or in a run folder's program.h5.

    Raises FormatError where there is none, or where the folder was trained again since.
    """
    from ranvier.deploy import Program

    if not need(path).is_dir():
        return Program.load(path)
    if not (path / "program.h5").exists():
        raise FormatError(f"'{path}' holds no program.h5; run `ranvier compile {path}` first")
    program = Program.load(path / "program.h5")
    compiled, now = program.meta.get("weights"), weights_digest(path)
    if compiled is not None and compiled != now:
        raise FormatError(
            f"'{path / 'program.h5'}' was compiled from other weights than '{path}' holds now: it was "
            f"trained again since. Run `ranvier compile {path}`"
        )
    return program


def weights_digest(run: Path) -> str:
    """The digest of a run folder's weights, which says which training they are of, or "unfinished"."""
    from ranvier.train.checkpoint import read_tensors
    from ranvier.train.trainer import WEIGHTS

    if not (run / WEIGHTS).is_file():
        return "unfinished"
    return str(read_tensors(run / WEIGHTS)[1].get("digest"))


def default_output(path: Path, name: str) -> Path:
    """`name` in a run folder; beside a file, its stem with name's suffix."""
    return path / name if path.is_dir() else path.with_suffix(Path(name).suffix)


def arrays(
    data: str, *, split: str, data_dir: Path | None, limit: int | None, shape: tuple[int, ...],
    steps: int | None = None, run: Path | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """(x, y) of a named data set, or of an .npz file with x and perhaps y.

    steps  time bins of an event set
    run    a run folder: the set that it was trained on is read as its recipe reads it
    Raises DataError where neither is there.
    """
    path = Path(data)
    if path.suffix == ".npz" and path.exists():
        if limit is not None and limit < 1:
            raise RangeError(f"data: limit is {limit}; give 1 or more, or leave it out")
        x, y = _own_arrays(path)
        return x[:limit], None if y is None else y[:limit]
    if path.suffix == ".npz":
        raise DataError(f"data: there is no file '{path}'")
    if path.is_dir():
        raise DataError(
            f"data: '{path}' is a folder; name the set (--data digits), and the folder that it lies in "
            f"with --data-dir {path}"
        )
    from ranvier.train import load_dataset

    how: dict[str, Any] = {"size": shape[-1] if len(shape) == 3 else None, "steps": steps}
    part = None if run is None else recipe_of(run)
    if part is not None and part.data.name == data:
        how |= {"size": part.data.size, "encoding": part.data.encoding, "bins": part.data.bins}
        how["steps"] = part.data.steps or part.model.get("steps")
    loaded = load_dataset(data, data_dir, split, limit=limit, **how)
    x = loaded.x.float().numpy()
    return x, np.asarray(loaded.y)


def _own_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(x, y or None) of an .npz file. Raises DataError where it is damaged or holds no such numbers."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "x" not in file:
                raise DataError(f"data: '{path}' holds {', '.join(file)}; an array 'x' is needed")
            x, y = file["x"], file["y"] if "y" in file else None
    except DataError:
        raise
    except (
        Exception
    ) as error:  # zipfile and zlib errors of a cut file, ValueError of pickled objects
        raise DataError(f"data: '{path}' cannot be read as npz: {error}") from error
    if x.dtype.kind not in "biuf" or x.ndim == 0 or (y is not None and len(y) != len(x)):
        found = f"x {x.dtype} {x.shape}" + ("" if y is None else f", y {y.dtype} {y.shape}")
        raise DataError(
            f"data: '{path}' holds {found}; numbers, and one label a sample, are needed"
        )
    return x, y
