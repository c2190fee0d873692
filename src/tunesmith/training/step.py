"""One optimizer step, read top to bottom.

The denominator is counted over all micro-batches first, so the step's loss is the mean over its supervised
tokens however they are grouped. A loss or gradient that is not finite is never applied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.contracts.batch import TokenBatch
from tunesmith.contracts.errors import UserError
from tunesmith.distributed.backend import Backend
from tunesmith.models.head import CausalModel
from tunesmith.objectives.api import Objective
from tunesmith.training.noise_scale import NOTHING, Unread, Wanted, squares_of


@dataclass(frozen=True, slots=True)
class ObjectiveLoss:
    """An objective over a model, in the form in which a backend runs it (`distributed.backend.Loss`)."""

    causal: CausalModel
    objective: Objective

    def count(self, batch: TokenBatch) -> float:
        """Denominator that a batch contributes, computed on the CPU."""
        return self.objective.count(batch)

    def __call__(self, batch: TokenBatch, total: float | Tensor) -> Tensor:
        """Scalar loss of a batch on the device, divided by the step's denominator."""
        return self.objective.loss(self.causal.score(batch), batch, total)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: mean over the step's supervised tokens.
        micro_losses: the contribution of each micro-batch; they sum to `loss`.
        grad_norm: global gradient norm before clipping.
        applied: whether parameters changed.
        fault: what was not finite, `loss` or `gradient`, or None. A float16 overflow is no fault.
        loss_scale: the float16 scaler's factor, 1.0 without one.
        squares: what was measured of the gradients, where it was asked for; still on the device.
    """

    loss: float
    micro_losses: tuple[float, ...]
    grad_norm: float
    applied: bool
    fault: str | None
    loss_scale: float
    squares: Unread | None = None


def first_sentence(error: torch.OutOfMemoryError) -> str:
    """`CUDA out of memory. Tried to allocate 2.00 GiB`, of a message that goes on for lines."""
    lines = str(error).splitlines() or ["out of memory"]
    return ". ".join(lines[0].split(". ")[:2]).rstrip(".")


def train_step(
    backend: Backend,
    micro_batches: Sequence[TokenBatch],
    loss: ObjectiveLoss,
    max_grad_norm: float | None,
    wanted: Wanted = NOTHING,
) -> StepResult:
    """Accumulate the gradients of one step, measure what is wanted of them, check them, clip them, apply them.

    Raises:
        OutOfMemoryError: of torch, before anything is applied.
        UserError: the update itself ran out of memory.
    """
    gradients = backend.forward_backward(micro_batches, loss, squares=wanted.noise)
    squares = squares_of(backend, gradients) if any(wanted) else None
    try:
        update = backend.clip_and_step(gradients, max_grad_norm)
    except torch.OutOfMemoryError as error:
        # some weights may have moved, so it is not made again; activations are gone, and leaner ones would not help
        raise UserError(
            f"The update ran out of the device's memory: {first_sentence(error)}.",
            hint="The optimizer's state is too large beside the weights: use train.optimizer: adamw_8bit, "
            "model.quantize: nf4 or a smaller adapter. The last checkpoint is whole.",
            exit_code=1,
        ) from error
    mean = sum(update.losses)  # not fsum, which refuses infinities of both signs
    fault = None
    if not math.isfinite(mean):
        fault = "loss"
    elif not update.applied and not update.overflowed:
        fault = "gradient"
    return StepResult(
        mean, update.losses, update.grad_norm, update.applied, fault, update.loss_scale, squares
    )
