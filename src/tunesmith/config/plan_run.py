"""From the settings of a run to its plan: what the planner is asked, and what of the settings it does not know.

Torch-free: neither weights nor data nor a GPU are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.config.plan_adapter import Adapted, adapted_groups
from tunesmith.config.plan_model import FoundConfig, find_config
from tunesmith.contracts.errors import UserError
from tunesmith.contracts.visible import visible
from tunesmith.planning.cards import Card
from tunesmith.planning.facts import ModelFacts, Work, embedding_stays
from tunesmith.planning.plan import Plan, PlanRequest, make_plan
from tunesmith.planning.read_facts import read_facts
from tunesmith.planning.request import BFLOAT16, settled
from tunesmith.settings.quantities import share_or_bytes, tokens_of
from tunesmith.settings.run import RunSettings


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A plan with what it was made of.

    Attributes:
        facts: of the model.
        config_from: where its `config.json` is from.
        card: that it is planned for.
        computes: the type that everything is computed in.
        request: what the planner was asked.
        plan: what it answered.
        notes: what the plan takes for granted, and what of the run it does not know, in sentences.
    """

    facts: ModelFacts
    config_from: str
    card: Card
    computes: str
    request: PlanRequest
    plan: Plan
    notes: tuple[str, ...]
    host_known: bool = True


def plan_run(
    settings: RunSettings, card: Card, host_bytes: int | None = None, *, host_known: bool = True
) -> PlannedRun:
    """Plan a run on a card.

    Args:
        settings: of the run.
        card: a row of `CARDS`.
        host_bytes: memory of the host that may be pinned, None for any number.
        host_known: whether a host is known of which that is said.

    Raises:
        UserError: the config of the model is nowhere or cannot be read, or the adapter fits none of its layers.
    """
    found = find_config(settings.model.name, settings.model.revision)
    facts = read_facts(found.values, settings.model.name)
    published = _held_as(found)
    quantize = settings.model.quantize if settings.model.quantize != "none" else published
    facts = replace(facts, unfused=facts.unfused or _unfused(settings, quantize))
    adapted = adapted_groups(settings.adapter, facts)
    request = make_request(
        settings,
        facts,
        card,
        adapted,
        quantize=quantize,
        published_quantized=published != "none",
        host_bytes=host_bytes,
    )
    if request.embedding == "host" and (reason := embedding_stays(facts, request.work)):
        raise embedding_error(reason)
    return PlannedRun(
        facts=facts,
        config_from=found.where,
        card=card,
        computes=_computes(settings, card),
        request=request,
        plan=make_plan(facts, request),
        notes=(
            *_notes(settings, facts, adapted),
            *_notes_of_weights(_published_as(found), quantize),
            *_notes_of_experts(facts, adapted),
            *_notes_of_card(settings, card, request),
        ),
        host_known=host_known,
    )


def embedding_error(reason: str) -> UserError:
    """The input embedding is asked to lie where it cannot."""
    return UserError(
        f"memory.embedding: host is not possible: {reason}.", hint="Leave memory.embedding at auto."
    )


def make_request(
    settings: RunSettings,
    facts: ModelFacts,
    card: Card,
    adapted: Adapted,
    *,
    quantize: str,
    published_quantized: bool,
    host_bytes: int | None = None,
) -> PlanRequest:
    """What the planner is asked for.

    A row is taken to be full, one document long, and supervised throughout: the most that it can take.
    """
    train, dtype = settings.train, settings.model.dtype
    length = train.sequence_length
    work = Work(
        documents=(length,),
        supervised=length,
        quantize=quantize,
        rank=adapted.rank,
        adapted=adapted.groups,
        dropout=adapted.rank > 0 and settings.adapter.dropout > 0,
        optimizer=train.optimizer,
        itemsize=4 if dtype == "float32" else 2,
    )
    request = PlanRequest(
        card=card.name,
        work=work,
        rows=train.global_batch if isinstance(train.global_batch, int) else 1,
        steps=train.steps if isinstance(train.steps, int) else None,
        batch_tokens=tokens_of(train.global_batch),
        run_tokens=tokens_of(train.steps),
        trained_in=dtype if dtype in ("auto", "bfloat16") else "float32",
        micro_batch=train.micro_batch if isinstance(train.micro_batch, int) else None,
        policy=settings.memory.policy,
        embedding=settings.memory.embedding,
        budget=share_or_bytes(settings.memory.budget),
        host_bytes=host_bytes,
        published_quantized=published_quantized,
    )
    return settled(facts, request.of_length(length))


