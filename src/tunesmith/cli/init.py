"""`tunesmith init`: asks for what a run needs, or takes it from flags, looks into the data and writes a run file."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import typer
from rich.console import Console

from tunesmith.config.starter import (
    Wishes,
    default_output,
    refuse_file,
    sizes_of,
    starter_text,
    write_starter,
)
from tunesmith.config.starter_data import Lengths, Look, likely_data, look_at, measure
from tunesmith.config.starter_text import choices
from tunesmith.config.starter_time import seconds_on_cpu
from tunesmith.contracts.errors import DataError, UserError
from tunesmith.contracts.plural import counted
from tunesmith.data.cache import cache_folder
from tunesmith.settings.base import Section
from tunesmith.settings.model import AdapterSettings, ModelSettings
from tunesmith.settings.run import ObjectiveSettings

_MODEL_QUESTION = "Model (a folder, or a Hugging Face id)"
_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WORTH_SAYING = 600.0
"""Seconds on a CPU from which on it is said how long the run takes."""


@dataclass(frozen=True)
class Flags:
    """What was given on the command line; None and empty where nothing was.

    Attributes:
        columns: `own=name`, one for each column that is called otherwise in the data.
    """

    model: str | None = None
    data: str | None = None
    output: str | None = None
    objective: str | None = None
    adapter: str | None = None
    quantize: str | None = None
    format: str | None = None
    held_out: str | None = None
    sequence_length: int | None = None
    columns: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """The flags without which nothing can be written."""
        return [f"--{name}" for name in ("model", "data") if getattr(self, name) is None]


def write_run_file(path: str, flags: Flags, console: Console, *, force: bool) -> None:
    """Write a run file and say what comes next.

    Args:
        path: of the file.
        force: replace a file that is there.

    Raises:
        UserError: a flag is missing and there is no terminal to ask on, the file exists, or model or data cannot be
            read.
    """
    file = Path(path).expanduser()
    refuse_file(file, force=force)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if flags.missing and not on_terminal:
        raise UserError(
            f"Without a terminal to ask on, {' and '.join(flags.missing)} must be given.",
            hint=f"For example: tunesmith init {path} --model {_MODEL} --data train.jsonl",
        )
    if flags.missing:
        wishes, look = _ask(flags, console)
    else:
        wishes = _wishes(flags)
        wishes.check()
        look = look_at(wishes.data, format=wishes.format, columns=wishes.columns)
    if wishes.held_out is not None:
        look_at(wishes.held_out, format=look.format.name, columns=look.renames)
    wishes, lengths = _measure(wishes, look, console, again=flags.model is None)
    seconds = seconds_on_cpu(wishes.model, wishes.adapter, sizes_of(wishes, look, lengths))
    duration = "" if seconds is None or seconds[1] < _WORTH_SAYING else " to ".join(map(rough_span, seconds))
    write_starter(file, starter_text(wishes, look, lengths, file=file, duration=duration), force=force)
    _report(file, look, lengths, duration, console)


def _measure(wishes: Wishes, look: Look, console: Console, *, again: bool) -> tuple[Wishes, Lengths]:
    """The lengths of the rows; a model that was asked for is asked for again where it is none."""
    while True:
        try:
            with Console(stderr=True).status("loading the tokenizer") as status:
                return wishes, measure(look, wishes.model, status.update)
        except UserError as error:
            if not again or isinstance(error, DataError):
                raise
            _complain(error, console)
            wishes = replace(wishes, model=_question(_MODEL_QUESTION, _default_model()))


def _complain(error: UserError, console: Console, *, hint: bool = False) -> None:
    """Say what is wrong with an answer; most hints speak of flags, which is not what is asked for here."""
    said = [error.message, error.hint] if hint and error.hint else [error.message]
    console.print(f"  {' '.join(said)}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _wishes(flags: Flags) -> Wishes:
    """The flags, with a name for the run directory and the defaults of the others."""
    given = {
        each.name: value
        for each in fields(flags)
        if each.name != "columns" and (value := getattr(flags, each.name)) is not None
    }
    given.setdefault("output", default_output(given["data"]))
    return Wishes(**given, columns=_columns(flags.columns))


def _columns(pairs: tuple[str, ...]) -> dict[str, str]:
    columns = {}
    for pair in pairs:
        own, equals, name = pair.partition("=")
        if not (own and equals and name):
            raise UserError(
                f"--column {pair} is not of the form NAME=COLUMN.",
                hint="The format's name first, then the one in the data: --column prompt=question.",
            )
        columns[own] = name
    return columns


# ---------------------------------------------------------------- questions


def _ask(flags: Flags, console: Console) -> tuple[Wishes, Look]:
    """Ask for what no flag says, with a default to each question."""
    console.print("Enter takes what stands in brackets; Ctrl-C leaves without writing anything.\n")
    model = flags.model or _question(_MODEL_QUESTION, _default_model())
    likely = likely_data(Path())
    columns = _columns(flags.columns)
    data, look = _ask_data(flags, None if likely is None else str(likely), columns, console)
    adapter = flags.adapter or _choice("Train", AdapterSettings, "kind")
    quantize = flags.quantize
    if quantize is None and adapter != "none":
        quantize = _choice("Hold the frozen weights in", ModelSettings, "quantize")
    objective = flags.objective
    if objective is None and len(choices(ObjectiveSettings.model_fields["kind"].annotation)) > 1:
        objective = _choice("Objective", ObjectiveSettings, "kind")
    output = flags.output or _question("Run directory", default_output(data))
    wishes = Wishes(
        model=model,
        data=data,
        output=output,
        objective=objective or ObjectiveSettings().kind,
        adapter=adapter,
        quantize=quantize or "none",
        format=look.format.name,
        columns=look.renames,
        held_out=flags.held_out,
        sequence_length=flags.sequence_length,
    )
    wishes.check()
    return wishes, look


def _question(text: str, default: str | None) -> str:
    try:
        answer: str = typer.prompt(text, default=default)
    except typer.Abort:  # Ctrl-C, or the end of the input: nothing was written
        raise KeyboardInterrupt from None
    return answer.strip()


def _choice(text: str, section: type[Section], name: str) -> str:
    """Ask for one of the words that a setting may have, with its docstring above."""
    field = section.model_fields[name]
    words = choices(field.annotation)
    typer.echo(typer.style(f"  {' '.join((field.description or '').split())}", dim=True))
    while True:
        answer = _question(f"{text} ({', '.join(words)})", str(field.default))
        if answer in words:
            return answer
        typer.echo(f"  {answer!r} is none of {', '.join(words)}.")


def _ask_data(
    flags: Flags, default: str | None, columns: dict[str, str], console: Console
) -> tuple[str, Look]:
    """The data and its format; asks again until it can be read."""
    data, asked = flags.data, False
    while True:
        if data is None:
            data = _question("Training data (a file, folder, pattern or hub data set)", default)
        try:
            look = look_at(data, format=flags.format or "auto", columns=columns)
        except DataError as error:
            about_columns = asked or "--column" in (error.hint or "")
            if flags.data is not None and not about_columns:
                raise
            _complain(error, console, hint=not about_columns)
            if about_columns:
                columns, asked = _ask_columns(), True
            else:
                data = None
            continue
        console.print(
            f"  {look.format.name}: {look.described}",
            style="dim",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return data, look


def _ask_columns() -> dict[str, str]:
    prompt = _question("Which column is what the user asks", None)
    return {"prompt": prompt, "response": _question("Which column is the answer", None)}


def _default_model() -> str:
    """The demo's model where it is on this machine, else its name on the hub."""
    folder = cache_folder("models") / _MODEL.rpartition("/")[2]
    return str(folder) if (folder / "config.json").is_file() else _MODEL


