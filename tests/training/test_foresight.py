"""Planned against measured: said once, of the steps that are no longer the first."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.support.events import stepped
from tunesmith.contracts.events import Compared, Event, Saved
from tunesmith.training.console import ConsoleView
from tunesmith.training.foresight import FIRST, LAST, Forecast, Foresight

GIB = 2**30


def test_the_first_steps_are_compared_with_the_plan_once():
    said: list[Event] = []
    foresight = Foresight(Forecast(30 * GIB, 1000.0), said.append, lambda: 33.0)
    speeds = [1.0] * (FIRST - 1) + [900.0, 910.0, 920.0, 5000.0] + [1e6] * 4
    for number, speed in enumerate(speeds):
        foresight.on_event(Saved(step=number, path="", seconds=0.0))
        memory = 31.0 if number + 1 == LAST else 32.0
        foresight.on_event(stepped(100 + number, tokens_per_second=speed, memory_gib=memory))
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
