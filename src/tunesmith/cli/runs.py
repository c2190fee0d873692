"""`tunesmith runs`: runs as a table, and some of them beside each other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text as Rich

from tunesmith.cli.terminal_chart import COLORS, names_line, print_chart
from tunesmith.contracts.errors import UserError
from tunesmith.contracts.plural import counted
from tunesmith.contracts.visible import one_line, visible
from tunesmith.export.compare import MISSING, Comparison, compare
from tunesmith.export.curves import AXES, series, smoothed
from tunesmith.export.report_settings import written
from tunesmith.export.run_files import find_runs, open_run
from tunesmith.export.run_report import duration
from tunesmith.export.run_summary import STATES, Recorded, Summary, read_run, read_summary, short

_STYLES = {"finished": "green", "running": "bright_blue", "interrupted": "yellow", "failed": "red"}
_MOST_LETTERS = 28
_MISSING_LAST = float("inf")


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _steps(run: Summary) -> str:
    of = "" if run.total_steps in (None, run.steps) else f"/{run.total_steps:,}"
    return f"{run.steps:,}{of}"


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the table.

    Attributes:
        text: what stands in it.
        keep: the higher, the longer it stays on a narrow terminal.
        right: numbers stand at the right.
    """

    text: Callable[[Summary], str]
    keep: int
    right: bool = True


_COLUMNS = {
    "run": _Column(lambda run: visible(run.name), 99, right=False),
    "model": _Column(lambda run: one_line(short(run.model or MISSING), _MOST_LETTERS), 8, right=False),
    "adapter": _Column(lambda run: run.adapter or MISSING, 5, right=False),
    "data": _Column(lambda run: one_line(run.data or MISSING, _MOST_LETTERS), 4, right=False),
    "state": _Column(lambda run: run.state, 11, right=False),
    "steps": _Column(_steps, 9),
    "first": _Column(lambda run: _number(run.first_eval, ".4f"), 6),
    "last": _Column(lambda run: _number(run.last_eval, ".4f"), 12),
    "best": _Column(lambda run: _number(run.best_eval, ".4f"), 7),
    "train": _Column(lambda run: _number(run.train_loss, ".4f"), 6),
    "tokens/s": _Column(lambda run: _number(run.tokens_per_second, ",.0f"), 3),
    "GiB": _Column(lambda run: _number(run.memory_gib, ".1f"), 1),
    "time": _Column(lambda run: MISSING if run.seconds is None else duration(run.seconds), 2),
    "when": _Column(lambda run: f"{datetime.fromtimestamp(run.when):%Y-%m-%d %H:%M}", 10),
}
"""The columns: held-out losses are `first`, `last` and `best`, the training loss of the last steps is `train`."""

SORTS: dict[str, Callable[[Summary], Any]] = {
    "when": lambda run: -run.when,
    "name": lambda run: run.name,
    "last": lambda run: _known(run.last_eval),
    "best": lambda run: _known(run.best_eval),
    "train": lambda run: _known(run.train_loss),
    "steps": lambda run: -run.steps,
    "speed": lambda run: -(run.tokens_per_second or 0.0),
    "memory": lambda run: _known(run.memory_gib),
    "time": lambda run: _known(run.seconds),
}
"""Orders of the table, the best or newest run first; what is not known comes last."""


