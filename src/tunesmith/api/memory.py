"""What a model keeps between forward and backward, by the values that `use_gradient_checkpointing` has in scripts.

    value          fused layers                                              stock layers
    "unsloth"      `offload_attention` where the host has memory for what
                   moves there, else `offload`, else `recompute`             recomputed
    True           `recompute`: inputs of layers, on the device              recomputed
    False          `keep`                                                    kept
    "auto"         the fastest that fits `max_seq_length`                    kept where it fits, else recomputed

On a CPU nothing is moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from tunesmith.contracts.errors import UserError
from tunesmith.models.attach import Attached, attach
from tunesmith.models.base_of import base_of
from tunesmith.models.device_memory import room_of
from tunesmith.models.head import CausalModel
from tunesmith.models.policy import OF_TOKENS, POLICIES
from tunesmith.models.probe import fixed_bytes, policy_costs
from tunesmith.planning.fit import STOCK_POLICIES, fit_micro_batch
from tunesmith.planning.host import free_host_memory

CHECKPOINTING: dict[bool | str, tuple[str, ...]] = {
    "unsloth": ("offload_attention", "offload", "recompute"),
    True: ("recompute",),
    False: ("keep",),
    "auto": OF_TOKENS,
}
"""A value of `use_gradient_checkpointing`, and the rows of `POLICIES` that it leaves, fastest first."""


def policies_of(checkpointing: Any) -> tuple[str, ...]:
    """The policies among which a value of `use_gradient_checkpointing` leaves the choice.

    Raises:
        UserError: it is none of the four.
    """
    for value, policies in CHECKPOINTING.items():
        if type(checkpointing) is type(value) and checkpointing == value:
            return policies
    raise UserError(
        f"use_gradient_checkpointing={checkpointing!r} is none of {', '.join(map(repr, CHECKPOINTING))}.",
        hint='"unsloth" needs the least memory, "auto" is the fastest that fits.',
    )


def attach_with(model: Any, checkpointing: Any, *, tokens: int) -> Attached:
    """Put fused layers and the door on a model, keeping what `use_gradient_checkpointing` says.

    Args:
        tokens: of a micro-batch, where there is a choice.
    """
    policies = policies_of(checkpointing)
    attached = attach(model, policy="keep")
    try:
        fit_policy(model, attached, policies, tokens)
    except BaseException:
        attached.undo()
        raise
    return attached


def fit_policy(model: Any, attached: Attached, policies: Sequence[str], tokens: int) -> None:
    """Set the only one of `policies` that the layers have, or the fastest under which a micro-batch of so many tokens
    fits."""
    if attached.installed is None or not attached.installed.fused:
        policies = [policy for policy in policies if policy in STOCK_POLICIES]
    set_policy(
        model, attached, policies[0] if len(policies) == 1 else fitting(model, attached, policies, tokens)
    )


def set_policy(model: Any, attached: Attached, policy: str) -> None:
    """Have fused and stock layers keep what a row of `POLICIES` says from the next forward pass on."""
    base = base_of(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*checkpointing.* is deprecated", category=FutureWarning)
        if POLICIES[policy].keep and not POLICIES[policy].offload:
            base.gradient_checkpointing_disable()
        else:  # also for stock layers, of which a fused model may have some
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if attached.installed is not None:
        attached.installed.set_policy(policy)


def fitting(model: Any, attached: Attached, policies: Sequence[str], tokens: int) -> str:
    """The fastest of `policies` under which a micro-batch of so many tokens fits the memory that is free now."""
    parameters = list(model.parameters())
    device = parameters[0].device
    dtype = next(
        (p.dtype for p in parameters if not p.requires_grad and p.is_floating_point()), parameters[0].dtype
    )
    free = host = free_host_memory()
    if device.type == "cuda":
        free = room_of(device).free
    try:
        causal = CausalModel(model, dtype)
        costs = policy_costs(causal, torch.autocast(device.type, enabled=False), attached.installed)
    except UserError:  # a model whose head we cannot take off cannot be measured so either
        return "recompute"
    return fit_micro_batch(
        policy="auto",
        costs=[cost for cost in costs if cost.name in policies],
        device=device.type,
        free_bytes=free - fixed_bytes(causal, "adamw", attached.installed),
        free_host_bytes=host,
        row_tokens=tokens,
    ).policy
