"""`RunResult`: what a run left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left behind.

    Attributes:
        dir: the run directory.
        result: folder of the adapter or model, or None for an interrupted run.
        loss_curve: the PNG, or None where matplotlib is not installed.
        reason: `complete`, `time` or `interrupted`.
        steps: optimizer steps that are complete.
        first_eval: held-out loss before training, where it was measured.
        last_eval: held-out loss at the end.
        tokens: tokens trained on by this process.
        seconds: wall time of training.
    """

    dir: Path
    result: Path | None
    loss_curve: Path | None
    reason: str
    steps: int
    first_eval: float | None
    last_eval: float | None
    tokens: int
    seconds: float
