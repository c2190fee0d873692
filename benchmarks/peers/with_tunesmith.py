"""Ours: a model loaded as a run loads it, its layers fused, and the step that training takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.batches import Documents, token_batch
from benchmarks.loop import GIB, time_steps
from benchmarks.peers.measure import batches_of, failure, row_of
from benchmarks.peers.processes import find_card
from benchmarks.peers.tables import OPTIMIZERS, RANK, Work
from benchmarks.planned import card_name, facts_of, foreseen, plan_step, work_of
from benchmarks.shapes import device_and_dtype
from tunesmith.contracts.batch import TokenBatch
from tunesmith.distributed.single import SingleDevice
from tunesmith.models.adapter import add_lora
from tunesmith.models.attention import choose_attention, packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.models.install import Installed, install
from tunesmith.models.loader import load_model
from tunesmith.objectives.sft import SFT
from tunesmith.planning.fit import pinnable
from tunesmith.planning.graphs import graphs_pay
from tunesmith.planning.host import free_host_memory
from tunesmith.planning.plan import Plan
from tunesmith.training.allocator import grow_segments
from tunesmith.training.optim import build_optimizer
from tunesmith.training.step import ObjectiveLoss, train_step

Step = Callable[[TokenBatch], float]


@contextmanager
def training_step(
    model: Any,
    policy: str | Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    adapter: str,
    embedding: str = "device",
    optimizer_name: str | None = None,
    graphs: bool | None = None,
) -> Iterator[tuple[Step, Installed | None]]:
    """One step of training as a function from a batch to its loss, and what was installed.

    Args:
        model: with an adapter or with all of it trained, on `device`.
        policy: a row of `POLICIES`, one for each layer, or `stock` for layers as they are.
        tokens: of a step.
        adapter: what trains, a row of `OPTIMIZERS`.
        embedding: where the input embedding lies, `device` or `host`.
        optimizer_name: another one than the table's.
        graphs: record CUDA graphs; None where training would.
    """
    causal = CausalModel(model, dtype)
    name, rate = OPTIMIZERS[adapter]
    optimizer = build_optimizer(
        optimizer_name or name, model, learning_rate=rate, weight_decay=0.01, betas=(0.9, 0.999)
    )
    installed = None if policy == "stock" else install(model)
    if installed is not None:
        installed.set_policies([policy] * len(installed.policies) if isinstance(policy, str) else policy)
        installed.set_embedding_on_host(embedding == "host")
    if graphs is None:
        graphs = installed is not None and device.type == "cuda" and installed.recordable() is None
        graphs = graphs and graphs_pay(
            tokens=tokens, layer_parameters=installed.layer_parameters(), full=adapter == "full"
        )
    backend = SingleDevice(model, optimizer, device, dtype, graphs=graphs)
    loss = ObjectiveLoss(causal, SFT)
    model.train()
    with packed_attention(causal.base, choose_attention("auto", device, dtype)):
        yield lambda batch: train_step(backend, [batch], loss, max_grad_norm=1.0).loss, installed


def report(installed: Installed | None) -> dict[str, Any]:
    """What to know of the installed layers beside a figure: host memory, and calls that were not fused."""
    if installed is None:
        return {"host_gib": 0.0, "fallbacks": {}}
    return {
        "host_gib": round(installed.host_bytes / 2**30, 2),
        "fallbacks": dict(installed.fallbacks),
        "stock_layers": len(installed.stock),
    }


def planned(work: Work, row: Documents, dtype: torch.dtype) -> Plan:
    """The planner's layout within `options["budget"]`, a share of the card or GiB, with the host memory runs use."""
    budget = work.options["budget"]
    return plan_step(
        facts_of(work.config),
        work_of(work.adapter, row.lengths, row.supervised, dtype.itemsize),
        card=card_name(find_card().name),
        budget=budget if budget <= 1 else budget * GIB,
        host_bytes=pinnable(free_host_memory()),
    )


def measure(work: Work) -> Iterator[dict[str, Any]]:
    """The row of results."""
    grow_segments()
    device, dtype = device_and_dtype()
    model = load_model(
        work.checkpoint, device=device, dtype=dtype, quantize="nf4" if work.adapter == "qlora" else "none"
    )
    if work.adapter == "full":
        model.requires_grad_(True)
    else:
        model = add_lora(model, rank=RANK, alpha=float(RANK), dropout=0.0, targets="all-linear", seed=0)
    documents = batches_of(work)
    batches = [token_batch(row) for row in documents]
    policy, embedding, foresight = work.options["policy"], "device", {}
    if policy == "plan":
        plan = planned(work, documents[0], dtype)
        policy, embedding, foresight = plan.policies, plan.embedding, foreseen(plan)
    try:
        tokens = batches[0].tokens
        with training_step(
            model, policy, device, dtype, tokens=tokens, adapter=work.adapter, embedding=embedding
        ) as (step, installed):
            timing = time_steps(
                lambda number: step(batches[number % len(batches)]),
                steps=work.steps,
                warm=work.warm,
                device=device,
            )
    except torch.OutOfMemoryError as error:
        yield failure("packed", error)
        return
    yield row_of(work, documents, "packed", timing, batches[0].tokens) | report(installed) | foresight
