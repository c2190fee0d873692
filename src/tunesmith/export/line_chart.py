"""Curves as SVG inside a page: axes with round numbers, values when the pointer rests on a step, no script.

Rejected: a plotting library in the page. It would be a script of megabytes in each report; and a picture of
matplotlib, which is no text, has no values to point at and does not follow the dark scheme.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tunesmith.export.curves import Point, thinned
from tunesmith.export.page import escape

MOST_POINTS, _MOST_SPOTS = 1000, 160
"""Points of a curve, and places where values can be pointed at."""
_LARGE, _SMALL = (720, 240), (430, 200)
"""Width and height; two small charts stand beside each other."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 36


@dataclass(frozen=True, slots=True)
class Line:
    """A curve.

    Attributes:
        name: what it is, in the legend and beside its values.
        look: class of the style sheet: `raw`, `smooth`, `held`.
        points: in the order of their places.
        dots: mark each point.
    """

    name: str
    look: str
    points: Sequence[Point]
    dots: bool = False


def figure(value: float) -> str:
    """A number with about four digits that count: 1.234, 12,340, 2.0e-4, 1.2M."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6:
        return f"{value / 1e9:.3g}G" if size >= 1e9 else f"{value / 1e6:.3g}M"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 1e-3:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def round_numbers(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two numbers, about as many as asked for."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Numbers of a logarithmic axis: powers of ten, with 2 and 5 times them where it is short."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    found = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    found = [value for value in found if low * 0.999 <= value <= high * 1.001]
    return found[:: max(1, -(-len(found) // 7))]


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to places on the paper."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(self.low), math.log(self.high), math.log(value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def _range(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    # a curve near zero begins at zero, so that its height tells its size
    return (0.0 if 0 <= low < 0.35 * high else low - room), high + room


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    unit: str = "",
    small: bool = False,
    may_be_log: bool = False,
) -> str:
    """Curves over optimizer steps, with a legend where there are several; empty where there is nothing to draw.

    Args:
        title: what is drawn, written above.
        unit: what the values are measured in.
        small: half as wide.
        may_be_log: a logarithmic scale where the values span more than two powers of ten.
    """
    lines = [replace(line, points=thinned(line.points, MOST_POINTS)) for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    log = may_be_log and min(ys) > 0 and max(ys) / min(ys) > 100
    x_low, x_high = min(xs), max(xs)
    width, height = _SMALL if small else _LARGE
    to_x = _Scale(x_low, x_high if x_high > x_low else x_low + 1, _LEFT, width - _RIGHT)
    to_y = _Scale(*_range(ys, log=log), height - _BOTTOM, _TOP, log)
    drawn = [*_axes(to_x, to_y), *(_curve(line, to_x, to_y) for line in lines), *_spots(lines, to_x, to_y)]
    key = (
        "".join(f'<i class="{line.look}"></i>{escape(line.name)}' for line in lines) if len(lines) > 1 else ""
    )
    measured = ", ".join(part for part in (unit, "logarithmic" if log else "") if part)
    said = f' <span class="faint">{escape(measured)}</span>' if measured else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{said}<span class="key">{key}</span></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{''.join(drawn)}</svg></figure>"
    )


def _axes(to_x: _Scale, to_y: _Scale) -> list[str]:
    left, right, bottom = to_x.start, to_x.end, to_y.start
    drawn = []
    ticks: Callable[[float, float], list[float]] = _powers if to_y.log else round_numbers
    for value in ticks(to_y.low, to_y.high):
        y = to_y(value)
        drawn.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text class="tall" x="{left - 7}" y="{y + 4:.1f}">{figure(value)}</text>')
    for value in round_numbers(to_x.low, to_x.high, round((right - left) / 80)):
        if value == round(value):  # there is no half a step
            drawn.append(f'<text x="{to_x(value):.1f}" y="{bottom + 15}">{figure(value)}</text>')
    drawn.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    drawn.append(f'<text class="unit" x="{(left + right) / 2}" y="{bottom + 32}">optimizer step</text>')
    return drawn


def _curve(line: Line, to_x: _Scale, to_y: _Scale) -> str:
    places = [(to_x(x), to_y(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline class="{line.look}" points="{path}"/>'
    if line.dots or len(places) == 1:
        drawn += "".join(f'<circle class="{line.look}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places)
    return drawn


def _spots(lines: Sequence[Line], to_x: _Scale, to_y: _Scale) -> list[str]:
    """Stripes over the picture that show the values behind them, and a line, where the pointer rests."""
    places = sorted({x for line in lines for x, _ in line.points})
    places = places[:: -(-len(places) // _MOST_SPOTS)]
    at = [to_x(place) for place in places]
    edges = [to_x.start, *((left + right) / 2 for left, right in pairwise(at)), to_x.end]
    top, bottom = to_y.end, to_y.start
    drawn = []
    for place, x, (left, right) in zip(places, at, pairwise(edges), strict=True):
        values = [f"{line.name} {figure(value)}" for line in lines if (value := _at(line, place)) is not None]
        box = f'x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{bottom - top}"'
        drawn.append(
            f'<g class="spot"><rect {box}/><line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>'
            f"<title>step {place:,.0f}: {escape(', '.join(values))}</title></g>"
        )
    return drawn


def _at(line: Line, place: float) -> float | None:
    """The value of a curve at a place, or the last one before it."""
    behind = bisect_right(line.points, place, key=lambda point: point[0])
    return line.points[behind - 1][1] if behind else None
