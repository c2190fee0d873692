"""Architectures as data: what the hand-written layer computes for a model type, or why it does not. Torch-free.

A row says where a family's parts are, how its norms stand around the blocks, and what its constants are called in the
config or in its modules. A new family that differs in these only is one more row; what the layer cannot compute is
refused with its reason and trains on the stock layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

Check = tuple[Callable[[Any], bool | str], str]
"""A condition on the config under which the fused layer is refused, and the reason. A condition may also say which
key it found, and its value."""


class NormPaths(NamedTuple):
    """Paths of the norms of a layer's two blocks inside it; None where there is none.

    A norm before a block reads the residual stream; one behind it reads what the block adds to the stream.
    """

    before_attention: str | None
    behind_attention: str | None
    before_mlp: str | None
    behind_mlp: str | None


_BEFORE = NormPaths("input_layernorm", None, "post_attention_layernorm", None)
_BEHIND = NormPaths(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_AROUND = NormPaths(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_ONE = NormPaths("input_layernorm", None, "input_layernorm", None)

_SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family of decoder layers.

    Attributes:
        model_type: as in `config.json`.
        models: what people call models of this type.
        qkv: paths of the q, k and v projections inside a layer, or of the one that holds all three.
        output: path of the attention's output projection.
        gate_up: paths of the gate and up projections, of the one that holds both, or of the only one without `gated`.
        down: path of the down projection.
        gated: whether the MLP multiplies by a gate.
        activation: name of its activation in the config.
        act: path of its activation.
        norms: where the norms stand.
        norm: their kind, `rms` or `layer`.
        norm_offset: added to the norms' weights.
        eps: name of the norms' epsilon in the config.
        parallel: whether both blocks read the same rows, and the layer adds both to its input.
        qk_norms: paths of the norms of q and k, of the kind `rms` with the same offset.
        qk_full: whether they are over all heads of a token, not over each.
        interleaved: whether columns 2j and 2j + 1 of a head rotate together, not j and j + half.
        paired_tables: whether the cosines of pair j are in column 2j of their table, not in column j.
        rope: path of what is false or None in layers without rotary positions; None rotates in all.
        window: path of the sliding window in keys, inside a layer; None has none.
        softcap: path of the soft cap of the attention scores.
        residual_multiplier: path of the factor on what a block adds.
        refused: conditions that rule the fused layer out.
    """

    model_type: str
    models: str
    qkv: tuple[str, ...] = _SEPARATE
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    gated: bool = True
    activation: str = "hidden_act"
    act: str = "mlp.act_fn"
    norms: NormPaths = _BEFORE
    norm: str = "rms"
    norm_offset: float = 0.0
    eps: str = "rms_norm_eps"
    parallel: bool = False
    qk_norms: tuple[str, str] | None = None
    qk_full: bool = False
    interleaved: bool = False
    paired_tables: bool = False
    rope: str | None = None
    window: str | None = None
    softcap: str | None = None
    residual_multiplier: str | None = None
    refused: tuple[Check, ...] = ()


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Names of activations in configs, and what the kernels call them."""


def _drops(key: str) -> Callable[[Any], str]:
    """The condition that a rate of dropout is not 0; says the rate."""

    def found(config: Any) -> str:
        rate = getattr(config, key, 0.0)
        return f"its {key} is {rate}" if rate else ""

    return found


def _both_ways(config: Any) -> bool:
    return bool(getattr(config, "use_bidirectional_attention", False)) or (
        getattr(config, "is_causal", True) is False
    )


_WINDOWS = {"full_attention", "sliding_attention"}

REFUSED_EVERYWHERE: tuple[Check, ...] = (
    (_drops("attention_dropout"), "it drops attention weights"),
    (_both_ways, "it attends in both directions"),
    (
        lambda c: bool(set(getattr(c, "layer_types", None) or ()) - _WINDOWS),
        "it has layers whose attention is neither full nor in a sliding window",
    ),
)
"""What no family's layer computes."""

ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama", "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2; DeepSeek-R1-Distill-Llama"),
        Architecture("mistral", "Mistral 7B, Nemo, Small", window="self_attn.config.sliding_window"),
        Architecture("qwen2", "Qwen2, Qwen2.5; DeepSeek-R1-Distill-Qwen", window="self_attn.sliding_window"),
        Architecture("qwen3", "Qwen3", qk_norms=_QK_NORMS, window="self_attn.sliding_window"),
        Architecture(
            "gemma2",
            "Gemma 2",
            activation="hidden_activation",
            norms=_AROUND,
            norm_offset=1.0,
            window="self_attn.sliding_window",
            softcap="self_attn.attn_logit_softcapping",
        ),
        Architecture(
            "gemma3_text",
            "Gemma 3, its text",
            activation="hidden_activation",
            norms=_AROUND,
            norm_offset=1.0,
            qk_norms=_QK_NORMS,
            window="self_attn.sliding_window",
        ),
        Architecture(
            "phi3",
            "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
            qkv=("self_attn.qkv_proj",),
            gate_up=("mlp.gate_up_proj",),
            act="mlp.activation_fn",
            window="self_attn.config.sliding_window",
            refused=((_drops("resid_pdrop"), "it drops what a block adds"),),
        ),
        Architecture("gemma", "Gemma 1", norm_offset=1.0),
        Architecture("ministral", "Ministral", window="self_attn.sliding_window"),
        Architecture("granite", "Granite 3", residual_multiplier="residual_multiplier"),
        Architecture("olmo2", "OLMo 2", norms=_BEHIND, qk_norms=_QK_NORMS, qk_full=True),
        Architecture(
            "olmo3",
            "OLMo 3",
            norms=_BEHIND,
            qk_norms=_QK_NORMS,
            qk_full=True,
            window="self_attn.sliding_window",
        ),
        Architecture("smollm3", "SmolLM3", rope="self_attn.use_rope", window="self_attn.sliding_window"),
        Architecture(
            "cohere",
            "Command R, Aya",
            norms=_ONE,
            norm="layer",
            eps="layer_norm_eps",
            parallel=True,
            interleaved=True,
            paired_tables=True,
            refused=(
                (
                    lambda c: bool(c.use_qk_norm),
                    "it has layer norms on q and k, with weights of its own for each head",
                ),
            ),
        ),
        Architecture(
            "cohere2",
            "Command R7B, Command A",
            norms=_ONE,
            norm="layer",
            eps="layer_norm_eps",
            parallel=True,
            interleaved=True,
            paired_tables=True,
            rope="self_attn.sliding_window",
            window="self_attn.sliding_window",
        ),
        Architecture(
            "glm4",
            "GLM-4-0414",
            gate_up=("mlp.gate_up_proj",),
            act="mlp.activation_fn",
            norms=NormPaths(
                "input_layernorm",
                "post_self_attn_layernorm",
                "post_attention_layernorm",
                "post_mlp_layernorm",
            ),
            interleaved=True,
        ),
        Architecture(
            "glm",
            "GLM-4-9B",
            gate_up=("mlp.gate_up_proj",),
            act="mlp.activation_fn",
            interleaved=True,
        ),
        Architecture(
            "starcoder2",
            "StarCoder2",
            gate_up=("mlp.c_fc",),
            down="mlp.c_proj",
            gated=False,
            act="mlp.act",
            norm="layer",
            eps="norm_epsilon",
            window="self_attn.config.sliding_window",
            refused=((_drops("residual_dropout"), "it drops what a block adds"),),
        ),
    )
}


def find_architecture(config: Any) -> tuple[Architecture | None, str]:
    """The row for a model's config, or None and the reason."""
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        return None, f"{config.model_type} is not among the families with fused layers (docs/families.md)"
    for broken, reason in (*REFUSED_EVERYWHERE, *row.refused):
        found = broken(config)
        if found:
            return None, f"{reason}: {found}" if isinstance(found, str) else reason
    activation = getattr(config, row.activation)
    if activation not in ACTIVATIONS:
        return None, f"its activation {activation} is not among {', '.join(ACTIVATIONS)}"
    return row, ""