def _computes(settings: RunSettings, card: Card) -> str:
    """The compute type, as `models.loader.choose_dtype` has it."""
    if settings.model.dtype != "auto":
        return settings.model.dtype
    return "bfloat16" if card.capability >= BFLOAT16 else "float16"


def _held_as(found: FoundConfig) -> str:
    """How a checkpoint that was quantised before it was published holds its weights."""
    held = _published_as(found)
    if held.get("load_in_4bit") or held.get("_load_in_4bit"):
        return "nf4"
    return "int8" if held.get("load_in_8bit") or held.get("_load_in_8bit") else "none"


def _published_as(found: FoundConfig) -> Mapping[str, Any]:
    """What a config says of weights that were quantised before they were published."""
    held = found.values.get("quantization_config")
    return held if isinstance(held, dict) else {}


def _unfused(settings: RunSettings, quantize: str) -> str:
    """What of the settings rules fused layers out; empty where nothing does."""
    if quantize == "int8":
        return "its weights are held in 8 bits"
    if settings.adapter.kind == "lora" and settings.adapter.use_dora:
        return "its adapter has DoRA"
    return ""


def _notes(settings: RunSettings, facts: ModelFacts, adapted: Adapted) -> Iterator[str]:
    """What the plan takes for granted, and what it does not count."""
    adapter, train = settings.adapter, settings.train
    length = train.sequence_length
    yield (
        f"Rows are taken to be full: {length:,} tokens, one document, all of it trained on. Shorter documents and "
        "prompts that do not train make steps faster and smaller."
    )
    if facts.longest is not None and length > facts.longest and settings.model.rope_scaling is None:
        made_for = f"the {facts.longest:,} positions that the model was made for"
        yield f"train.sequence_length is longer than {made_for}; model.rope_scaling stretches them."
    if facts.unfused:
        yield f"Its layers are not fused ({facts.unfused}): bytes and seconds are estimates."
    if facts.other_parameters:
        count = facts.other_parameters / 1e9
        yield f"Its vision tower, {count:.1f} billion parameters, lies in memory and does not train on text."
    if adapted.parts:
        yield "The adapter is counted on all projections of each group that it touches, in every layer."
    for name in ("layers_to_transform", "last_layers", "rank_pattern"):
        if adapted.rank and getattr(adapter, name):
            yield f"adapter.{name} is not counted: every layer is taken to carry rank {adapted.rank}."
    for name in ("modules_to_save", "new_tokens"):
        if adapted.rank and getattr(adapter, name):
            yield f"What adapter.{name} trains besides is not counted; it takes memory of its own."
    if not adapted.rank and settings.model.freeze:
        yield "model.freeze is not counted: all weights are taken to train."


def _notes_of_weights(published: Mapping[str, Any], quantize: str) -> Iterator[str]:
    """What the plan does not know of how weights are held."""
    method = published.get("quant_method")
    if published and quantize == "none":
        yield (
            f"Its weights are published in {visible(str(method))} and counted in 16 bits: what a run makes of them "
            "is not known here."
        )


def _notes_of_experts(facts: ModelFacts, adapted: Adapted) -> Iterator[str]:
    """How a mixture of experts is counted."""
    if not any(layer.expert_inner for layer in facts.layers):
        return
    met = "Of its experts those that one token meets are counted as a layer, and the others as weights."
    if not adapted.rank:
        yield met
        return
    yield (
        f"{met} The experts of a layer lie in one tensor: model.quantize leaves them as they are, and all-linear "
        "puts no adapters on them."
    )
    if adapted.beyond:
        yield "Adapters that adapter.targets puts on experts by name are not counted; they take memory of their own."


def _notes_of_card(settings: RunSettings, card: Card, request: PlanRequest) -> Iterator[str]:
    """What of the card is other than a run might expect."""
    if card.capability < BFLOAT16 and settings.model.dtype == "auto":
        yield f"{card.name} has no bfloat16: the run computes in float16, with a loss scale."
    elif card.capability < BFLOAT16 and settings.model.dtype == "bfloat16":
        yield (
            f"{card.name} has no bfloat16, and model.dtype asks for it: steps are much slower than planned; "
            "auto takes float16."
        )
    if request.budget > card.memory_bytes:
        asked, there = request.budget / 2**30, card.memory_bytes / 2**30
        yield (
            f"memory.budget is {asked:,.1f} GiB, and the card has {there:.1f}: all of it is planned with, and "
            "nothing is left for the driver and for gaps between allocations."
        )
