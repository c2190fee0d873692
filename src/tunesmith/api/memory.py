"""What a model keeps between forward and backward, by the values that `use_gradient_checkpointing` has in scripts.

    value          fused layers                                  stock layers
    "unsloth"      `offload`: inputs of layers, on the host      recomputed
    True           `recompute`: inputs of layers, on the device  recomputed
    False          `keep`                                        kept
    "auto"         the fastest that fits `max_seq_length`        kept where it fits, else recomputed

On a CPU nothing is moved: "unsloth" and True are the same there.
"""

from __future__ import annotations

import warnings
from typing import Any

import psutil
import torch

from tunesmith.api.facts import base_of
from tunesmith.contracts.errors import UserError
from tunesmith.models.attach import Attached, attach
from tunesmith.models.head import CausalModel
from tunesmith.models.policy import POLICIES
from tunesmith.models.probe import policy_costs
from tunesmith.planning.fit import fit_micro_batch

CHECKPOINTING: dict[bool | str, str] = {
    "unsloth": "offload",
    True: "recompute",
    False: "keep",
    "auto": "auto",
}
"""A value of `use_gradient_checkpointing`, and the row of `POLICIES` that it asks for."""


def policy_of(checkpointing: Any) -> str:
    """The policy that a value of `use_gradient_checkpointing` asks for.

    Raises:
        UserError: it is none of the four.
    """
    for value, policy in CHECKPOINTING.items():
        if type(checkpointing) is type(value) and checkpointing == value:
            return policy
    raise UserError(
        f"use_gradient_checkpointing={checkpointing!r} is none of {', '.join(map(repr, CHECKPOINTING))}.",
        hint='"unsloth" needs the least memory, "auto" is the fastest that fits.',
    )


def attach_with(model: Any, checkpointing: Any, *, tokens: int) -> Attached:
    """Put fused layers and the door on a model, keeping what `use_gradient_checkpointing` says.

    Args:
        tokens: of a micro-batch, for `auto`.
    """
    wanted = policy_of(checkpointing)
    attached = attach(model, policy="keep")
    set_policy(model, attached, fitting(model, attached, tokens) if wanted == "auto" else wanted)
    return attached


def set_policy(model: Any, attached: Attached, policy: str) -> None:
    """Have fused and stock layers keep what a row of `POLICIES` says from the next forward pass on."""
    base = base_of(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*checkpointing.* is deprecated", category=FutureWarning)
        if POLICIES[policy].keep:
            base.gradient_checkpointing_disable()
        else:  # also for stock layers, of which a fused model may have some
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if attached.installed is not None:
        attached.installed.set_policy(policy)


def fitting(model: Any, attached: Attached, tokens: int) -> str:
    """The fastest policy under which a micro-batch of so many tokens fits the memory that is free now."""
    parameters = list(model.parameters())
    device, trained = parameters[0].device, sum(p.numel() for p in parameters if p.requires_grad)
    dtype = next(
        (p.dtype for p in parameters if not p.requires_grad and p.is_floating_point()), torch.float32
    )
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        costs = policy_costs(
            CausalModel(model, dtype), torch.autocast(device.type, enabled=False), attached.installed
        )
    except UserError:  # a model whose head we cannot take off cannot be measured so either
        return "recompute"
    return fit_micro_batch(
        policy="auto",
        costs=costs,
        device=device.type,
        free_bytes=free - trained * 12,  # float32 gradient and two moments
        free_host_bytes=psutil.virtual_memory().available,
        row_tokens=tokens,
    ).policy
