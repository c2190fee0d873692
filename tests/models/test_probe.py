"""What a token keeps between forward and backward: measured, in proportion, and without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_llama
from tunesmith.models import probe
from tunesmith.models.adapter import add_lora, train_all
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.models.install import install
from tunesmith.models.policy import OF_TOKENS, POLICIES
from tunesmith.models.probe import fixed_bytes, policy_costs, probe_batch, saved_bytes_per_token
from tunesmith.planning.fit import STATE_BYTES, PolicyCost
from tunesmith.training.optim import OPTIMIZERS

NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def measured(model: Any, autocast: torch.autocast = NO_AUTOCAST) -> float:
    causal = CausalModel(model, torch.float32)
    with packed_attention(causal.base, "sdpa"):
        return saved_bytes_per_token(causal, autocast)


def whole(**changes: Any) -> Any:
    return train_all(tiny_llama(**changes), []).train()


def test_twice_the_layers_keep_twice_as_much() -> None:
    one, two, four = (measured(whole(num_hidden_layers=n)) for n in (1, 2, 4))
    per_layer = two - one
    assert per_layer > 0
    assert four - two == pytest.approx(2 * per_layer, rel=0.01)


def test_a_wider_model_keeps_more_in_proportion() -> None:
    narrow = measured(whole())
    wide = measured(whole(hidden_size=64, intermediate_size=128))
    assert wide / narrow == pytest.approx(2, rel=0.1)


def test_at_least_what_the_linear_layers_need() -> None:
    # each keeps its input: qkv share one of 32 floats, o 32, gate and up share 32, down 64; times 2 layers
    assert measured(whole()) >= 2 * 4 * (32 + 32 + 32 + 64)


def test_it_does_not_depend_on_the_length_of_the_probe(monkeypatch) -> None:
    short = measured(whole())
    monkeypatch.setattr(probe, "PROBE_TOKENS", 256)
    assert measured(whole()) == pytest.approx(short, rel=0.02)


def test_parameters_are_not_counted() -> None:
    # the embedding of a large vocabulary is a parameter; only the ids of a token are kept for it
    assert measured(whole(vocab_size=38_400)) == pytest.approx(measured(whole()), rel=0.01)


def test_recomputation_keeps_less() -> None:
    model = whole(num_hidden_layers=8)
    kept = measured(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert measured(model) < kept / 3


def test_half_precision_keeps_less() -> None:
    full = measured(whole())
    assert measured(whole(), torch.autocast("cpu", dtype=torch.bfloat16)) < full


def test_nothing_is_left_behind() -> None:
    model = add_lora(tiny_llama(), rank=2, alpha=4, dropout=0.5, targets="all-linear", seed=0)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first = measured(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert measured(model) == first


def test_the_probe_is_a_batch_as_any_other() -> None:
    batch = probe_batch((5,))
    assert batch.lengths == (5,)
    assert batch.cu_seqlens.tolist() == [0, 5]
    assert batch.targets_S.tolist() == batch.ids_T[1:].tolist()
    assert batch.supervised == 4


# ---------------------------------------------------------------------- costs of policies

# float32 columns of a token in a layer of the tiny model, by stage: q, k and v; the output of attention (on a CPU
# nothing else of it); the middle stream; gate and up; and the input, which every policy holds
QKV, ATTENTION, MIDDLE, GATE_UP, INPUT = (4 * columns for columns in (64, 32, 32, 128, 32))
HALF = QKV + ATTENTION + MIDDLE
# what falls out of a stage besides: the norm's statistics, and x·Aᵀ of its projections at rank 2
QKV_SMALL, GATE_UP_SMALL, LAST_SMALL = (4 * columns for columns in (1 + 3 * 2, 1 + 2 * 2, 2 * 2))
LAYERS = 8


def costs_of(model: Any, *, fused: bool = True) -> dict[str, PolicyCost]:
    causal = CausalModel(model, torch.float32)
    installed = install(model) if fused else None
    with packed_attention(causal.base, "sdpa"):
        return {cost.name: cost for cost in policy_costs(causal, NO_AUTOCAST, installed)}


def adapted(**changes: Any) -> Any:
    return add_lora(tiny_llama(**changes), rank=2, alpha=4, dropout=0.0, targets="all-linear", seed=0)


def test_every_policy_of_fused_layers_has_a_cost_in_their_order() -> None:
    assert list(costs_of(adapted(num_hidden_layers=LAYERS))) == list(OF_TOKENS)


def test_fused_layers_take_what_their_stages_take() -> None:
    costs = costs_of(adapted(num_hidden_layers=LAYERS))
    keep = costs["keep"].device_bytes
    # one layer at a time is whole again in backward; the activation is half as wide as gate and up
    assert costs["keep_all"].device_bytes - keep == (LAYERS - 1) * GATE_UP // 2
    second = GATE_UP + GATE_UP_SMALL
    layer = QKV + QKV_SMALL + ATTENTION + MIDDLE + second
    assert keep - costs["recompute_gate_up"].device_bytes == (LAYERS - 1) * second
    projections = costs["recompute_projections"].device_bytes
    assert keep - projections == (LAYERS - 1) * (QKV + QKV_SMALL + second)
    assert keep - costs["recompute"].device_bytes == (LAYERS - 1) * layer
    # of what travels two layers are on the device at a time
    offloaded = costs["keep_offload_attention"]
    assert offloaded.host_bytes == LAYERS * (INPUT + HALF)
    assert keep - offloaded.device_bytes == (LAYERS - 2) * (INPUT + HALF)
    offloaded = costs["offload_attention"]
    assert offloaded.host_bytes == LAYERS * (INPUT + HALF)
    assert keep - offloaded.device_bytes == (LAYERS - 2) * (INPUT + HALF) + (LAYERS - 1) * second
    offloaded = costs["offload"]
    assert offloaded.host_bytes == LAYERS * (INPUT + LAST_SMALL)
    assert keep - offloaded.device_bytes == (LAYERS - 2) * (INPUT + LAST_SMALL) + (LAYERS - 1) * layer
    offloaded = costs["keep_offload_all"]
    assert offloaded.host_bytes == LAYERS * (INPUT + HALF + GATE_UP)
    assert keep - offloaded.device_bytes == (LAYERS - 2) * (INPUT + HALF + GATE_UP)
    assert [cost.name for cost in costs.values() if cost.host_bytes] == [
        "keep_offload_attention", "offload_attention", "offload", "keep_offload_all",
    ]  # fmt: skip


def test_stock_layers_have_two_policies() -> None:
    kept = measured(whole(num_hidden_layers=4))
    costs = costs_of(whole(num_hidden_layers=4), fused=False)
    assert list(costs) == ["keep", "recompute"]
    assert costs["keep"] == PolicyCost("keep", kept)
    # four layer inputs of 32 float32, and one layer whole
    assert costs["recompute"].device_bytes == 4 * 32 * 4 + kept / 4


def test_layers_that_cannot_be_fused_are_stock() -> None:
    assert costs_of(whole(hidden_act="relu")) == costs_of(whole(hidden_act="relu"), fused=False)


def test_weights_that_train_cost_no_token_anything() -> None:
    """What full fine-tuning takes is what an adapter's takes without its rank-wide products."""
    full = costs_of(whole(num_hidden_layers=LAYERS))
    adapter = costs_of(adapted(num_hidden_layers=LAYERS))
    assert list(full) == list(OF_TOKENS)
    less = {name: adapter[name].device_bytes - full[name].device_bytes for name in OF_TOKENS}
    # float32; rank 2 of seven projections; embeddings that train keep the tokens' ids
    kept = LAYERS * 4 * 2 * 7 - 8
    # a layer of those in which backward comes by them again
    qkv, gate_up, last = 4 * 2 * 3, 4 * 2 * 2, 4 * 2 * 2
    without_gate_up, without_both = kept - (LAYERS - 1) * gate_up, kept - (LAYERS - 1) * (qkv + gate_up)
    assert less == {
        "keep_all": kept,
        "keep": kept,
        "keep_offload_attention": kept,
        "recompute_gate_up": without_gate_up,
        "offload_attention": without_gate_up,
        "recompute_projections": without_both,
        "recompute": without_both,
        "offload": without_both - (LAYERS - 2) * last,
        "keep_offload_all": kept,
    }


