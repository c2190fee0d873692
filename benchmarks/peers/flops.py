"""How many floating-point operations a training step with adapters needs at the least: the roofline's numerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

H100_TFLOPS = 790.0
"""What bfloat16 GEMMs of these sizes reach on one H100 80GB (740 to 795 measured); its data sheet says 989."""

ATTENTION_PRODUCTS = 7
"""Matrix products of causal attention: two forward; five backward, as scores are never stored (dV, dP, dQ, dK and
the scores once more)."""


def step_flops(config: dict[str, Any], lengths: Sequence[int], supervised: int, rank: int) -> float:
    """FLOPs of forward and backward of one step without recomputing, a multiply-add counted as two.

    Base weights are frozen: one GEMM forward, one for the gradient of the input, none for the weight. Adapters
    train: three GEMMs. Attention counts the pairs of each document that causality leaves. The head sees the
    supervised positions only.

    Args:
        config: keyword arguments of a Llama's config.
        lengths: tokens of each document.
        supervised: tokens that train.
        rank: of the adapters on all seven projections.
    """
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    key_width = config["num_key_value_heads"] * (width // heads)
    projections = (
        (width, width), (width, key_width), (width, key_width), (width, width),
        (width, inner), (width, inner), (inner, width),
    )  # fmt: skip
    tokens = sum(lengths)
    base = 2 * 2 * tokens * sum(inputs * outputs for inputs, outputs in projections)
    adapters = 3 * 2 * tokens * rank * sum(inputs + outputs for inputs, outputs in projections)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    attention = ATTENTION_PRODUCTS * 2 * pairs * width
    head = 2 * 2 * supervised * width * config["vocab_size"]
    return float(config["num_hidden_layers"] * (base + adapters + attention) + head)
