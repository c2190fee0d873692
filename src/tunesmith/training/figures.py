"""The figures of a running run, gathered from its events: what the live view and the lines of a log both show."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta

from tunesmith.contracts.best import best_step
from tunesmith.contracts.events import Evaluated, Event, Finished, Started, Stepped, Underway

_SMOOTHING = 0.8
_LAST_STEPS = 512
"""Losses that are remembered for the curve; no terminal is wider."""


class Figures:
    """Takes events in order.

    Args:
        clock: seconds from any beginning.

    Attributes:
        step: optimizer steps that are complete, of `total`.
        loss: smoothed mean of the losses of steps that were applied; None before the first.
        losses: the loss of each of the last steps.
        rate: smoothed tokens per second of the steps.
        last: the last step's event; None before the first.
        held_out: step and loss of the last evaluation.
        best: step and loss of the lowest one.
        gradients: what was measured of the gradients last, in words.
        underway: what goes on between steps; None where that is a step.
        finished: how the run ended, and after how many seconds; None while it goes on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.step = self.total = 0
        self.loss: float | None = None
        self.losses: deque[float] = deque(maxlen=_LAST_STEPS)
        self.rate: float | None = None
        self.last: Stepped | None = None
        self.held_out: tuple[int, float] | None = None
        self.best: tuple[int, float] | None = None
        self.gradients = ""
        self.underway: Underway | None = None
        self.finished: Finished | None = None
        self._steps = 0  # of this process
        self._clock = clock
        # when the first one ended, and the seconds from there to the last
        self._first_at = self._seconds = 0.0
        self._began = self._last_at = clock()
        self._handlers: dict[type[Event], Callable[..., None]] = {
            Started: self._started,
            Stepped: self._stepped,
            Evaluated: self._evaluated,
            Finished: self._ended,
        }

    def take(self, event: Event) -> None:
        """Bring the figures up to date; events that say nothing about them are passed over."""
        self.underway = event if isinstance(event, Underway) else None
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    @property
    def is_first(self) -> bool:
        """Whether the last step was the first of this process."""
        return self._steps == 1

    def seconds_left(self) -> float | None:
        """By the time that the steps so far took, with all that lay between them; None before a step.

        The first one, in which kernels are compiled and memory is fetched, counts only while there is no other.
        """
        if not self._steps:
            return None
        mean = self._seconds / (self._steps - 1) if self._steps > 1 else self._seconds
        since = self._clock() - self._last_at
        return max(0.0, mean * (self.total - self.step) - since)

    def seconds_so_far(self) -> float:
        """Since training began in this process."""
        return self._clock() - self._began

    def _started(self, event: Started) -> None:
        self.step, self.total = event.step, event.total_steps
        self._began = self._clock()

    def _stepped(self, event: Stepped) -> None:
        self.step, self.last = event.step, event
        self._steps += 1
        self._last_at = self._clock()
        if self._steps == 1:
            self._first_at, self._seconds = self._last_at, event.seconds
        else:
            self._seconds = self._last_at - self._first_at
        self.losses.append(event.loss)
        if event.applied and math.isfinite(event.loss):
            self.loss = _mix(self.loss, event.loss)
        self.rate = _mix(self.rate, event.tokens_per_second)

    def _evaluated(self, event: Evaluated) -> None:
        self.held_out = event.step, event.loss
        known = dict([self.best] if self.best is not None else []) | {event.step: event.loss}
        best = best_step(known)
        self.best = None if best is None else (best, known[best])

    def _ended(self, event: Finished) -> None:
        self.finished = event


def in_words(underway: Underway) -> str:
    """What goes on between steps: `held-out loss before training 12/78`."""
    when = f"after step {underway.step:,}" if underway.step else "before training"
    count = f" {underway.done:,}/{underway.total:,}" if underway.total else ""
    return f"{underway.what} {when}{count}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: `0:04:10`."""
    return str(timedelta(seconds=round(seconds)))


def _mix(mean: float | None, value: float) -> float:
    return value if mean is None else _SMOOTHING * mean + (1 - _SMOOTHING) * value
