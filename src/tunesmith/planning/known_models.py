"""Sizes of public models by their hub id, so that a plan needs no network. Torch-free.

Each entry holds what the model's own `config.json` says about sizes, or the part of it that differs from the family's
defaults (`family_defaults`). They were read from the configs as Lightning AI's LitGPT, MaxText and others quote them
with their addresses; totals of parameters that are published elsewhere hold them in a test.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Config = dict[str, Any]


def _sizes(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, **more: Any) -> Config:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


def _family(common: Config, members: dict[str, Config], endings: Iterable[str] = ("",)) -> dict[str, Config]:
    """Entries of a family: what all say, what each says, and the endings of the names of its variants."""
    return {f"{name}{ending}": {**common, **sizes} for name, sizes in members.items() for ending in endings}


_SMOLLM2 = _family(
    {
        "model_type": "llama",
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    {
        "HuggingFaceTB/SmolLM2-135M": _sizes(30, 576, 1536, 9, 3),
        "HuggingFaceTB/SmolLM2-360M": _sizes(32, 960, 2560, 15, 5),
        "HuggingFaceTB/SmolLM2-1.7B": _sizes(24, 2048, 8192, 32, 32),
    },
    ("", "-Instruct"),
)

_LLAMA3_8B, _LLAMA3_70B = _sizes(32, 4096, 14336, 32, 8), _sizes(80, 8192, 28672, 64, 8)
_LLAMA3: Config = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
_LLAMA = {
    **_family(
        {**_LLAMA3, "max_position_embeddings": 8192},
        {"meta-llama/Meta-Llama-3-8B": _LLAMA3_8B, "meta-llama/Meta-Llama-3-70B": _LLAMA3_70B},
        ("", "-Instruct"),
    ),
    **_family(
        _LLAMA3,
        {
            "meta-llama/Llama-3.1-8B": _LLAMA3_8B,
            "meta-llama/Llama-3.1-70B": _LLAMA3_70B,
            "meta-llama/Meta-Llama-3.1-8B": _LLAMA3_8B,
            "meta-llama/Meta-Llama-3.1-70B": _LLAMA3_70B,
        },
        ("", "-Instruct"),
    ),
    **_family(
        {**_LLAMA3, "tie_word_embeddings": True},
        {
            "meta-llama/Llama-3.2-1B": _sizes(16, 2048, 8192, 32, 8, head_dim=64),
            "meta-llama/Llama-3.2-3B": _sizes(28, 3072, 8192, 24, 8, head_dim=128),
        },
        ("", "-Instruct"),
    ),
    **_family(
        _LLAMA3,
        {
            "meta-llama/Llama-3.3-70B-Instruct": _LLAMA3_70B,
            "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA3_8B,
            "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": _LLAMA3_70B,
        },
    ),
    **_family(
        {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096},
        {
            "meta-llama/Llama-2-7b": _sizes(32, 4096, 11008, 32, 32),
            "meta-llama/Llama-2-13b": _sizes(40, 5120, 13824, 40, 40),
            "meta-llama/Llama-2-70b": _sizes(80, 8192, 28672, 64, 8),
        },
        ("-hf", "-chat-hf"),
    ),
    **_family(
        {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048},
        {"TinyLlama/TinyLlama-1.1B-Chat-v1.0": _sizes(22, 2048, 5632, 32, 4)},
    ),
}

_QWEN2_5_SMALL: Config = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
_QWEN2_5_LARGE: Config = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072}
_QWEN2_5 = {
    **_family(
        _QWEN2_5_SMALL,
        {
            "Qwen/Qwen2.5-0.5B": _sizes(24, 896, 4864, 14, 2),
            "Qwen/Qwen2.5-1.5B": _sizes(28, 1536, 8960, 12, 2),
            "Qwen/Qwen2.5-3B": _sizes(36, 2048, 11008, 16, 2),
        },
        ("", "-Instruct"),
    ),
    **_family(
        _QWEN2_5_LARGE,
        {
            "Qwen/Qwen2.5-7B": _sizes(28, 3584, 18944, 28, 4),
            "Qwen/Qwen2.5-14B": _sizes(48, 5120, 13824, 40, 8),
            "Qwen/Qwen2.5-32B": _sizes(64, 5120, 27648, 40, 8),
            "Qwen/Qwen2.5-72B": _sizes(80, 8192, 29568, 64, 8),
        },
        ("", "-Instruct"),
    ),
    **_family(
        {**_QWEN2_5_LARGE, "max_position_embeddings": 32768},
        {
            "Qwen/Qwen2.5-Coder-7B": _sizes(28, 3584, 18944, 28, 4),
            "Qwen/Qwen2.5-Coder-14B": _sizes(48, 5120, 13824, 40, 8),
            "Qwen/Qwen2.5-Coder-32B": _sizes(64, 5120, 27648, 40, 8),
        },
        ("", "-Instruct"),
    ),
    **_family(
        _QWEN2_5_LARGE,
        {
            "Qwen/QwQ-32B": _sizes(64, 5120, 27648, 40, 8),
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": {
                **_sizes(28, 1536, 8960, 12, 2),
                "vocab_size": 151936,
            },
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _sizes(28, 3584, 18944, 28, 4),
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _sizes(48, 5120, 13824, 40, 8),
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": _sizes(64, 5120, 27648, 40, 8),
        },
    ),
}

_QWEN3_ANY: Config = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "head_dim": 128,
}
_QWEN3_4B = _sizes(36, 2560, 9728, 32, 8)
_QWEN3 = {
    **_family(
        {**_QWEN3_ANY, "tie_word_embeddings": True},
        {
            "Qwen/Qwen3-0.6B": _sizes(28, 1024, 3072, 16, 8),
            "Qwen/Qwen3-1.7B": _sizes(28, 2048, 6144, 16, 8),
            "Qwen/Qwen3-4B": _QWEN3_4B,
        },
        ("", "-Base"),
    ),
    **_family(
        {**_QWEN3_ANY, "tie_word_embeddings": True, "max_position_embeddings": 262144},
        {"Qwen/Qwen3-4B-Instruct-2507": _QWEN3_4B, "Qwen/Qwen3-4B-Thinking-2507": _QWEN3_4B},
    ),
    **_family(
        _QWEN3_ANY,
        {
            "Qwen/Qwen3-8B": _sizes(36, 4096, 12288, 32, 8),
            "Qwen/Qwen3-14B": _sizes(40, 5120, 17408, 40, 8),
        },
        ("", "-Base"),
    ),
    **_family(_QWEN3_ANY, {"Qwen/Qwen3-32B": _sizes(64, 5120, 25600, 64, 8)}),
}

_MISTRAL_ANY: Config = {"model_type": "mistral", "sliding_window": None}
_MISTRAL_7B: Config = {
    **_sizes(32, 4096, 14336, 32, 8),
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
}
_MISTRAL_NEMO: Config = {
    **_sizes(40, 5120, 14336, 32, 8),
    "head_dim": 128,
    "vocab_size": 131072,
    "max_position_embeddings": 128000,
}
_MISTRAL_24B: Config = {
    **_sizes(40, 5120, 32768, 32, 8),
    "head_dim": 128,
    "vocab_size": 131072,
    "max_position_embeddings": 32768,
}
_MISTRAL = _family(
    _MISTRAL_ANY,
    {
        "mistralai/Mistral-7B-v0.1": {**_MISTRAL_7B, "vocab_size": 32000, "sliding_window": 4096},
        "mistralai/Mistral-7B-Instruct-v0.2": {**_MISTRAL_7B, "vocab_size": 32000},
        "mistralai/Mistral-Small-24B-Base-2501": _MISTRAL_24B,
        "mistralai/Mistral-Small-24B-Instruct-2501": _MISTRAL_24B,
        "mistralai/Mistral-7B-v0.3": _MISTRAL_7B,
        "mistralai/Mistral-7B-Instruct-v0.3": _MISTRAL_7B,
        "mistralai/Mistral-Nemo-Base-2407": _MISTRAL_NEMO,
        "mistralai/Mistral-Nemo-Instruct-2407": _MISTRAL_NEMO,
    },
)

_GEMMA2 = _family(
    {"model_type": "gemma2"},
    {
        "google/gemma-2-2b": _sizes(26, 2304, 9216, 8, 4),
        "google/gemma-2-9b": _sizes(42, 3584, 14336, 16, 8),
        "google/gemma-2-27b": _sizes(46, 4608, 36864, 32, 16, head_dim=128),
    },
    ("", "-it"),
)

_SIGLIP: Config = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "image_size": 896,
    "patch_size": 14,
    "vision_use_head": False,
}
"""The tower beside Gemma 3's larger models, which lies frozen in memory where they train on text."""


