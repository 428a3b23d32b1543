"""The commands. Each reads what the one before wrote, and writes its own artifact atomically."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ranvier.cli.arguments import WHERE, Chip, DataDir, Json, Limit, Target
from ranvier.cli.study_commands import study_app
from ranvier.cli.tables import show
from ranvier.train.errors import RangeError, RanvierError
from ranvier.train.memory import keep_freed_memory

app = typer.Typer(
    name="ranvier",
    help="From a spiking network trained in snntorch to bit-exact Loihi integers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# typer brings click as a package of its own or as a part, by version; this is its base error in both
ClickException: type[Any] = typer.BadParameter.__mro__[2]

app.add_typer(study_app, name="study")


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """From a spiking network trained in snntorch to bit-exact Loihi integers."""
    if version:
        from importlib.metadata import version as installed

        print(f"ranvier {installed('ranvier')}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        raise typer.BadParameter("give a command")


def run_app(argv: list[str]) -> int:
    """The exit status of a command line; errors become one line on stderr."""
    debug = "--debug" in argv
    keep_freed_memory()
    try:
        status = app(
            [a for a in argv if a != "--debug"], standalone_mode=False, prog_name="ranvier"
        )
        if status == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except RanvierError as error:
        if debug:
            raise
        print(f"ranvier: {' '.join(str(error).split())}", file=sys.stderr)
    except (KeyboardInterrupt, typer.Abort):
        print("ranvier: interrupted", file=sys.stderr)
        return 130
    except ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            print(f"ranvier: {error.format_message()} (see --help)", file=sys.stderr)
    except BrokenPipeError:
        return 0
    return 2


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for all artifacts")] = Path("runs/demo"),
    report: Annotated[Path, typer.Option(help="copy of the report")] = Path("report.html"),
    lava_samples: Annotated[int, typer.Option(min=0, help="samples run in Lava, each join")] = 5,
    epochs: Annotated[int, typer.Option(min=1, help="training epochs")] = 10,
    seed: int = 0,
) -> None:
    """Train, export, compile and run one small network with each residual connection."""
    import time

    from rich.console import Console
    from rich.table import Table

    from ranvier.cli.demo import HEADS, failed, run_demo
    from ranvier.train.files import write_text

    console = Console(width=None if sys.stdout.isatty() else 160)
    begin = time.perf_counter()

    def say(text: str) -> None:
        console.print(
            f"[{time.perf_counter() - begin:6.1f} s] {text}", highlight=False, markup=False
        )

    rows = run_demo(out, lava_samples=lava_samples, epochs=epochs, seed=seed, say=say)
    write_text(report, (out / "report.html").read_text(encoding="utf-8"))
    table = Table(title=f"{rows[0].n_test} held-out digits, 4 time steps", title_justify="left")
    for i, head in enumerate(HEADS):
        table.add_column(head, justify="left" if i in (0, len(HEADS) - 1) else "right")
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    console.print(
        "torch and ONNX: measured. chip: simulated, bit for bit, in 8-bit integers. Lava: simulated by "
        "Lava itself.",
        highlight=False,
    )
    console.print(f"report: {report}   artifacts: {out}/", highlight=False, markup=False)
    wrong = failed(rows)
    if wrong:
        print(f"ranvier: demo: {wrong}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def doctor(
    as_json: Json = False,
    lava_run: Annotated[bool, typer.Option(help="run two real Lava processes")] = False,
) -> None:
    """Say what is here, what each missing part switches off, and how to turn it on."""
    from ranvier.cli import doctor as module

    report = module.collect(lava_run=lava_run)
    if as_json:
        print(json.dumps(report, indent=1, default=str))
    else:
        module.show(report)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="'*' patterns")] = "*", as_json: Json = False
) -> None:
    """List the networks."""
    from ranvier.train import list_models

    found = list_models(pattern)
    if not found:
        print(f"ranvier: no network's name matches '{pattern}'", file=sys.stderr)
    if found or as_json:
        show([{"model": name} for name in found], as_json)


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the training recipes."""
    from ranvier.train.recipe import list_recipes, load_recipe

    found = []
    for name in list_recipes():
        recipe = load_recipe(name)
        found.append({"recipe": name, "device": recipe.device, "about": recipe.description})
    show(found, as_json)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a recipe's name, or a TOML file")],
    setting: Annotated[list[str] | None, typer.Option("-s", help="key=value")] = None,
    out: Annotated[Path | None, typer.Option(help="run folder")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="continue from the last checkpoint")
    ] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Train a recipe into a run folder."""
    from ranvier.train.recipe import load_recipe, train_recipe

    loaded = load_recipe(recipe, setting or [])
    folder = out or Path("runs") / Path(recipe).stem
    if not resume and (folder / "metrics.json").is_file():
        print(
            f"ranvier: train: '{folder}' holds an earlier training; its files stay as previous-*",
            file=sys.stderr,
        )
    result = train_recipe(loaded, folder, resume=resume, data_dir=data_dir)
    show([{"run": str(folder), **result.metrics}], as_json)


@app.command()
def export(
    run: Target,
    nir: Annotated[Path | None, typer.Option(help="write NIR")] = None,
    onnx: Annotated[Path | None, typer.Option(help="write ONNX")] = None,
    net: Annotated[Path | None, typer.Option(help="write lava-dl netx")] = None,
    verify: Annotated[bool, typer.Option(help="hold each file against torch")] = True,
    as_json: Json = False,
) -> None:
    """Trace a run's network; write NIR, ONNX and netx; verify each against torch."""
    from ranvier.cli.exporting import export_run

    show(export_run(run, nir, onnx, net, verify), as_json)


