"""`TokenBatch`: the one form in which tokens reach a model.

Every batch is one packed row without padding between documents, also when packing is off. The list of
supervised positions is built on the CPU, so the head sees those positions only, needs no host
synchronisation, and one position may have two targets.

Shape suffixes: T tokens of the row, D documents, S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """One packed row of documents and the list of positions that are trained on.

    Attributes:
        ids_T: int64, token ids of all documents one after the other.
        position_ids_T: int64, restarting at 0 with each document.
        lengths: document lengths in tokens as host integers; they sum to T.
        cu_seqlens: int32 of shape [D + 1], cumulative lengths starting at 0.
        logit_index_S: int64, the position in the row whose hidden state predicts the target.
        targets_S: int64, the token id to predict (already shifted).
        weights_S: float32, weight of each supervised token in the objective.
        document_S: int64, the document that each supervised token belongs to.
        rows_D: id of the data row behind each document, as host integers; for reports.
        columns: further columns per document (D) such as pair or label.
        token_columns: further columns per supervised token (S) such as a reference log-probability.
        longest: a bound on the lengths that stands for them where something is built for many batches.
    """

    ids_T: Tensor
    position_ids_T: Tensor
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    logit_index_S: Tensor
    targets_S: Tensor
    weights_S: Tensor
    document_S: Tensor
    rows_D: tuple[int, ...]
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    token_columns: Mapping[str, Tensor] = field(default_factory=dict)
    longest: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens in the row (T)."""
        return int(self.ids_T.shape[0])

    @property
    def supervised(self) -> int:
        """Number of supervised tokens (S)."""
        return int(self.targets_S.shape[0])

    @property
    def max_seqlen(self) -> int:
        """Length of the longest document in tokens, or the bound that stands for it; a host integer."""
        return self.longest if self.longest is not None else max(self.lengths)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the batch in a fixed order."""
        found = [getattr(self, entry.name) for entry in fields(self)]
        return [
            *(value for value in found if isinstance(value, Tensor)),
            *self.columns.values(),
            *self.token_columns.values(),
        ]

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch with every tensor on `device`; host integers stay where they are."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            ids_T=move(self.ids_T),
            position_ids_T=move(self.position_ids_T),
            cu_seqlens=move(self.cu_seqlens),
            logit_index_S=move(self.logit_index_S),
            targets_S=move(self.targets_S),
            weights_S=move(self.weights_S),
            document_S=move(self.document_S),
            columns={name: move(column) for name, column in self.columns.items()},
            token_columns={name: move(column) for name, column in self.token_columns.items()},
        )
