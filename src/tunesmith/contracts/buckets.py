"""Padding a batch to one of few shapes, so that recorded graphs and compiled plans serve many batches.

The padding hangs at the row's tail: documents of its own that nothing attends to and no token of which is
supervised, then documents of no length, then supervised entries of weight 0. Losses and gradients are those of
the batch as it was.

Shape suffixes: T tokens of the row, D documents, S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tunesmith.contracts.batch import TokenBatch

SMALLEST = 64
"""Rows and lists of supervised tokens are not told apart below this size."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """What may be built into a graph; two batches of one bucket differ in the contents of their tensors only.

    Attributes:
        tokens: T.
        supervised: S.
        documents: D.
        longest: no document is longer.
        equal: all documents have this length; 0 where they differ.
    """

    tokens: int
    supervised: int
    documents: int
    longest: int
    equal: int


def round_up(size: int) -> int:
    """The next of eight sizes an octave: at most an eighth more."""
    step = max(SMALLEST, 1 << max(0, (size - 1).bit_length() - 4))
    return -(-size // step) * step


def power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length() if size > 1 else 1


def bucket_of(batch: TokenBatch) -> Bucket:
    """The bucket of a batch. Several documents of one length stay as they are: dense attention serves them."""
    tokens, supervised = round_up(batch.tokens), round_up(batch.supervised)
    longest, documents = max(batch.lengths), len(batch.lengths)
    same = min(batch.lengths) == longest
    if same and (documents > 1 or tokens == batch.tokens):
        return Bucket(batch.tokens, supervised, documents, longest, longest)
    longest = power_of_2(longest)
    spare = -(-(tokens - batch.tokens) // longest)
    return Bucket(tokens, supervised, power_of_2(documents + spare), longest, 0)


def _extended(tensor: Tensor, size: int) -> Tensor:
    return pad(tensor, (0, size - tensor.shape[0]))


def _columns(columns: Mapping[str, Tensor], size: int) -> dict[str, Tensor]:
    return {name: _extended(column, size) for name, column in columns.items()}


def pad_to(batch: TokenBatch, bucket: Bucket) -> TokenBatch:
    """The batch on the CPU with the shapes of its bucket, `bucket_of(batch)`."""
    lengths = list(batch.lengths)
    left = bucket.tokens - batch.tokens
    while left > 0:
        lengths.append(min(left, bucket.longest))
        left -= lengths[-1]
    positions = [torch.arange(length) for length in lengths[len(batch.lengths) :]]
    lengths += [0] * (bucket.documents - len(lengths))
    return replace(
        batch,
        ids_T=_extended(batch.ids_T, bucket.tokens),
        position_ids_T=torch.cat([batch.position_ids_T, *positions]),
        lengths=tuple(lengths),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        logit_index_S=_extended(batch.logit_index_S, bucket.supervised),
        targets_S=_extended(batch.targets_S, bucket.supervised),
        weights_S=_extended(batch.weights_S, bucket.supervised),
        document_S=_extended(batch.document_S, bucket.supervised),
        columns=_columns(batch.columns, bucket.documents),
        token_columns=_columns(batch.token_columns, bucket.supervised),
        longest=None if bucket.equal else bucket.longest,
    )
