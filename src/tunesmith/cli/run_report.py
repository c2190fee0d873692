"""`tunesmith report`: the report of a run, written again from what lies in its directory."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tunesmith.contracts.errors import UserError
from tunesmith.export.run_files import open_run
from tunesmith.export.run_report import write_report


def report_run(folder: str, console: Console, *, out: str | None = None) -> None:
    """Write the report and say where it is.

    Args:
        folder: the run directory.
        out: the file; `report.html` in the run directory by default.

    Raises:
        UserError: there is no such run, or the file cannot be written.
    """
    target = None if out is None else Path(out).expanduser()
    try:
        path = write_report(open_run(Path(folder).expanduser()), target)
    except OSError as error:
        place = target if target is not None else folder
        raise UserError(
            f"The report cannot be written to {place}: {error.strerror or error}.",
            hint="Name a file that can be written, such as --out report.html.",
        ) from None
    console.print(str(path), markup=False, highlight=False, soft_wrap=True)
