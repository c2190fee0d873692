"""`tunesmith.train`: the Python door to what `tunesmith train` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.config.execute import execute
from tunesmith.config.load import load_settings
from tunesmith.config.result import RunResult
from tunesmith.config.terminal import open_console


def train(
    run: str | Path | Mapping[str, Any], *, overrides: Sequence[str] = (), quiet: bool = False
) -> RunResult:
    """Fine-tune as a run file says.

    Args:
        run: a YAML file, or the same structure as a dict.
        overrides: `section.key=value` on top of it.
        quiet: print nothing.

    Returns:
        Where the result lies, and the held-out loss before and after.

    Raises:
        tunesmith.UserError: anything that you can mend, in one sentence; `ConfigError` lists every problem
            of the settings.
    """
    console = Console(quiet=True) if quiet else open_console()
    return execute(load_settings(run, overrides), console)
