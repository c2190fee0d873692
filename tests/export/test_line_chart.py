"""Curves as SVG: round numbers, what is where, and values to point at."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.export.line_chart import MOST_POINTS, Line, figure, line_chart, round_numbers


def line(points: list[tuple[float, float]], name: str = "loss", **more: bool) -> Line:
    return Line(name, "raw", points, **more)


def polyline(drawn: str) -> list[tuple[float, float]]:
    found = re.search(r'points="([^"]*)"', drawn)
    assert found is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found[1].split())]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.23456, "1.235"), (12340, "12,340"), (2e-4, "2e-4"), (1.25e-5, "1.25e-5"), (1.5e6, "1.5M"),
     (2.5e9, "2.5G"), (-0.5, "-0.5"), (99.5, "99.5")],
)  # fmt: skip
def test_figures(value: float, text: str) -> None:
    assert figure(value) == text


@given(st.floats(-1e5, 1e5), st.floats(1e-4, 1e5), st.integers(3, 9))
def test_round_numbers_lie_between_and_are_evenly_spaced(low: float, width: float, about: int) -> None:
    found = round_numbers(low, low + width, about)
    room = 1e-6 * (abs(low) + width)

    assert 1 <= len(found) <= about + 1
    assert low - room <= found[0]
    assert found[-1] <= low + width + room
    steps = [b - a for a, b in pairwise(found)]
    assert all(math.isclose(each, steps[0], rel_tol=1e-3) for each in steps)


def test_round_numbers_of_a_loss() -> None:
    assert round_numbers(0.93, 2.41) == pytest.approx([1.0, 1.5, 2.0])
    assert round_numbers(0, 300, 8) == [0, 50, 100, 150, 200, 250, 300]


def test_higher_values_are_higher_up_and_later_steps_further_right() -> None:
    (x1, y1), (x2, y2), (x3, y3) = polyline(line_chart("Loss", [line([(1, 2.0), (2, 3.0), (9, 1.0)])]))

    assert x1 < x2 < x3
    assert y2 < y1 < y3
    assert (x2 - x1) * 7 == pytest.approx(x3 - x2, abs=0.5)


def test_values_over_many_powers_get_a_logarithmic_scale_where_that_is_wanted() -> None:
    points = [(1, 0.1), (2, 10.0), (3, 1000.0)]
    drawn = line_chart("Norm", [line(points)], may_be_log=True)
    heights = [y for _, y in polyline(drawn)]

    assert "logarithmic" in drawn
    assert heights[2] < 20  # near the top
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)
    assert "logarithmic" not in line_chart("Rate", [line(points)])
    assert "logarithmic" not in line_chart("Norm", [line([*points, (4, 0.0)])], may_be_log=True)


def test_long_runs_are_thinned_and_their_spikes_stay() -> None:
    points = [(float(n), 9.0 if n == 77_777 else 1.0 + n % 7 / 10) for n in range(100_000)]
    drawn = line_chart("Loss", [line(points)])

    places = polyline(drawn)
    assert len(places) <= MOST_POINTS
    assert min(y for _, y in places) < sorted(y for _, y in places)[1] - 50
    assert len(drawn) < 100_000


def test_values_stand_where_the_pointer_rests() -> None:
    drawn = line_chart(
        "Loss", [line([(1, 2.0), (2, 1.5), (3, 1.25)], "each"), line([(2, 1.75)], "held <out>")]
    )

    assert re.findall(r"<title>([^<]*)</title>", drawn) == [
        "step 1: each 2",
        "step 2: each 1.5, held &lt;out&gt; 1.75",
        "step 3: each 1.25, held &lt;out&gt; 1.75",
    ]
    boxes = [
        (float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)"', drawn)
    ]
    assert all(x + w == pytest.approx(after, abs=0.2) for (x, w), (after, _) in pairwise(boxes))


@pytest.mark.parametrize(
    "points", [[(5, 1.0)], [(5, 0.0), (6, 0.0)], [(0, -2.0), (1, -2.0)], [(3, 1e-30), (4, 1e-30)]]
)
def test_one_point_and_a_flat_curve_are_drawn(points: list[tuple[float, float]]) -> None:
    drawn = line_chart("Loss", [line(points)])

    assert len(polyline(drawn)) == len(points)
    assert "nan" not in drawn
    assert line_chart("Loss", [line([])]) == ""