def _gemma3(sizes: Config) -> Config:
    text = {"model_type": "gemma3_text", "sliding_window": 1024, **sizes}
    return {"model_type": "gemma3", "text_config": text, "vision_config": _SIGLIP}


_GEMMA3 = {
    **_family(
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
        },
        {"google/gemma-3-1b": _sizes(26, 1152, 6912, 4, 1)},
        ("-pt", "-it"),
    ),
    **_family(
        {},
        {
            "google/gemma-3-4b": _gemma3(_sizes(34, 2560, 10240, 8, 4)),
            "google/gemma-3-12b": _gemma3(_sizes(48, 3840, 15360, 16, 8)),
            "google/gemma-3-27b": _gemma3(_sizes(62, 5376, 21504, 32, 16, head_dim=128)),
        },
        ("-pt", "-it"),
    ),
}

_PHI4_ANY: Config = {"model_type": "phi3", "vocab_size": 100352, **_sizes(40, 5120, 17920, 40, 10)}
_PHI = {
    **_family(
        _PHI4_ANY,
        {
            "microsoft/phi-4": {"max_position_embeddings": 16384},
            "microsoft/Phi-4-reasoning": {"max_position_embeddings": 32768},
            "microsoft/Phi-4-reasoning-plus": {"max_position_embeddings": 32768},
        },
    ),
    **_family(
        {"model_type": "phi3", "vocab_size": 32064, **_sizes(32, 3072, 8192, 32, 32)},
        {"microsoft/Phi-3-mini-4k-instruct": {"max_position_embeddings": 4096, "sliding_window": 2047}},
    ),
    **_family(
        {"model_type": "phi3", "vocab_size": 200064, **_sizes(32, 3072, 8192, 24, 8)},
        {
            "microsoft/Phi-4-mini-instruct": {
                "max_position_embeddings": 131072,
                "sliding_window": 262144,
                "partial_rotary_factor": 0.75,
                "tie_word_embeddings": True,
            }
        },
    ),
}

