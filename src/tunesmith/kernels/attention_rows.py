"""What the attention rows of the catalog are made of: inputs, sizes, tolerances and cost of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.attention_triton import packed_attention_reference
from tunesmith.kernels.packed import Documents, Heads, Scores

Size = Mapping[str, Any]

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
"""Probabilities and their gradients are rounded to the type of the operands before they are multiplied, and the
result once more. In float32 products keep 22 bits and the soft cap errs by 1e-7 of c."""


def _heads(size: Size) -> Heads:
    return Heads(size["heads"], size["kv_heads"], size["head_dim"])


def _scores(size: Size) -> Scores:
    return Scores(size.get("scale"), size.get("window"), size.get("softcap"))


def _normal(tokens: int, width: int, pad: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(tokens, width + pad, device=device).to(dtype)[:, :width]


def attention_cases(size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `packed_attention`."""
    heads, lengths = _heads(size), tuple(size["lengths"])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return {
        "fused_TN": _normal(sum(lengths), heads.columns, size.get("pad", 0), dtype, device),
        "heads": heads,
        "documents": Documents(lengths, bounds.to(device, torch.int32)),
        "scores": _scores(size),
        "room": size.get("room", 0),
    }


def attention_backward_cases(size: Size, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of `packed_attention_backward`."""
    inputs = attention_cases(size, dtype, device)
    output_TN, lse_HT = packed_attention_reference(**inputs)
    grad_TN = _normal(len(output_TN), output_TN.shape[1], size.get("pad", 0), dtype, device)
    return {**inputs, "grad_TN": grad_TN, "output_TN": output_TN, "lse_HT": lse_HT}


def pairs(size: Size) -> int:
    """Scores that count, for one head."""
    found = 0
    for length in size["lengths"]:
        window = min(size.get("window") or length, length)
        found += window * (window + 1) // 2 + (length - window) * window
    return found


def attention_work(size: Size, itemsize: int) -> tuple[int, int]:
    """Bytes and operations of a forward pass: two products of `head_dim` for each score."""
    heads, tokens = _heads(size), sum(size["lengths"])
    moved = tokens * (heads.columns + heads.query * heads.size) * itemsize + 4 * tokens * heads.query
    return moved, 4 * heads.size * heads.query * pairs(size)


def attention_backward_work(size: Size, itemsize: int) -> tuple[int, int]:
    """Bytes and operations of a backward pass: five products for each score, as everybody counts them."""
    heads, tokens = _heads(size), sum(size["lengths"])
    moved = tokens * 2 * (heads.columns + heads.query * heads.size) * itemsize + 8 * tokens * heads.query
    return moved, 10 * heads.size * heads.query * pairs(size)


_SHORT = (65, 1, 5, 130)

SMALL: tuple[Size, ...] = (
    {"lengths": _SHORT, "heads": 2, "kv_heads": 1, "head_dim": 64, "pad": 8},
    {"lengths": (1,), "heads": 1, "kv_heads": 1, "head_dim": 16},
    {"lengths": (300, 7), "heads": 2, "kv_heads": 2, "head_dim": 32, "scale": 0.3, "window": 70, "room": 8},
    {"lengths": _SHORT, "heads": 4, "kv_heads": 1, "head_dim": 72, "window": 1, "pad": 3},
    {"lengths": (40, 150), "heads": 2, "kv_heads": 1, "head_dim": 96, "softcap": 2.0},
    {
        "lengths": (33, 140),
        "heads": 8,
        "kv_heads": 1,
        "head_dim": 128,
        "scale": 0.2,
        "window": 50,
        "softcap": 3.0,
    },
)

_8B: Size = {"heads": 32, "kv_heads": 8, "head_dim": 128}
_GEMMA: Size = {"heads": 16, "kv_heads": 8, "head_dim": 256, "scale": 256**-0.5}

LARGE: tuple[Size, ...] = (
    {**_8B, "lengths": (4096, 4096)},
    {**_8B, "lengths": (512,) * 16},
    {**_GEMMA, "lengths": (4096, 4096), "softcap": 50.0, "window": 2048},
    {**_GEMMA, "lengths": (4096, 4096), "window": 1024},
    {"heads": 9, "kv_heads": 3, "head_dim": 64, "lengths": (2048, 1024, 1024)},
    {"heads": 32, "kv_heads": 32, "head_dim": 96, "lengths": (4096, 4096)},
)
