"""The seam to every engine: what a training step needs from the way a model is laid out over devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tunesmith.contracts.batch import TokenBatch


class Loss(Protocol):
    """An objective as the backend sees it: a denominator per batch, then a loss."""

    def count(self, batch: TokenBatch) -> float:
        """Denominator that a batch contributes, computed on the CPU."""
        ...

    def __call__(self, batch: TokenBatch, total: float | Tensor) -> Tensor:
        """Scalar loss of a batch on the device, divided by the step's denominator `total`, a number or a scalar."""
        ...


@dataclass(frozen=True, slots=True)
class Gradients:
    """What accumulated in one `forward_backward`.

    Attributes:
        losses: one detached scalar per micro-batch; their sum is the loss of the step.
        total: the step's denominator over all micro-batches and ranks.
        squares: where they were asked for, float64 `[micro-batches]`: the squared norm of what each added to the
            gradients, without the loss scale.
    """

    losses: tuple[Tensor, ...]
    total: float
    squares: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """What became of an optimizer step.

    Attributes:
        losses: the micro-batches' losses as numbers.
        grad_norm: global norm of the gradients before clipping; not finite where they overflowed.
        applied: whether parameters changed.
        loss_scale: the float16 scaler's factor (1.0 without one).
        overflowed: the scaler skipped the step and lowered its factor, which is part of its normal work.
    """

    losses: tuple[float, ...]
    grad_norm: float
    applied: bool
    loss_scale: float
    overflowed: bool


class Backend(Protocol):
    """How one optimizer step runs on the devices of a run."""

    def forward_backward(
        self, micro_batches: Sequence[TokenBatch], loss: Loss, *, squares: bool = False
    ) -> Gradients:
        """Accumulate gradients over CPU micro-batches; the denominator is counted before the first forward.

        Args:
            squares: also measure what each micro-batch adds; the gradients are the same.
        """
        ...

    def gradient_squares(self) -> dict[str, Tensor]:
        """The squared norm of the gradient of each trained parameter by its name, float64 scalars on the device.

        To be called between `forward_backward` and `clip_and_step`; without the loss scale.
        """
        ...

    def clip_and_step(self, gradients: Gradients, max_norm: float | None) -> Update:
        """Clip the global gradient norm, step the optimizer where losses and norm are finite, clear the gradients."""
        ...

    def state(self) -> dict[str, Any]:
        """Optimizer and scaler as nested dicts of tensors and plain values."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        ...

    def trained_parameters(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name, as whole tensors."""
        ...

    def load_trained_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Write whole tensors back into the parameters that are trained."""
        ...

    def for_measuring(self) -> AbstractContextManager[None]:
        """The context in which the model is what the run leaves behind: around evaluation, samples and the result.

        A schedule-free optimizer takes gradients at one point and answers with another; afterwards the parameters are
        bit for bit what they were. Checkpoints are written outside it.
        """
        ...