def test_what_autocast_casts_is_no_part_of_a_token() -> None:
    """Stock layers hold weights cast to 16 bits; a wider vocabulary or a shorter probe must not show it."""
    autocast = torch.autocast("cpu", torch.bfloat16)
    short = measured(whole(), autocast)
    inner = measured(whole(intermediate_size=640), autocast)
    # 576 columns more in two layers: gate, up, the activation and the product, 2 bytes each; weights would add 3,456
    assert inner - short == 2 * 576 * 2 * 4


# ---------------------------------------------------------------------- what does not depend on tokens


def test_fixed_bytes_of_full_fine_tuning() -> None:
    model = whole(num_hidden_layers=2)
    causal, count = CausalModel(model, torch.float32), sum(p.numel() for p in model.parameters())
    head = causal.base.get_output_embeddings().weight.numel()
    assert fixed_bytes(causal, "adamw", install(model)) == count * 12 + head * 8
    half = whole(num_hidden_layers=2).bfloat16()
    causal = CausalModel(half, torch.bfloat16)
    assert fixed_bytes(causal, "adamw_8bit", install(half)) == int(count * (2 + 2.03125)) + head * 6


def test_fixed_bytes_count_what_is_cast() -> None:
    """Stock layers hold every weight in 16 bits besides, fused ones those of the layer at hand."""
    model = whole(num_hidden_layers=6, vocab_size=8)
    causal = CausalModel(model, torch.bfloat16)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    layer = list(model.model.layers[0].parameters())
    stock, fused = fixed_bytes(causal, "sgd"), fixed_bytes(causal, "sgd", install(model))
    base = sum(p.numel() for p in model.parameters()) * 8
    table = 8 * 32
    assert stock == base + 2 * matrices + 6 * table
    inside = sum(4 * p.numel() + (2 * p.numel() if p.ndim == 2 else 0) for p in layer)
    assert fused == base + 2 * table + inside


