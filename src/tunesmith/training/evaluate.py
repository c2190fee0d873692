"""The held-out loss: packed, without gradients, normalised by all supervised tokens that were held out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.batches import Corpus, collate, micro_batches
from tunesmith.data.packing import pack_best_fit
from tunesmith.models.head import CausalModel
from tunesmith.models.modes import evaluating


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Mean loss in nats per supervised token, and the tokens that went through the model."""

    loss: float
    tokens: int


@torch.no_grad()
def held_out_loss(
    causal: CausalModel,
    corpus: Corpus,
    documents_N: NDArray[np.int64],
    *,
    max_tokens: int,
    autocast: AbstractContextManager[object],
) -> HeldOutLoss:
    """Mean cross-entropy over the supervised tokens of the held-out documents.

    Args:
        documents_N: the documents, at least one.
        max_tokens: tokens of a micro-batch; changes speed and memory only.
    """
    longest = int(corpus.lengths[documents_N].max())
    packs = pack_best_fit(corpus.lengths[documents_N], max(longest, max_tokens))
    rows: Sequence[tuple[int, ...]] = [tuple(int(documents_N[i]) for i in pack) for pack in packs]
    loss = weight = 0.0
    tokens = 0
    with evaluating(causal.model), autocast:
        for documents in micro_batches(corpus, rows, rows_per_batch=1, max_tokens=max_tokens):
            batch = collate(corpus, documents)
            summed = causal.score(batch.to(causal.device)).cross_entropy(batch.weights_S.to(causal.device))
            loss += float(summed)
            weight += float(batch.weights_S.double().sum())
            tokens += batch.tokens
    return HeldOutLoss(loss / weight, tokens)
