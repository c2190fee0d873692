"""The live view: a few lines at the foot of a terminal, drawn anew in place while other lines pass above them.

    training  ━━━━━━━━━━━━━━╸─────────────── 312/1,000 · 31% · 0:04:10 left
    loss      1.2345 █▇▆▆▅▅▄▄▃▄▃▃▂▃▂▂▁▂▁▁▂▁▁▁
    held-out  1.3456 at step 300 · best 1.3301 at step 250
    speed     12,345 tokens/s · lr 1.80e-04 · epoch 1.31
    memory    10.2 GiB now · 12.5 GiB peak

Every line is made for the width that the terminal has at that moment: the bar and the curve take what is left, and
figures that do not fit are left out from the right. While something goes on between steps a line says what
(`now       held-out loss before training 12/78`). Rich draws; what it does not know is that a terminal which
becomes narrower wraps the lines that stand there (`_Foot`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from tunesmith.training.figures import Figures, duration, in_words

_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_LABEL = 10
_BAR = (10, 40)
"""Narrowest and widest progress bar."""
_PER_SECOND = 4


def sparkline(values: Iterable[float], width: int, *, ascii_only: bool = False) -> str:
    """The last `width` values as blocks from the lowest to the highest of them; `x` is one that is not finite."""
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    shown = list(values)[-width:] if width > 0 else []
    finite = [value for value in shown if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = high - low

    def block(value: float) -> str:
        if not math.isfinite(value):
            return "x"
        return blocks[round((value - low) / span * (len(blocks) - 1)) if span else 0]

    return "".join(map(block, shown))


def view_lines(figures: Figures, width: int, *, ascii_only: bool = False) -> list[Text]:
    """The lines of the view, none of them longer than `width` cells."""
    dot = " - " if ascii_only else " · "
    lines = [_progress(figures, width, dot, ascii_only)]
    if figures.underway is not None:
        lines.append(_line("now", width, Text(in_words(figures.underway))))
    if figures.losses:
        loss = "–" if figures.loss is None else f"{figures.loss:.4f}"
        curve = sparkline(figures.losses, width - _LABEL - len(loss) - 1, ascii_only=ascii_only)
        lines.append(_line("loss", width, Text.assemble((loss, "bold"), " ", (curve, "blue"))))
    if figures.held_out is not None:
        step, loss_there = figures.held_out
        items = [f"{loss_there:.4f} at step {step:,}"]
        if figures.best is not None and figures.best[0] != step:
            items.append(f"best {figures.best[1]:.4f} at step {figures.best[0]:,}")
        lines.append(_line("held-out", width, _joined(items, width, dot)))
    if figures.last is not None and figures.rate is not None:
        last = figures.last
        speed = [f"{figures.rate:,.0f} tokens/s", f"lr {last.learning_rate:.2e}"]
        lines.append(_line("speed", width, _joined([*speed, f"epoch {last.epoch:.2f}"], width, dot)))
        if figures.gradients:
            lines.append(_line("gradients", width, Text(figures.gradients)))
        memory = [f"{last.memory_now_gib:.1f} GiB now", f"{last.memory_gib:.1f} GiB peak"]
        lines.append(_line("memory", width, _joined(memory, width, dot)))
    return lines


def _progress(figures: Figures, width: int, dot: str, ascii_only: bool) -> Text:
    """The bar with the count of steps, the share that is done and the time that is left."""
    share = figures.step / figures.total if figures.total else 1.0
    items = [f"{figures.step:,}/{figures.total:,}", f"{math.floor(100 * share)}%"]
    left = figures.seconds_left()
    if figures.finished is not None:
        reason = "" if figures.finished.reason == "complete" else f", {figures.finished.reason}"
        items.append(f"{duration(figures.finished.seconds)}{reason}")
    else:
        items.append(
            f"{duration(left)} left" if left is not None else f"{duration(figures.seconds_so_far())} so far"
        )
    room = width - _LABEL - _BAR[0] - 1
    tail = _joined(items, room + _LABEL, dot)
    size = min(_BAR[1], width - _LABEL - tail.cell_len - 1)
    if size < 1:
        return _line("training", width, tail)
    full, rest = ("=", "-") if ascii_only else ("━", "─")
    done = min(size, int(share * size))
    return _line(
        "training", width, Text.assemble((full * done, "green"), (rest * (size - done), "dim"), " ", tail)
    )


def _joined(items: Sequence[str], width: int, dot: str) -> Text:
    """As many of the items as fit behind a label, the first one in any case."""
    text = items[0]
    for item in items[1:]:
        if len(text) + len(dot) + len(item) > width - _LABEL:
            break
        text += dot + item
    return Text(text)


def _line(label: str, width: int, value: Text) -> Text:
    line = Text.assemble((f"{label:<{_LABEL}}", "bold"), value)
    line.no_wrap = True
    line.truncate(width, overflow="crop")
    return line


class _View:
    """What rich draws: the figures of the moment, for the width of the moment.

    Attributes:
        lengths: cells of each line that was drawn last.
    """

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self.lengths: list[int] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # the last column stays free: some terminals wrap behind it
        lines = view_lines(self._figures, max(1, options.max_width - 1), ascii_only=options.ascii_only)
        self.lengths = [line.cell_len for line in lines]
        yield from lines


class _Foot(Live):
    """`Live` that also takes away what a terminal made of its lines when it became narrower.

    Terminals wrap the lines that stand there when they lose columns, so that the view is taller than it was drawn,
    and the cursor has further to go up. Nothing is done where they become wider: each line ended with a line break.
    """

    def __init__(self, view: _View, console: Console) -> None:
        super().__init__(view, console=console, refresh_per_second=_PER_SECOND, redirect_stdout=True)
        self._view = view
        self._drawn_for = console.width

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Put the view below what is printed."""
        width = self.console.width
        wrapped = 0
        if width < self._drawn_for:
            wrapped = sum(max(0, math.ceil(length / width) - 1) for length in self._view.lengths)
        self._drawn_for = width
        up = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)) * wrapped
        return [Control(*up), *super().process_renderables(renderables)]


class LiveView:
    """Draws the figures until it is stopped; their last state stays on the terminal.

    Args:
        figures: what is drawn; brought up to date by whoever takes the events.
        console: a terminal.
    """

    def __init__(self, figures: Figures, console: Console) -> None:
        self._live = _Foot(_View(figures), console)

    def start(self) -> None:
        """Begin to draw."""
        self._live.start(refresh=True)

    def stop(self) -> None:
        """Draw the last state, and leave it there."""
        self._live.stop()
