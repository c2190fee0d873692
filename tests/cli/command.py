"""Commands called in this process, which is much faster than a process of their own."""

from __future__ import annotations

from tunesmith.cli import main


def exit_code(*words: object) -> int:
    """Run a command as the entry point does."""
    try:
        main.run([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("the entry point always exits")


def succeed(*words: object) -> None:
    """Run a command that must end well."""
    assert exit_code(*words) == 0
