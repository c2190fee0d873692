"""How many bytes a token of this model keeps between forward and backward: measured, not guessed; and what training
takes however many tokens there are.

Forward passes over a short row and one twice as long, with autograd's own hooks counting what they save. The
difference is exact for everything that grows with the number of tokens, on every architecture, and takes a fraction
of a second; weights that autocast has cast are in both. Fused layers are counted under each policy; what a backward
pass needs for a moment beside it is worked out from the counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.contracts.batch import TokenBatch
from tunesmith.models.head import CausalModel
from tunesmith.models.install import Installed
from tunesmith.models.offload import Offloader
from tunesmith.models.policy import OF_TOKENS, POLICIES
from tunesmith.planning.fit import PolicyCost, layer_costs, training_bytes
from tunesmith.planning.policies import IN_FLIGHT

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
    """Bytes that autograd keeps per token of a row, parameters and what is cast of them not counted.

    Runs the backbone twice; leaves gradients, random state and module state as they were.
    """
    short, long = (_saved_bytes(causal, autocast, tokens) for tokens in (PROBE_TOKENS, 2 * PROBE_TOKENS))
    return (long - short) / PROBE_TOKENS


def _saved_bytes(causal: CausalModel, autocast: torch.autocast, tokens: int) -> int:
    """Bytes that autograd keeps of a row, parameters not counted."""
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
        hidden_TD = causal.hidden(probe_batch((tokens,)).to(causal.device))
    if not hidden_TD.requires_grad:  # only the head is trained
        return 0
    return sum(held.values())


def fixed_bytes(causal: CausalModel, optimizer: str, installed: Installed | None = None) -> int:
    """Bytes that training takes beside weights and activations: gradients, the optimizer's state, and what a pass
    needs for a moment of the head or of a layer.

    Args:
        optimizer: a name of `OPTIMIZERS`.
        installed: the fused layers, which cast weights for one layer at a time; stock layers hold all that is cast.
    """
    compute, head = causal.compute_dtype, causal.base.get_output_embeddings()
    trained = [p for p in causal.model.parameters() if p.requires_grad]
    layers = [] if installed is None else installed.layers
    fused = {id(p) for layer in layers for p in layer.parameters()}
    cast = sum(_cast_bytes(p, compute) for p in trained if id(p) not in fused)
    head_weights = [p for p in head.parameters() if p.requires_grad and p.ndim == 2]
    return cast + training_bytes(
        trained=sum(p.numel() for p in trained),
        gradient_bytes=sum(p.nbytes for p in trained),
        optimizer=optimizer,
        head_bytes=sum(p.numel() * (4 + compute.itemsize) for p in head_weights),
        layer_bytes=max((_layer_bytes(layer, compute) for layer in layers), default=0),
    )


def _cast_bytes(parameter: Tensor, compute: torch.dtype) -> int:
    """Of a matrix in the type that products are in, 0 where it is in that type already."""
    matrix = parameter.ndim == 2 and parameter.dtype != compute
    return parameter.numel() * compute.itemsize if matrix else 0


def _layer_bytes(layer: Any, compute: torch.dtype) -> int:
    """Of a fused layer's new gradients and of its weights as it casts them."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    return sum(p.nbytes + _cast_bytes(p, compute) for p in trained)


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
    policies = [POLICIES[name] for name in OF_TOKENS]
    for policy in policies:
        # what the same policy holds without moving it, of which the rest is on the host
        held = next(saved[p.name] for p in policies if p.keep == policy.keep and not p.offload)
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
    before, offloader = installed.policies, installed.offloader
    installed.offloader = Offloader(enabled=False)  # pinned memory for 64 tokens would serve nothing else
    try:
        saved = {}
        for name in OF_TOKENS:
            installed.set_policy(name)
            saved[name] = saved_bytes_per_token(causal, autocast)
    finally:
        installed.offloader = offloader
        installed.policies = before
    return saved
