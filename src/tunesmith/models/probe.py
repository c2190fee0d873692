"""How many bytes a token of this model keeps between forward and backward: measured, not guessed.

One forward pass over a short row, with autograd's own hooks counting what it saves. The count is exact for
everything that grows with the number of tokens, on every architecture, and takes a fraction of a second. Fused layers
are counted once under each policy; what a backward pass needs for a moment beside it is worked out from the counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.contracts.batch import TokenBatch
from tunesmith.models.head import CausalModel
from tunesmith.models.install import Installed
from tunesmith.models.offload import IN_FLIGHT, Offloader
from tunesmith.models.policy import POLICIES
from tunesmith.planning.fit import PolicyCost, layer_costs

PROBE_TOKENS = 64


def probe_batch(lengths: tuple[int, ...]) -> TokenBatch:
    """A row of documents that count from 0 to 6 over and over, every token but the row's first supervised."""
    tokens = sum(lengths)
    position_ids_T = torch.cat([torch.arange(length) for length in lengths])
    ids_T = position_ids_T % 7
    return TokenBatch(
        ids_T=ids_T,
        position_ids_T=position_ids_T,
        lengths=lengths,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        logit_index_S=torch.arange(tokens - 1),
        targets_S=ids_T[1:],
        weights_S=torch.ones(tokens - 1),
        document_S=torch.zeros(tokens - 1, dtype=torch.int64),
        rows_D=tuple(range(len(lengths))),
    )


def saved_bytes_per_token(causal: CausalModel, autocast: torch.autocast) -> float:
    """Bytes that autograd keeps per token of a row, parameters not counted.

    Runs the backbone once; leaves gradients, random state and module state as they were.
    """
    held: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in causal.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # keeps the storage alive, so that its address is not used twice
        return tensor

    kept: list[Tensor] = []
    devices: list[Any] = [causal.device] if causal.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        autocast,
    ):
        hidden_TD = causal.hidden(probe_batch((PROBE_TOKENS,)).to(causal.device))
    if not hidden_TD.requires_grad:  # only the head is trained
        return 0.0
    return sum(held.values()) / PROBE_TOKENS


def policy_costs(
    causal: CausalModel, autocast: torch.autocast, installed: Installed | None = None
) -> tuple[PolicyCost, ...]:
    """What a token takes under every policy that this model has, fastest first; nothing is moved to the host yet.

    Args:
        installed: the fused layers; without any, these are the two policies of stock layers.
    """
    if installed is None or not installed.fused:
        return layer_costs(
            kept_per_token=saved_bytes_per_token(causal, autocast),
            input_per_token=causal.config.hidden_size * 4,
            layers=causal.config.num_hidden_layers,
        )
    fused = len(installed.fused)
    saved = _saved_under_each(causal, autocast, installed)
    costs = []
    for policy in POLICIES.values():
        # what the same policy holds without moving it, of which the rest is on the host
        held = next(saved[p.name] for p in POLICIES.values() if p.keep == policy.keep and not p.offload)
        moved = held - saved[policy.name]
        # in backward one layer is whole again; of what travels, the layers under way are on the device as well
        again = (saved["keep_all"] - held) / fused
        under_way = moved * min(IN_FLIGHT + 1, fused) / fused
        costs.append(PolicyCost(policy.name, saved[policy.name] + again + under_way, moved))
    return tuple(costs)


def _saved_under_each(
    causal: CausalModel, autocast: torch.autocast, installed: Installed
) -> dict[str, float]:
    """Bytes that autograd keeps per token under each policy; what would be moved is not among them."""
    before, offloader = installed.policy.name, installed.offloader
    installed.offloader = Offloader(enabled=False)  # pinned memory for 64 tokens would serve nothing else
    try:
        saved = {}
        for name in POLICIES:
            installed.set_policy(name)
            saved[name] = saved_bytes_per_token(causal, autocast)
    finally:
        installed.offloader = offloader
        installed.set_policy(before)
    return saved
