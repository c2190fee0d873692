"""When things happen in a run, how its rows are grouped, and how it ended: the plain values of the training loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MicroBatching:
    """How the rows of a step are grouped: a fixed number of rows, or as many as hold `max_tokens`."""

    rows_per_batch: int | None
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    """When things happen, in optimizer steps; None never.

    Attributes:
        total_steps: optimizer steps of the whole run.
        save_every: steps between checkpoints.
        save_seconds: wall time since the last checkpoint after which the next one is written.
        save_best: a new lowest held-out loss is a checkpoint as well.
        eval_every: steps between measurements of the held-out loss (also measured before and after).
        sample_every: steps between sample answers (also before and after).
        patience: evaluations in a row without a gain after which the run ends.
        min_delta: by how much the held-out loss has to fall to be a gain.
        max_seconds: wall time after which the run saves and ends.
        max_grad_norm: gradients are clipped to this global norm.
        on_non_finite: `stop` or `skip`.
    """

    total_steps: int
    save_every: int | None = None
    save_seconds: float | None = None
    save_best: bool = False
    eval_every: int | None = None
    sample_every: int | None = None
    patience: int | None = None
    min_delta: float = 0.0
    max_seconds: float | None = None
    max_grad_norm: float | None = None
    on_non_finite: str = "stop"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How training ended.

    Attributes:
        reason: `complete`, `time`, `early stop` or `interrupted`.
        step: optimizer steps that are complete.
        new_steps: how many of them this process made.
        first_eval: held-out loss before the first step, where it was measured.
        last_eval: held-out loss at the end.
        best_step: the step with the lowest held-out loss, 0 before the first one.
        best_eval: that loss.
        seconds: wall time of this process's training.
        tokens: tokens this process trained on.
        all_tokens: tokens of the whole run.
    """

    reason: str
    step: int
    new_steps: int
    first_eval: float | None
    last_eval: float | None
    best_step: int | None
    best_eval: float | None
    seconds: float
    tokens: int
    all_tokens: int


def evaluations_without_gain(evals: Mapping[int, float], *, every: int, min_delta: float) -> int:
    """The evaluations since the last one whose held-out loss was lower than all before it.

    Args:
        evals: held-out loss by step, as it stands in a checkpoint; so the count survives one.
        every: only multiples of this many steps count. The others were measured because a part of the run ended
            there, and a run that never stopped would not have them.
        min_delta: a loss is lower where it falls by more than this.
    """
    lowest, since = math.inf, 0
    for step in sorted(step for step in evals if step % every == 0):
        if evals[step] < lowest - min_delta:  # never true of a loss that is not finite
            lowest, since = evals[step], 0
        else:
            since += 1
    return since
