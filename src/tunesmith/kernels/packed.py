"""What attention on packed rows is told: the layout of the fused buffer, the documents, what happens to scores
between q·k and the softmax, and a row of the table.

Shape suffixes: T tokens, N columns of the fused buffer, H query heads, G key/value heads, K head size, D documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """Layout of the fused buffer.

    Attributes:
        query: number of query heads (H).
        key_value: number of key/value heads (G); H is a multiple of it.
        size: width of a head (K).
    """

    query: int
    key_value: int
    size: int

    @property
    def columns(self) -> int:
        """Columns of the fused buffer."""
        return (self.query + 2 * self.key_value) * self.size

    def split(self, fused_TN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views `[T, H, K]`, `[T, G, K]`, `[T, G, K]` of q, k and v."""
        q_end = self.query * self.size
        k_end = q_end + self.key_value * self.size
        parts = (fused_TN[:, :q_end], fused_TN[:, q_end:k_end], fused_TN[:, k_end : self.columns])
        q_TN, k_TN, v_TN = parts
        return (
            q_TN.unflatten(-1, (self.query, self.size)),
            k_TN.unflatten(-1, (self.key_value, self.size)),
            v_TN.unflatten(-1, (self.key_value, self.size)),
        )


@dataclass(frozen=True, slots=True)
class Documents:
    """Where documents begin and end: host lengths, and the same on the device.

    Attributes:
        lengths: host integers that sum to T.
        cu_seqlens: int32 `[D + 1]` on the device.
        bound: stands for the longest length where one recorded graph serves many sets of documents.
        derived: what backends compute from the boundaries, once for all layers of a pass.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    bound: int | None = None
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def longest(self) -> int:
        """Length of the longest document, or the bound that stands for it; a host integer."""
        return self.bound if self.bound is not None else max(self.lengths)

    @property
    def equal(self) -> bool:
        """Whether all documents have the same length, and those of every other set under this bound too."""
        return self.bound is None and min(self.lengths) == max(self.lengths)


@dataclass(frozen=True, slots=True)
class Scores:
    """What makes scores of q·k, and which of them count.

    Attributes:
        scale: factor on q·k; None is K ** -0.5.
        window: keys that a query sees, itself and those before it; None are all of its document.
        softcap: c of s ← c · tanh(s / c) after scaling; None caps nothing.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None

    def factor(self, heads: Heads) -> float:
        """The factor on q·k as a number."""
        return self.scale if self.scale is not None else heads.size**-0.5

    def within(self, documents: Documents) -> Scores:
        """The same without a window that hides nothing, so that backends without windows serve too."""
        hides = self.window is not None and self.window < documents.longest
        return self if hides or self.window is None else replace(self, window=None)


Saved = tuple[Tensor, ...]
"""What a backend keeps for its backward besides the fused buffer and the output."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A row of the table.

    Attributes:
        fits: whether it computes this device, type, layout, set of documents and kind of scores.
        forward: (fused_TN, heads, documents, scores, room) → output `[T, H·K]`, in rows with `room` more columns
            where it can, and what backward needs.
        backward: (grad `[T, H·K]`, fused_TN, output, saved, heads, documents, scores, room) → gradient of the fused
            buffer, the first columns of rows with `room` more.
    """

    fits: Callable[[Tensor, Heads, Documents, Scores], bool]
    forward: Callable[[Tensor, Heads, Documents, Scores, int], tuple[Tensor, Saved]]
    backward: Callable[[Tensor, Tensor, Tensor, Saved, Heads, Documents, Scores, int], Tensor]


def takes_half(fused_TN: Tensor, heads: Heads, widest: int) -> bool:
    """Whether these are 16-bit numbers on a GPU in heads that FlashAttention and cuDNN take."""
    half = fused_TN.dtype in (torch.bfloat16, torch.float16)
    return fused_TN.is_cuda and half and heads.size <= widest and heads.size % 8 == 0
