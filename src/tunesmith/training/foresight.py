"""What a run's plan foresaw, held against what its first steps take."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tunesmith.contracts.events import Compared, Event, Stepped

FIRST, LAST = 3, 6
"""Steps of this process that are measured: kernels are compiled and graphs recorded before."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a plan says of every step.

    Attributes:
        peak_bytes: the most that is allocated on the device.
        tokens_per_second: of a step.
    """

    peak_bytes: int
    tokens_per_second: float


def reserved_gib(device: torch.device) -> float:
    """Peak of what the allocator of a CUDA device held for tensors, in GiB."""
    return torch.cuda.max_memory_reserved(device) / 2**30


class Foresight:
    """Observer that compares once, after `LAST` steps of this process.

    Args:
        forecast: of the plan.
        emit: takes the comparison.
        reserved: peak of reserved memory in GiB; that of allocated memory stands in the events.
    """

    def __init__(
        self, forecast: Forecast, emit: Callable[[Event], None], reserved: Callable[[], float]
    ) -> None:
        self._forecast, self._emit, self._reserved = forecast, emit, reserved
        self._speeds: list[float] = []
        self._steps = 0

    def on_event(self, event: Event) -> None:
        """Count steps; the last of the first ones gives the comparison."""
        if not isinstance(event, Stepped):
            return
        self._steps += 1
        if FIRST <= self._steps <= LAST:
            self._speeds.append(event.tokens_per_second)
        if self._steps != LAST:
            return
        self._emit(
            Compared(
                step=event.step,
                planned_gib=self._forecast.peak_bytes / 2**30,
                measured_gib=event.memory_gib,
                reserved_gib=self._reserved(),
                planned_tokens_per_second=self._forecast.tokens_per_second,
                measured_tokens_per_second=statistics.median(self._speeds),
            )
        )
