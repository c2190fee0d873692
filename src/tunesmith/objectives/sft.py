"""Supervised fine-tuning: the mean cross-entropy over the supervised tokens of a step.

loss = −Σ_s w_s · logprob_s / Σ_s w_s,   both sums over all micro-batches of the step
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.contracts.batch import TokenBatch
from tunesmith.objectives.api import Objective, Scorer


def _count(batch: TokenBatch) -> float:
    return float(batch.weights_S.double().sum())


def _loss(scorer: Scorer, batch: TokenBatch, total: float | Tensor) -> Tensor:
    return scorer.cross_entropy(batch.weights_S / total)


SFT = Objective(name="sft", unit="supervised tokens", count=_count, loss=_loss)
