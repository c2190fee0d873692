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
from tunesmith.cli.result_commands import add_result_commands
from tunesmith.cli.runs_commands import report_command, runs_app
from tunesmith.contracts.errors import UserError
from tunesmith.training.quiet import quiet_imports

app = typer.Typer(
    name="tunesmith",
    # one line for what it is and how to start: with two the help would be longer than a screen
    epilog="Fine-tunes large language models from one YAML file. Start with `tunesmith demo`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

data_app = typer.Typer(
    help="Look at data sets.",
    epilog="Example: tunesmith data check train.jsonl",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace those of the file."),
]
_INTERRUPTED = 130
"""What typer turns Ctrl-C into, without a word."""

RunFile = Annotated[str, typer.Argument(metavar="RUN.YAML", help="The run file.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print warnings and the final lines only.")]
Plain = Annotated[bool, typer.Option("--plain", help="Print lines without control codes, as for a log.")]


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"tunesmith {__version__}")
        raise typer.Exit


@app.callback(help="")
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (any command).")
    ] = False,
) -> None:
    """What goes before a command."""


@app.command(epilog="Example: tunesmith init run.yaml --model Qwen/Qwen3-0.6B --data train.jsonl")
def init(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="The run file.")] = "run.yaml",
    model: Annotated[str | None, typer.Option(help="A folder or a Hugging Face id.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data, as data.train has it.")] = None,
    output: Annotated[str | None, typer.Option(help="The run directory.")] = None,
    objective: Annotated[str | None, typer.Option(help="As objective.kind has it.")] = None,
    adapter: Annotated[str | None, typer.Option(help="lora, or none to train all weights.")] = None,
    quantize: Annotated[str | None, typer.Option(help="As model.quantize has it; nf4: QLoRA.")] = None,
    format: Annotated[str | None, typer.Option(help="As format of a source has it.")] = None,  # noqa: A002
    column: Annotated[list[str] | None, typer.Option(help="OWN=NAME, a name in the data.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Data that measures.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=8, help="Tokens of a row.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a run file with comments for a model and a data set."""
    from rich.console import Console

    from tunesmith.cli.init import Flags, write_run_file

    flags = Flags(
        model,
        data,
        output,
        objective,
        adapter,
        quantize,
        format,
        held_out,
        sequence_length,
        columns=tuple(column or ()),
    )
    write_run_file(file, flags, Console(), force=force)


@app.command(epilog="Example: tunesmith train run.yaml train.steps=100 output.dir=runs/short")
def train(run_file: RunFile, overrides: Overrides = None, quiet: Quiet = False, plain: Plain = False) -> None:
    """Train as the run file says; go on where a run stopped."""
    from tunesmith.config.execute import execute
    from tunesmith.config.load import load_settings
    from tunesmith.config.terminal import open_console

    execute(load_settings(run_file, overrides or []), open_console(plain=plain), quiet=quiet)


@app.command(epilog="Example: tunesmith plan run.yaml --gpu RTX-4090 --picture plan.html")
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="A card such as RTX-4090; this machine's.")] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Free memory of its machine, such as 64GiB; this machine's.")
    ] = None,
    picture: Annotated[str | None, typer.Option(help="Draw the memory: FILE.png or .html.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether a run fits a card, and how fast it would be.

    Exit 0: it fits; 1: it does not.
    """
    from tunesmith.cli.plan import plan_and_print
    from tunesmith.config.terminal import open_console

    fits = plan_and_print(
        run_file,
        overrides or [],
        open_console(),
        gpu=gpu,
        host_memory=host_memory,
        as_json=json,
        picture=picture,
    )
    raise typer.Exit(0 if fits else 1)


@app.command(epilog="Example: tunesmith inspect run.yaml --row 3")
def inspect(
    run_file: RunFile,
    overrides: Overrides = None,
    row: Annotated[int, typer.Option(min=0, help="Number of the row in the source, from 0.")] = 0,
    source: Annotated[int, typer.Option(min=0, help="Number of the training source, from 0.")] = 0,
) -> None:
    """Show one row at every stop, from the file to its pack.

    Record, conversation, text, tokens in colour by mask, place in a pack.
    """
    from rich.console import Console

    from tunesmith.cli.inspect_row import inspect_row
    from tunesmith.config.load import load_settings

    inspect_row(load_settings(run_file, overrides or []), Console(), row=row, source=source)


@app.command(epilog="Example: tunesmith demo train.steps=5")
def demo(overrides: Overrides = None, quiet: Quiet = False, plain: Plain = False) -> None:
    """Fine-tune a small real model on school maths, here and now."""
    from tunesmith.cli.demo import run_demo
    from tunesmith.config.terminal import open_console

    run_demo(open_console(plain=plain), overrides or [], quiet=quiet)


add_result_commands(app)
app.command("report", epilog="Example: tunesmith report runs/first")(report_command)


@app.command(epilog="Example: tunesmith schema > tunesmith.schema.json")
def schema() -> None:
    """Print the JSON Schema of a run file, for editors."""
    from tunesmith.cli.schema import print_schema

    print_schema()


@app.command(epilog="Example: tunesmith doctor run.yaml")
def doctor(
    run_file: Annotated[str | None, typer.Argument(metavar="[RUN.YAML]", help="Ask about this run.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine has, and what a run would use and why.

    Exit 0: training is possible; 1: something essential is broken.
    """
    from rich.console import Console

    from tunesmith.cli.doctor import diagnose

    raise typer.Exit(0 if diagnose(run_file, as_json=json, console=Console()) else 1)


@data_app.command(epilog="Example: tunesmith data check train.jsonl --html report.html")
def check(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Data as data.train has it, or a run file."),
    ],
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer; the demo's by default.")] = None,
    format: Annotated[str, typer.Option(help="A format of data.train.")] = "auto",  # noqa: A002
    template: Annotated[str, typer.Option(help="As data.template has it.")] = "auto",
    sequence_length: Annotated[int | None, typer.Option(min=8, help="Of a row; 2,048 by default.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Data that measures, to be compared.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Read only the first rows.")] = None,
    html: Annotated[str | None, typer.Option(help="Write a report with pictures.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what data would train on.

    Exit 0: all of it as it stands; 1: not all; 2: it cannot be read.
    """
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
    quiet_imports()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        app(words, prog_name="tunesmith")
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
