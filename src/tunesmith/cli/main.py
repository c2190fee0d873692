"""The command line: commands, and the one boundary where errors become a sentence and an exit code.

Commands import what they need when they run, so `tunesmith --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from tunesmith._version import __version__
from tunesmith.contracts.errors import UserError

app = typer.Typer(
    name="tunesmith",
    help="Fine-tune large language models from one YAML file.",
    epilog="Start with `tunesmith demo`, or `tunesmith train run.yaml`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

data_app = typer.Typer(help="Look at data sets.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace those of the file."),
]
_INTERRUPTED = 130
"""What typer turns Ctrl-C into, without a word."""

RunFile = Annotated[str, typer.Argument(metavar="RUN.YAML", help="The run file.")]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"tunesmith {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (any command).")
    ] = False,
) -> None:
    """Fine-tune large language models from one YAML file."""


@app.command(epilog="Example: tunesmith train run.yaml train.steps=100 output.dir=runs/short")
def train(run_file: RunFile, overrides: Overrides = None) -> None:
    """Train as the run file says; go on where an interrupted run stopped."""
    from rich.console import Console

    from tunesmith.config.execute import execute
    from tunesmith.config.load import load_settings

    execute(load_settings(run_file, overrides or []), Console())


@app.command(epilog="Example: tunesmith inspect run.yaml --row 3")
def inspect(
    run_file: RunFile,
    overrides: Overrides = None,
    row: Annotated[int, typer.Option(min=0, help="Number of the row in the source, from 0.")] = 0,
    source: Annotated[int, typer.Option(min=0, help="Number of the training source, from 0.")] = 0,
) -> None:
    """Show one row at every stop: record, conversation, text, tokens in colour by mask, place in a pack."""
    from rich.console import Console

    from tunesmith.cli.inspect_row import inspect_row
    from tunesmith.config.load import load_settings

    inspect_row(load_settings(run_file, overrides or []), Console(), row=row, source=source)


@app.command(epilog="Example: tunesmith demo train.steps=5")
def demo(overrides: Overrides = None) -> None:
    """Fine-tune a small real model on grade-school maths, here and now."""
    from rich.console import Console

    from tunesmith.cli.demo import run_demo

    run_demo(Console(), overrides or [])


@data_app.command(
    epilog="Examples: tunesmith data check train.jsonl --html report.html; tunesmith data check run.yaml"
)
def check(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A file, folder, glob pattern, hub data set, or a run file."),
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Whose tokenizer and template; the demo's by default.")
    ] = None,
    format: Annotated[str, typer.Option(help="A format of data.train, or auto.")] = "auto",  # noqa: A002
    template: Annotated[str, typer.Option(help="A chat template, as data.template has it.")] = "auto",
    sequence_length: Annotated[
        int | None, typer.Option(min=8, help="Longest row in tokens; 2,048 by default.")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Data that measures; rows that PATH has, too, are found.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Read only the first rows of each source.")] = None,
    html: Annotated[str | None, typer.Option(help="Write the report with pictures to this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what data would train on. Exit 0: all of it as it stands; 1: not all; 2: it cannot be read."""
    from rich.console import Console

    from tunesmith.cli.data_check import Options, check_and_print

    options = Options(
        path,
        overrides or (),
        model=model,
        format=format,
        template=template,
        sequence_length=sequence_length,
        held_out=held_out,
        most_rows=rows,
        as_json=json,
        html=html,
    )
    raise typer.Exit(0 if check_and_print(options, Console()) else 1)


def _sentence(error: Exception) -> tuple[str, int]:
    """What to print for an error that is nobody's UserError, and the exit code."""
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return (
            "Out of memory.\nSet train.micro_batch: 1, memory.policy: recompute, or a shorter train.sequence_length.",
            1,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"The disk is full{where}.\nFree some space and run the same command again.", 1
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return f"{error.filename or 'A file'} cannot be written or read: {error.strerror}.", 1
    kind = type(error).__name__
    return f"Unexpected {kind}: {error}\nThis is a defect: please report it with the output of --debug.", 70


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(typer.style("error: ", fg=typer.colors.RED, bold=True) + message, err=True)
    raise SystemExit(code)


def run(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command and turns every error into one clear sentence and a non-zero exit code.

    `--debug` is accepted anywhere and lets the traceback through.
    """
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; some bars ask nothing else
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        app(words)
    except UserError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            _fail("interrupted", _INTERRUPTED)
        raise
    except Exception as error:
        if debug:
            raise
        _fail(*_sentence(error))
