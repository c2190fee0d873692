"""The fastest way to lay a step out over a card: rows of a micro-batch and a policy for each layer. Torch-free.

With kept bytes k, seconds t and passing bytes f (forward) and b (backward) of layer i under its policy, and room R:

    minimise  Σ t_i   where for every layer  K_i + f_i ≤ R  and  K_i + k_i + b_i ≤ R,   K_i = Σ_{j<i} k_j
                      and at the head        K_L + head ≤ R

Both are what `bytes.timeline` says, moment by moment. Layers go from the first to the last over states (K, seconds):
of two states at one layer, one that holds no less and is no faster can never win. What is left are the Pareto optima,
and they are few, because a state is dropped as well where even the Lagrangian bound of the layers to come,

    seconds so far + Σ min_policy (t + λ k) − λ (R_head − K)

is above a target. The target begins a little above the bound of the whole and is raised until there is a solution; it
is then the best. λ is the slope at which the bound is tightest.

Policies that move tensors to the host take time that depends on their neighbours, so layers that have them are
enumerated: they are the first ones, whose copies have the longest time to come back, under one such policy or two.
After the last of them the others' time is a sum again.

Rejected: a linear program, which gives fractions of layers; and dynamic programming over rounded bytes, which is
exact up to the rounding only and slower.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from tunesmith.planning.bytes import fixed_bytes
from tunesmith.planning.cards import Rates
from tunesmith.planning.facts import ModelFacts
from tunesmith.planning.frame import Frame, Prefix, Way
from tunesmith.planning.request import PlanRequest

Chain = tuple[str, "Chain"] | None
"""Policies of the layers so far, the last one first."""
State = tuple[float, float, Chain]
"""(bytes kept so far, seconds so far, how)."""

ROUNDING = 1e-12
"""Sums of seconds depend on their order by less than this share."""

GRID = 16
"""Steps in which counts of layers are tried where two policies move tensors to the host."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A layout and what it takes.

    Attributes:
        frame: the step, of its size of micro-batch.
        policies: one a layer, from the first to the last.
        seconds: of an optimizer step.
        peak: bytes of the device; host: pinned bytes of the host.
        fits: whether both are within what may be used.
    """

    frame: Frame
    policies: tuple[str, ...]
    seconds: float
    peak: int
    host: int
    fits: bool

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return self.frame.rows


def solve(
    model: ModelFacts, request: PlanRequest, rates: Rates, device_bytes: int, *, beside: int = 0
) -> Solution:
    """The fastest layout within a budget; where there is none, the one that needs the least of the device.

    Args:
        device_bytes: that may be used; what the request says of it does not count here.
        beside: bytes on the device that the model's facts do not tell.
    """
    sizes = request.micro_batches()
    fixed = fixed_bytes(model, request.work)
    standing = fixed.weights + fixed.adapter + fixed.optimizer + fixed.gradients + beside
    best: Solution | None = None
    for rows in reversed(sizes) if standing <= device_bytes else ():  # larger ones are faster where they fit
        frame = Frame(model, request, rows, rates, beside)
        limit = math.inf if best is None else frame.layers_within(best.seconds)
        for policies in _layouts(frame, request, device_bytes - frame.standing, limit):
            found = _solution(frame, policies, device_bytes, request.host_bytes)
            if found.fits and (best is None or _key(found) < _key(best)):
                best = found
    return (
        best
        if best is not None
        else _leanest(Frame(model, request, sizes[0], rates, beside), request, device_bytes)
    )


def _key(solution: Solution) -> tuple[float, int]:
    return solution.seconds, solution.peak


def _solution(frame: Frame, policies: Sequence[str], device_bytes: int, host_bytes: int | None) -> Solution:
    peak, host = frame.peak(policies), frame.host(policies)
    fits = peak <= device_bytes and (host_bytes is None or host <= host_bytes)
    return Solution(frame, tuple(policies), frame.step_seconds(policies), peak, host, fits)


def _leanest(frame: Frame, request: PlanRequest, device_bytes: int) -> Solution:
    """The policy of all layers that needs the least of the device, though it does not fit."""
    names = frame.names if request.policy == "auto" else (request.policy,)
    every = [_solution(frame, (name,) * frame.count, device_bytes, request.host_bytes) for name in names]
    allowed = [one for one in every if request.host_bytes is None or one.host <= request.host_bytes]
    return min(allowed or every, key=lambda one: (one.peak, one.seconds))


# ---------------------------------------------------------------- one size of micro-batch


def _layouts(frame: Frame, request: PlanRequest, room: int, limit: float) -> Iterator[Sequence[str]]:
    """Layouts of which one is the fastest.

    Args:
        room: bytes for everything that a step makes.
        limit: what takes all layers of a micro-batch so many seconds is of no interest.
    """
    if request.policy != "auto":
        yield (request.policy,) * frame.count
        return
    if room < frame.least:
        return
    search = Search(frame, room)
    # what moves nothing is tried first: it may be recorded as CUDA graphs, which the seconds of layers do not tell
    nothing = Prefix(frame)
    if search.bound(nothing) < limit:
        found = search.after(nothing, limit)
        if found is not None:
            limit = found[0]
            yield _lean_first(frame, nothing, found[1], room)
    waiting = [
        (search.bound(prefix), number, prefix)
        for number, prefix in enumerate(_prefixes(frame))
        if request.host_bytes is None or prefix.host <= request.host_bytes
    ]
    heapq.heapify(waiting)
    while waiting and waiting[0][0] < limit:
        bound, _, prefix = heapq.heappop(waiting)
        if not prefix.fits(room):
            continue
        # what the prefix waits for the link is not in the bound
        if bound - prefix.least_seconds + prefix.seconds >= limit:
            continue
        found = search.after(prefix, limit)
        if found is not None:
            limit = found[0]
            yield _lean_first(frame, prefix, found[1], room)


def _lean_first(frame: Frame, prefix: Prefix, rest: Sequence[str], room: int) -> list[str]:
    """The same policies with the leaner ones on the first of layers that are alike, where that fits as well."""
    start, ordered = prefix.count, list(rest)
    for kind in dict.fromkeys(frame.kinds[start:]):
        places = [number - start for number in range(start, frame.count) if frame.kinds[number] == kind]
        ways = frame.ways[kind]
        names = sorted((rest[place] for place in places), key=lambda name: ways[name].kept)
        for place, name in zip(places, names, strict=True):
            ordered[place] = name
    fits = frame.passing_peak([*prefix.policies, *ordered]) <= room
    return [*prefix.policies, *(ordered if fits else rest)]


def _prefixes(frame: Frame) -> Iterator[Prefix]:
    """First layers that move tensors to the host, under one policy or two, the leaner one first."""
    count, ways = frame.count, frame.ways[frame.kinds[0]]
    moving = [name for name in frame.names if ways[name].moved]
    moving.sort(key=lambda name: (ways[name].kept, -ways[name].seconds))
    for name in moving:
        for first in range(1, count + 1):
            yield Prefix(frame, ((name, first),))
    step = -(-count // GRID)
    for lean, rich in combinations(moving, 2):
        for first in range(step, count, step):
            for second in (*range(step, count - first, step), count - first):
                yield Prefix(frame, ((lean, first), (rich, second)))


class Search:
    """Layers that move nothing, after a prefix of such as do.

    Args:
        room: bytes for everything that a step makes.
    """

    def __init__(self, frame: Frame, room: int) -> None:
        self._frame, self._room = frame, room
        self._ways = [_device_ways(frame.ways[kind]) for kind in frame.kinds]
        last = frame.count - 1
        least = min(way.backward for _, way in self._ways[last])
        # all layers hold what they keep at the head, and when the last one goes backward
        self._most = min(room - frame.around, room - frame.backward[last] - least)
        kinds = [_device_ways(ways) for ways in frame.ways]
        slopes = sorted({slope for ways in kinds for slope in _slopes(ways)})
        self._tails = {slope: self._sums(_priced(slope)) for slope in slopes}
        self._least_kept = self._sums(_priced(1.0, 0.0))
        self._longest = [-seconds for seconds in self._sums(_priced(0.0, -1.0))]

    def _sums(self, value: Callable[[Way], float]) -> list[float]:
        """For each layer the sum of the least value of it and of those behind it, and 0 at the end."""
        least = {
            kind: min(value(way) for way in ways.values() if not way.moved)
            for kind, ways in enumerate(self._frame.ways)
        }
        sums = [0.0]
        for kind in reversed(self._frame.kinds):
            sums.append(sums[-1] + least[kind])
        return sums[::-1]

    def _tightest(self, prefix: Prefix) -> tuple[float, float]:
        """(bound of the layers after a prefix, the slope at which it is that tight)."""
        left, place = self._most - prefix.kept, prefix.count
        return max((tail[place] - slope * left, slope) for slope, tail in self._tails.items())

    def bound(self, prefix: Prefix) -> float:
        """Seconds of all layers that no layout with this prefix goes below; infinite where it does not fit."""
        if prefix.kept + self._least_kept[prefix.count] > self._most:
            return math.inf
        return prefix.least_seconds + self._tightest(prefix)[0]

    def after(self, prefix: Prefix, limit: float) -> tuple[float, list[str]] | None:
        """The fastest layers after a prefix, with the seconds of all; None where none is faster than `limit`."""
        bound, slope = self._tightest(prefix)
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
            states = _optima(self._next(number, states, slope, target))
        most = self._room - frame.around
        fitting = [state for state in states if state[0] <= most]
        if not fitting:
            return None
        _, seconds, chain = min(fitting, key=lambda state: (state[1], state[0]))
        return seconds, _unfold(chain)

    def _next(self, number: int, states: Sequence[State], slope: float, target: float) -> Iterator[State]:
        """What one more layer makes of the states, those left out that do not fit or are beyond the target."""
        frame = self._frame
        forward_room = self._room - frame.forward[number]
        backward_room = self._room - frame.backward[number]
        behind = self._tails[slope][number + 1]
        head_room = self._most - self._least_kept[number + 1]
        target += ROUNDING * abs(target)
        for name, way in self._ways[number]:
            room = min(
                forward_room - way.forward, backward_room - way.backward - way.kept, head_room - way.kept
            )
            for kept, seconds, chain in states:
                if kept > room:
                    break  # they are in order
                now, then = kept + way.kept, seconds + way.seconds
                if then + behind - slope * (self._most - now) <= target:
                    yield now, then, (name, chain)


def _priced(slope: float, second: float = 1.0) -> Callable[[Way], float]:
    """What a policy costs where a byte costs `slope`."""
    return lambda way: second * way.seconds + slope * way.kept


def _optima(states: Iterator[State]) -> list[State]:
    """Those that no other is better than, by what they hold."""
    best, optima = math.inf, []
    for state in sorted(states, key=lambda state: (state[0], state[1])):
        if state[1] < best:
            best = state[1]
            optima.append(state)
    return optima


def _unfold(chain: Chain) -> list[str]:
    names = []
    while chain is not None:
        name, chain = chain
        names.append(name)
    return names[::-1]


def _device_ways(ways: Mapping[str, Way]) -> list[tuple[str, Way]]:
    """Policies that move nothing, the leanest first."""
    found = [(name, way) for name, way in ways.items() if not way.moved]
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
