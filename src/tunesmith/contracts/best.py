"""Which of a run's held-out losses is the best: one rule for training, checkpoints, summaries and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping


def best_step(evals: Mapping[int, float]) -> int | None:
    """The step with the lowest of the held-out losses, the latest of equal ones; None where none is finite.

    Args:
        evals: held-out loss by step.
    """
    finite = {step: loss for step, loss in evals.items() if math.isfinite(loss)}
    return min(finite, key=lambda step: (finite[step], -step), default=None)
