"""What the planner foresees of a benchmark's step: the solver of `tunesmith plan`, on the same facts. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.tables import OPTIMIZERS, RANK
from tunesmith.contracts.errors import UserError
from tunesmith.planning.cards import CARDS, find_card
from tunesmith.planning.facts import ModelFacts, Work
from tunesmith.planning.plan import Plan, PlanRequest, plan_of
from tunesmith.planning.read_facts import read_facts
from tunesmith.planning.solver import solve

GIB = 2**30

USUAL = {"model_type": "llama", "hidden_act": "silu"}
"""What a row of `shapes.SHAPES` leaves out where it is a Llama."""


def facts_of(config: Mapping[str, Any]) -> ModelFacts:
    """The facts of a config, a row of `shapes.SHAPES` or what is like one."""
    return read_facts(USUAL | dict(config), str(config.get("model_type", "llama")))


def work_of(
    adapter: str,
    lengths: Sequence[int],
    supervised: int,
    itemsize: int = 2,
    *,
    optimizer: str | None = None,
) -> Work:
    """How a benchmark's row trains: a LoRA adapter in float32 on all projections, or everything in the compute type.

    Args:
        adapter: a row of `OPTIMIZERS`.
        lengths: of the documents.
        supervised: tokens that train.
        itemsize: bytes of the compute type.
        optimizer: another one than the table's.
    """
    full = adapter == "full"
    return Work(
        documents=tuple(lengths),
        supervised=supervised,
        quantize="nf4" if adapter == "qlora" else "none",
        rank=0 if full else RANK,
        optimizer=optimizer or OPTIMIZERS[adapter][0],
        itemsize=itemsize,
        trained_itemsize=itemsize if full else 4,
    )


def card_name(name: str) -> str:
    """The row of `CARDS` for what `nvidia-smi` calls a card; an H100's where there is none like it."""
    try:
        return find_card(name).name
    except UserError:
        return "H100-80GB"


def plan_step(
    facts: ModelFacts,
    work: Work,
    *,
    card: str,
    budget: float,
    policy: str = "auto",
    embedding: str = "auto",
    host_bytes: int | None,
) -> Plan:
    """The fastest layout of one step of one micro-batch within a budget, or one policy for all layers.

    Args:
        card: a row of `CARDS`.
        budget: share of its memory (at most 1), or bytes.
        embedding: where the input embedding lies, as `PlanRequest` has it.
        host_bytes: that may be pinned, None for any number.
    """
    request = PlanRequest(
        card,
        work,
        rows=1,
        micro_batch=1,
        policy=policy,
        embedding=embedding,
        budget=budget,
        host_bytes=host_bytes,
    )
    allowed = request.budget_of(CARDS[card].memory_bytes)
    return plan_of(request, solve(facts, request, CARDS[card].rates(), allowed), allowed)


def foreseen(plan: Plan) -> dict[str, Any]:
    """The figures of a plan that are measured as well, as fields of a row of results."""
    return {
        "plan": plan.layout,
        "embedding": plan.embedding,
        "fits": plan.fits,
        "foreseen_peak_gib": round(plan.peak_bytes / GIB, 2),
        "foreseen_host_gib": round(plan.host_bytes / GIB, 2),
        "foreseen_seconds": round(plan.step_seconds, 4),
    }
