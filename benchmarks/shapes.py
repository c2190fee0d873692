"""Random models of published shapes, built on the GPU in seconds: shape decides speed and memory, weights do not."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000.0, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
}  # fmt: skip


def _quantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every linear layer but the head by bitsandbytes' NF4 form with nested scales, one at a time."""
    import bitsandbytes as bnb

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear) or name == "lm_head":
                continue
            held = bnb.nn.Linear4bit(
                child.in_features, child.out_features, bias=False, compute_dtype=dtype, quant_type="nf4",
                compress_statistics=True, device="meta",
            )  # fmt: skip
            held.weight = bnb.nn.Params4bit(
                child.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to("cuda")
            setattr(parent, name, held)


def random_model(
    shape: str, adapter: str, *, layers: int | None = None, rank: int = 16, seed: int = 0
) -> Any:
    """A Llama of a named shape with a LoRA adapter on all seven projections, bfloat16, on the GPU.

    Args:
        shape: a row of `SHAPES`.
        adapter: `lora` (bfloat16 weights) or `qlora` (NF4).
        layers: fewer layers than the shape has.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunesmith.models.adapter import add_lora

    config = LlamaConfig(
        **(SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})), dtype="bfloat16"
    )
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.requires_grad_(False)
    if adapter == "qlora":
        _quantise(model, torch.bfloat16)
        torch.cuda.empty_cache()
    return add_lora(model, rank=rank, alpha=float(rank), dropout=0.0, targets="all-linear", seed=seed)


def batch_size(text: str) -> tuple[int, int]:
    """`2x4096` as (2, 4096)."""
    rows, _, length = text.partition("x")
    try:
        return int(rows), int(length)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxLENGTH") from None