@app.command()
def lint(
    source: Annotated[Path | None, typer.Argument(help="a run folder, or a file")] = None,
    chip: Chip = "loihi2",
    every: Annotated[bool, typer.Option("--all", help="each network by name, made small")] = False,
    pattern: Annotated[str, typer.Option(help="with --all: '*' patterns of names")] = "*",
    as_json: Json = False,
    sarif: bool = False,
) -> None:
    """List what a chip cannot run, what costs, and what to do about it."""
    from ranvier.cli.sources import load_graph
    from ranvier.deploy import lint as find
    from ranvier.deploy.chip import chip_named
    from ranvier.deploy.linter import to_sarif

    if every:
        from ranvier.sim.lint_zoo import rows

        found = rows(pattern)
        if not found:
            raise RangeError(f"lint: no network's name matches '{pattern}'; see `ranvier models`")
        show([r.cells() for r in found], as_json)
        return
    if source is None:
        raise typer.BadParameter("lint: give a run folder or a file, or --all")
    findings = find(load_graph(source), chip=chip_named(chip))
    if sarif:
        print(to_sarif(findings))
    elif findings or as_json:
        keys = ("code", "severity", "node", "message", "fix")
        show([{k: getattr(f, k) for k in keys} for f in findings], as_json)
    else:
        print("nothing found")
    if any(f.severity == "error" for f in findings):
        raise typer.Exit(1)


