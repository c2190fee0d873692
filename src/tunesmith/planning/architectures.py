"""Architectures as data: what the hand-written layer computes for a model type, or why it does not. Torch-free.

A row says where a family's parts are and what its constants are called in the config. A new family that differs
in these only is one more row; what the layer cannot compute yet is refused with its reason and trains on the
stock layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Check = tuple[Callable[[Any], bool], str]
"""A condition on the config under which the fused layer is refused, and the reason."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family of decoder layers.

    Attributes:
        model_type: as in `config.json`.
        qkv: paths of the q, k and v projections inside a layer.
        output: path of the attention's output projection.
        gate_up: paths of the gate and up projections.
        down: path of the down projection.
        norms: paths of the norm before attention and of the norm before the MLP.
        eps: name of the norms' epsilon in the config.
        refused: conditions that rule the fused layer out.
    """

    model_type: str
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    eps: str = "rms_norm_eps"
    refused: tuple[Check, ...] = ()


_COMMON: tuple[Check, ...] = (
    (lambda c: c.hidden_act not in ("silu", "swish"), "its activation is not SiLU"),
    (lambda c: bool(getattr(c, "attention_dropout", 0.0)), "it drops attention weights"),
)

ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row for row in (Architecture("llama", refused=_COMMON),)
}


def find_architecture(config: Any) -> tuple[Architecture | None, str]:
    """The row for a model's config, or None and the reason."""
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        return None, f"{config.model_type} is not among {', '.join(ARCHITECTURES)}"
    for broken, reason in row.refused:
        if broken(config):
            return None, reason
    return row, ""
