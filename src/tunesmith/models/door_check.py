"""Proof on a few tokens that a backbone computes the same from a packed row as from the padded batch.

Nothing is looked up in a list of names. Layers that carry state from one document into the next, tokens that see
the ones behind them, positions counted in another way: each shows in the hidden states. Masks that packed attention
would not keep to, such as a window longer than these few tokens, show in what attention is called with.

Shape suffixes: B rows, T columns, N real tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from tunesmith.contracts.errors import UserError
from tunesmith.models.attention import picked_keys, sdpa_attention
from tunesmith.models.modes import evaluating
from tunesmith.models.packed_call import run_packed
from tunesmith.models.unpad import from_mask

_WATCHED = "tunesmith_watched"

_MASK = [[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
"""A full row, one padded on the left as prompts are, one on both sides as completions are, one on the right."""


@dataclass(frozen=True)
class Proof:
    """What the proof found out.

    Attributes:
        modules: the modules that attend, in the order of their calls.
        restart: whether positions are counted anew in each document; otherwise they are columns of the batch.
    """

    modules: tuple[Any, ...]
    restart: bool


@dataclass
class _Watch:
    """Packed attention that remembers who called it, and sees that masks ask for no more than it computes.

    The mask that the model carries to its attention holds one number: the window it stands for, 0 for none.
    """

    modules: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Behind the block it remembers nobody."""
        try:
            yield
        finally:
            self.modules.clear()

    def mask(
        self,
        *_: Any,
        q_length: int,
        kv_length: int,
        device: torch.device,
        local_size: int | None = None,
        use_vmap: bool = False,
        **__: Any,
    ) -> Tensor:
        # transformers vectorises what is no plain causal, sliding or chunked mask
        window = float("nan") if use_vmap else float(local_size or 0)
        return torch.full((1, 1, q_length, kv_length), window, device=device)

    def attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if kwargs.get("document_lengths") is None:
            raise UserError("its attention is not told where documents begin")
        window = float(kwargs.get("sliding_window") or 0)
        if attention_mask is not None and not bool((attention_mask == window).all()):
            raise UserError("its attention mask has a pattern of its own, which packed rows do not have")
        self.modules[id(module)] = module
        return sdpa_attention(module, query, key, value, None, **kwargs)


def _difference(got_BTD: Tensor, expected_BTD: Tensor, mask_BT: Tensor) -> float:
    """Relative distance of the hidden states of real tokens."""
    got_ND, expected_ND = got_BTD[mask_BT].float(), expected_BTD[mask_BT].float()
    return float((got_ND - expected_ND).norm() / expected_ND.norm().clamp_min(1e-30))


@torch.no_grad()
def prove(backbone: Any, stock: Callable[..., Any]) -> Proof:
    """Compare the hidden states of a small batch, padded and packed.

    Args:
        backbone: a decoder of transformers.
        stock: its forward as a function of the backbone.

    Raises:
        UserError: they differ, or the model cannot run packed rows; the message is a reason, in the form
            "its ...".
    """
    if picked_keys(backbone.config) is not None:
        raise UserError("its attention picks the keys of each token, by a mask that packed rows do not have")
    embedding = backbone.get_input_embeddings()
    device = next(backbone.parameters()).device  # not the embedding's, which may be on the host
    mask_BT = torch.tensor(_MASK, device=device)
    ids_BT = (torch.arange(mask_BT.numel(), device=device) * 5 + 1).view(mask_BT.shape) % min(
        97, embedding.weight.shape[0]
    )
    given = {"input_ids": ids_BT, "attention_mask": mask_BT}
    layout, real_BT, watch = from_mask(mask_BT, device), mask_BT.bool(), _Watch()
    AttentionInterface.register(_WATCHED, watch.attention)
    AttentionMaskInterface.register(_WATCHED, watch.mask)
    dtypes = {parameter.dtype for parameter in backbone.parameters()}
    half = next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), None)
    # 8-bit layers round by what else is in the batch
    tolerance = 1e-4 if half is None and torch.int8 not in dtypes else 5e-2
    # what trains in float32 on a model in 16 bits needs the trainer's autocast to run at all
    autocast = torch.autocast(device.type, half, enabled=half is not None and torch.float32 in dtypes)
    differences = []
    # the registry outlives the model, so the watch must not hold on to its modules
    with evaluating(backbone), autocast, watch.forgetting():
        expected = stock(backbone, **given, use_cache=False).last_hidden_state
        for restart in (False, True):
            output = run_packed(stock, backbone, given, layout, attention=_WATCHED, restart=restart)
            if not watch.modules:
                raise UserError("its attention does not go through the attention interface of transformers")
            differences.append(_difference(output.last_hidden_state, expected, real_BT))
            if differences[-1] <= tolerance:
                return Proof(tuple(watch.modules.values()), restart)
    raise UserError(f"its hidden states differ in a packed row (by {min(differences):.2g})")
