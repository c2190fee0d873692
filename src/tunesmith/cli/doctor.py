"""`tunesmith doctor`: what the machine has, what a run would use and why, and what is missing, as a table."""

from __future__ import annotations

import json
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.config.doctor import Diagnosis, examine
from tunesmith.config.doctor_row import State

_MARKS: dict[State, tuple[str, str]] = {
    "good": ("ok", "green"),
    "note": ("note", "yellow"),
    "missing": ("-", "dim"),
    "broken": ("BROKEN", "bold red"),
    "unknown": ("?", "yellow"),
}
"""What stands in front of a row, and its style."""


def diagnose(run_file: str | None, *, as_json: bool, console: Console) -> bool:
    """Look at everything and print it; whether training is possible.

    Args:
        run_file: the run that is asked about; None is any run.
        as_json: print JSON instead of the table for people.
        console: where the table goes; a word on the waiting goes to standard error.
    """
    with Console(stderr=True).status("looking at this machine"):
        diagnosis = examine(run_file)
    if as_json:
        print(json.dumps(diagnosis.to_json(), indent=2))
    else:
        _print_table(diagnosis, console)
    return diagnosis.possible


def _print_table(diagnosis: Diagnosis, console: Console) -> None:
    for section, rows in groupby(diagnosis.rows, key=lambda row: row[0].section):
        console.print(Text(section, style="bold"))
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(no_wrap=True, min_width=6)
        table.add_column(no_wrap=True, min_width=21)
        table.add_column(overflow="fold")
        for check, finding in rows:
            mark, style = _MARKS[finding.state]
            said = Text(finding.value)
            if finding.advice:
                said.append(("; " if section == "optional" else "\n") + finding.advice, "dim")
            table.add_row(Text(mark, style), Text(check.name), said)
        console.print(table)
        console.print()
    console.print(Text(diagnosis.sentence, "bold" if diagnosis.possible else "bold red"), soft_wrap=True)
