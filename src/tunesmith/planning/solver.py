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
enumerated: they are the first ones, whose copies have the longest time to come back, under one such policy or two,
the leaner one first. After the last of them the others' time is a sum again, and the bytes that are still on their
way are known. All counts of layers are tried: in steps of a sixteenth, solutions were up to 0.72% slower (450
budgets of 8B and 70B on four cards), and no more than 0.1 s of 80 layers was saved.

Weights that a layer holds unpacked (`policies.UNPACKED`) are there at every moment. A search that counts them with k
knows those of the layers so far only; where what it finds is too large after all, which happens in short rows, the
search is made for each number of last layers that hold them, with so much less room. No layer moves anything then.

Rejected: a linear program, which gives fractions of layers; and dynamic programming over rounded bytes, which is
exact up to the rounding only and slower.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from tunesmith.planning.bytes import fixed_bytes
from tunesmith.planning.cards import Rates
from tunesmith.planning.facts import ModelFacts, embedding_stays
from tunesmith.planning.frame import Frame, Parts, Prefix
from tunesmith.planning.policies import UNPACKED
from tunesmith.planning.request import PlanRequest
from tunesmith.planning.search import ROUNDING, Search


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
    model: ModelFacts,
    request: PlanRequest,
    rates: Rates,
    device_bytes: int,
    *,
    beside: int = 0,
    rows: int | None = None,
) -> Solution:
    """The fastest layout within a budget; where there is none, the one that needs the least of the device.

    Args:
        device_bytes: that may be used; what the request says of it does not count here.
        beside: bytes on the device that the model's facts do not tell.
        rows: of a micro-batch, where they are settled though the request leaves them open.
    """
    best: Solution | None = None
    leanest: list[Frame] = []
    for placed in _placements(model, request):
        for frame in _frames(model, placed, rates, device_bytes, beside, rows):
            best = _faster(frame, placed, device_bytes, best)
        leanest.append(frame)  # of the fewest rows
        if best is not None and best.rows == (rows or placed.micro_batches()[-1]) and _keeps_all(best):
            break  # room is not what it lacks
    return best if best is not None else _leanest(leanest, request, device_bytes)


def _placements(model: ModelFacts, request: PlanRequest) -> list[PlanRequest]:
    """The request with the input embedding in each of the places that it allows."""
    host = replace(request, work=replace(request.work, host_embedding=True))
    if request.embedding == "auto":
        return [request] if embedding_stays(model, request.work) else [request, host]
    return [host if request.embedding == "host" else request]


def _frames(
    model: ModelFacts,
    request: PlanRequest,
    rates: Rates,
    device_bytes: int,
    beside: int,
    settled: int | None,
) -> Iterator[Frame]:
    """The step with each size of micro-batch, larger ones first, which are faster where they fit; with the smallest
    alone where what always stands does not fit."""
    sizes = request.micro_batches() if settled is None else [settled]
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
    search = Search(frame, room)
    # what moves nothing is tried first: it may be recorded as CUDA graphs, which the seconds of layers do not tell
    found = search.after(Prefix(frame), limit)
    if found is not None:
        limit = found[0]
        yield _lean_first(frame, Prefix(frame), found[1], room)
    for policies in _unpacked(frame, room, limit):
        limit = frame.layers_seconds(policies)
        yield policies
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
        if frame.above(policies) <= room and frame.layers_seconds(policies) <= longest:
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


def _unpacked(frame: Frame, room: int, limit: float) -> Iterator[Sequence[str]]:
    """Layouts with layers that hold their weights unpacked, each faster than the one before."""
    if frame.names[0] not in UNPACKED:
        return
    found = Search(frame, room, None).after(Prefix(frame), limit)
    if found is None:
        return
    policies = _lean_first(frame, Prefix(frame), found[1], room)
    if frame.above(policies) <= room:
        yield policies
        return
    for count in range(frame.count, 0, -1):
        found = Search(frame, room, count).after(Prefix(frame), limit)
        if found is not None:
            limit = found[0]
            yield _lean_first(frame, Prefix(frame), found[1], room)
