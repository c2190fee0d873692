"""The hand-written layer under DeepSpeed ZeRO-3 on two gloo ranks: parameters that are gone between its two passes.

ZeRO-3 gathers a module's own parameters when that module is called. The node calls the layer and never the linear
layers in it, so there are two ways to the weights, and both are tested:

- found by use: the node's first look at a weight inside the whole model's forward gathers it, and DeepSpeed
  remembers that the layer needs it. The user has nothing to call.
- leaf: DeepSpeed gathers and frees all of the layer at once, also where only the backbone is called, as
  `CausalModel.hidden` does. Its gradients are then reduced when the gradient of the layer's input is there, so the
  embeddings need one too: `enable_input_require_grads`. Without that DeepSpeed fails in the first step.

The reference is stock: one process, no engine, no fused layer.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.models.test_decoder import adapted, error, run
from tests.models.test_decoder_distributed import (
    TOLERANCE,
    WORLD,
    Gradients,
    Report,
    gradients,
    loss,
    micro_batches,
    stock_gradients,
)
from tests.support.ranks import RankError, Ranks
from tunesmith.models.attention import document_kwargs, packed_attention
from tunesmith.models.install import Installed, install

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the extra `deepspeed`"),
]

DTYPE = torch.float32  # ZeRO-3 holds what it trains in float32, whatever the model is
RATE = 1e-4
NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,  # small parameters would never be freed
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
AHEAD = {"stage3_param_persistence_threshold": 0, "overlap_comm": True, "stage3_prefetch_bucket_size": 20_000}
"""Of these 20,000 elements the next layer is gathered while one computes."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(
            "DS_ACCELERATOR", "cpu"
        )  # read when DeepSpeed is imported, here also on a GPU host
        with Ranks(WORLD) as ranks:
            yield ranks


# ---------------------------------------------------------------------- on every rank


def engine_around(model: Any, count: int, zero: dict[str, Any]) -> Any:
    """DeepSpeed's engine with plain SGD, which accumulates `count` micro-batches."""
    import deepspeed

    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(WORLD))
    # gloo serves two ranks; the extension would be compiled at first use, for half a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained, lr=RATE),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": count,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 3, **zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    return engine


def with_leaves(model: Any) -> None:
    import deepspeed

    deepspeed.utils.set_z3_leaf_modules(model, [type(model.get_base_model().model.layers[0])])
    model.enable_input_require_grads()


def freed_layers(model: Any) -> list[bool]:
    """For each layer, whether nothing of it is gathered at this moment."""
    layers = model.get_base_model().model.layers
    return [all(parameter.numel() == 0 for parameter in layer.parameters()) for layer in layers]


def watch_gathered(model: Any) -> list[torch.Tensor]:
    """Fills with the memory of every parameter that a layer has gathered, at the end of its forward."""
    gathered: list[torch.Tensor] = []
    for layer in model.get_base_model().model.layers:  # runs before DeepSpeed's own hook, which frees it
        layer.register_forward_hook(lambda layer, *_: gathered.extend(p.data for p in layer.parameters()))
    return gathered


def whole_gradients(model: Any) -> Gradients:
    from deepspeed.utils import safe_get_full_grad

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: safe_get_full_grad(parameter).clone() for name, parameter in trained.items()}


def under_zero3(policy: str, count: int, leaf: bool, installed_first: bool = True) -> Report:
    """Gradients of `count` micro-batches, and whether every layer was free between forward and backward.

    What was gathered for forward is overwritten, so that a node that still reads it gives NaN.
    """
    model = adapted(DTYPE)
    gathered = watch_gathered(model)
    if leaf:
        with_leaves(model)
    if installed_first:
        installed = install(model, policy=policy)
    engine = engine_around(model, count, NOTHING_STAYS)
    if not installed_first:
        installed = install(model, policy=policy)
    freed: list[bool] = []
    with packed_attention(model.get_base_model(), "sdpa"):
        for number, batch in enumerate(micro_batches(dist.get_rank(), count), start=1):
            value = loss(engine, batch)
            freed += freed_layers(model)
            assert all(tensor.numel() > 0 for tensor in gathered)
            while gathered:
                gathered.pop().fill_(torch.nan)
            engine.backward(value, scale_wrt_gas=False)
            if number < count:
                engine.step()
    each = [stock_gradients(DTYPE, rank, count) for rank in range(WORLD)]
    result = compared(whole_gradients(model), each, installed, freed)
    engine.destroy()
    return result


