"""Random models of published shapes, built in seconds: shape decides speed and memory, weights do not."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and who only reads the table does not need it
    import torch
    from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000.0, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32768,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "gemma2-9b": {
        "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000,
        "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "gemma3-12b": {
        "model_type": "gemma3_text", "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208,
        "query_pre_attn_scalar": 256, "sliding_window": 1024, "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "phi-4": {
        "model_type": "phi3", "hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352, "rope_theta": 250000.0,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 16384, "original_max_position_embeddings": 16384,
        "sliding_window": None, "pad_token_id": 100100, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Keyword arguments of each shape's config, and the `model_type` it belongs to; without one it is a Llama."""

_APART = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PROJECTIONS = {"phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}


def projections(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of all linear layers of a decoder layer, on which the adapters are."""
    return _PROJECTIONS.get(config.get("model_type", "llama"), _APART)


def attention_widths(config: dict[str, Any]) -> tuple[int, int]:
    """Columns of q, and of k or v."""
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    return heads * size, config["num_key_value_heads"] * size


_SPECIAL = 256
"""The last ids of the vocabulary are control tokens, as in Llama 3: ids 128,000 to 128,255 of 128,256."""


def parameters(config: dict[str, Any]) -> int:
    """Number of parameters of a model with this config, norms and biases left out."""
    width, (queries, keys) = config["hidden_size"], attention_widths(config)
    attention = 2 * width * (queries + keys)
    layer = attention + 3 * width * config["intermediate_size"]
    tables = 1 if config["tie_word_embeddings"] else 2
    return int(config["num_hidden_layers"] * layer + tables * config["vocab_size"] * width)


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """The GPU and bfloat16, or the CPU and float32 where there is none."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", 0), torch.bfloat16
    return torch.device("cpu"), torch.float32


def _quantise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replace every linear layer but the head by bitsandbytes' NF4 form with nested scales, one at a time."""
    import bitsandbytes as bnb
    from torch import nn

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear) or name == "lm_head":
                continue
            held = bnb.nn.Linear4bit(
                child.in_features, child.out_features, bias=child.bias is not None, compute_dtype=dtype,
                quant_type="nf4", compress_statistics=True, device="meta",
            )  # fmt: skip
            held.bias = child.bias
            held.weight = bnb.nn.Params4bit(
                child.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(device)
            setattr(parent, name, held)


def base_model(config: dict[str, Any], seed: int = 0) -> Any:
    """A model with frozen random weights on the device, in the type of `device_and_dtype`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device, dtype = device_and_dtype()
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    settings = {"model_type": "llama", "dtype": str(dtype).removeprefix("torch.")} | config
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def random_model(
    shape: str, adapter: str, *, layers: int | None = None, rank: int = 16, seed: int = 0
) -> Any:
    """A model of a named shape with a LoRA adapter on all its projections, or trained whole, bfloat16, on the GPU.

    Args:
        shape: a row of `SHAPES`.
        adapter: `lora` (bfloat16 weights), `qlora` (NF4) or `full` (none; all weights train).
        layers: fewer layers than the shape has.
    """
    import torch

    from tunesmith.models.adapter import add_lora

    model = base_model(SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {}), seed)
    if adapter == "full":
        return model.requires_grad_(True)
    if adapter == "qlora":
        device, dtype = device_and_dtype()
        _quantise(model, dtype, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return add_lora(model, rank=rank, alpha=float(rank), dropout=0.0, targets="all-linear", seed=seed)


def _save_tokenizer(folder: Path, vocabulary: int, positions: int) -> dict[str, int]:
    """Write a byte-level tokenizer that fills the vocabulary, for systems that do not load a model without one.

    Returns:
        The ids of its control tokens, by the name of the setting in a model's config.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = vocabulary - _SPECIAL
    special = {"<|begin_of_text|>": first, "<|end_of_text|>": first + 1, "<|pad|>": first + 4}
    names = {number: token for token, number in special.items()}
    vocab = {token: number for number, token in enumerate(alphabet)}
    for number in range(len(alphabet), vocabulary):
        vocab[names.get(number, f"<|unused{number}|>")] = number
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = special
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, model_max_length=positions
    ).save_pretrained(folder)
    return {"bos_token_id": special[bos], "eos_token_id": special[eos]}


def save_checkpoint(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """Write the base weights that `random_model` has, and a tokenizer; the folder appears when it is whole."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    model = base_model(config, seed)
    for name, number in _save_tokenizer(
        partial, config["vocab_size"], config["max_position_embeddings"]
    ).items():
        setattr(model.config, name, number)
        setattr(model.generation_config, name, number)
    model.save_pretrained(partial, max_shard_size="4GB")
    partial.rename(folder)


def batch_size(text: str) -> tuple[int, int]:
    """`2x4096` as (2, 4096)."""
    rows, _, length = text.partition("x")
    try:
        return int(rows), int(length)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxLENGTH") from None


if __name__ == "__main__":  # python shapes.py FOLDER CONFIG writes a checkpoint; CONFIG is JSON
    save_checkpoint(Path(sys.argv[1]), json.loads(sys.argv[2]))
