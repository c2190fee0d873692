"""A walk through the model types of transformers: each trains on packed rows as on padded ones, or is refused.

Tiny random models with a LoRA adapter take three steps on the generic path (stock layers, our head, packed rows),
three behind the door, and three as they come. `pytest -m slow -rA tests/models/test_door_walk.py` prints the table.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.documents import random_corpus
from tunesmith.contracts.errors import UserError
from tunesmith.data.batches import collate
from tunesmith.models.adapter import add_lora
from tunesmith.models.attach import attach
from tunesmith.models.attention import packed_attention
from tunesmith.models.head import CausalModel
from tunesmith.models.head_check import check_head, check_packing

pytestmark = pytest.mark.slow

STEPS = 3
LENGTHS = [9, 5, 14, 2]

_SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # layers that matter, as trained ones do
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = _EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
}
_MAMBA = {
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "layers_block_type": ["mamba", "moe"],
    "moe_shared_expert_intermediate_size": 16,
}

CARRIES = "carries one document of a row into the next"
NOT_TOLD = "its attention is not told where documents begin"
PICKS = "picks the [0-9]+ keys that each token attends to, which packed attention does not compute"
PICKING = "its attention picks the keys of each token"
NO_INTERFACE = "does not let its attention be replaced"

FAMILIES: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    # model type: (changes of the config, why it is refused, why its door stays shut)
    "llama": ({}, None, None),
    "mistral": ({"sliding_window": 4}, None, None),
    "ministral": ({"sliding_window": 4}, None, None),
    "mixtral": (_EXPERTS, None, None),
    "qwen2": ({}, None, None),
    "qwen2_moe": (_EXPERTS | {"shared_expert_intermediate_size": 16}, None, None),
    "qwen3": ({}, None, None),
    "qwen3_moe": (_EXPERTS, None, None),
    "gemma": ({}, None, None),
    "gemma2": ({"query_pre_attn_scalar": 8}, None, None),
    "gemma3_text": ({"sliding_window": 4}, None, None),
    "phi": ({}, None, None),
    "phi3": ({"sliding_window": 4}, None, None),
    "phimoe": (_EXPERTS, None, None),
    "gpt2": ({}, None, None),
    "gpt_bigcode": ({}, None, None),
    "gpt_neox": ({}, None, None),
    "gptj": ({"rotary_dim": 4}, None, None),
    "codegen": ({"rotary_dim": 4}, None, None),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, None, None),
    "starcoder2": ({}, None, None),
    "olmo": ({}, None, None),
    "olmo2": ({}, None, None),
    "olmo3": ({"sliding_window": 4}, None, None),
    "olmoe": (_EXPERTS, None, None),
    "cohere": ({}, None, None),
    "cohere2": ({"sliding_window": 4}, None, None),
    "granite": ({}, None, None),
    "granitemoe": (_EXPERTS, None, None),
    "smollm3": ({}, None, None),
    "glm": ({}, None, None),
    "glm4": ({}, None, None),
    "glm4_moe": (_ROUTED, None, None),
    "deepseek_v2": (_ROUTED | LATENT | {"num_key_value_heads": 4}, None, None),
    "deepseek_v3": (_ROUTED | LATENT | {"num_key_value_heads": 4}, None, None),
    "deepseek_v32": (_ROUTED | LATENT | {"num_key_value_heads": 4}, PICKS, PICKING),
    "deepseek_v4": (_ROUTED | LATENT, PICKS, PICKING),
    "exaone4": ({"sliding_window": 4}, None, None),
    "ernie4_5": ({}, None, None),
    "ernie4_5_moe": ({"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}, None, None),
    "helium": ({}, None, None),
    "persimmon": ({}, None, None),
    "hunyuan_v1_dense": ({}, None, None),
    "seed_oss": ({}, None, None),
    "apertus": ({}, None, None),
    "arcee": ({}, None, None),
    "biogpt": ({}, None, None),
    "glm_moe_dsa": (_ROUTED | LATENT | {"num_key_value_heads": 4}, PICKS, PICKING),
    "gpt_oss": (_EXPERTS | {"sliding_window": 4}, None, None),
    "afmoe": (_ROUTED, None, None),
    "aria_text": (_EXPERTS | {"moe_num_experts": 4}, None, None),
    "axk1": (_ROUTED | LATENT | {"num_key_value_heads": 4}, None, None),
    "cohere2_moe": (_EXPERTS, None, None),
    "dots1": (_ROUTED | {"n_shared_experts": 1}, None, None),
    "exaone_moe": (_ROUTED, None, None),
    "flex_olmo": (_EXPERTS, None, None),
    "gemma4_text": (
        _EXPERTS
        | {
            "enable_moe_block": True,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 384,
            "sliding_window": 4,
            "global_head_dim": 8,
        },
        None,
        None,
    ),
    "glm4_moe_lite": (_ROUTED | LATENT | {"num_key_value_heads": 4}, None, None),
    "granitemoehybrid": (
        _EXPERTS | {"layer_types": ["attention"] * 2, "mamba_n_heads": 8, "shared_intermediate_size": 16},
        None,
        None,
    ),
    "granitemoeshared": (_EXPERTS | {"shared_intermediate_size": 16}, None, None),
    "hunyuan_v1_moe": (_EXPERTS | {"moe_topk": 2}, None, None),
    "hy_v3": (_ROUTED, None, None),
    "jetmoe": (_EXPERTS | {"kv_channels": 8}, None, None),
    "laguna": (_ROUTED, None, None),
    "lfm2_moe": (_EXPERTS | {"layer_types": ["full_attention"] * 2, "num_dense_layers": 1}, None, None),
    "longcat_flash": (
        _ROUTED
        | LATENT
        | {
            "num_key_value_heads": 4,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "moe_topk": 2,
            "zero_expert_num": 2,
        },
        None,
        None,
    ),
    "mellum": (_EXPERTS, None, None),
    "minimax_m2": (_EXPERTS, None, None),
    "sarvam_moe": (_ROUTED, None, None),
    "solar_open": (_ROUTED, None, None),
    "stablelm": ({}, CARRIES, NOT_TOLD),
    "nemotron": ({}, CARRIES, NOT_TOLD),
    "llama4_text": (
        _EXPERTS | {"intermediate_size_mlp": 48},
        "does not tell its backbone from its head",
        "its attention mask has a pattern of its own",
    ),
    "bloom": ({}, NO_INTERFACE, "its attention"),
    "mpt": ({}, NO_INTERFACE, "its attention"),
    "xglm": ({}, NO_INTERFACE, "its attention"),
    "qwen3_next": (_EXPERTS, "cannot run packed rows: .*flash-linear-attention", "flash-linear-attention"),
    "minimax": (_EXPERTS, CARRIES, "its hidden states differ"),
    "mamba": ({"state_size": 8}, CARRIES, "its attention"),
    "jamba": (_EXPERTS, CARRIES, "its attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, CARRIES, "its hidden states differ"),
    "falcon_h1": ({}, CARRIES, "its hidden states differ"),
    "nemotron_h": (_ROUTED | _MAMBA, CARRIES, "its attention"),
    "zaya": (_EXPERTS | {"num_experts_per_tok": 1}, CARRIES, "its hidden states differ"),
    "recurrent_gemma": ({}, "computes its logits in a way that is not supported", "its attention"),
}


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, str, str]]]:
    """Collects a row for each family and prints them at the end."""
    rows: list[tuple[str, str, str]] = []
    yield rows
    trained = sum(row[1] == "trains" for row in rows)
    print(f"\n{trained} of {len(rows)} model types train, the others are refused")
    for family, generic, door in rows:
        print(f"{family:18} {generic:90.90} door: {door}")


def _tiny(family: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(_SMALL | changes))
    return AutoModelForCausalLM.from_config(
        config
    ).eval()  # dropout and noise on routers differ from run to run


def _adapted(model: Any) -> Any:
    model = add_lora(model, rank=3, alpha=6.0, dropout=0.0, targets="all-linear", seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def _padded(batch: Any) -> dict[str, torch.Tensor]:
    """The documents of a packed row as a batch that is padded on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = list(batch.ids_T.split(batch.lengths))
    ones = [torch.ones(n, dtype=torch.int64) for n in batch.lengths]
    labels = [document.clone() for document in ids]
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad(ones, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


def _steps(model: Any, loss_of: Any) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for seed in range(STEPS):
        corpus = random_corpus(LENGTHS, seed=seed, share=1.1)
        loss = loss_of(collate(corpus, range(len(LENGTHS))))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _on_packed_rows(model: Any) -> list[float]:
    causal = CausalModel(model, torch.float32)
    check_head(causal)
    with packed_attention(causal.base, "sdpa"):
        check_packing(causal)
        return _steps(
            model, lambda batch: causal.score(batch).cross_entropy(batch.weights_S / batch.supervised)
        )


def _on_padded_rows(model: Any) -> list[float]:
    return _steps(model, lambda batch: model(**_padded(batch), use_cache=False).loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_as_it_comes_or_is_refused(family, table):
    if family == "qwen3_next" and importlib.util.find_spec("fla") is not None:
        pytest.skip("flash-linear-attention is installed, and keeps documents apart")
    changes, refused, shut = FAMILIES[family]
    stock = _tiny(family, changes)
    generic, behind = copy.deepcopy(stock), copy.deepcopy(stock)

    outcome, losses = "trains", []
    try:
        losses = _on_packed_rows(_adapted(generic))
    except UserError as error:
        outcome = error.message
    door = attach(behind).door
    table.append((family, outcome, door.shut or "packs"))

    assert re.search(refused or "^trains$", outcome)
    assert door.shut is None if shut is None else shut in door.shut
    expected = _on_padded_rows(_adapted(stock))
    assert all(map(math.isfinite, expected))
    assert len(set(expected)) == STEPS
    if refused is None:
        assert losses == pytest.approx(expected, abs=1e-4)
    # open or shut, a trainer sees the same losses
    assert _on_padded_rows(_adapted(behind)) == pytest.approx(expected, abs=1e-4)
    assert door.packed == (STEPS if shut is None else 0)


def test_the_walk_is_long_and_has_mixtures_of_experts():
    trains = [family for family, (_, refused, _) in FAMILIES.items() if refused is None]
    assert len(trains) >= 30
    assert sum(_EXPERTS.items() <= FAMILIES[family][0].items() for family in trains) >= 5