# ---------------------------------------------------------------- report


def _report(file: Path, look: Look, lengths: Lengths, duration: str, console: Console) -> None:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    if look.guessed:
        renames = ", ".join(f"{own} from {name}" for own, name in look.renames.items())
        say(
            f"warning: columns were chosen by the likeness of their names ({renames}); see that they are right",
            "yellow",
        )
    if lengths.estimated:
        say(f"warning: lengths were estimated from characters, because {lengths.estimated}", "yellow")
    if lengths.dropped:
        say(
            f"warning: {counted(lengths.dropped, 'row')} of {lengths.rows:,} would not train; data check says why",
            "yellow",
        )
    if duration:
        say(
            f"note: there is no GPU here, and on this CPU the run takes {duration}; train.steps=20 behind the "
            "command makes it a short one",
            "yellow",
        )
    name = shlex.quote(str(file))
    say(f"data  {look.format.name}: {look.described}")
    say(f"wrote {file}")
    steps = [
        ("inspect", "a row at every stop, from the file to its tokens"),
        ("data check", "what the whole set would train on"),
        ("train", "the run itself"),
    ]
    width = max(len(f"tunesmith {command} {name}") for command, _ in steps)
    for number, (command, what) in enumerate(steps):
        say(f"{'next' if number == 0 else '':<5} {f'tunesmith {command} {name}':<{width}}   {what}")


def rough_span(seconds: float) -> str:
    """A time that is known roughly: `2 minutes`, `3 hours`, `12 days`."""
    for noun, size, most in (("minute", 60, 90), ("hour", 3600, 36)):
        if seconds < most * size:
            return counted(max(1, round(seconds / size)), noun)
    return counted(round(seconds / 86400), "day")
