"""What a plan says, and how it is made: the words that the command, a run and the solver share. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

from tunesmith.planning.bytes import LIBRARIES, Moment, fixed_bytes, head_rows
from tunesmith.planning.cards import CARDS
from tunesmith.planning.changes import (
    Change,
    larger_cards,
    left_to_the_plan,
    lora_instead,
    lower_ranks,
    moments_in_8_bits,
    shorter_rows,
    weights_otherwise,
)
from tunesmith.planning.facts import ModelFacts, embedding_stays
from tunesmith.planning.fit import USABLE_HOST, pinnable
from tunesmith.planning.request import PlanRequest as PlanRequest
from tunesmith.planning.request import settled
from tunesmith.planning.solver import Solution, solve

PARTS = (
    "weights", "unpacked", "adapter", "gradients", "optimizer", "activations", "head", "workspace", "reserve",
)  # fmt: skip
"""What memory of a card goes to, in the order in which tables and pictures show it. `unpacked` are 4-bit weights that
layers hold in 16 bits as well; `activations` is what all layers keep at the moment at which it is most; `reserve` is
what the allocator and libraries hold beside tensors."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a plan that are compared with another's.

    Attributes:
        card: name of a row of `CARDS`.
        fits: whether it stays under its budget.
        missing_bytes: what it lacks where it does not.
        peak_bytes: the most memory in use at any moment of a step.
        micro_batch_rows: rows that go through the model at once.
        step_seconds: of an optimizer step.
        tokens_per_second: tokens through the model, supervised or not.
        total_seconds: of the run, None where its steps are not known.
    """

    card: str
    fits: bool
    missing_bytes: int
    peak_bytes: int
    micro_batch_rows: int
    step_seconds: float
    tokens_per_second: float
    total_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """What a change of settings would make of the run.

    Attributes:
        what: the change in words: `QLoRA instead of LoRA`.
        settings: the change as settings: `model.quantize=nf4`; empty where it is none, as with another card.
        summary: of the plan with it.
    """

    what: str
    settings: tuple[str, ...]
    summary: Summary


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run is laid out over the memory of a card and the layers of a model.

    Attributes:
        card: name of a row of `CARDS`.
        budget_bytes: that may be used.
        parts: bytes of each of `PARTS`; what is not there at the peak of the step counts by its own most.
        host_bytes: pinned memory of the host.
        micro_batch_rows: rows that go through the model at once; tokens: of them.
        policies: one for each layer, from the first to the last.
        embedding: where the input embedding lies, `device` or `host`.
        chunks: sizes by which work is cut: `head`, tokens of the head at once; `mlp`, tokens of the gated MLP at once
            where it is tiled.
        peak_bytes: the most memory in use at any moment of a step.
        step_seconds: of an optimizer step.
        tokens_per_second: tokens through the model, supervised or not.
        total_seconds: of the run, None where its steps are not known.
        timeline: (what happens, bytes of each part that is there) in the order of one micro-batch.
        fits: whether the peak is within the budget; missing_bytes: what lacks where it is not.
        nearest: the least changes under which it fits, the best first; empty where it fits.
        alternatives: what other choices would change.
    """

    card: str
    budget_bytes: int
    parts: dict[str, int]
    host_bytes: int
    micro_batch_rows: int
    tokens: int
    policies: tuple[str, ...]
    embedding: str
    chunks: dict[str, int]
    peak_bytes: int
    step_seconds: float
    tokens_per_second: float
    total_seconds: float | None
    timeline: tuple[tuple[str, dict[str, int]], ...]
    fits: bool
    missing_bytes: int = 0
    nearest: tuple[Alternative, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

    @property
    def strip(self) -> tuple[tuple[str, int], ...]:
        """Policies of layers that follow each other: (name, how many)."""
        return tuple((name, len(list(group))) for name, group in groupby(self.policies))

    @property
    def layout(self) -> str:
        """Policies of the layers in words, from the first to the last: `12 × recompute, 20 × keep`."""
        return ", ".join(f"{count} × {name}" for name, count in self.strip)

    @property
    def summary(self) -> Summary:
        """The figures that are compared."""
        return Summary(
            card=self.card,
            fits=self.fits,
            missing_bytes=self.missing_bytes,
            peak_bytes=self.peak_bytes,
            micro_batch_rows=self.micro_batch_rows,
            step_seconds=self.step_seconds,
            tokens_per_second=self.tokens_per_second,
            total_seconds=self.total_seconds,
        )


# ---------------------------------------------------------------- how it is made


def make_plan(facts: ModelFacts, request: PlanRequest) -> Plan:
    """Lay a run out over a card, and say what other choices would change.

    Args:
        facts: of the model.
        request: what the run wants, on a card of `CARDS`.
    """
    request = settled(facts, request)
    plan = _without_others(facts, request)
    if plan.fits:
        return replace(plan, alternatives=tuple(_alternatives(facts, request)))
    return replace(plan, nearest=tuple(_nearest(facts, request)))


def _without_others(facts: ModelFacts, request: PlanRequest) -> Plan:
    """The plan of a settled request for a card of `CARDS`, without a look at other choices."""
    card = CARDS[request.card]
    budget = request.budget_of(card.memory_bytes)
    return plan_of(request, solve(facts, request, card.rates(), budget), budget)


def plan_of(request: PlanRequest, solution: Solution, budget_bytes: int) -> Plan:
    """A solution as a plan, without a look at other choices."""
    frame, work = solution.frame, solution.frame.work
    moments = frame.moments(solution.policies)
    tokens = request.rows * request.work.tokens
    return Plan(
        card=request.card,
        budget_bytes=budget_bytes,
        parts=_parts(solution, moments),
        host_bytes=solution.host,
        micro_batch_rows=solution.rows,
        tokens=work.tokens,
        policies=solution.policies,
        embedding="host" if work.host_embedding else "device",
        chunks={"head": head_rows(frame.model, work)},
        peak_bytes=solution.peak,
        step_seconds=solution.seconds,
        tokens_per_second=tokens / solution.seconds,
        total_seconds=None if request.steps is None else request.steps * solution.seconds,
        timeline=tuple((moment.label, _parts(solution, [moment])) for moment in moments),
        fits=solution.fits,
        missing_bytes=max(0, solution.peak - budget_bytes),
    )


def _parts(solution: Solution, moments: Sequence[Moment]) -> dict[str, int]:
    """Bytes of each of `PARTS` at the most that it has in these moments."""
    frame, fixed = solution.frame, solution.frame.fixed
    head = [moment.passing for moment in moments if moment.label == "head"]
    other = [moment.passing for moment in moments if moment.label != "head"]
    one = len(moments) == 1
    return {
        "weights": fixed.weights + frame.beside,
        "unpacked": frame.unpacked(solution.policies),
        "adapter": fixed.adapter,
        "gradients": moments[0].gradients if one else fixed.gradients,
        "optimizer": fixed.optimizer,
        "activations": max(moment.activations for moment in moments),
        "head": max(head, default=0),
        "workspace": max(other, default=0),
        "reserve": LIBRARIES,
    }


# ---------------------------------------------------------------- other choices


def _alternative(change: Change, facts: ModelFacts, before: PlanRequest) -> Alternative:
    """What becomes of the run by a change.

    Args:
        before: the settled request without the change.
    """
    request = settled(facts, change.request)
    what = change.what + _held_otherwise(request, before)
    return Alternative(what, change.settings, _without_others(facts, request).summary)


def _held_otherwise(request: PlanRequest, before: PlanRequest) -> str:
    """What to say of weights that train in another type because of a change that is none of their type."""
    work = request.work
    same = work.trained_itemsize == before.work.trained_itemsize
    if same or not work.full or request.trained_in != before.trained_in:
        return ""
    return f", weights in {'float32' if work.trained_itemsize == 4 else 'bfloat16'}"


MOST_NEAREST = 4
"""Changes that are named where a run does not fit."""


def _alternatives(facts: ModelFacts, request: PlanRequest) -> Iterator[Alternative]:
    """What a larger card, weights held otherwise and shorter rows change."""
    here = CARDS[request.card]
    faster = (change for change in larger_cards(request) if CARDS[change.request.card].tensor >= here.tensor)
    changes = [*islice(faster, 1), *weights_otherwise(facts, request), *islice(shorter_rows(request), 1)]
    if request.work.full:
        changes += [*moments_in_8_bits(request), *lora_instead(request)]
    for change in changes:
        yield _alternative(change, facts, request)


def _nearest(facts: ModelFacts, request: PlanRequest) -> list[Alternative]:
    """The changes under which it fits: one, else two at once, else another card."""
    found = list(_that_fit(facts, request, _smaller(facts, request)))
    if not found:
        for first in (changes[-1] for changes in _smaller(facts, request)):
            second = ([first.then(other) for other in changes] for changes in _smaller(facts, first.request))
            found = list(_that_fit(facts, request, second))
            if found:
                break
    machines = _that_fit(
        facts, request, [list(_more_of_the_host(facts, request)), list(larger_cards(request))]
    )
    return [*found[:MOST_NEAREST], *machines]


def _that_fit(
    facts: ModelFacts, request: PlanRequest, families: Iterable[Sequence[Change]]
) -> Iterator[Alternative]:
    """The first change of each family under which the run fits."""
    for changes in families:
        tried = (
            _alternative(change, facts, request) for change in changes if _may_fit(facts, change.request)
        )
        fitting = next((one for one in tried if one.summary.fits), None)
        if fitting is not None:
            yield fitting


def _may_fit(facts: ModelFacts, request: PlanRequest) -> bool:
    """Whether what stands throughout a step leaves room: that is soon said, and to lay out the rest is not."""
    request = settled(facts, request)
    moves = request.embedding != "device" and not embedding_stays(facts, request.work)
    fixed = fixed_bytes(facts, replace(request.work, host_embedding=moves))
    standing = fixed.weights + fixed.adapter + fixed.optimizer + fixed.gradients + LIBRARIES
    return standing <= request.budget_of(CARDS[request.card].memory_bytes)


def _smaller(facts: ModelFacts, request: PlanRequest) -> list[list[Change]]:
    """Changes that make a run smaller, families of one kind from the least to the most; those kinds first that leave
    what is learned as it is."""
    families = [
        list(left_to_the_plan(request)),
        [*(moments := list(moments_in_8_bits(request))), *_also_in_bfloat16(facts, moments)],
        list(weights_otherwise(facts, request)) if request.work.quantize == "none" else [],
        list(lora_instead(request)) if request.work.full else [],
        list(shorter_rows(request)),
        list(lower_ranks(request)),
    ]
    return [changes for changes in families if changes]


def _also_in_bfloat16(facts: ModelFacts, changes: Sequence[Change]) -> Iterator[Change]:
    """The changes, with weights that train in bfloat16 besides."""
    for change in changes:
        if change.request.work.full:
            yield from (change.then(other) for other in weights_otherwise(facts, change.request))


def _more_of_the_host(facts: ModelFacts, request: PlanRequest) -> Iterator[Change]:
    """A machine with as much memory as some layout needs that fits, where there is less."""
    if request.host_bytes is None or facts.unfused:
        return

    def planned(host_bytes: int | None, policy: str) -> Plan:
        return _without_others(facts, replace(request, host_bytes=host_bytes, policy=policy))

    lean = planned(None, "offload")
    if lean.fits and lean.host_bytes > request.host_bytes:
        enough = _least(lambda host: planned(host, request.policy).fits, request.host_bytes, lean.host_bytes)
        gigabytes = -(-int(enough / USABLE_HOST) // 2**30)
        more = replace(request, host_bytes=pinnable(gigabytes * 2**30))
        yield Change(f"{gigabytes} GiB of free host memory", (), more)


def _least(fits: Callable[[int], bool], less: int, most: int) -> int:
    """The least bytes that fit, up to a sixteenth of what lies between `less`, which do not, and `most`, which do."""
    for _ in range(4):
        middle = (less + most) // 2
        less, most = (less, middle) if fits(middle) else (middle, most)
    return most