@app.command()
def compile(
    source: Target,
    bits: Annotated[int, typer.Option(min=1, max=8, help="weight bits, 1 to 8")] = 8,
    joins: Annotated[str, typer.Option(help="auto, linear (unrolled), graded (relay)")] = "auto",
    chip: Chip = "loihi2",
    output: Annotated[Path | None, typer.Option("-o", help="the program's file")] = None,
    calibration: Annotated[str | None, typer.Option(help="data set, or .npz with x")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Compile a network to an integer program."""
    from ranvier.cli.exporting import compile_source

    options = {"weight_bits": bits, "joins": joins}
    show([compile_source(source, chip, options, output, calibration, data_dir)], as_json)


@app.command()
def place(program: Target, chip: Chip = "loihi2", as_json: Json = False) -> None:
    """Place a program on the cores of a chip."""
    from ranvier.cli.sources import load_program
    from ranvier.deploy import place as place_program
    from ranvier.deploy.chip import chip_named

    placement = place_program(load_program(program), chip_named(chip))
    if as_json:
        print(json.dumps(placement.to_dict(), indent=1))
    else:
        print(placement.table())


@app.command()
def run(
    program: Target,
    data: Annotated[str, typer.Option(help="data set, or .npz with x and y")] = "digits",
    engine: Annotated[str, typer.Option(help="reference, dense, events, lava or auto")] = "auto",
    limit: Limit = None,
    batch_size: int = 64,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help=WHERE)] = None,
    ledger: Annotated[Path | None, typer.Option(help="write the counts as JSON")] = None,
    as_json: Json = False,
) -> None:
    """Run a program on data; print accuracy and counts."""
    from ranvier.cli.exporting import run_program

    show([run_program(program, data, engine, limit, batch_size, data_dir, ledger)], as_json)


@app.command()
def compare(
    run: Target,
    engines: Annotated[
        str, typer.Option(help="of torch, onnx, reference, dense, events, lava")
    ] = "torch,onnx,dense,lava",
    limit: Limit = None,
    lava_limit: Annotated[int, typer.Option(help="samples run in Lava")] = 5,
    html: Annotated[Path | None, typer.Option(help="write a report")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="fail if the chip loses more points")
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Hold torch, ONNX, the engines and Lava against each other on the same samples."""
    from ranvier.cli.exporting import compare_run

    report = compare_run(run, engines.split(","), limit, lava_limit, data_dir)
    if html is not None:
        report.to_html(html)
    print(report.to_json() if as_json else report)
    lost = 100 * report.drop
    if max_drop is not None and lost > max_drop:
        print(
            f"ranvier: compare: the chip loses {lost:.2f} points; {max_drop} allowed",
            file=sys.stderr,
        )
        raise typer.Exit(1)


@app.command()
def bench(
    suite: Annotated[str, typer.Option(help="sim or train")] = "sim",
    quick: Annotated[bool, typer.Option(help="small nets only")] = False,
    out: Annotated[Path | None, typer.Option(help="CSV file")] = None,
    nets: Annotated[str, typer.Option(help="names of networks, with commas")] = "",
    rates: Annotated[str, typer.Option(help="firing rates, with commas: 0.02,0.1")] = "",
    sides: Annotated[
        str, typer.Option(help="dense,events,auto,snntorch,reference,lava,spikingjelly")
    ] = "",
    rounds: Annotated[int, typer.Option(min=1, help="timed runs of each side")] = 5,
    spikingjelly: Annotated[
        str | None, typer.Option(help="the Python of an environment with ranvier and SpikingJelly")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print rows as JSON")] = False,
) -> None:
    """Measure the engines against each other, or training against a plain loop."""
    from ranvier.cli.exporting import run_bench

    numbers = parsed_rates(rates)
    run_bench(
        suite, quick, out, nets=split(nets), rates=numbers, sides=split(sides),
        rounds=rounds if rounds != 5 else None, spikingjelly=spikingjelly, as_json=as_json,
    )  # fmt: skip


def split(names: str) -> tuple[str, ...]:
    return tuple(n.strip() for n in names.split(",") if n.strip())


def parsed_rates(rates: str) -> tuple[float, ...]:
    """Shares between 0 and 1; raises RangeError for anything else."""
    try:
        found = tuple(float(r) for r in split(rates))
    except ValueError as error:
        raise RangeError(
            f"bench: --rates {rates} is no list of numbers such as 0.02,0.1"
        ) from error
    if not all(0 < r < 1 for r in found):
        raise RangeError(f"bench: --rates {rates}; each must lie between 0 and 1")
    return found
