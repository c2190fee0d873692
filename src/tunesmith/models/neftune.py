"""NEFTune: uniform noise on the embeddings while a model trains.

    x_t  ←  x_t + ε_t · α / √(L · D),      ε_t uniform in [−1, 1]^D

(https://arxiv.org/abs/2310.05914). The paper's L is the length of the sequence that a token stands in. Rows are
packed here, so L is the length of the token's own document: a document gets the same noise alone, in a pack of
twenty, and with any number of rows in a micro-batch. Rejected: the length of the row, by which packing would make the
noise of short documents several times smaller.

Two hooks: one at the backbone, which is told where documents end, one at its embedding, which is not. The noise is
drawn once a micro-batch, before the layers, so that layers which are computed again in backward see the noise that
they saw. It comes from torch's generator of the device, whose state is in every checkpoint.

Shape suffixes: B batch (1), T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Noise:
    """The noise of one backbone; holds the lengths of the documents that are in it at the moment."""

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._lengths: tuple[int, ...] | None = None

    def enter(self, backbone: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Before the backbone runs: note its documents, if it trains."""
        self._lengths = kwargs.get("document_lengths") if backbone.training else None

    def leave(self, *_: Any) -> None:
        """After it has run, also with an error: what follows is another call."""
        self._lengths = None

    def add(self, _embedding: nn.Module, _args: Any, embedded_BTD: Tensor) -> Tensor | None:
        """The embeddings with noise; None, which leaves them alone, outside of a training pass of the backbone."""
        if self._lengths is None:
            return None
        width = embedded_BTD.shape[-1]
        scale_T = noise_scale(self._lengths, width, self._alpha).to(
            embedded_BTD.device, embedded_BTD.dtype, non_blocking=True
        )
        noise_BTD = torch.empty_like(embedded_BTD).uniform_(-1.0, 1.0)
        # a new tensor: what PEFT returns for a frozen embedding may be a leaf, which nothing may be written into
        return embedded_BTD + noise_BTD * scale_T[:, None]


def noise_scale(lengths: tuple[int, ...], width: int, alpha: float) -> Tensor:
    """α / √(L · D) of every token, float32 `[T]`, from the lengths of the documents of a row."""
    scale_N = alpha / torch.tensor([length * width for length in lengths], dtype=torch.float64).sqrt()
    return scale_N.repeat_interleave(torch.tensor(lengths)).float()


@contextmanager
def noisy_embeddings(backbone: Any, alpha: float | None) -> Iterator[None]:
    """Within the block the embeddings of `backbone` carry noise in training mode, and nothing in evaluation mode.

    Args:
        backbone: a backbone of transformers that is called with `document_lengths` (`attention.document_kwargs`).
        alpha: strength of the noise; 5 to 15 in the paper. None adds none.
    """
    if alpha is None:
        yield
        return
    noise = _Noise(alpha)
    handles = [
        backbone.register_forward_pre_hook(noise.enter, with_kwargs=True),
        backbone.register_forward_hook(noise.leave, always_call=True),
        backbone.get_input_embeddings().register_forward_hook(noise.add),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
