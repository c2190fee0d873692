"""Series out of the events of a run: losses, rates and what else was measured, smoothed and thinned for a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Point = tuple[float, float]
Events = Sequence[dict[str, Any]]

AXES = {"steps": "optimizer step", "tokens": "tokens", "time": "seconds"}
"""What a curve can run over, and how an axis calls it."""

LAST = 10
"""Steps at the end whose mean loss is the final training loss."""


def number(event: dict[str, Any], name: str) -> float | None:
    """A finite number of an event, or None: values that are not finite are text."""
    value = event.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def of_kind(events: Events, kind: str) -> list[dict[str, Any]]:
    """The events of one kind."""
    return [event for event in events if event["event"] == kind]


def places(events: Events, axis: str) -> list[float]:
    """Where each event lies on an axis of `AXES`: steps, tokens trained on, or seconds of training so far."""
    if axis == "steps":
        return [float(event["step"]) for event in events]
    found, tokens, seconds = [], 0.0, 0.0
    for event in events:
        if event["event"] == "step":
            tokens += number(event, "tokens") or 0.0
        if event["event"] != "end":  # its seconds are those of the whole
            seconds += number(event, "seconds") or 0.0
        found.append(tokens if axis == "tokens" else seconds)
    return found


def series(events: Events, kind: str, name: str, axis: str = "steps") -> list[Point]:
    """The finite values of a field over an axis, in order."""
    points = []
    for event, place in zip(events, places(events, axis), strict=True):
        value = number(event, name) if event["event"] == kind else None
        if value is not None:
            points.append((place, value))
    return points


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential mean with the bias of its start removed; it remembers a tenth of the run, at most ten steps."""
    found: list[Point] = []
    mean, weight = 0.0, 1 - 1 / min(10.0, max(2.0, len(points) / 10))
    for count, (place, value) in enumerate(points, start=1):
        mean = weight * mean + (1 - weight) * value
        found.append((place, mean / (1 - weight**count)))
    return found


def final_loss(events: Events) -> float | None:
    """The mean training loss of the last steps, at most ten of them."""
    losses = [value for _, value in series(events, "step", "loss")][-LAST:]
    return sum(losses) / len(losses) if losses else None


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points that look the same: of each stretch its lowest and its highest one stay.

    Args:
        most: 2 or more.
    """
    if len(points) <= most:
        return list(points)
    stretches, kept = most // 2, []
    for number_of in range(stretches):
        first, behind = (len(points) * edge // stretches for edge in (number_of, number_of + 1))
        stretch = range(first, behind)
        ends = {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
        kept += [points[index] for index in sorted(ends)]
    return kept
