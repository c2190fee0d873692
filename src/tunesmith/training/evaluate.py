"""The held-out loss: packed, without gradients, normalised by all supervised tokens that were held out.

Documents of different sources never share a micro-batch, so that the loss of each source is measured in the same
pass as the mean over all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.batches import Corpus, Row, collate, micro_batches
from tunesmith.data.packing import pack_best_fit
from tunesmith.models.head import CausalModel
from tunesmith.models.modes import evaluating


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """What was measured.

    Attributes:
        loss: mean in nats per supervised token.
        tokens: tokens that went through the model.
        by_source: the mean of each source, by its name; empty where there is only one.
    """

    loss: float
    tokens: int
    by_source: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def held_out_loss(
    causal: CausalModel,
    corpus: Corpus,
    documents_N: NDArray[np.int64],
    *,
    max_tokens: int,
    autocast: AbstractContextManager[object],
    progress: Callable[[int, int], None] | None = None,
) -> HeldOutLoss:
    """Mean cross-entropy over the supervised tokens of the held-out documents.

    Args:
        documents_N: the documents, at least one.
        max_tokens: tokens of a micro-batch; changes speed and memory only.
        progress: called before each micro-batch, with how many are done of how many.
    """
    batches = [
        (name, documents)
        for name, own_N in zip(corpus.names, corpus.by_source(documents_N), strict=True)
        for documents in micro_batches(
            corpus, _packs(corpus, own_N, max_tokens), rows_per_batch=1, max_tokens=max_tokens
        )
    ]
    sums: dict[str, tuple[float, float]] = {}
    tokens = 0
    with evaluating(causal.model), autocast:
        for done, (name, documents) in enumerate(batches):
            if progress is not None:
                progress(done, len(batches))
            batch = collate(corpus, documents)
            summed = causal.score(batch.to(causal.device)).cross_entropy(batch.weights_S.to(causal.device))
            loss, weight = sums.get(name, (0.0, 0.0))
            sums[name] = loss + float(summed), weight + float(batch.weights_S.double().sum())
            tokens += batch.tokens
    mean = sum(loss for loss, _ in sums.values()) / sum(weight for _, weight in sums.values())
    by_source = {name: loss / weight for name, (loss, weight) in sums.items() if weight}
    return HeldOutLoss(mean, tokens, by_source if len(by_source) > 1 else {})


def _packs(corpus: Corpus, documents_N: NDArray[np.int64], max_tokens: int) -> list[Row]:
    if not len(documents_N):
        return []
    lengths_N = corpus.lengths[documents_N]
    packs = pack_best_fit(lengths_N, max(int(lengths_N.max()), max_tokens))
    return [tuple(documents_N[pack].tolist()) for pack in packs]
