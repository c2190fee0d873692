"""The hand-written layer under DDP and FSDP2 on two gloo ranks: its gradients are seen, averaged and sharded.

Each rank trains on its own documents of one packed corpus. The reference is stock: one process, no engine, no fused
layer, the mean over both ranks' batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.models.test_decoder import adapted, error
from tests.models.test_families import base_of, tiny
from tests.support.documents import random_corpus
from tests.support.ranks import RankError, Ranks
from tunesmith.contracts.batch import TokenBatch
from tunesmith.data.batches import collate
from tunesmith.models.attention import document_kwargs, packed_attention
from tunesmith.models.install import Installed, install

WORLD = 2
# rank -> micro-batch -> documents of the corpus; no two hold the same number of tokens
DOCUMENTS = (((0, 1, 2), (3, 4)), ((5,), (6, 7)))
LENGTHS = [7, 1, 19, 2, 30, 11, 1, 5]
# Stock norms and RoPE tables are float32 whatever the model is; in float32 the order of additions differs as well.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-6}
DTYPES = {str(dtype): dtype for dtype in TOLERANCE}

Gradients = dict[str, torch.Tensor]


def made(dtype: torch.dtype, full: bool) -> Any:
    """A model with an adapter, or one whose own weights train: norms on q and k, biases, tied embeddings."""
    if full:
        return tiny("qwen3", {"attention_bias": True, "tie_word_embeddings": True}, dtype, adapter=False)
    return adapted(dtype)


@dataclass
class Report:
    """What one rank saw.

    Attributes:
        error: largest relative difference of a gradient from the stock mean over the ranks.
        local_error: the same from the rank's own stock gradient, which an engine that averages has to leave.
        freed: per layer, whether its unsharded weights had no memory between forward and backward.
    """

    error: float
    local_error: float
    fused: int
    fallbacks: dict[str, int]
    freed: list[bool] = field(default_factory=list)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(WORLD) as ranks:
        yield ranks


# ---------------------------------------------------------------------- on every rank


def micro_batches(rank: int, count: int) -> list[TokenBatch]:
    corpus = random_corpus(LENGTHS)
    return [collate(corpus, documents) for documents in DOCUMENTS[rank][:count]]


def loss(model: Any, batch: TokenBatch) -> torch.Tensor:
    """A fixed linear function of the logits, through the forward of the outermost module as engines need it."""
    logits = model(
        input_ids=batch.ids_T[None], position_ids=batch.position_ids_T[None], use_cache=False,
        **document_kwargs(batch),
    ).logits[0]  # fmt: skip
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(batch.tokens))
    return (logits * weights.to(logits)).sum()


def gradients(model: Any) -> Gradients:
    grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for n, g in grads.items()}


def stock_gradients(dtype: torch.dtype, rank: int, count: int, full: bool) -> Gradients:
    model = made(dtype, full)
    with packed_attention(base_of(model), "sdpa"):
        for batch in micro_batches(rank, count):
            loss(model, batch).backward()
    return gradients(model)


def report(model: Any, installed: Installed, dtype: torch.dtype, count: int, full: bool) -> Report:
    ours = gradients(model)
    each = [stock_gradients(dtype, rank, count, full) for rank in range(WORLD)]
    mean = {name: sum(grads[name] for grads in each) / WORLD for name in each[0]}
    return Report(
        error=error(ours, mean),
        local_error=error(ours, each[dist.get_rank()]),
        fused=len(installed.fused),
        fallbacks=dict(installed.fallbacks),
    )


def under_ddp(policy: str, count: int, full: bool = False) -> Report:
    """`count` micro-batches, only the last of which is synchronised."""
    model = made(torch.float64, full)
    installed = install(model, policy=policy)
    wrapped = DistributedDataParallel(model)
    with packed_attention(base_of(model), "sdpa"):
        for number, batch in enumerate(micro_batches(dist.get_rank(), count), start=1):
            with nullcontext() if number == count else wrapped.no_sync():
                loss(wrapped, batch).backward()
    return report(wrapped, installed, torch.float64, count, full)


def shard(model: Any) -> None:
    for layer in base_of(model).model.layers:
        fully_shard(layer, reshard_after_forward=True)
    fully_shard(model, reshard_after_forward=True)


def down_weight(layer: Any) -> torch.Tensor:
    module = layer.mlp.down_proj
    return getattr(module, "base_layer", module).weight


def under_fsdp(policy: str, count: int, dtype_name: str, installed_first: bool, full: bool = False) -> Report:
    """The same with every decoder layer sharded, and all memory of a layer freed between forward and backward."""
    warnings.filterwarnings("error", message="(.|\n)*returned a view")  # its backward hook would be at risk
    dtype = DTYPES[dtype_name]
    model = made(dtype, full)
    if installed_first:
        installed = install(model, policy=policy)
        shard(model)
    else:
        shard(model)
        installed = install(model, policy=policy)
    layers = base_of(model).model.layers
    unsharded: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(layers):  # runs after FSDP's own hook, which gathers the weights
        layer.register_forward_pre_hook(
            lambda layer, _, number=number: unsharded.update({number: down_weight(layer)})
        )
    freed = []
    with packed_attention(base_of(model), "sdpa"):
        for number, batch in enumerate(micro_batches(dist.get_rank(), count), start=1):
            model.set_requires_gradient_sync(number == count)
            value = loss(model, batch)
            for index, layer in enumerate(layers):
                assert not isinstance(unsharded[index], DTensor)
                freed.append(
                    unsharded[index].untyped_storage().size() == 0
                    and all(isinstance(p, DTensor) for p in layer.parameters())
                )
            value.backward()
    result = report(model, installed, dtype, count, full)
    result.freed = freed
    return result


def fail_on_one_rank() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is not well")
    dist.barrier()


# ---------------------------------------------------------------------- in the test's process


@pytest.mark.parametrize("count", [1, 2], ids=["one micro-batch", "accumulated"])
@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_ddp_averages_the_gradients(ranks, policy, count):
    for result in ranks.run(under_ddp, policy, count):
        assert result.fused == 2
        assert result.fallbacks == {}
        assert result.error < TOLERANCE[torch.float64]
        assert result.local_error > 0.1, "the ranks must have seen other documents"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2], ids=["one micro-batch", "accumulated"])
@pytest.mark.parametrize("installed_first", [True, False], ids=["install then shard", "shard then install"])
@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_fsdp2_reduces_the_gradients_of_layers_freed_in_between(ranks, policy, installed_first, count, dtype):
    for result in ranks.run(under_fsdp, policy, count, dtype, installed_first):
        assert result.fused == 2
        assert result.fallbacks == {}
        assert result.freed == [True] * (2 * count)
        assert result.error < TOLERANCE[DTYPES[dtype]]
        assert result.local_error > 0.1, "the ranks must have seen other documents"


@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_full_fine_tuning_under_ddp(ranks, policy):
    for result in ranks.run(under_ddp, policy, 2, True):
        assert result.fused == 2
        assert result.fallbacks == {}
        assert result.error < 3 * TOLERANCE[torch.float64]
        assert result.local_error > 0.1, "the ranks must have seen other documents"


@pytest.mark.parametrize("installed_first", [True, False], ids=["install then shard", "shard then install"])
def test_full_fine_tuning_under_fsdp2(ranks, installed_first):
    """Weights are inputs of the node, and are freed between its forward and its backward."""
    for result in ranks.run(under_fsdp, "recompute", 2, "torch.float64", installed_first, True):
        assert result.fused == 2
        assert result.fallbacks == {}
        assert result.freed == [True] * 4
        assert result.error < 3 * TOLERANCE[torch.float64]
        assert result.local_error > 0.1, "the ranks must have seen other documents"


def test_a_failing_rank_fails_the_test_and_the_next_job_has_new_ranks(ranks):
    with pytest.raises(RankError, match=r"rank 1 raised(.|\n)*rank one is not well"):
        ranks.run(fail_on_one_rank)
    assert ranks.run(dist.get_rank) == [0, 1]
