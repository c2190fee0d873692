"""Curves in a terminal: dots of braille characters in colours, or letters where there are none.

Rejected: a plotting library for terminals. It is a dependency for sixty lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.console import Console
from rich.text import Text as Rich

from tunesmith.export.curves import Point, thinned
from tunesmith.export.line_chart import figure

COLORS = (
    "bright_blue",
    "orange3",
    "green3",
    "magenta",
    "red",
    "cyan",
    "yellow3",
    "purple",
    "grey62",
    "pink1",
)
_HEIGHT, _LABEL, _MOST_WIDTH = 14, 9, 100
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of the eight dots of a braille character, by column and row."""


def look(console: Console) -> tuple[bool, int]:
    """Whether curves can be told apart by colour here, and how wide a chart is."""
    fits = (console.encoding or "").lower().startswith("utf")
    return console.color_system is not None and fits, max(30, min(console.width, _MOST_WIDTH))


def print_chart(console: Console, title: str, curves: Sequence[Sequence[Point]], axis: str) -> None:
    """Draw curves over each other; the first one has the first colour, or the letter a.

    Args:
        curves: of each run its points, which may be none.
        axis: what they run over.
    """
    points = [point for curve in curves for point in curve]
    if not points:
        return
    dots, width = look(console)
    columns = width - _LABEL - 1
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high, start, end = min(ys), max(ys), min(xs), max(xs)
    fine = (columns * 2, _HEIGHT * 4) if dots else (columns, _HEIGHT)
    cells: dict[tuple[int, int], tuple[int, int]] = {}  # (row, column) to the dots there and whose they are
    for number, curve in enumerate(curves):
        places = [
            (
                round((x - start) / ((end - start) or 1) * (fine[0] - 1)),
                round((high - y) / ((high - low) or 1) * (fine[1] - 1)),
            )
            for x, y in thinned(curve, 2000)
        ]
        for x, y in _line(places):
            cell = (y // 4, x // 2) if dots else (y, x)
            before = cells.get(cell, (0, number))[0]
            cells[cell] = (before | _DOTS[x % 2][y % 4] if dots else 0, number)
    console.print(Rich(title, style="bold"))
    for row in range(_HEIGHT):
        value = high - (high - low) * row / (_HEIGHT - 1)
        label = figure(value) if row % 4 == 0 or row == _HEIGHT - 1 else ""
        line = Rich(f"{label:>{_LABEL - 1}} ┤" if dots else f"{label:>{_LABEL - 1}} |", style="dim")
        for column in range(columns):
            line.append(*_cell(cells.get((row, column)), dots))
        line.rstrip()
        console.print(line, soft_wrap=True, highlight=False)
    room = columns - len(figure(start)) - len(axis)
    console.print(
        Rich(f"{' ' * (_LABEL + 1)}{figure(start)} {axis:^{len(axis)}}{figure(end):>{room - 1}}", style="dim")
    )


def _cell(cell: tuple[int, int] | None, dots: bool) -> tuple[str, str]:
    if cell is None:
        return " ", ""
    bits, number = cell
    return (
        chr(0x2800 + bits) if dots else chr(ord("a") + number % 26)
    ), f"not dim {COLORS[number % len(COLORS)]}"


def _line(places: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """The dots of a line through places."""
    found = set(places)
    for (x, y), (next_x, next_y) in pairwise(places):
        many = max(abs(next_x - x), abs(next_y - y))
        for number in range(1, many):
            found.add((x + round((next_x - x) * number / many), y + round((next_y - y) * number / many)))
    return found


def names_line(console: Console, names: Sequence[str]) -> Rich:
    """Which colour, or letter, is which run."""
    dots, _ = look(console)
    line = Rich()
    for number, name in enumerate(names):
        mark = "●" if dots else f"{chr(ord('a') + number % 26)}:"
        line.append(f"{mark} ", style=COLORS[number % len(COLORS)]).append(f"{name}   ")
    return line
