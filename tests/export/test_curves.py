"""Series out of events: axes, smoothing, thinning."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.fake_runs import end, evaluated, step
from tunesmith.export.curves import final_loss, series, smoothed, thinned

EVENTS = [
    evaluated(0, 3.0, seconds=2.0),
    step(1, loss=2.0, tokens=10, seconds=1.0),
    step(2, loss="nan", tokens=20, seconds=1.5),
    step(3, loss=1.0, tokens=30, seconds=1.0),
    evaluated(3, 1.5, seconds=2.0),
    end(3, seconds=99.0),
    step(4, loss=0.5, tokens=10, seconds=1.0),
]


def test_values_over_each_axis() -> None:
    assert series(EVENTS, "step", "loss") == [(1, 2.0), (3, 1.0), (4, 0.5)]
    assert series(EVENTS, "step", "loss", "tokens") == [(10, 2.0), (60, 1.0), (70, 0.5)]
    assert series(EVENTS, "step", "loss", "time") == [(3.0, 2.0), (5.5, 1.0), (8.5, 0.5)]
    assert series(EVENTS, "eval", "loss", "time") == [(2.0, 3.0), (7.5, 1.5)]


@pytest.mark.parametrize("value", ["nan", None, True, math.inf, math.nan, [1]])
def test_what_is_no_finite_number_is_no_point(value: object) -> None:
    assert series([step(1, loss=value)], "step", "loss") == []


def test_the_mean_is_that_of_equal_values_and_weighs_the_start_rightly() -> None:
    assert [round(y, 9) for _, y in smoothed([(x, 4.0) for x in range(30)])] == [4.0] * 30
    # two points have weight 1/2: (0.5 * 2 * 0.5 + 0.5 * 4) / (1 - 0.25)
    assert smoothed([(1, 2.0), (2, 4.0)])[-1][1] == pytest.approx(2.5 / 0.75)


def test_the_final_loss_is_the_mean_of_the_last_ten() -> None:
    assert final_loss([step(n, loss=float(n)) for n in range(1, 31)]) == 25.5
    assert final_loss([]) is None


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(2, 50))
def test_thinned_points_are_few_in_order_and_keep_the_extremes(values: list[float], most: int) -> None:
    points = [(float(place), value) for place, value in enumerate(values)]
    found = thinned(points, most)

    assert len(found) <= max(2, most)
    assert found == sorted(set(found) & set(points))
    if len(points) > most:
        assert min(y for _, y in found) == min(values)
        assert max(y for _, y in found) == max(values)
    else:
        assert found == points
