"""Facts of models whose layers are not fused, from the names that configs usually have. Torch-free.

A mixture of experts is read as the layer that one token meets: the experts it is sent to side by side, which is what
it computes and keeps, and the others as parameters that lie there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from tunesmith.planning.architectures import find_architecture
from tunesmith.planning.facts import LayerFacts, ModelFacts
from tunesmith.planning.read_sizes import layer_count, needed, optional, refuse

_OLDER = {
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gpt_bigcode",
    "gptj",
    "opt",
    "bloom",
    "falcon",
    "mpt",
    "phi",
    "codegen",
    "persimmon",
    "nemotron",
    "jais2",
}
"""Families with layer norms, an MLP without a gate, and biases everywhere but where `bias` in the config says no."""

_UNGATED = _OLDER | {"arcee", "apertus"}
"""Families whose MLP has no gate."""

_OTHER_LAYERS = {
    "kv_lora_rank": "it compresses keys and values",
    "state_size": "its layers carry a state in place of attention",
    "ssm_state_size": "its layers carry a state in place of attention",
    "mamba_d_state": "some of its layers carry a state in place of attention",
    "linear_num_key_heads": "some of its layers carry a state in place of attention",
    "conv_L_cache": "some of its layers are convolutions in place of attention",
    "hidden_size_per_layer_input": "each of its layers has embeddings of its own",
    "altup_num_inputs": "its layers hand on several streams side by side",
}
"""Names that give away a layer whose sizes these facts cannot say."""

_NOT_ATTENTION = {"conv", "linear_attention", "mamba", "hybrid", "hybrid_sliding"}
"""Kinds of layers in `layer_types` whose sizes these facts cannot say."""

_QK_NORMED = {"qwen3_moe", "olmoe", "apertus"}
_QKV_BIASED = {"qwen2_moe"}
_TIED = {"gpt2", "gpt_neo", "gpt_bigcode", "opt", "bloom", "mpt", "falcon"}
"""Families with one matrix for embeddings and head where the config does not say."""


def read_other(text: Mapping[str, Any], name: str) -> ModelFacts:
    """Facts of a model outside `ARCHITECTURES`; `unfused` says why its layers are not fused.

    Args:
        text: config of the language model.
        name: what the user calls it.

    Raises:
        UserError: a size is missing, or its layers are of a kind that the facts cannot say.
    """
    config = SimpleNamespace(**text)
    _refuse_other_layers(config, name)
    count = layer_count(config, name, "n_layer", "num_layers", "n_layers")
    dense = _dense_layer(config, name)
    layers = tuple(
        _with_experts(dense, config, name) if _has_experts(config, number, name) else dense
        for number in range(count)
    )
    tied = getattr(config, "tie_word_embeddings", None)
    _, unfused = find_architecture(config)
    return ModelFacts(
        name=name,
        model_type=config.model_type,
        layers=layers,
        vocabulary=needed(config, "vocab_size", name),
        tied=config.model_type in _TIED if tied is None else bool(tied),
        longest=optional(config, "max_position_embeddings", name, "n_positions"),
        unfused=unfused,
    )


def _refuse_other_layers(config: SimpleNamespace, name: str) -> None:
    """Refuse layers and embeddings whose sizes these facts cannot say.

    Raises:
        UserError: with the key of the config that gives them away.
    """
    for key, reason in _OTHER_LAYERS.items():
        if getattr(config, key, None):
            raise refuse(name, f"{reason} ({key})")
    kinds = _NOT_ATTENTION & set(getattr(config, "layer_types", None) or ())
    if kinds:
        raise refuse(
            name, f"its layer_types names {min(kinds)}, which is another kind of layer than attention"
        )
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if isinstance(getattr(config, key, None), list | tuple):
            raise refuse(name, f"its {key} is a list where one number for all layers should be")
    columns = optional(config, "word_embed_proj_dim", name)
    if columns and columns != needed(config, "hidden_size", name):
        raise refuse(name, "its embeddings are projected to the width of its layers (word_embed_proj_dim)")


def _dense_layer(config: SimpleNamespace, name: str) -> LayerFacts:
    hidden = needed(config, "hidden_size", name, "n_embd", "d_model")
    heads = needed(config, "num_attention_heads", name, "n_head", "n_heads", "num_heads")
    head_dim = optional(config, "head_dim", name) or hidden // heads
    kv_heads = optional(config, "num_key_value_heads", name, "num_kv_heads") or heads
    # Falcon's newer layers do not read multi_query
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1
    gated = config.model_type not in _UNGATED
    names = ("n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size")
    inner = optional(config, "intermediate_size", name, *names)
    if inner is None and gated:
        raise refuse(name, "it has no intermediate_size")
    older = config.model_type in _OLDER
    all_biased = older and bool(getattr(config, "bias", True))
    attention_biased = all_biased or bool(getattr(config, "attention_bias", False))
    mlp_biased = all_biased or (config.model_type == "arcee" and bool(getattr(config, "mlp_bias", False)))
    return LayerFacts(
        hidden=hidden,
        inner=inner or 4 * hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_dim=head_dim,
        gated=gated,
        gate_up_parts=2 if gated else 1,
        layer_norm=older,
        norm_bias=older,
        qk_norm=config.model_type in _QK_NORMED,
        qk_full=config.model_type == "olmoe",
        qkv_bias=attention_biased or _qkv_biased(config),
        output_bias=attention_biased,
        gate_up_bias=mlp_biased,
        down_bias=mlp_biased,
        window=_window(config, name),
    )


def _qkv_biased(config: SimpleNamespace) -> bool:
    return bool(getattr(config, "qkv_bias", config.model_type in _QKV_BIASED))


def _window(config: SimpleNamespace, name: str) -> int | None:
    """The window of all layers; where some see everything, all are taken to."""
    window = optional(config, "sliding_window", name)
    kinds = set(getattr(config, "layer_types", None) or ())
    alike = not kinds or kinds == {"sliding_attention"}
    return window if window and alike and getattr(config, "use_sliding_window", True) else None


# ---------------------------------------------------------------- mixtures of experts


def _experts(config: SimpleNamespace, name: str) -> int:
    names = ("num_experts", "n_routed_experts", "moe_num_experts")
    return optional(config, "num_local_experts", name, *names) or 0


def _has_experts(config: SimpleNamespace, number: int, name: str) -> bool:
    """Whether a layer sends its tokens to experts."""
    if not _experts(config, name) or number < (getattr(config, "first_k_dense_replace", None) or 0):
        return False
    if number in (getattr(config, "mlp_only_layers", None) or ()):
        return False
    return (number + 1) % (getattr(config, "decoder_sparse_step", None) or 1) == 0


def _with_experts(dense: LayerFacts, config: SimpleNamespace, name: str) -> LayerFacts:
    """The layer as a token meets it, and the experts that it does not meet as idle parameters.

    Every mixture that transformers 5 builds holds the experts of a layer in one tensor.
    """
    experts = _experts(config, name)
    met = min(needed(config, "num_experts_per_tok", name, "moe_topk", "num_experts_per_token"), experts)
    inner = optional(config, "moe_intermediate_size", name) or dense.inner
    shared = optional(config, "shared_expert_intermediate_size", name) or (
        inner * (optional(config, "n_shared_experts", name) or 0)
    )
    router = experts * dense.hidden + (dense.hidden if _has_shared_gate(config) else 0)
    return replace(
        dense,
        inner=met * inner + shared,
        expert_inner=met * inner,
        idle_parameters=(experts - met) * 3 * dense.hidden * inner + router,
    )


def _has_shared_gate(config: SimpleNamespace) -> bool:
    return bool(getattr(config, "shared_expert_intermediate_size", None))
