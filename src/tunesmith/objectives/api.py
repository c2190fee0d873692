"""What every objective is: a count on the CPU, then plain autograd over `[S]` vectors.

An objective first says, from the batch alone, how much of a denominator a micro-batch contributes (`count`).
The step adds these up over all micro-batches and ranks *before* the first forward pass, so that the sum of the
micro-batches' losses is the loss of the step: it does not depend on accumulation, packing or ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tunesmith.contracts.batch import TokenBatch


class Scorer(Protocol):
    """The head over the hidden states of one batch: scores its supervised tokens without full logits."""

    def logprob(self) -> Tensor:
        """Log-probability of every supervised token, float32 `[S]`, differentiable."""
        ...

    def cross_entropy(self, weights_S: Tensor) -> Tensor:
        """Σ_s −weights_s · logprob_s as a scalar; cheaper than through `logprob`."""
        ...


@dataclass(frozen=True, slots=True)
class Objective:
    """A row of the table of objectives.

    Attributes:
        name: as `objective.kind` says it.
        unit: what `count` counts, for reports.
        count: denominator contributed by a batch, computed on the CPU.
        loss: scalar loss of a batch, already divided by the denominator of the whole step.
    """

    name: str
    unit: str
    count: Callable[[TokenBatch], float]
    loss: Callable[[Scorer, TokenBatch, float | Tensor], Tensor]
