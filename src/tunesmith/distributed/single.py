"""One process, one device.

float16 trains with a loss scale: gradients are computed for scale · loss, checked, divided, clipped. An overflow
lowers the scale and skips the step; that is the scaler's normal work, not a fault of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.contracts.batch import TokenBatch
from tunesmith.distributed.backend import Gradients, Loss, Update
from tunesmith.distributed.gradient_norms import added_square, changed_square, squared_norm
from tunesmith.distributed.graphs import MicroBatchGraphs


class SingleDevice:
    """`Backend` on one device.

    Args:
        module: the model; parameters that require grad are trained.
        optimizer: holds exactly those parameters.
        device: where the micro-batches are moved.
        compute_dtype: autocast runs in it where parameters are held wider; float16 brings the loss scale.
        graphs: record CUDA graphs of the micro-batches (`distributed.graphs`); not with a loss scale.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        compute_dtype: torch.dtype,
        *,
        graphs: bool = False,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.device = device
        self.autocast_dtype = compute_dtype if compute_dtype in (torch.bfloat16, torch.float16) else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=compute_dtype == torch.float16)
        self.use_graphs = graphs and not self.scaler.is_enabled()
        self._graphs: tuple[Loss, MicroBatchGraphs] | None = None

    def autocast(self, *, cache: bool = True) -> torch.autocast:
        """The context in which forward passes run.

        Args:
            cache: keep what was cast; in a recorded graph it would be missing.
        """
        return torch.autocast(
            self.device.type,
            dtype=self.autocast_dtype,
            enabled=self.autocast_dtype is not None,
            cache_enabled=cache,
        )

    def forward_backward(
        self, micro_batches: Sequence[TokenBatch], loss: Loss, *, squares: bool = False
    ) -> Gradients:
        """Accumulate gradients over CPU micro-batches; the denominator is counted before the first forward.

        Args:
            squares: also measure what each micro-batch adds; the gradients are the same.
        """
        total = math.fsum(loss.count(batch) for batch in micro_batches)
        assert total > 0, "rows without supervised tokens are dropped when data is prepared"
        run = self._graphs_of(loss).forward_backward if self.use_graphs else partial(self._run, loss)
        if not squares:
            return Gradients(tuple(run(batch, total) for batch in micro_batches), total)
        measured = changed_square if self.use_graphs else added_square
        found: list[Tensor] = []
        losses: list[Tensor] = []
        for batch in micro_batches:
            with measured(self._parameters(), found):
                losses.append(run(batch, total))
        return Gradients(tuple(losses), total, torch.stack(found) / self.scaler.get_scale() ** 2)

    def gradient_squares(self) -> dict[str, Tensor]:
        """The squared norm of each parameter's gradient, before `clip_and_step` and without the loss scale."""
        scale = self.scaler.get_scale() ** 2
        named = [(name, p.grad) for name, p in self.module.named_parameters() if p.grad is not None]
        return {name: squared_norm(gradient) / scale for name, gradient in named}

    def _run(self, loss: Loss, batch: TokenBatch, total: float) -> Tensor:
        with self.autocast():
            value = loss(batch.to(self.device), total)
        self.scaler.scale(value).backward()
        return value.detach()

    def _graphs_of(self, loss: Loss) -> MicroBatchGraphs:
        """The graphs of this loss; another loss starts anew."""
        if self._graphs is None or self._graphs[0] is not loss:

            def run(batch: TokenBatch, total: Tensor) -> Tensor:
                with self.autocast(cache=False):
                    return loss(batch, total)

            self._graphs = (loss, MicroBatchGraphs(self._parameters(), self.device, run))
        return self._graphs[1]

    def discard(self) -> None:
        """Clear the gradients without an update, and forget recorded graphs."""
        self._graphs = None
        self.optimizer.zero_grad(set_to_none=True)

    def _zero_grad(self) -> None:
        if self._graphs is None or not self._graphs[1].zero_grad():
            self.optimizer.zero_grad(set_to_none=True)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def clip_and_step(self, gradients: Gradients, max_norm: float | None) -> Update:
        """Clip the global gradient norm, step the optimizer where losses and norm are finite, clear the gradients.

        The host waits for the device once, after everything is enqueued: an optimizer that can skip its step by
        itself is told on the device whether all is finite.
        """
        self.scaler.unscale_(self.optimizer)
        norm = self._clip(max_norm)
        values = torch.stack([norm.double(), *(loss.double() for loss in gradients.losses)])
        scale = self.scaler.get_scale()
        self._step(values)
        self._zero_grad()
        grad_norm, *losses = values.tolist()
        losses_finite = all(map(math.isfinite, losses))
        # a scale below 1 has made room enough: what still overflows is not finite by itself
        overflowed = losses_finite and not math.isfinite(grad_norm) and 1.0 <= self.scaler.get_scale() < scale
        return Update(
            tuple(losses),
            grad_norm,
            applied=losses_finite and math.isfinite(grad_norm),
            loss_scale=scale,
            overflowed=overflowed,
        )

    def _clip(self, max_norm: float | None) -> Tensor:
        """Clip the gradients, or have the optimizer clip them within its step; returns the norm before."""
        clip_in_step = getattr(self.optimizer, "clip_in_step", None)
        if clip_in_step is not None:
            measured: Tensor = clip_in_step(max_norm)
            return measured
        parameters = self._parameters()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def _step(self, values: Tensor) -> None:
        """Step the optimizer if every one of `values` is finite."""
        if self.scaler.is_enabled():  # finds overflowed gradients itself, lowers its scale and skips the step
            if bool(values[1:].isfinite().all()):
                self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.device.type == "cuda" and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            optimizer: Any = self.optimizer
            optimizer.found_inf = (~values.isfinite().all()).float()
            optimizer.step()
            del optimizer.found_inf
        elif bool(values.isfinite().all()):
            self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Optimizer and scaler as nested dicts of tensors and plain values."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, but for the ratios of learning rates, which are those of the settings."""
        ratios = [group.get("lr_ratio") for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, ratio in zip(self.optimizer.param_groups, ratios, strict=True):
            if ratio is not None:
                group["lr_ratio"] = ratio
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])

    def trained_parameters(self) -> dict[str, Tensor]:
        """The parameters that are trained, by name, as whole tensors."""
        return {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_trained_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Write whole tensors back into the parameters that are trained.

        Raises:
            KeyError: a trained parameter is missing from `tensors`.
        """
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[name])

    def for_measuring(self) -> AbstractContextManager[None]:
        """The context in which the model is what the run leaves behind; see `Backend`."""
        measuring: AbstractContextManager[None] = getattr(self.optimizer, "measuring", nullcontext)()
        return measuring
