"""What a plan says, and how it is made: the words that the command, a run and the solver share. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, groupby, islice
from typing import Any

from tunesmith.planning.bytes import LIBRARIES, Moment, fixed_bytes, head_rows
from tunesmith.planning.cards import CARDS, Card
from tunesmith.planning.facts import ModelFacts, Work, embedding_stays
from tunesmith.planning.fit import ROUNDING
from tunesmith.planning.request import BFLOAT16, settled
from tunesmith.planning.request import PlanRequest as PlanRequest
from tunesmith.planning.solver import Solution, solve

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "head", "workspace", "reserve")
"""What memory of a card goes to, in the order in which tables and pictures show it. `activations` is what all layers
keep at the moment at which it is most; `reserve` is what the allocator and libraries hold beside tensors."""


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
        "adapter": fixed.adapter,
        "gradients": moments[0].gradients if one else fixed.gradients,
        "optimizer": fixed.optimizer,
        "activations": max(moment.activations for moment in moments),
        "head": max(head, default=0),
        "workspace": max(other, default=0),
        "reserve": LIBRARIES,
    }


# ---------------------------------------------------------------- other choices


@dataclass(frozen=True, slots=True)
class _Change:
    """Settings that could be others.

    Attributes:
        what: in words; settings: as they are written.
        request: with them.
    """

    what: str
    settings: tuple[str, ...]
    request: PlanRequest

    def alternative(self, facts: ModelFacts, before: PlanRequest) -> Alternative:
        """What becomes of the run.

        Args:
            before: the settled request without the change.
        """
        request = settled(facts, self.request)
        what = self.what + _held_otherwise(request, before)
        return Alternative(what, self.settings, _without_others(facts, request).summary)

    def then(self, other: _Change) -> _Change:
        """Both; `other` was made of the request of this one."""
        return _Change(f"{self.what}, and {other.what}", (*self.settings, *other.settings), other.request)


def _held_otherwise(request: PlanRequest, before: PlanRequest) -> str:
    """What to say of weights that train in another type because of a change that is none of their type."""
    work = request.work
    same = work.trained_itemsize == before.work.trained_itemsize
    if same or not work.full or request.trained_in != before.trained_in:
        return ""
    return f", weights in {'float32' if work.trained_itemsize == 4 else 'bfloat16'}"


MOST_NEAREST = 4
"""Changes that are named where a run does not fit."""
_SHORTEST, _LOWEST = 512, 8
"""Tokens of a row and a rank below which no advice goes."""


def _alternatives(facts: ModelFacts, request: PlanRequest) -> Iterator[Alternative]:
    """What a larger card, weights held otherwise and shorter rows change."""
    here = CARDS[request.card]
    faster = (change for change in _larger_cards(request) if CARDS[change.request.card].tensor >= here.tensor)
    changes = [*islice(faster, 1), *_weights(facts, request), *islice(_shorter(request), 1)]
    if request.work.full:
        changes += [*_optimizer(request), *_adapter(request)]
    for change in changes:
        yield change.alternative(facts, request)


def _nearest(facts: ModelFacts, request: PlanRequest) -> list[Alternative]:
    """The changes under which it fits: one, else two at once, else another card."""
    found = list(_that_fit(facts, request, _smaller(facts, request)))
    if not found:
        for first in (changes[-1] for changes in _smaller(facts, request)):
            second = ([first.then(other) for other in changes] for changes in _smaller(facts, first.request))
            found = list(_that_fit(facts, request, second))
            if found:
                break
    cards = _that_fit(facts, request, [list(_larger_cards(request))])
    return [*found[:MOST_NEAREST], *cards]


def _that_fit(
    facts: ModelFacts, request: PlanRequest, families: Iterable[Sequence[_Change]]
) -> Iterator[Alternative]:
    """The first change of each family under which the run fits."""
    for changes in families:
        tried = (change.alternative(facts, request) for change in changes if _may_fit(facts, change.request))
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


def _smaller(facts: ModelFacts, request: PlanRequest) -> list[list[_Change]]:
    """Changes that make a run smaller, families of one kind from the least to the most; those kinds first that leave
    what is learned as it is."""
    families = [
        list(_left_to_the_plan(request)),
        [*(moments := list(_optimizer(request))), *_also_in_bfloat16(facts, moments)],
        list(_weights(facts, request)) if request.work.quantize == "none" else [],
        list(_adapter(request)) if request.work.full else [],
        list(_shorter(request)),
        list(_lower_rank(request)),
    ]
    return [changes for changes in families if changes]


def _also_in_bfloat16(facts: ModelFacts, changes: Sequence[_Change]) -> Iterator[_Change]:
    """The changes, with weights that train in bfloat16 besides."""
    for change in changes:
        if change.request.work.full:
            yield from (change.then(other) for other in _weights(facts, change.request))


def _left_to_the_plan(request: PlanRequest) -> Iterator[_Change]:
    """What is fixed of the layout, each by itself, then several together."""
    fixed: list[tuple[str, str, dict[str, Any]]] = []
    if request.policy != "auto":
        fixed.append(("policies", "memory.policy=auto", {"policy": "auto"}))
    if request.micro_batch is not None and request.micro_batch > 1:
        fixed.append(("micro-batch", "train.micro_batch=auto", {"micro_batch": None}))
    if request.embedding == "device":
        fixed.append(("embedding", "memory.embedding=auto", {"embedding": "auto"}))
    for count in range(1, len(fixed) + 1):
        for some in combinations(fixed, count):
            names, settings, values = zip(*some, strict=True)
            changed = {name: value for one in values for name, value in one.items()}
            what = f"{' and '.join(names)} left to the plan"
            yield _Change(what, settings, replace(request, **changed))


def _of_work(what: str, settings: tuple[str, ...], request: PlanRequest, work: Work) -> _Change:
    return _Change(what, settings, replace(request, work=work))


def _optimizer(request: PlanRequest) -> Iterator[_Change]:
    """Moments in 8 bits."""
    if request.work.optimizer == "adamw":
        work = replace(request.work, optimizer="adamw_8bit")
        yield _of_work("8-bit moments", ("train.optimizer=adamw_8bit",), request, work)


def _weights(facts: ModelFacts, request: PlanRequest) -> Iterator[_Change]:
    """The base in 4 bits, or in 16 where it is in 4; weights that train in 16 bits."""
    request = settled(facts, request)
    work, card = request.work, CARDS[request.card]
    if work.full:
        rounds = work.optimizer in ROUNDING and card.capability >= BFLOAT16
        if work.trained_itemsize == 4 and work.itemsize == 2 and rounds:
            rounded = replace(request, work=replace(work, trained_itemsize=2), trained_in="bfloat16")
            yield _Change("weights in bfloat16", ("model.dtype=bfloat16",), rounded)
    elif work.quantize == "nf4":
        larger = replace(work, quantize="none")
        yield _of_work("LoRA instead of QLoRA", ("model.quantize=none",), request, larger)
    elif work.quantize == "none" and not facts.unfused:
        smaller = replace(work, quantize="nf4")
        yield _of_work("QLoRA instead of LoRA", ("model.quantize=nf4",), request, smaller)


def _adapter(request: PlanRequest) -> Iterator[_Change]:
    """LoRA in place of full fine-tuning."""
    work = replace(request.work, rank=16, adapted=("qkv", "output", "gate_up", "down"), trained_itemsize=4)
    yield _of_work("LoRA instead of all weights", ("adapter.kind=lora",), request, work)


def _shorter(request: PlanRequest) -> Iterator[_Change]:
    """Rows of half the length, of a quarter, and so on."""
    times = 2
    while (length := request.work.tokens // times) >= _SHORTEST:
        what = "rows of half the length" if times == 2 else f"rows of {length:,} tokens"
        yield _Change(what, (f"train.sequence_length={length}",), request.of_length(length))
        times *= 2


def _lower_rank(request: PlanRequest) -> Iterator[_Change]:
    """An adapter of half the rank, of a quarter, and so on."""
    rank = request.work.rank
    while (rank := rank // 2) >= _LOWEST:
        yield _of_work(f"rank {rank}", (f"adapter.rank={rank}",), request, replace(request.work, rank=rank))


def _larger_cards(request: PlanRequest) -> Iterator[_Change]:
    """Cards with more memory, the smallest first; of those that are sold with the same only the fastest."""
    here = CARDS[request.card]
    if request.budget > 1:  # so many bytes are so many on any card
        return

    def order(card: Card) -> tuple[int, float]:
        return card.gb, -card.tensor

    found = here.gb
    for card in sorted(CARDS.values(), key=order):
        if card.gb > found:
            found = card.gb
            yield _Change(card.name, (), replace(request, card=card.name))
