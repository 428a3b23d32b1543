"""The commands `ranvier study ...`: many runs, one table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ranvier.cli.arguments import DataDir, Json, Limit
from ranvier.cli.tables import show

study_app = typer.Typer(help="Studies: many runs, one table.", no_args_is_help=True)


@study_app.command("residual")
def study_residual(
    dataset: Annotated[str | None, typer.Option(help="default: the recipe's, or digits")] = None,
    joins: Annotated[
        str,
        typer.Option(help="vanilla, sew, sew-and, sew-iand, ms, or; '-conv' behind: 1x1 shortcuts"),
    ] = "vanilla,sew,ms,or",
    seeds: Annotated[str, typer.Option(help="how many, or which: '3', or '0,4,7'")] = "3",
    recipe: Annotated[
        str | None, typer.Option(help="network and setting of all joins; default: the data set's")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("-s", help="key=value")] = None,
    out: Annotated[Path, typer.Option(help="folder of the runs")] = Path("runs/study"),
    runs: Annotated[
        Path | None, typer.Option(help="load trained networks: <join>-s<seed>/ in this folder")
    ] = None,
    stored: Annotated[bool, typer.Option("--stored", help="load the networks of ranvier")] = False,
    processes: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    limit: Annotated[int | None, typer.Option(help="test samples at most")] = None,
    onnx_limit: Annotated[int, typer.Option(help="test samples in ONNX Runtime")] = 2000,
    bits: Annotated[int, typer.Option(min=1, max=8, help="weight bits, 1 to 8")] = 8,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="measure finished runs again")
    ] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="print the table for a page")
    ] = False,
) -> None:
    """Train one family with each residual connection and say which survives the chip.

    Interrupted, the same command goes on where it stopped; finished runs are not made again.
    """
    from ranvier.cli.studies import residual
    from ranvier.sim.study_view import markdown_table

    found = residual(
        dataset, joins, seeds, recipe, setting or [], out, runs, stored, processes, remeasure, data_dir,
        limit=limit, onnx_limit=onnx_limit, weight_bits=bits,
    )  # fmt: skip
    print(found.to_json() if as_json else markdown_table(found) if markdown else found.table())
    for name, why in found.failed.items():
        print(f"ranvier: study: {name} failed: {why}", file=sys.stderr)
    if found.failed:
        raise typer.Exit(1)


@study_app.command("depth")
def study_depth(
    dataset: Annotated[str | None, typer.Option(help="default: the recipe's, or digits")] = None,
    depths: Annotated[str, typer.Option(help="weighted layers, 6n + 2")] = "20,32,56",
    joins: str = "vanilla,sew,ms,or",
    seeds: Annotated[str, typer.Option(help="how many, or which: '3', or '0,4,7'")] = "2",
    setting: Annotated[list[str] | None, typer.Option("-s", help="key=value")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="of each training")] = 6,
    out: Annotated[Path, typer.Option(help="folder of the runs")] = Path("runs/depth"),
    processes: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    limit: Annotated[int | None, typer.Option(help="test samples at most")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Train narrow networks of several depths with each join: does depth degrade, and why."""
    from ranvier.cli.studies import command_line, numbers, teller
    from ranvier.sim.study_depth import study_depth as study

    found = study(
        dataset, numbers(depths, "depths"), tuple(joins.split(",")), numbers(seeds, "seeds"), out=out,
        epochs=epochs, settings=setting or [], processes=processes, limit=limit, say=teller(),
        data_dir=None if data_dir is None else str(data_dir), meta={"command": command_line()},
    )  # fmt: skip
    print(found.to_json() if as_json else found.table())


@study_app.command("published")
def study_published(as_json: Json = False) -> None:
    """Count published operations, parameters and energies again: no training, no data."""
    from ranvier.sim.published import cells, published_figures

    show(cells(published_figures()), as_json)


@study_app.command("bits")
def study_bits(
    dataset: Annotated[
        str, typer.Option(help="of the stored networks: mnist, mnist-wide, fashion_mnist, cifar10")
    ] = "mnist",
    only: Annotated[str, typer.Option(help="pattern of <model>-<join>")] = "*",
    lava_samples: Annotated[
        int, typer.Option(min=0, help="samples run in Lava, each network")
    ] = 20,
    limit: Limit = None,
    out: Path = Path("runs/bits"),
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Chip accuracy of the stored networks at 8 and 4 weight bits, and after training for 4."""
    from ranvier.sim.study_bits import study_bits as study

    rows = study(
        dataset,
        data_dir=data_dir,
        only=only,
        lava_samples=lava_samples,
        limit=limit,
        out=out,
        say=lambda text: print(text, file=sys.stderr),
    )
    show(rows, as_json, "float: measured (torch). ptq, qat, lava: simulated. cores: modelled.")
