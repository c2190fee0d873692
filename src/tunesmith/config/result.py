"""`RunResult`: what a run left behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run left behind.

    Attributes:
        dir: the run directory.
        result: folder of the adapter or model, or None for an interrupted run.
        loss_curve: the PNG, or None where matplotlib is not installed.
        reason: `complete`, `time`, `early stop` or `interrupted`.
        steps: optimizer steps that are complete.
        first_eval: held-out loss before training, where it was measured.
        last_eval: held-out loss at the end.
        best_step: the step with the lowest held-out loss, 0 before training; None where none was measured.
        best_eval: that loss.
        best_checkpoint: the checkpoint of that step, None where none was written there.
        result_step: the step whose weights the result has; None without a result.
        new_steps: how many of the steps this process made.
        tokens: tokens trained on by this process.
        seconds: wall time of training.
        by_source: held-out losses of each source, the first and the last one; empty where there is only one.
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
    by_source: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    best_step: int | None = None
    best_eval: float | None = None
    best_checkpoint: Path | None = None
    result_step: int | None = None
    new_steps: int = 0


def losses_by_source(events: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """The first and the last held-out loss of each source, from the events of a run."""
    measured = [event.get("by_source") or {} for event in events if event.get("event") == "eval"]
    return {
        name: (float(measured[0][name]), float(loss))
        for name, loss in (measured[-1] if measured else {}).items()
        if name in measured[0]
    }