def test_every_optimizer_has_its_bytes() -> None:
    assert STATE_BYTES.keys() == OPTIMIZERS.keys()


def test_measuring_policies_leaves_policy_and_host_memory_as_they_were() -> None:
    model = adapted()
    causal = CausalModel(model, torch.float32)
    installed = install(model, policy="recompute")
    offloader = installed.offloader
    with packed_attention(causal.base, "sdpa"):
        policy_costs(causal, NO_AUTOCAST, installed)
    assert installed.policy is POLICIES["recompute"]
    assert installed.offloader is offloader
    assert offloader.host_bytes == 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.gpu
def test_on_the_gpu_the_costs_foresee_the_peak() -> None:
    """Peaks of a whole pass differ between policies as the costs do; what is the same in all cancels out."""
    tokens, layers = 8192, 12
    shape = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": layers,
    }
    model = adapted(
        dtype=torch.bfloat16, num_key_value_heads=4, max_position_embeddings=tokens, **shape
    ).cuda()
    causal = CausalModel(model, torch.bfloat16)
    installed = install(model)
    batch = probe_batch((tokens,)).to(torch.device("cuda"))
    peaks, foreseen = {}, {}
    with packed_attention(causal.base, "varlen"):
        found = policy_costs(causal, torch.autocast("cuda", torch.bfloat16), installed)
        costs = {cost.name: cost for cost in found}
        for name in OF_TOKENS:
            installed.set_policy(name)
            for _ in range(2):  # the first pass fills the pool of host buffers
                torch.cuda.reset_peak_memory_stats()
                with torch.autocast("cuda", torch.bfloat16):
                    loss = causal.hidden(batch).float().square().mean()
                loss.backward()
                model.zero_grad(set_to_none=True)
                torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated()
            foreseen[name] = costs[name].device_bytes * tokens
    for name in OF_TOKENS:
        saved, expected = peaks["keep"] - peaks[name], foreseen["keep"] - foreseen[name]
        # two layers' worth: when the peak comes in backward differs by policy
        assert saved == pytest.approx(expected, abs=2 * foreseen["keep"] / layers), name
