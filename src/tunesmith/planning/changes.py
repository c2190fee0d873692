"""Changes of settings that a plan may name: what would fit, what would be faster. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from tunesmith.planning.cards import CARDS, Card
from tunesmith.planning.facts import ModelFacts, Work
from tunesmith.planning.fit import ROUNDING
from tunesmith.planning.request import BFLOAT16, PlanRequest, settled

_SHORTEST, _LOWEST = 512, 8
"""Tokens of a row and a rank below which no advice goes."""


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that could be others.

    Attributes:
        what: in words; settings: as they are written.
        request: with them.
    """

    what: str
    settings: tuple[str, ...]
    request: PlanRequest

    def then(self, other: Change) -> Change:
        """Both; `other` was made of the request of this one."""
        return Change(f"{self.what}, and {other.what}", (*self.settings, *other.settings), other.request)


def left_to_the_plan(request: PlanRequest) -> Iterator[Change]:
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
            yield Change(what, settings, replace(request, **changed))


def _of_work(what: str, settings: tuple[str, ...], request: PlanRequest, work: Work) -> Change:
    return Change(what, settings, replace(request, work=work))


def moments_in_8_bits(request: PlanRequest) -> Iterator[Change]:
    """Moments in 8 bits."""
    if request.work.optimizer == "adamw":
        work = replace(request.work, optimizer="adamw_8bit")
        yield _of_work("8-bit moments", ("train.optimizer=adamw_8bit",), request, work)


def weights_otherwise(facts: ModelFacts, request: PlanRequest) -> Iterator[Change]:
    """The base in 4 bits, or in 16 where it is in 4; weights that train in 16 bits."""
    request = settled(facts, request)
    work, card = request.work, CARDS[request.card]
    if work.full:
        rounds = work.optimizer in ROUNDING and card.capability >= BFLOAT16
        if work.trained_itemsize == 4 and work.itemsize == 2 and rounds:
            rounded = replace(request, work=replace(work, trained_itemsize=2), trained_in="bfloat16")
            yield Change("weights in bfloat16", ("model.dtype=bfloat16",), rounded)
    elif request.published_quantized:
        return
    elif work.quantize == "nf4":
        larger = replace(work, quantize="none")
        yield _of_work("LoRA instead of QLoRA", ("model.quantize=none",), request, larger)
    elif work.quantize == "none" and not facts.unfused:
        smaller = replace(work, quantize="nf4")
        yield _of_work("QLoRA instead of LoRA", ("model.quantize=nf4",), request, smaller)


def lora_instead(request: PlanRequest) -> Iterator[Change]:
    """LoRA in place of full fine-tuning."""
    work = replace(request.work, rank=16, adapted=("qkv", "output", "gate_up", "down"), trained_itemsize=4)
    yield _of_work("LoRA instead of all weights", ("adapter.kind=lora",), request, work)


def shorter_rows(request: PlanRequest) -> Iterator[Change]:
    """Rows of half the length, of a quarter, and so on."""
    times = 2
    while (length := request.work.tokens // times) >= _SHORTEST:
        what = "rows of half the length" if times == 2 else f"rows of {length:,} tokens"
        yield Change(what, (f"train.sequence_length={length}",), request.of_length(length))
        times *= 2


def lower_ranks(request: PlanRequest) -> Iterator[Change]:
    """An adapter of half the rank, of a quarter, and so on."""
    rank = request.work.rank
    while (rank := rank // 2) >= _LOWEST:
        yield _of_work(f"rank {rank}", (f"adapter.rank={rank}",), request, replace(request.work, rank=rank))


def larger_cards(request: PlanRequest) -> Iterator[Change]:
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
            yield Change(card.name, (), replace(request, card=card.name))
