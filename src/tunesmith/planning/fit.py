"""How many tokens a micro-batch may hold, and whether layers are recomputed in backward. Torch-free.

The caller measures what one token takes under each policy; this decides. The fastest policy under which one row fits
is chosen; more than a card needs to be busy gains nothing, so the size of a micro-batch is capped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BUSY_TOKENS = {"cuda": 16_384, "cpu": 1_024}
"""Tokens of a micro-batch beyond which a device gets no faster; on CPU smaller ones stay in the caches."""

USABLE = 0.8
"""Share of the free memory that activations may take; the rest is for gradients, the head's chunk and the
allocator's fragmentation."""

USABLE_HOST = 0.5
"""Share of the free host memory that may be pinned: the system cannot swap it, and data and files need the rest."""

STOCK_POLICIES = ("keep", "recompute")
"""The policies that every decoder layer has, fastest first; the others are the fused layer's own."""


STATE_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2.0 + 2 * 4 / 256,
    "paged_adamw_32bit": 8.0,
    "paged_adamw_8bit": 2.0 + 2 * 4 / 256,
    "adamw_torch_8bit": 2.0 + 2 * 4 / 256,
    "adamw_torch_4bit": 1.0 + 2 * 4 / 128,
    "adamw_torch_fp8": 2.0 + 2 * 4 / 256,
    "schedule_free_adamw": 8.0,
    "muon": 8.0,
    "lion_32bit": 4.0,
    "lion_8bit": 1.0 + 4 / 256,
    "ademamix": 12.0,
    "ademamix_8bit": 3.0 + 3 * 4 / 256,
    "adafactor": 0.0,
    "sgd": 4.0,
}
"""Bytes of an optimizer's state for each trained parameter: moments in float32, or in 8 bits with a float32 scale for
256 of them (in 4 bits for 128); Adafactor's rows and columns are too few to count. Muon's are 4 of a hidden matrix
and 8 of the rest, which is what all is counted as."""


ROUNDING = ("adamw", "adamw_8bit", "adamw_torch_8bit", "adamw_torch_4bit", "adamw_torch_fp8")
"""Optimizers that round weights in bfloat16 stochastically, so that they can be trained as such."""


def pinnable(free_bytes: float) -> int:
    """Bytes of the host's free memory that a run may pin."""
    return int(USABLE_HOST * max(free_bytes, 0))


def training_bytes(
    *, trained: int, gradient_bytes: int, optimizer: str, head_bytes: int = 0, layer_bytes: int = 0
) -> int:
    """Bytes that training takes beside weights and activations, whatever the number of tokens.

    Args:
        trained: number of trained parameters.
        gradient_bytes: of their gradients.
        optimizer: a name of `STATE_BYTES`.
        head_bytes: of a head that trains: its gradient as it is summed, and as it is handed on.
        layer_bytes: of the layer that takes most: its new gradients before they are added to those that are there,
            and its weights cast for the products. Never at the same moment as the head's.
    """
    return int(gradient_bytes + STATE_BYTES[optimizer] * trained) + max(head_bytes, layer_bytes)


def fits_in_float32(*, trained: int, frozen_bytes: int, optimizer: str, device_bytes: int) -> bool:
    """Whether a device holds float32 weights, their gradients and the optimizer's state with room for activations.

    Args:
        trained: number of trained parameters.
        frozen_bytes: of those that are not.
        optimizer: a name of `STATE_BYTES`.
        device_bytes: memory of the device.
    """
    taken = 4 * trained + training_bytes(trained=trained, gradient_bytes=4 * trained, optimizer=optimizer)
    return taken + frozen_bytes <= USABLE * device_bytes


@dataclass(frozen=True, slots=True)
class PolicyCost:
    """What a token takes under one policy.

    Attributes:
        name: of the policy.
        device_bytes: on the device, over all layers, at the moment of a backward pass at which it is most.
        host_bytes: in pinned host memory.
    """

    name: str
    device_bytes: float
    host_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Fit:
    """What a micro-batch may hold.

    Attributes:
        policy: what is kept between forward and backward.
        tokens: tokens of a micro-batch (at least one row is always taken).
        bytes_per_token: what a token takes on the device under this policy.
        unpacked: bytes of 4-bit weights that layers hold unpacked, from their first pass on.
    """

    policy: str
    tokens: int
    bytes_per_token: float
    unpacked: int = 0


def layer_costs(*, kept_per_token: float, input_per_token: float, layers: int) -> tuple[PolicyCost, ...]:
    """Costs of stock layers, from what they keep when nothing is recomputed.

    Args:
        kept_per_token: bytes of a token over all layers.
        input_per_token: bytes of one layer's input, all that is left of a layer that is recomputed.
        layers: number of layers; one at a time is whole while it is recomputed.
    """
    recomputed = input_per_token * layers + kept_per_token / layers
    return PolicyCost("keep", kept_per_token), PolicyCost("recompute", recomputed)


def fit_micro_batch(
    *,
    policy: str,
    costs: Sequence[PolicyCost],
    device: str,
    free_bytes: int,
    free_host_bytes: int,
    row_tokens: int,
) -> Fit:
    """Choose the policy, where it is `auto`, and the size of a micro-batch.

    `auto` is the first of `costs` under which a row fits, else the one that takes the least of the device among
    those that the host has memory for.

    Args:
        policy: the name of one of `costs`, or `auto`.
        costs: fastest first; the first needs no host memory.
        device: `cuda` or `cpu`.
        free_bytes: memory of the device that is free once weights, gradients and optimizer are counted.
        free_host_bytes: memory of the host that is free.
        row_tokens: tokens of the longest row.
    """
    usable, usable_host = USABLE * max(free_bytes, 0), pinnable(free_host_bytes)
    if policy == "auto":
        possible = [cost for cost in costs if cost.host_bytes * row_tokens <= usable_host]
        fitting = (cost for cost in possible if cost.device_bytes * row_tokens <= usable)
        chosen = next(fitting, min(possible, key=lambda cost: cost.device_bytes))
    else:
        chosen = next(cost for cost in costs if cost.name == policy)
    tokens = BUSY_TOKENS[device]
    if chosen.device_bytes:
        tokens = min(tokens, int(usable / chosen.device_bytes))
    if chosen.host_bytes:
        tokens = min(tokens, int(usable_host / chosen.host_bytes))
    return Fit(policy=chosen.name, tokens=max(tokens, 1), bytes_per_token=chosen.device_bytes)
