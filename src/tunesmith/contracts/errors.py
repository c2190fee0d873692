"""The errors that a person can mend, and how they read.

A `UserError` ends a command with one clear sentence and a non-zero exit code; anything else that escapes
is a defect of ours. Torch-free: settings, planning and the CLI import it.
"""

from __future__ import annotations

from dataclasses import dataclass


class UserError(Exception):
    """Something the user can mend: one sentence that says what is wrong, and a hint that says what to do.

    Args:
        message: one sentence, without a trailing newline.
        hint: what to do about it, one sentence; shown on a line of its own.
        exit_code: exit status of the command; 2 for input that was refused before anything started,
            1 for a run that had started.
    """

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 2) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without its full stop; the name of its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a configuration: where, what stood there, what was expected, the fix."""

    where: str
    found: str
    expected: str
    suggestion: str | None = None

    def __str__(self) -> str:
        line = f"{self.where}: {self.found}; {self.expected}"
        return f"{line} ({self.suggestion})" if self.suggestion else line


class ConfigError(UserError):
    """All problems of a configuration at once; nothing was started."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        noun = "1 problem" if count == 1 else f"{count} problems"
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{noun} in the configuration, nothing was started:\n{lines}", exit_code=2)


class DataError(UserError):
    """A data source that cannot be read, or rows that the settings refuse."""


class StorageError(UserError):
    """The disk is full, or a directory cannot be written."""

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 1) -> None:
        super().__init__(message, hint=hint, exit_code=exit_code)


class NonFiniteError(UserError):
    """The loss or a gradient is not finite; the step was not applied."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint, exit_code=1)