def backbone_under_zero3() -> Report:
    """The same of the hidden states, from the backbone alone."""
    batches = [micro_batches(rank, 1)[0] for rank in range(WORLD)]
    model = adapted(DTYPE)
    with_leaves(model)
    installed = install(model)
    engine = engine_around(model, 1, NOTHING_STAYS)
    batch = batches[dist.get_rank()]
    base = model.get_base_model()
    with packed_attention(base, "sdpa"):
        hidden_BTD = base.get_decoder()(
            input_ids=batch.ids_T[None], position_ids=batch.position_ids_T[None], use_cache=False,
            **document_kwargs(batch),
        ).last_hidden_state  # fmt: skip
    freed = freed_layers(model)
    weights_TD = torch.randn(hidden_BTD.shape[1:], generator=torch.Generator().manual_seed(3))
    engine.backward((hidden_BTD[0] * weights_TD).sum())  # the loss of `run`
    each = [run(adapted(DTYPE), other)[1] for other in batches]
    result = compared(whole_gradients(model), each, installed, freed)
    engine.destroy()
    return result


def compared(ours: Gradients, each: list[Gradients], installed: Installed, freed: list[bool]) -> Report:
    mean = {name: sum(grads[name] for grads in each) / WORLD for name in each[0]}
    return Report(
        error=error(ours, mean),
        local_error=error(ours, each[dist.get_rank()]),
        fused=len(installed.fused),
        fallbacks=dict(installed.fallbacks),
        freed=freed,
    )


def leaves_alone() -> None:
    model = adapted(DTYPE)
    with_leaves(model)
    model.disable_input_require_grads()
    install(model)
    engine = engine_around(model, 1, NOTHING_STAYS)
    with packed_attention(model.get_base_model(), "sdpa"):
        engine.backward(loss(engine, micro_batches(dist.get_rank(), 1)[0]))


def steps_under_zero3(leaf: bool) -> list[float]:
    """Errors of the gradients of four steps in a row, with an evaluation between; the weights move along."""
    model, stock = adapted(DTYPE, layers=3), adapted(DTYPE, layers=3)
    if leaf:
        with_leaves(model)
    install(model)
    engine = engine_around(model, 1, AHEAD)
    optimizer = torch.optim.SGD([p for p in stock.parameters() if p.requires_grad], lr=RATE)
    mine, every = micro_batches(dist.get_rank(), 1), [micro_batches(rank, 1)[0] for rank in range(WORLD)]
    errors = []
    with packed_attention(model.get_base_model(), "sdpa"), packed_attention(stock.get_base_model(), "sdpa"):
        for _ in range(4):
            engine.backward(loss(engine, mine[0]))
            optimizer.zero_grad()
            for batch in every:
                (loss(stock, batch) / WORLD).backward()
            errors.append(error(whole_gradients(model), gradients(stock)))
            engine.step()
            optimizer.step()
            with torch.no_grad():
                loss(engine, every[0])
    engine.destroy()
    return errors


# ---------------------------------------------------------------------- in the test's process


def check(results: list[Report], count: int) -> None:
    for result in results:
        assert result.fused == 2
        assert result.fallbacks == {}
        assert result.freed == [True] * (2 * count)
        assert result.error < TOLERANCE[DTYPE]
        assert result.local_error > 0.1, "the ranks must have seen other documents"


@pytest.mark.parametrize("count", [1, 2], ids=["one micro-batch", "accumulated"])
@pytest.mark.parametrize("leaf", [False, True], ids=["found by use", "leaf"])
@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_zero3_averages_the_gradients_of_layers_freed_in_between(ranks, policy, leaf, count):
    check(ranks.run(under_zero3, policy, count, leaf), count)


@pytest.mark.parametrize("leaf", [False, True], ids=["found by use", "leaf"])
def test_weights_that_are_sharded_already_are_fused(ranks, leaf):
    check(ranks.run(under_zero3, "keep", 1, leaf, False), 1)


def test_leaves_serve_calls_of_the_backbone_alone(ranks):
    check(ranks.run(backbone_under_zero3), 1)


@pytest.mark.parametrize("leaf", [False, True], ids=["found by use", "leaf"])
def test_steps_in_a_row_with_gathering_ahead(ranks, leaf):
    for errors in ranks.run(steps_under_zero3, leaf):
        assert max(errors) < TOLERANCE[DTYPE]


def test_leaves_without_gradients_of_the_embeddings_fail_at_once(ranks):
    """Loud, not wrong: DeepSpeed would reduce the first layer's gradients before they are there."""
    with pytest.raises(RankError, match="must match the size"):
        ranks.run(leaves_alone)
