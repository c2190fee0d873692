"""How many tokens a micro-batch may hold, and whether layers are recomputed in backward. Torch-free.

The caller measures what one token keeps; this decides. Keeping is fastest, so it is chosen as long as one row
fits; more than a card needs to be busy gains nothing, so the size is capped.
"""

from __future__ import annotations

from dataclasses import dataclass

BUSY_TOKENS = {"cuda": 16_384, "cpu": 1_024}
"""Tokens of a micro-batch beyond which a device gets no faster; on CPU smaller ones stay in the caches."""

USABLE = 0.8
"""Share of the free memory that activations may take; the rest is for gradients, the head's chunk and the
allocator's fragmentation."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What a micro-batch may hold.

    Attributes:
        recompute: recompute each layer in backward instead of keeping its activations.
        tokens: tokens of a micro-batch (at least one row is always taken).
        bytes_per_token: what a token keeps under this choice.
    """

    recompute: bool
    tokens: int
    bytes_per_token: float


def fit_micro_batch(
    *,
    policy: str,
    device: str,
    free_bytes: int,
    kept_per_token: float,
    input_per_token: float,
    layers: int,
    row_tokens: int,
) -> Fit:
    """Choose between keeping and recomputing, and the size of a micro-batch.

    Args:
        policy: `keep`, `recompute`, or `auto`.
        device: `cuda` or `cpu`.
        free_bytes: memory of the device that is free once weights, gradients and optimizer are counted.
        kept_per_token: bytes one token keeps when nothing is recomputed.
        input_per_token: bytes of one layer's input per token, kept per layer when layers are recomputed.
        layers: number of layers.
        row_tokens: tokens of the longest row.
    """
    usable = USABLE * max(free_bytes, 0)
    recomputed_per_token = input_per_token * layers + kept_per_token / layers
    too_much = kept_per_token * row_tokens > usable and recomputed_per_token < kept_per_token
    recompute = policy == "recompute" or (policy == "auto" and too_much)
    per_token = recomputed_per_token if recompute else kept_per_token
    tokens = min(BUSY_TOKENS[device], int(usable / per_token)) if per_token else BUSY_TOKENS[device]
    return Fit(recompute=recompute, tokens=max(tokens, 1), bytes_per_token=per_token)