def _known(value: float | None) -> float:
    return _MISSING_LAST if value is None else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which runs are shown, and how.

    Attributes:
        folders: run directories, or folders of them.
        states: only runs in one of these states; all where there are none.
        model: only runs whose model's name holds this text; `data` likewise.
        sort: a name of `SORTS`.
        reverse: the other way round.
        most: at most so many.
        as_json: print JSON.
    """

    folders: Sequence[str] = ()
    states: Sequence[str] = ()
    model: str | None = None
    data: str | None = None
    sort: str = "when"
    reverse: bool = False
    most: int | None = None
    as_json: bool = False


def list_runs(choice: Choice, console: Console) -> None:
    """Print the runs.

    Raises:
        UserError: a folder is not there, or a choice is none.
    """
    _check("--state", choice.states, STATES)
    _check("--sort", [choice.sort], SORTS)
    folders = [Path(folder).expanduser() for folder in choice.folders or ["runs"]]
    if not choice.folders and not folders[0].is_dir():
        raise UserError(
            "There is no folder runs/ here.",
            hint="`tunesmith train run.yaml` makes it; or name the folder, as in `tunesmith runs /data/runs`.",
        )
    found = [read_summary(folder) for folder in find_runs(folders)]
    runs = sorted(
        (run for run in found if _chosen(run, choice)), key=SORTS[choice.sort], reverse=choice.reverse
    )
    shown = runs[: choice.most]
    if choice.as_json:
        print(json.dumps([run.to_json() for run in shown], indent=2))
        return
    if not shown:
        none = f"None of {counted(len(found), 'run')} is like that." if found else f"No runs in {folders[0]}."
        console.print(none, markup=False, highlight=False, soft_wrap=True)
        return
    _print_table(console, shown)
    if len(shown) < len(found):
        console.print(f"{len(shown):,} of {counted(len(found), 'run')}", style="dim", highlight=False)


def _check(option: str, values: Sequence[str], known: Sequence[str] | dict[str, Any]) -> None:
    for value in values:
        if value not in known:
            raise UserError(f"{option} {value}: there is no such choice.", hint=f"Choose {', '.join(known)}.")


def _chosen(run: Summary, choice: Choice) -> bool:
    return (
        (not choice.states or run.state in choice.states)
        and (choice.model is None or choice.model.lower() in (run.model or "").lower())
        and (choice.data is None or choice.data.lower() in (run.data or "").lower())
    )


def _print_table(console: Console, runs: Sequence[Summary]) -> None:
    """One line a run; a narrow terminal gets the columns that matter most, a file gets all."""
    cells = {name: [column.text(run) for run in runs] for name, column in _COLUMNS.items()}
    widths = {name: max(map(len, [name, *texts])) for name, texts in cells.items()}
    hidden = []
    while (
        console.is_terminal
        and sum(widths.values()) + 2 * (len(widths) - 1) > console.width
        and len(widths) > 3
    ):
        least = min(widths, key=lambda name: _COLUMNS[name].keep)
        hidden.append(least)
        del widths[least]

    def line(texts: dict[str, str]) -> str:
        parts = (f"{texts[n]:{'>' if _COLUMNS[n].right else '<'}{width}}" for n, width in widths.items())
        return "  ".join(parts)

    lines = [Rich(line({name: name for name in widths}).rstrip(), style="bold")]
    for number, run in enumerate(runs):
        text = Rich(line({name: cells[name][number] for name in widths}).rstrip())
        text.highlight_regex(rf"(?<=\s){run.state}(?=\s)", _STYLES[run.state])
        lines.append(text)
    console.print(Rich("\n").join(lines), soft_wrap=True, highlight=False)
    if hidden:
        console.print(f"left out, for want of width: {', '.join(hidden)}", style="dim", highlight=False)


# ---------------------------------------------------------------- some of them beside each other


def compare_runs(
    folders: Sequence[str],
    console: Console,
    *,
    axis: str = "steps",
    png: str | None = None,
    as_json: bool = False,
) -> None:
    """Print in what runs differ, what they came to, and their curves over each other.

    Args:
        folders: two run directories or more.
        axis: what curves run over, one of `AXES`.
        png: a file for the curves as a picture.
        as_json: print JSON.

    Raises:
        UserError: a folder is no run directory, there is only one, or the picture cannot be drawn.
    """
    _check("--x", [axis], AXES)
    if len(folders) < 2:
        raise UserError(
            "One run alone cannot be compared.", hint="Name two or more: tunesmith runs compare A B."
        )
    runs = [read_run(open_run(Path(folder).expanduser())) for folder in folders]
    found = compare(runs)
    if png is not None:
        from tunesmith.export.plot import draw_comparison

        draw_comparison(list(zip(found.names, (run.events for run in runs), strict=True)), Path(png), axis)
    if as_json:
        values = {"runs": found.names, "settings": found.settings, "versions": found.versions}
        print(json.dumps({**values, "figures": found.figures, "notes": found.notes}, indent=2, default=str))
        return
    _print_comparison(console, found)
    _print_curves(console, found.names, runs, axis)
    if png is not None:
        console.print(f"\npicture: {png}", markup=False, highlight=False, soft_wrap=True)


def _print_comparison(console: Console, found: Comparison) -> None:
    from rich.table import Table

    def table(title: str, rows: dict[str, list[Rich]]) -> None:
        grid = Table(box=None, padding=(0, 3, 0, 0), show_edge=False, title_justify="left")
        grid.add_column(title, overflow="fold", header_style="bold")
        for number, name in enumerate(found.names):
            grid.add_column(Rich(visible(name), style=COLORS[number % len(COLORS)]), overflow="fold")
        for name, cells in rows.items():
            grid.add_row(Rich(name), *cells)
        console.print(grid)
        console.print()

    def plain(rows: dict[str, list[Any]]) -> dict[str, list[Rich]]:
        return {visible(name): [Rich(written(value)) for value in values] for name, values in rows.items()}

    if found.settings:
        table("settings that differ", plain(found.settings))
    else:
        console.print("All settings are the same.\n")
    if found.versions:
        table("versions that differ", plain(found.versions))
    table("figures", {name: _cells(name, values) for name, values in found.figures.items()})
    for note in found.notes:
        console.print(f"note: {note}\n", style="yellow", markup=False, highlight=False, soft_wrap=True)


_FORMS: dict[str, Callable[[Any], str]] = {
    "first held-out loss": lambda value: f"{value:.4f}",
    "last held-out loss": lambda value: f"{value:.4f}",
    "best held-out loss": lambda value: f"{value:.4f}",
    "training loss": lambda value: f"{value:.4f}",
    "tokens/s": lambda value: f"{value:,.0f}",
    "peak memory": lambda value: f"{value:.1f} GiB",
    "time": duration,
}
_LOWER_IS_BETTER = ("last held-out loss", "best held-out loss")


def _cells(name: str, values: Sequence[Any]) -> list[Rich]:
    """The figures of each run; the best held-out loss in green."""
    form = _FORMS.get(name, lambda value: f"{value:,}" if isinstance(value, int) else visible(str(value)))
    cells = [Rich(MISSING if value is None else form(value)) for value in values]
    known = [value for value in values if value is not None]
    if name in _LOWER_IS_BETTER and len(set(known)) > 1:
        cells[values.index(min(known))].stylize("bold green")
    return cells


def _print_curves(console: Console, names: Sequence[str], runs: Sequence[Recorded], axis: str) -> None:
    held = [series(run.events, "eval", "loss", axis) for run in runs]
    losses = [smoothed(series(run.events, "step", "loss", axis)) for run in runs]
    if not any(held) and not any(losses):
        return
    console.print(names_line(console, [visible(name) for name in names]), soft_wrap=True, highlight=False)
    print_chart(console, "held-out loss", held, AXES[axis])
    print_chart(console, "training loss, smoothed", losses, AXES[axis])
