"""Where a command prints: a terminal that can be drawn on, or plain lines.

Torch-free: a mistake in a run file is said before anything heavy is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from rich.console import Console

_NO = ("", "0", "false", "no")


def open_console(*, plain: bool = False) -> Console:
    """A console on standard output.

    Args:
        plain: no control codes, also on a terminal. Without it, that is so where the environment asks for it.
    """
    if plain or asks_for_plain(os.environ):
        return Console(force_terminal=False, no_color=True, highlight=False)
    return Console()


def asks_for_plain(environment: Mapping[str, str]) -> bool:
    """Whether the environment asks for lines without control codes: `CI`, `NO_COLOR` or `TERM=dumb`."""
    return (
        environment.get("CI", "").lower() not in _NO
        or environment.get("NO_COLOR", "") != ""
        or environment.get("TERM", "").lower() in ("dumb", "unknown")
    )
