"""The fastest way to lay a step out over a card: rows of a micro-batch and a policy for each layer. Torch-free.

With held bytes k, seconds t and passing bytes f (forward) and b (backward) of layer i under its policy, and room R:

    minimise  Σ t_i   where for every layer  K_i + f_i ≤ R  and  K_i + k_i + b_i ≤ R,   K_i = Σ_{j<i} k_j
                      and at the head        K_L + head ≤ R

Both are what `bytes.timeline` says, moment by moment. Layers go from the first to the last over states (K, seconds):
of two states at one layer, one that holds no less and is no faster can never win. What is left are the Pareto optima,
and they are few, because a state is dropped as well where even the Lagrangian bound of the layers to come,

    seconds so far + Σ min_policy (t + λ k) − λ (R_head − K)

is above a target. The target begins a little above the bound of the whole and is raised until there is a solution; it
is then the best. λ is the slope at which the bound is tightest.

Policies that move tensors to the host take time that depends on their neighbours, so layers that have them are
enumerated: they are the first ones, whose copies have the longest time to come back, under one such policy or two,
the leaner one first. After the last of them the others' time is a sum again, and the bytes that are still on their
way are known. All counts of layers are tried: in steps of a sixteenth, solutions were up to 0.72% slower (450
budgets of 8B and 70B on four cards), and no more than 0.1 s of 80 layers was saved.

Weights that a layer holds unpacked (`policies.UNPACKED`) are there at every moment, and a state knows those of the
layers so far only. They lie on the last layers, where the peak is as well, so what a state knows is the peak all the
same; they are searched for apart, after everything else that moves nothing, and what the walk finds too large after
all is left out.

Rejected: a linear program, which gives fractions of layers; and dynamic programming over rounded bytes, which is
exact up to the rounding only and slower.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from operator import itemgetter

from tunesmith.planning.bytes import fixed_bytes
from tunesmith.planning.cards import Rates
from tunesmith.planning.facts import ModelFacts, embedding_stays
from tunesmith.planning.frame import Frame, Parts, Prefix, Way
from tunesmith.planning.policies import UNPACKED
from tunesmith.planning.request import PlanRequest

Chain = tuple[str, "Chain"] | None
"""Policies of the layers so far, the last one first."""
State = tuple[float, float, Chain]
"""(bytes kept so far, seconds so far, how)."""

ROUNDING = 1e-12
"""Sums of seconds depend on their order by less than this share."""


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
    best: Solution | None = None
    leanest: list[Frame] = []
    for placed in _placements(model, request):
        for frame in _frames(model, placed, rates, device_bytes, beside):
            best = _faster(frame, placed, device_bytes, best)
        leanest.append(frame)  # of the fewest rows
        if best is not None and best.rows == placed.micro_batches()[-1] and _keeps_all(best):
            break  # room is not what it lacks
    return best if best is not None else _leanest(leanest, request, device_bytes)


def _placements(model: ModelFacts, request: PlanRequest) -> list[PlanRequest]:
    """The request with the input embedding in each of the places that it allows."""
    host = replace(request, work=replace(request.work, host_embedding=True))
    if request.embedding == "auto":
        return [request] if embedding_stays(model, request.work) else [request, host]
    return [host if request.embedding == "host" else request]


def _frames(
    model: ModelFacts, request: PlanRequest, rates: Rates, device_bytes: int, beside: int
) -> Iterator[Frame]:
    """The step with each size of micro-batch, larger ones first, which are faster where they fit; with the smallest
    alone where what always stands does not fit."""
    sizes = request.micro_batches()
    fixed = fixed_bytes(model, request.work)
    standing = fixed.weights + fixed.adapter + fixed.optimizer + fixed.gradients + beside
    for rows in reversed(sizes if standing <= device_bytes else sizes[:1]):
        yield Frame(model, request, rows, rates, beside)


def _faster(frame: Frame, request: PlanRequest, device_bytes: int, best: Solution | None) -> Solution | None:
    """The best layout of a frame where it is better than the best of others, else that one."""
    limit = math.inf if best is None else frame.layers_within(best.seconds)
    for policies in _layouts(frame, request, device_bytes - frame.standing, limit):
        found = _solution(frame, policies, device_bytes, request.host_bytes)
        if found.fits and (best is None or _key(found) < _key(best)):
            best = found
    return best


def _keeps_all(solution: Solution) -> bool:
    return set(solution.policies) == {solution.frame.names[0]}


def _key(solution: Solution) -> tuple[float, int]:
    return solution.seconds, solution.peak


def _solution(frame: Frame, policies: Sequence[str], device_bytes: int, host_bytes: int | None) -> Solution:
    peak, host = frame.peak(policies), frame.host(policies)
    fits = peak <= device_bytes and (host_bytes is None or host <= host_bytes)
    return Solution(frame, tuple(policies), frame.step_seconds(policies), peak, host, fits)


def _leanest(frames: Sequence[Frame], request: PlanRequest, device_bytes: int) -> Solution:
    """The policy of all layers that needs the least of the device, though it does not fit."""
    every = [
        _solution(frame, (name,) * frame.count, device_bytes, request.host_bytes)
        for frame in frames
        for name in (frame.names if request.policy == "auto" else (request.policy,))
    ]
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
    search = Search(frame, room, besides=UNPACKED)
    # what moves nothing is tried first: it may be recorded as CUDA graphs, which the seconds of layers do not tell
    found = search.after(Prefix(frame), limit)
    if found is not None:
        limit = found[0]
        yield _lean_first(frame, Prefix(frame), found[1], room)
    if frame.names[0] in UNPACKED:
        found = Search(frame, room).after(Prefix(frame), limit)
        if found is not None:
            limit = found[0]
            yield _lean_first(frame, Prefix(frame), found[1], room)
    host_bytes = math.inf if request.host_bytes is None else request.host_bytes - frame.table
    candidates = enumerate(_candidates(frame, search, host_bytes))
    waiting = [(bound, number, parts) for number, (bound, parts) in candidates if bound < limit]
    heapq.heapify(waiting)
    while waiting and waiting[0][0] < limit:
        prefix = Prefix(frame, heapq.heappop(waiting)[2])
        found = search.after(prefix, limit) if prefix.fits(room) else None
        if found is not None:
            limit = found[0]
            yield _lean_first(frame, prefix, found[1], room)


def _lean_first(frame: Frame, prefix: Prefix, rest: Sequence[str], room: int) -> list[str]:
    """The same policies with the leaner ones first: on all layers where that takes no longer, else on those that are
    alike, where it fits as well."""
    start = prefix.count
    kinds = frame.kinds[start:]
    first = [*prefix.policies, *rest]
    longest = frame.layers_seconds(first) * (1 + ROUNDING)
    for alike in ((0,) * len(kinds), kinds):
        ordered = list(rest)
        for kind in dict.fromkeys(alike):
            places = [place for place, other in enumerate(alike) if other == kind]
            held = {name: way.held for name, way in frame.ways[kinds[places[0]]].items()}
            names = sorted((rest[place] for place in places), key=held.__getitem__)
            for place, name in zip(places, names, strict=True):
                ordered[place] = name
        policies = [*prefix.policies, *ordered]
        fits = frame.unpacked(policies) + frame.passing_peak(policies) <= room
        if fits and frame.layers_seconds(policies) <= longest:
            return policies
    return first


def _candidates(frame: Frame, search: Search, host_bytes: float) -> Iterator[tuple[float, Parts]]:
    """First layers that move tensors to the host, under one policy or two, the leaner one first; each with seconds
    that no layout goes below which begins so."""
    count, sums = frame.count, frame.sums
    for lean, first in product(frame.moving, range(1, count + 1)):
        kept, moved, seconds = (values[first] for values in sums[lean])
        if moved <= host_bytes:
            yield search.bound(kept, seconds, first), ((lean, first),)
    for (lean, rich), first in product(combinations(frame.moving, 2), range(1, count)):
        of_rich = sums[rich]
        kept, moved, seconds = (sums[lean][what][first] - of_rich[what][first] for what in range(3))
        for end in range(first + 1, count + 1):
            if moved + of_rich[1][end] > host_bytes:
                break
            bound = search.bound(kept + of_rich[0][end], seconds + of_rich[2][end], end)
            yield bound, ((lean, first), (rich, end - first))


class Search:
    """Layers that move nothing, after a prefix of such as do.

    Args:
        room: bytes for everything that a step makes, and for weights that are held unpacked.
        besides: policies that no layer is to have.
    """

    def __init__(self, frame: Frame, room: int, besides: Sequence[str] = ()) -> None:
        self._frame, self._room = frame, room
        self._kinds = [_device_ways(ways, besides) for ways in frame.ways]
        self._ways = [self._kinds[kind] for kind in frame.kinds]
        last = frame.count - 1
        least = min(way.backward for _, way in self._ways[last])
        # all layers hold what they keep at the head, and when the last one goes backward
        self._most = room - max(frame.around, frame.backward[last] + least)
        slopes = sorted({slope for ways in self._kinds for slope in _slopes(ways)})
        self._tails = {slope: self._sums(_priced(slope)) for slope in slopes}
        self._least_kept = self._sums(_priced(1.0, 0.0))
        self._longest = [-seconds for seconds in self._sums(_priced(0.0, -1.0))]

    def _sums(self, value: Callable[[Way], float]) -> list[float]:
        """For each layer the sum of the least value of it and of those behind it, and 0 at the end."""
        least = [min(value(way) for _, way in ways) for ways in self._kinds]
        sums = [0.0]
        for kind in reversed(self._frame.kinds):
            sums.append(sums[-1] + least[kind])
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
            more, longer = way.held, way.seconds
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
    return lambda way: second * way.seconds + slope * way.held


def _unfold(chain: Chain) -> list[str]:
    names = []
    while chain is not None:
        name, chain = chain
        names.append(name)
    return names[::-1]


def _device_ways(ways: Mapping[str, Way], besides: Sequence[str]) -> list[tuple[str, Way]]:
    """Policies that move nothing, the leanest first."""
    found = [(name, way) for name, way in ways.items() if not way.moved and name not in besides]
    return sorted(found, key=lambda item: (item[1].held, item[1].seconds))


def _slopes(ways: Sequence[tuple[str, Way]]) -> Iterator[float]:
    """Seconds that a byte is worth where the best of two policies changes; 0 is that of room for everything."""
    yield 0.0
    for (_, lean), (_, rich) in combinations(ways, 2):
        if rich.held > lean.held and rich.seconds < lean.seconds:
            slope = (lean.seconds - rich.seconds) / (rich.held - lean.held)
            least = min(way.seconds + slope * way.held for _, way in ways)
            if lean.seconds + slope * lean.held <= least * (1 + ROUNDING):
                yield slope
