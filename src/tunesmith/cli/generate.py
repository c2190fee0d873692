"""`tunesmith generate`: a file of prompts to a file of answers, with progress and what went wrong."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tunesmith.config.find_result import find_result
from tunesmith.contracts.errors import UserError
from tunesmith.contracts.plural import counted
from tunesmith.contracts.visible import one_line

if TYPE_CHECKING:
    from tunesmith.config.answer_file import Asking
    from tunesmith.config.prompt_rows import PromptRow

_LINES = 10
"""Lines of progress in a log."""
_WIDTH = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """What the command was asked for."""

    output: str
    prompts: str
    out: str | None
    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    batch: int
    base: bool
    limit: int | None
    trust_remote_code: bool


class _Lines:
    """Answers on standard output."""

    def write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line, ensure_ascii=False), flush=True)


def generate(options: GenerateOptions, console: Console) -> bool:
    """Answer every prompt.

    Args:
        console: for progress and problems; not the one that answers go to.

    Returns:
        Whether every row could be answered.

    Raises:
        UserError: the result cannot be loaded, the prompts cannot be read, or the file of answers is another's.
    """
    if options.samples > 1 and options.temperature == 0.0:
        raise UserError(
            f"--samples {options.samples} at temperature 0 would give the same answer {options.samples} times.",
            hint="Add --temperature 0.8, or the like.",
        )
    found = find_result(options.output)

    from tunesmith.config.answer_file import AnswerFile, answer_rows, key_of
    from tunesmith.config.load_result import fetched, load_result
    from tunesmith.config.prompt_rows import prompt_rows
    from tunesmith.training.quiet import quiet_libraries

    quiet_libraries()
    asking = _asking(options)
    rows = list(prompt_rows(options.prompts, options.limit))
    with ExitStack() as stack:
        found = fetched(found)
        key = key_of(found, asking)
        file = None
        if options.out is not None:
            file = stack.enter_context(closing(AnswerFile(Path(options.out).expanduser(), key)))
            if rows and file.has_all(rows, options.samples):
                console.print(f"{options.out} holds all answers already.", markup=False, highlight=False)
                return True
        with console.status("loading the model"):
            loaded = load_result(found, trust_remote_code=options.trust_remote_code)
        if options.base:
            with loaded.base_only():
                pass  # refused now, and not at the first batch
        view = stack.enter_context(_View(console, sum(row.problem is None for row in rows) * options.samples))
        if file is not None and file.done:
            view.say(f"{options.out}: {counted(len(file.done), 'answer')} there already")
        for event in answer_rows(loaded, rows, asking, file or _Lines(), key, file):
            if isinstance(event, int):
                view.advance(event)
            else:
                view.bad(event)
    if view.failed:
        console.print(
            f"{counted(view.failed, 'row')} of {len(rows):,} could not be answered.",
            style="yellow",
            highlight=False,
        )
    if options.out is not None:
        console.print(f"answers  {options.out}", markup=False, highlight=False, soft_wrap=True)
    return view.failed == 0


def _asking(options: GenerateOptions) -> Asking:
    from tunesmith.config.answer_file import Asking
    from tunesmith.models.generate import Sampling

    return Asking(
        sampling=Sampling(options.max_tokens, options.temperature, options.top_p),
        samples=options.samples,
        seed=options.seed,
        batch=options.batch,
        base=options.base,
    )


class _View:
    """A bar on a terminal, a few lines in a log."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._done = self._said = 0
        self.failed = 0
        self._bar: Progress | None = None

    def __enter__(self) -> _View:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("answering"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str, style: str = "dim") -> None:
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def advance(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif self._done * _LINES // max(1, self._total) > self._said:
            self._said = self._done * _LINES // self._total
            self.say(f"answered {self._done:,} of {self._total:,}")

    def bad(self, row: PromptRow) -> None:
        self.failed += 1
        self.say(f"{row.where}: {one_line(row.problem or '', _WIDTH)}", "yellow")
