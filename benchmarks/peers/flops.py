"""How many floating-point operations a training step with adapters needs at the least: the roofline's numerator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.shapes import attention_widths

H100_TFLOPS = 790.0
"""What bfloat16 GEMMs of these sizes reach on one H100 80GB (740 to 795 measured); its data sheet says 989."""

ATTENTION_PRODUCTS = 7
"""Matrix products of causal attention: two forward; five backward, as scores are never stored (dV, dP, dQ, dK and
the scores once more)."""


def step_flops(
    config: dict[str, Any], lengths: Sequence[int], supervised: int, rank: int, *, full: bool = False
) -> float:
    """FLOPs of forward and backward of one step without recomputing, a multiply-add counted as two.

    Base weights that are frozen take one GEMM forward, one for the gradient of the input, none for the weight. What
    trains takes three: adapters, or all weights with `full`. Attention counts the pairs of each document that
    causality leaves. The head sees the supervised positions only.

    Args:
        config: keyword arguments of the model's config.
        lengths: tokens of each document.
        supervised: tokens that train.
        rank: of the adapters on all seven projections, 0 without.
        full: whether the weights train.
    """
    gemms = 3 if full else 2
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = attention_widths(config)
    projections = (
        (width, queries), (width, keys), (width, keys), (queries, width),
        (width, inner), (width, inner), (inner, width),
    )  # fmt: skip
    tokens = sum(lengths)
    base = 2 * gemms * tokens * sum(inputs * outputs for inputs, outputs in projections)
    adapters = 3 * 2 * tokens * rank * sum(inputs + outputs for inputs, outputs in projections)
    attention = ATTENTION_PRODUCTS * 2 * queries * sum(
        sum(_pairs(length, window) for length in lengths) for window in _windows(config)
    )  # fmt: skip
    head = 2 * gemms * supervised * width * config["vocab_size"]
    return float(config["num_hidden_layers"] * (base + adapters) + attention + head)


def _pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, itself included."""
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


_LOCAL_OF = {"gemma2": 2, "gemma3_text": 6}
"""So many layers make a round in which the last one sees everything and the others their window."""


def _windows(config: dict[str, Any]) -> list[int | None]:
    """The attention window of each layer."""
    window, layers = config.get("sliding_window"), range(config["num_hidden_layers"])
    around = _LOCAL_OF.get(config.get("model_type", "llama"))
    return [None if around and (number + 1) % around == 0 else window for number in layers]
