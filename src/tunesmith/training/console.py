"""What a person sees while a run trains: on a terminal a view that is drawn in place, in a log plain lines.

Lines that stay (held-out losses, sample answers, checkpoints, warnings) are printed in both.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from tunesmith.contracts.events import (
    Compared,
    Evaluated,
    Event,
    Finished,
    Measured,
    Sampled,
    Saved,
    Started,
    Stepped,
    Underway,
    Warned,
)
from tunesmith.contracts.plural import counted
from tunesmith.contracts.visible import one_line, visible
from tunesmith.training.figures import Figures, duration, in_words
from tunesmith.training.live import LiveView
from tunesmith.training.noise_scale import describe

_LINES = 20
"""Lines of steps in the log of a whole run; more where a run is slow."""
_SILENCE = 60.0
"""Seconds without a line of a step in a log, after which the next step, or what goes on between steps, gets one."""
_PROMPT, _ANSWER = 100, 600
"""Characters of a sample that are shown; events.jsonl has all of it."""


_MARGIN = (0, 0, 0, 2)
"""Above, right, below and left of a sample answer, which a terminal wraps behind it."""


class ConsoleView:
    """Observer that prints. Close it (or use it as a context manager) when the run ends.

    Args:
        console: where to print; a terminal gets the live view.
        quiet: print warnings only.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._figures = Figures()
        live = console.is_terminal and not console.is_dumb_terminal and not quiet
        self._live = LiveView(self._figures, console) if live else None
        self._line_at = time.monotonic()
        self._handlers: dict[type[Event], Callable[..., None]] = {
            Started: self._started,
            Stepped: self._stepped,
            Compared: self._compared,
            Evaluated: self._evaluated,
            Measured: self._measured,
            Sampled: self._sampled,
            Underway: self._underway,
            Saved: self._saved,
            Warned: self._warned,
            Finished: self._finished,
        }
        if quiet:
            self._handlers = {Warned: self._warned}

    def __enter__(self) -> ConsoleView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_event(self, event: Event) -> None:
        """Show an event; one of a kind that is not known here is passed over."""
        self._figures.take(event)
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    def close(self) -> None:
        """Leave the last state of the live view on the terminal."""
        if self._live is not None:
            self._live.stop()

    def _print(self, text: str, style: str = "") -> None:
        """A line that is not wrapped in a log, and in which nothing is markup: it may hold text of the data."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def _started(self, event: Started) -> None:
        if event.resumed:
            self._print(
                f"Going on after step {event.step} of {event.total_steps}."
                if event.step < event.total_steps
                else f"All {counted(event.total_steps, 'step')} are done already; to train on, raise their number."
            )
        if self._live is not None:
            self._live.start()

    def _stepped(self, event: Stepped) -> None:
        figures = self._figures
        if self._live is not None:
            return
        now = time.monotonic()
        due = event.step % max(1, figures.total // _LINES) == 0 or now - self._line_at >= _SILENCE
        if not (due or event.step == figures.total or figures.is_first):
            return
        self._line_at = now
        left = figures.seconds_left()
        assert figures.rate is not None, "a step is complete"
        assert left is not None, "a step is complete"
        loss = f"{figures.loss:.3f}" if figures.loss is not None else "–"
        self._print(
            f"step {event.step}/{figures.total} · loss {loss} · lr {event.learning_rate:.2e} · "
            f"{figures.rate:,.0f} tokens/s · {event.memory_gib:.1f} GiB · {duration(left)} left"
        )

    def _compared(self, event: Compared) -> None:
        off = event.measured_gib / event.planned_gib - 1
        self._print(
            f"planned and measured: {event.planned_gib:.1f} and {event.measured_gib:.1f} GiB ({off:+.1%}, "
            f"{event.reserved_gib:.1f} reserved), {event.planned_tokens_per_second:,.0f} and "
            f"{event.measured_tokens_per_second:,.0f} tokens/s",
            style="dim",
        )

    def _evaluated(self, event: Evaluated) -> None:
        self._console.print(f"held-out loss at step {event.step}: [bold]{event.loss:.4f}[/]", highlight=False)
        for name, loss in event.by_source.items():
            self._print(f"  {loss:.4f} {name}")

    def _measured(self, event: Measured) -> None:
        if self._live is not None:
            self._figures.gradients = describe(event.values)
            return
        self._print(f"step {event.step}: {describe(event.values)}")

    def _underway(self, event: Underway) -> None:
        if self._live is not None:
            return
        now = time.monotonic()
        if now - self._line_at >= _SILENCE:
            self._line_at = now
            self._print(in_words(event))

    def _sampled(self, event: Sampled) -> None:
        self._print(f"sample at step {event.step}: {one_line(event.prompt, _PROMPT)}", style="dim")
        answer = visible(event.answer) or "(nothing)"
        answer = answer if len(answer) <= _ANSWER else f"{answer[:_ANSWER]}…"
        if self._console.is_terminal:
            self._console.print(Padding(Text(answer), _MARGIN), highlight=False)
            return
        for line in answer.splitlines():
            self._print(f"  {line}")

    def _saved(self, event: Saved) -> None:
        self._print(f"checkpoint {event.path}", style="dim")

    def _warned(self, event: Warned) -> None:
        self._print(f"warning: {event.message}", style="yellow")

    def _finished(self, _event: Finished) -> None:
        self.close()
