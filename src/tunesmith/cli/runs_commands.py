"""The commands `tunesmith runs`, `tunesmith runs compare` and `tunesmith report`, with their options."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _ListByDefault(TyperGroup):
    """`tunesmith runs FOLDER` is `tunesmith runs list FOLDER`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `list` before words that do not begin with a command."""
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


runs_app = typer.Typer(
    cls=_ListByDefault,
    help="List runs, or compare some of them.",
    epilog="Examples: tunesmith runs; tunesmith runs --sort best; tunesmith runs compare runs/a runs/b",
    rich_markup_mode=None,
)


@runs_app.command("list", epilog="Example: tunesmith runs --state finished --sort best")
def list_command(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="FOLDER", help="Folders of runs; runs/ by default.")
    ] = None,
    sort: Annotated[
        str, typer.Option(help="when, name, last, best, train, steps, speed, memory or time.")
    ] = "when",
    reverse: Annotated[bool, typer.Option("--reverse", help="The other way round.")] = False,
    state: Annotated[
        list[str] | None, typer.Option(help="Only finished, running, interrupted or failed ones.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only models whose name holds this.")] = None,
    data: Annotated[str | None, typer.Option(help="Only data whose name holds this.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", "-n", min=1, help="At most so many.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List runs, newest first.

    What was trained, how it stands, losses, speed, memory and time.
    """
    from rich.console import Console

    from tunesmith.cli.runs import Choice, list_runs

    choice = Choice(
        folders=folders or (),
        states=state or (),
        model=model,
        data=data,
        sort=sort,
        reverse=reverse,
        most=limit,
        as_json=json,
    )
    list_runs(choice, Console())


@runs_app.command(
    "compare", epilog="Example: tunesmith runs compare runs/a runs/b --png curves.png --x tokens"
)
def compare_command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run directories.")],
    x: Annotated[str, typer.Option(help="What curves run over: steps, tokens or time.")] = "steps",
    png: Annotated[str | None, typer.Option(help="Write the curves to this file, too.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show where runs differ, and their curves over each other.

    The settings in which they differ, their final figures, and their curves.
    """
    from rich.console import Console

    from tunesmith.cli.runs import compare_runs

    compare_runs(runs, Console(), axis=x, png=png, as_json=json)


def report_command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory.")],
    out: Annotated[str | None, typer.Option(help="The file; RUN/report.html by default.")] = None,
) -> None:
    """Write the report of a run as one HTML file. Every run writes it when it is over."""
    from rich.console import Console

    from tunesmith.cli.run_report import report_run

    report_run(run, Console(), out=out)
