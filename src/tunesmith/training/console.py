"""What a person sees while a run trains: a progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.text import Text

from tunesmith.contracts.events import Evaluated, Event, Finished, Saved, Started, Stepped, Warned

_SMOOTHING = 0.8


class _TimeLeft(ProgressColumn):
    """Time left from the mean seconds of the steps so far; rich's own estimate forgets slow steps too fast."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return Text("--:-- left" if left is None else f"{timedelta(seconds=round(left))} left", style="cyan")


class ConsoleView:
    """Observer that prints. Close it (or use it as a context manager) when the run ends.

    Args:
        console: where to print.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._loss: float | None = None
        self._rate: float | None = None
        self._first_step = self._total = 0
        self._train_seconds = 0.0
        self._handlers: dict[type[Event], Callable[..., None]] = {
            Started: self._started,
            Stepped: self._stepped,
            Evaluated: self._evaluated,
            Saved: self._saved,
            Warned: self._warned,
            Finished: self._finished,
        }

    def __enter__(self) -> ConsoleView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def on_event(self, event: Event) -> None:
        """Show an event."""
        self._handlers[type(event)](event)

    def close(self) -> None:
        """Take the progress bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _started(self, event: Started) -> None:
        self._first_step, self._total = event.step, event.total_steps
        if event.resumed:
            self._console.print(f"Going on after step {event.step} of {event.total_steps}.")
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            _TimeLeft(),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "train", total=event.total_steps, completed=event.step, figures=""
        )
        self._progress.start()

    def _stepped(self, event: Stepped) -> None:
        if event.applied:
            self._loss = event.loss if self._loss is None else _mix(self._loss, event.loss)
        self._rate = (
            event.tokens_per_second if self._rate is None else _mix(self._rate, event.tokens_per_second)
        )
        self._train_seconds += event.seconds
        done = event.step - self._first_step
        left = self._train_seconds / done * (self._total - event.step)
        loss = f"{self._loss:.3f}" if self._loss is not None else "–"
        figures = f"loss {loss} · {self._rate:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=event.step, figures=figures, left=left)
        elif event.step == self._total or done == 1 or event.step % max(1, self._total // 20) == 0:
            self._console.print(
                f"step {event.step}/{self._total} · {figures} · {event.memory_gib:.1f} GiB · "
                f"{timedelta(seconds=round(left))} left"
            )

    def _evaluated(self, event: Evaluated) -> None:
        self._console.print(f"held-out loss at step {event.step}: [bold]{event.loss:.4f}[/]", highlight=False)
        for name, loss in event.by_source.items():
            self._console.print(f"  {loss:.4f} {name}", highlight=False, markup=False, soft_wrap=True)

    def _saved(self, event: Saved) -> None:
        self._console.print(
            f"checkpoint {event.path}", style="dim", markup=False, highlight=False, soft_wrap=True
        )

    def _warned(self, event: Warned) -> None:
        self._console.print(
            f"warning: {event.message}", style="yellow", highlight=False, markup=False, soft_wrap=True
        )

    def _finished(self, _event: Finished) -> None:
        self.close()


def _mix(mean: float, value: float) -> float:
    return _SMOOTHING * mean + (1 - _SMOOTHING) * value