_OLMO2 = _family(
    {"model_type": "olmo2", "vocab_size": 100352, "max_position_embeddings": 4096},
    {
        "allenai/OLMo-2-1124-7B": _sizes(32, 4096, 11008, 32, 32),
        "allenai/OLMo-2-1124-13B": _sizes(40, 5120, 13824, 40, 40),
    },
    ("", "-SFT", "-DPO", "-Instruct"),
)

_SMOLLM3 = _family(
    {"model_type": "smollm3", "vocab_size": 128256, "max_position_embeddings": 65536},
    {"HuggingFaceTB/SmolLM3-3B": _sizes(36, 2048, 11008, 16, 4)},
    ("", "-Base"),
)

_GPT_OSS: Config = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "head_dim": 64,
    "attention_bias": True,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131072,
    "quantization_config": {"quant_method": "mxfp4"},
}
_EXPERTS = {
    **_family(
        {"model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2},
        {"mistralai/Mixtral-8x7B": {**_sizes(32, 4096, 14336, 32, 8), "max_position_embeddings": 32768}},
        ("-v0.1", "-Instruct-v0.1"),
    ),
    **_family(
        {
            **_QWEN3_ANY,
            "model_type": "qwen3_moe",
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        {"Qwen/Qwen3-30B-A3B": _sizes(48, 2048, 6144, 32, 4)},
        ("", "-Base"),
    ),
    "openai/gpt-oss-20b": {**_GPT_OSS, **_sizes(24, 2880, 2880, 64, 8), "num_local_experts": 32},
    "openai/gpt-oss-120b": {**_GPT_OSS, **_sizes(36, 2880, 2880, 64, 8), "num_local_experts": 128},
}
"""Mixtures of experts, whose layers are not fused."""

MODELS: dict[str, Config] = {
    **_SMOLLM2,
    **_LLAMA,
    **_QWEN2_5,
    **_QWEN3,
    **_MISTRAL,
    **_GEMMA2,
    **_GEMMA3,
    **_PHI,
    **_OLMO2,
    **_SMOLLM3,
    **_EXPERTS,
}
"""By hub id."""

_BY_LOWER = {name.lower(): config for name, config in MODELS.items()}
_COPIES = {f"unsloth/{name.partition('/')[2]}": config for name, config in _BY_LOWER.items()}
"""Copies of public models in 16 bits, under the model's own name."""


def published_config(name: str) -> Config | None:
    """The sizes of a public model, or of Unsloth's copy of one, by its hub id, which the hub reads without regard to
    case; None for others."""
    return _BY_LOWER.get(name.lower()) or _COPIES.get(name.lower())
