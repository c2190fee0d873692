"""Planned against measured: said once, of the steps that are no longer the first."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tunesmith.contracts.events import Compared, Event, Saved, Stepped
from tunesmith.training.console import ConsoleView
from tunesmith.training.foresight import FIRST, LAST, Forecast, Foresight

GIB = 2**30


def step(number: int, speed: float) -> Stepped:
    return Stepped(
        step=number, epoch=0.0, loss=1.0, grad_norm=1.0, learning_rate=1.0, tokens=1, supervised_tokens=1,
        tokens_per_second=speed, supervised_tokens_per_second=speed, seconds=1.0, memory_gib=1.0, loss_scale=1.0,
        applied=True,
    )  # fmt: skip


def test_the_first_steps_are_compared_with_the_plan_once():
    said: list[Event] = []
    foresight = Foresight(Forecast(30 * GIB, 1000.0), said.append, lambda: (31.0, 33.0))
    speeds = [1.0] * (FIRST - 1) + [900.0, 910.0, 920.0, 5000.0] + [1e6] * 4
    for number, speed in enumerate(speeds):
        foresight.on_event(Saved(step=number, path="", seconds=0.0))
        foresight.on_event(step(100 + number, speed))
        assert len(said) == (number + 1 >= LAST)
    assert said == [
        Compared(
            step=100 + LAST - 1, planned_gib=30.0, measured_gib=31.0, reserved_gib=33.0,
            planned_tokens_per_second=1000.0, measured_tokens_per_second=915.0,
        )
    ]  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
def test_the_comparison_is_a_line(terminal):
    page = io.StringIO()
    with ConsoleView(Console(file=page, force_terminal=terminal, width=200)) as view:
        view.on_event(
            Compared(
                step=6, planned_gib=30.0, measured_gib=31.5, reserved_gib=33.0,
                planned_tokens_per_second=12_000.0, measured_tokens_per_second=11_500.0,
            )
        )  # fmt: skip
    line = "planned and measured: 30.0 and 31.5 GiB (+5.0%, 33.0 reserved), 12,000 and 11,500 tokens/s"
    assert line in page.getvalue()
