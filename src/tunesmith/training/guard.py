"""A loss or gradient that is not finite is written down, never hidden.

`faults/step-N.json` names the step, the rows in it and each micro-batch's loss, so that the row at fault can be
looked at with `tunesmith inspect`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tunesmith.contracts.batch import TokenBatch
from tunesmith.contracts.errors import NonFiniteError
from tunesmith.data.batches import Corpus
from tunesmith.training.step import StepResult


def write_fault(
    folder: Path, step: int, result: StepResult, batches: Sequence[TokenBatch], corpus: Corpus
) -> Path:
    """Write what is known about a faulty step and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.json"
    losses = result.micro_losses if result.micro_losses else [float("nan")] * len(batches)
    report = {
        "step": step,
        "not_finite": result.fault,
        "loss": str(result.loss),
        "grad_norm": str(result.grad_norm),
        "micro_batches": [
            {"loss": str(loss), "rows": [corpus.where(document) for document in batch.rows_D]}
            for loss, batch in zip(losses, batches, strict=True)
        ],
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


def fault_error(step: int, result: StepResult, report: Path) -> NonFiniteError:
    """The error that ends the run at a faulty step."""
    return NonFiniteError(
        f"The {result.fault} of step {step} is not finite; the step was not applied and the run stops. "
        f"Its rows are named in {report}.",
        hint="Look at those rows, lower train.learning_rate, or set train.on_non_finite: skip to go on.",
    )
