"""What a person sees: the live view at any width, the lines of a log, the quiet run, and who gets which."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from tests.support.events import stepped
from tunesmith.config.terminal import asks_for_plain, open_console
from tunesmith.contracts.events import (
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
from tunesmith.training.console import ConsoleView
from tunesmith.training.figures import Figures
from tunesmith.training.live import LiveView, sparkline, view_lines

STARTED = Started(step=0, total_steps=1000, resumed=False, trained_parameters=9, device="cpu")


def _step(number: int, loss: float = 1.0, *, applied: bool = True, seconds: float = 2.0) -> Stepped:
    return stepped(
        number, epoch=number / 238, loss=loss, learning_rate=1.8e-4, tokens_per_second=12345.0, seconds=seconds,
        memory_gib=12.54, memory_now_gib=10.16, applied=applied,
    )  # fmt: skip


def _figures(steps: int = 312) -> Figures:
    now = [0.0]
    figures = Figures(clock=lambda: now[0])
    figures.take(STARTED)
    for number in range(1, steps + 1):
        now[0] += 2.0
        figures.take(_step(number, 3.0 - number / 200))
    figures.take(Evaluated(step=250, loss=1.3301, tokens=9, seconds=1.0))
    figures.take(Evaluated(step=300, loss=1.3456, tokens=9, seconds=1.0))
    return figures


def test_the_view_says_everything_where_there_is_room():
    lines = [line.plain for line in view_lines(_figures(), 100)]
    assert lines[0].startswith("training  ━")
    assert lines[0].endswith(" 312/1,000 · 31% · 0:22:56 left")  # 688 steps of 2 s
    assert lines[1].startswith("loss      1.4600 █")
    assert lines[1].endswith("▁")
    assert lines[2] == "held-out  1.3456 at step 300 · best 1.3301 at step 250"
    assert lines[3] == "speed     12,345 tokens/s · lr 1.80e-04 · epoch 1.31"
    assert lines[4] == "memory    10.2 GiB now · 12.5 GiB peak"
    bar = lines[0].split()[1]
    assert bar.count("━") == int(len(bar) * 0.312)


@pytest.mark.parametrize("width", [1, 9, 12, 20, 35, 59, 60, 61, 100, 300])
def test_no_line_of_the_view_is_wider_than_the_terminal(width):
    lines = view_lines(_figures(), width)
    assert all(line.cell_len <= width for line in lines)
    if width >= 59:  # the curve takes what is left, but has no more than it remembers
        assert lines[1].cell_len == width
        assert "312/1,000" in lines[0].plain
        assert "left" in lines[0].plain
        assert "epoch 1.31" in lines[3].plain


def test_figures_that_do_not_fit_are_left_out_whole():
    assert view_lines(_figures(), 40)[3].plain == "speed     12,345 tokens/s · lr 1.80e-04"
    assert view_lines(_figures(), 30)[3].plain == "speed     12,345 tokens/s"


def test_a_view_before_the_first_step_and_after_the_last():
    now = [0.0]
    figures = Figures(clock=lambda: now[0])
    figures.take(STARTED)
    now[0] = 65.0  # the held-out loss takes its time
    (line,) = view_lines(figures, 60)
    assert line.plain == f"training  {'─' * 20} 0/1,000 · 0% · 0:01:05 so far"
    figures = _figures(1000)
    figures.take(Finished(step=1000, reason="complete", seconds=312.0))
    assert view_lines(figures, 80)[0].plain.endswith("━ 1,000/1,000 · 100% · 0:05:12")
    figures.take(Finished(step=1000, reason="early stop", seconds=312.0))
    assert view_lines(figures, 80)[0].plain.endswith(" · 0:05:12, early stop")


def test_what_goes_on_between_steps_is_said_until_it_is_over():
    figures = Figures()
    figures.take(STARTED)
    figures.take(Underway(step=0, what="held-out loss", done=12, total=78))
    assert view_lines(figures, 80)[1].plain == "now       held-out loss before training 12/78"
    figures.take(Underway(step=0, what="sample answers"))
    assert view_lines(figures, 80)[1].plain == "now       sample answers before training"
    figures.take(Evaluated(step=0, loss=1.0, tokens=9, seconds=1.0))
    assert not any(line.plain.startswith("now") for line in view_lines(figures, 80))
    figures.take(_step(1))
    figures.take(Underway(step=1200, what="held-out loss", done=0, total=78))
    assert view_lines(figures, 80)[1].plain == "now       held-out loss after step 1,200 0/78"


def test_a_log_says_what_goes_on_after_a_minute_of_silence(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("tunesmith.training.console.time.monotonic", lambda: now[0])
    page = io.StringIO()
    view = ConsoleView(Console(file=page, width=100))
    for done in range(5):
        view.on_event(Underway(step=0, what="held-out loss", done=done, total=5))
        now[0] += 25.0
    assert page.getvalue() == "held-out loss before training 3/5\n"


def test_a_terminal_without_blocks_gets_letters():
    lines = view_lines(_figures(), 80, ascii_only=True)
    assert all(line.plain.isascii() for line in lines)
    assert "#" in lines[1].plain


@pytest.mark.parametrize(
    ("values", "width", "shown"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 8, "▁▂▃▄▅▆▇█"),
        ([9, 1, 8], 2, "▁█"),  # the last ones, and their own lowest and highest
        ([5, 5], 9, "▁▁"),
        ([1.0, math.nan, 2.0, math.inf], 9, "▁x█x"),
        ([math.nan], 9, "x"),
        ([1, 2], 0, ""),
        ([], 5, ""),
    ],
)
def test_the_curve(values, width, shown):
    assert sparkline(values, width) == shown


def test_time_left_counts_what_lies_between_steps_and_not_the_first_step():
    now = [0.0]
    figures = Figures(clock=lambda: now[0])
    figures.take(STARTED)
    assert figures.seconds_left() is None
    figures.take(_step(1, seconds=60.0))
    assert figures.seconds_left() == 60.0 * 999
    now[0] = 5.0  # with an evaluation between them
    figures.take(_step(2))
    now[0] = 7.0
    figures.take(_step(3))
    assert figures.seconds_left() == pytest.approx(7.0 / 2 * 997)
    now[0] = 8.5  # within the next step it goes on falling
    assert figures.seconds_left() == pytest.approx(7.0 / 2 * 997 - 1.5)


def test_losses_that_do_not_count_stay_out_of_the_mean():
    figures = Figures()
    for event in (_step(1, 2.0), _step(2, 100.0, applied=False), _step(3, math.nan), _step(4, 1.0)):
        figures.take(event)
    assert figures.loss == pytest.approx(0.8 * 2.0 + 0.2 * 1.0)
    assert list(figures.losses)[:2] == [2.0, 100.0]


def test_the_best_held_out_loss_is_a_finite_one():
    figures = Figures()
    for step, loss in ((0, 3.0), (10, 2.0), (20, math.nan), (30, 2.5)):
        figures.take(Evaluated(step=step, loss=loss, tokens=1, seconds=0.1))
    assert figures.best == (10, 2.0)
    assert figures.held_out == (30, 2.5)


# ---------------------------------------------------------------- on a terminal


def _terminal(width: int = 80, height: int = 30) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None, _environ={}
    )


def _written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_lines_pass_above_the_view_and_its_last_state_stays():
    console = _terminal()
    view = ConsoleView(console)
    view.on_event(STARTED)
    view.on_event(_step(1))
    view.on_event(Sampled(step=1, prompt="What is\n2+2?", answer="It is 4 " * 20, seconds=0.1))
    view.on_event(_step(1000))
    view.on_event(Finished(step=1000, reason="complete", seconds=3.0))
    view.close()
    written = _written(console)
    assert "sample at step 1: What is 2+2?" in written
    answer = [line for line in written.splitlines() if "It is 4" in line]
    assert len(answer) == 2
    assert answer[1].startswith("  "), "wrapped behind the margin"
    assert "\x1b[?25l" in written, "the cursor is hidden while the view is drawn"
    assert written.rindex("\x1b[?25h") > written.rindex("1,000/1,000 · 100% · 0:00:03"), (
        "and shown at the end"
    )


def test_a_terminal_that_became_narrower_is_cleaned_of_the_wrapped_lines():
    """A terminal of 40 columns wraps the bar and the curve twice, and two more lines once."""
    console = _terminal(width=100)
    figures = _figures()
    view = LiveView(figures, console)
    view.start()
    lengths = [line.cell_len for line in view_lines(figures, 99)]
    before = len(_written(console))
    console.width = 40
    view.stop()
    drawn = _written(console)[before:]
    wrapped = sum(math.ceil(length / 40) - 1 for length in lengths)
    assert wrapped == 6
    assert drawn.split("training")[0].count("\x1b[1A") == wrapped + len(lengths) - 1


def test_measurements_of_gradients_are_a_line_of_the_view():
    console = _terminal()
    view = ConsoleView(console)
    view.on_event(STARTED)
    view.on_event(_step(1))
    view.on_event(Measured(step=1, values={"noise_scale": 1234.0, "noise_scale_in_batches": 2.0}))
    view.close()
    assert "gradients noise scale 1,234 supervised tokens" in _written(console)


# ---------------------------------------------------------------- in a log


def _log(events: list[Event], *, quiet: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=40, force_terminal=False)
    view = ConsoleView(console, quiet=quiet)
    for event in events:
        view.on_event(event)
    view.close()
    return _written(console).splitlines()


EVENTS: list[Event] = [
    Started(step=2, total_steps=100, resumed=True, trained_parameters=9, device="cpu"),
    *(_step(number, 1.5) for number in range(3, 13)),
    Evaluated(step=12, loss=1.25, tokens=9, seconds=0.1),
    Sampled(step=12, prompt="[red]Say[/] hi.\n", answer="[bold]Hi.\x1b[31m\nBye.", seconds=0.1),
    Sampled(step=12, prompt="p" * 200, answer="", seconds=0.1),
    Saved(step=12, path="runs/first/checkpoints/step-00000012", seconds=0.1),
    Warned(step=12, message="careful " * 10),
    Finished(step=12, reason="time", seconds=9.0),
]


def test_a_log_has_whole_lines_and_no_control_codes():
    lines = _log(EVENTS)
    assert lines[0] == "Going on after step 2 of 100."
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == [
        "3/100",
        "5/100",
        "10/100",
    ]  # the first, and every twentieth
    assert steps[0].startswith(
        "step 3/100 · loss 1.500 · lr 1.80e-04 · 12,345 tokens/s · 12.5 GiB · 0:03:14 left"
    )
    assert "held-out loss at step 12: 1.2500" in lines
    assert "sample at step 12: [red]Say[/] hi." in lines
    assert "  [bold]Hi.␛[31m" in lines, "text of the model does not steer the terminal"
    assert "  Bye." in lines
    assert any(line.endswith("p…") and len(line) < 130 for line in lines)
    assert "  (nothing)" in lines
    assert "checkpoint runs/first/checkpoints/step-00000012" in lines
    assert "warning: " + "careful " * 10 in lines
    assert not any("\x1b" in line for line in lines)


def test_a_slow_run_says_something_every_minute(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tunesmith.training.console.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    view = ConsoleView(console)
    view.on_event(Started(step=0, total_steps=10_000, resumed=False, trained_parameters=9, device="cpu"))
    for number in range(1, 8):
        now[0] += 25.0
        view.on_event(_step(number))
    steps = [line.split()[1] for line in _written(console).splitlines()]
    assert steps == ["1/10000", "4/10000", "7/10000"]


def test_a_quiet_run_prints_warnings_only():
    assert _log(EVENTS, quiet=True) == ["warning: " + "careful " * 10]
    console = _terminal()
    view = ConsoleView(console, quiet=True)
    for event in EVENTS:
        view.on_event(event)
    view.close()
    assert _written(console).splitlines()[0].startswith("warning: careful")
    assert "training" not in _written(console)


def test_an_event_of_an_unknown_kind_is_passed_over():
    class Other(Event):
        kind = "other"

    assert _log([Other(step=1)]) == []


# ---------------------------------------------------------------- who gets which


@pytest.mark.parametrize(
    ("environment", "plain"),
    [
        ({"TERM": "xterm-256color"}, False),
        ({"TERM": "dumb"}, True),
        ({"CI": "true"}, True),
        ({"CI": "false"}, False),
        ({"CI": ""}, False),
        ({"NO_COLOR": "1"}, True),
        ({"NO_COLOR": ""}, False),
        ({}, False),
    ],
)
def test_the_environment_asks_for_plain_lines(environment, plain):
    assert asks_for_plain(environment) is plain


def test_plain_is_plain_also_on_a_terminal(monkeypatch):
    for name in ("CI", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert open_console().is_terminal
    assert not open_console(plain=True).is_terminal
    assert open_console(plain=True).color_system is None
    monkeypatch.setenv("CI", "1")
    assert not open_console().is_terminal
