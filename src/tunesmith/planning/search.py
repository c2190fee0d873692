"""The fastest policies of layers that move nothing to the host, under a room: see `solver`. Torch-free."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from operator import itemgetter

from tunesmith.planning.frame import Frame, Prefix, Way
from tunesmith.planning.policies import UNPACKED

Chain = tuple[str, "Chain"] | None
"""Policies of the layers so far, the last one first."""
State = tuple[float, float, Chain]
"""(bytes kept so far, seconds so far, how)."""

ROUNDING = 1e-12
"""Sums of seconds depend on their order by less than this share."""


class Search:
    """Layers that move nothing, after a prefix of such as do.

    Args:
        room: bytes for everything that a step makes, and for weights that are held unpacked.
        unpacked: how many layers hold them, the last ones; None for any, counted with what the layer keeps.
    """

    def __init__(self, frame: Frame, room: int, unpacked: int | None = 0) -> None:
        self._frame, start = frame, frame.count - (unpacked or 0)
        weights = (frame.ways[kind][UNPACKED[0]].unpacked for kind in frame.kinds[start:])
        self._room = room - sum(weights)
        self._kinds = [_device_ways(ways, None if unpacked is None else False) for ways in frame.ways]
        if unpacked:
            self._kinds += [_device_ways(ways, True) for ways in frame.ways]
        self._places = [kind + (n >= start) * len(frame.ways) for n, kind in enumerate(frame.kinds)]
        self._ways = [self._kinds[place] for place in self._places]
        last = frame.count - 1
        least = min(way.backward for _, way in self._ways[last])
        # all layers hold what they keep at the head, and when the last one goes backward
        self._most = self._room - max(frame.around, frame.backward[last] + least)
        slopes = sorted({slope for ways in self._kinds for slope in _slopes(ways)})
        self._tails = {slope: self._sums(_priced(slope)) for slope in slopes}
        self._least_kept = self._sums(_priced(1.0, 0.0))
        self._longest = [-seconds for seconds in self._sums(_priced(0.0, -1.0))]

    def _sums(self, value: Callable[[Way], float]) -> list[float]:
        """For each layer the sum of the least value of it and of those behind it, and 0 at the end."""
        least = [min(value(way) for _, way in ways) for ways in self._kinds]
        sums = [0.0]
        for place in reversed(self._places):
            sums.append(sums[-1] + least[place])
        return sums[::-1]

    def _tightest(self, kept: float, place: int) -> tuple[float, float]:
        """(bound of the layers from a place on, the slope at which it is that tight)."""
        left = self._most - kept
        return max((tail[place] - slope * left, slope) for slope, tail in self._tails.items())

    def bound(self, kept: float, seconds: float, place: int) -> float:
        """Seconds of all layers that no layout goes below whose layers before a place hold and take so much; infinite
        where none fits."""
        if kept + self._least_kept[place] > self._most:
            return math.inf
        return seconds + self._tightest(kept, place)[0]

    def after(self, prefix: Prefix, limit: float) -> tuple[float, list[str]] | None:
        """The fastest layers after a prefix, with the seconds of all; None where none is faster than `limit`."""
        # what the prefix waits for the link and what has not left at its end may not have been in a bound before
        if self.bound(prefix.kept, prefix.seconds, prefix.count) >= limit:
            return None
        bound, slope = self._tightest(prefix.kept, prefix.count)
        spreads = [max(s) - min(s) for s in ([w.seconds for _, w in ways] for ways in self._ways)]
        allowance = max(max(spreads) / 4, 1e-9)
        longest, left = self._longest[prefix.count], limit - prefix.seconds
        target = min(bound + allowance, left)
        while True:
            found = self._within(prefix, slope, target)
            if found is not None and found[0] <= target * (1 + ROUNDING):
                seconds = prefix.seconds + found[0]
                return (seconds, found[1]) if seconds < limit else None
            if target >= min(longest, left):
                return None
            # one that is slower than the target is a solution, and perhaps not the best: some were left out
            allowance *= 2
            target = min(bound + allowance, left) if found is None else min(found[0], left)

    def _within(self, prefix: Prefix, slope: float, target: float) -> tuple[float, list[str]] | None:
        """The fastest layers after a prefix; if there are any that take no more than `target`, it is one of them."""
        frame = self._frame
        states: list[State] = [(prefix.kept, 0.0, None)]
        for number in range(prefix.count, frame.count):
            states = self._next(number, states, slope, target, prefix.leaving(number))
        most = self._room - frame.around
        fitting = [state for state in states if state[0] <= most]
        if not fitting:
            return None
        _, seconds, chain = min(fitting, key=lambda state: (state[1], state[0]))
        return seconds, _unfold(chain)

    def _next(
        self, number: int, states: Sequence[State], slope: float, target: float, leaving: int
    ) -> list[State]:
        """The states after one more layer, those left out that do not fit, are beyond the target, or that another is
        better than.

        Args:
            leaving: bytes of earlier layers that are on their way to the host while it runs forward.
        """
        frame = self._frame
        forward_room = self._room - frame.forward[number] - leaving
        backward_room = self._room - frame.backward[number]
        head_room = self._most - self._least_kept[number + 1]
        # seconds + slope · kept, from which the Lagrangian bound differs by what is the same for all
        most = target + ROUNDING * abs(target) - self._tails[slope][number + 1] + slope * self._most
        found: list[tuple[float, float, str, Chain]] = []
        for name, way in self._ways[number]:
            more, longer = way.kept, way.seconds
            room = min(forward_room - way.forward, backward_room - way.backward - more, head_room - more)
            fitting = states[: bisect_right(states, room, key=itemgetter(0))]
            left = most - longer - slope * more
            found += [
                (kept + more, seconds + longer, name, chain)
                for kept, seconds, chain in fitting
                if seconds + slope * kept <= left
            ]
        found.sort()  # sorted runs, one for each policy; of two that hold and take the same the names differ
        best, optima = math.inf, list[State]()
        for kept, seconds, name, chain in found:
            if seconds < best:
                best = seconds
                optima.append((kept, seconds, (name, chain)))
        return optima


def _priced(slope: float, second: float = 1.0) -> Callable[[Way], float]:
    """What a policy costs where a byte costs `slope`."""
    return lambda way: second * way.seconds + slope * way.kept


def _unfold(chain: Chain) -> list[str]:
    names = []
    while chain is not None:
        name, chain = chain
        names.append(name)
    return names[::-1]


def _device_ways(ways: Mapping[str, Way], unpacked: bool | None) -> list[tuple[str, Way]]:
    """Policies that move nothing, the leanest first: those that hold weights unpacked, or the others, or all with
    these weights among what is kept."""
    found = [(name, way) for name, way in ways.items() if not way.moved]
    if unpacked is None:
        found = [(name, replace(way, kept=way.held)) for name, way in found]
    else:
        found = [(name, way) for name, way in found if (name in UNPACKED) == unpacked]
    return sorted(found, key=lambda item: (item[1].kept, item[1].seconds))


def _slopes(ways: Sequence[tuple[str, Way]]) -> Iterator[float]:
    """Seconds that a byte is worth where the best of two policies changes; 0 is that of room for everything."""
    yield 0.0
    for (_, lean), (_, rich) in combinations(ways, 2):
        if rich.kept > lean.kept and rich.seconds < lean.seconds:
            slope = (lean.seconds - rich.seconds) / (rich.kept - lean.kept)
            least = min(way.seconds + slope * way.kept for _, way in ways)
            if lean.seconds + slope * lean.kept <= least * (1 + ROUNDING):
                yield slope
