"""The training loop: plan, step, measure, save; read it top to bottom in `Trainer.train`.

There are no hooks to subclass. What happens is said as events to observers; what the run needs to go on after a
kill is in the checkpoint: trained parameters, optimizer, random states and the place in the data, two integers
where it lies in tables. Checkpoints lie between optimizer steps, so nothing of a half-done accumulation is ever
needed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.contracts.batch import TokenBatch
from tunesmith.contracts.errors import UserError
from tunesmith.contracts.events import Evaluated, Event, Finished, Observer, Saved, Started, Stepped, Warned
from tunesmith.data.batches import BatchPlan, Corpus, collate, micro_batches
from tunesmith.data.feed import Feed, Position, Step, TableFeed
from tunesmith.distributed.single import SingleDevice
from tunesmith.training.checkpoint import Checkpoint, CheckpointStore
from tunesmith.training.evaluate import held_out_loss
from tunesmith.training.guard import fault_error, write_fault
from tunesmith.training.interrupt import StopRequest
from tunesmith.training.metrics import peak_memory_gib
from tunesmith.training.optim import Schedule
from tunesmith.training.state import join_state, restore_rng, rng_state, split_state
from tunesmith.training.step import ObjectiveLoss, StepResult, train_step


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
        eval_every: steps between measurements of the held-out loss (also measured before and after).
        max_seconds: wall time after which the run saves and ends.
        max_grad_norm: gradients are clipped to this global norm.
        on_non_finite: `stop` or `skip`.
    """

    total_steps: int
    save_every: int | None
    eval_every: int | None
    max_seconds: float | None
    max_grad_norm: float | None
    on_non_finite: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How training ended.

    Attributes:
        reason: `complete`, `time` or `interrupted`.
        step: optimizer steps that are complete.
        first_eval: held-out loss before the first step, where it was measured.
        last_eval: held-out loss at the end.
        seconds: wall time of this process's training.
        tokens: tokens this process trained on.
        all_tokens: tokens of the whole run.
    """

    reason: str
    step: int
    first_eval: float | None
    last_eval: float | None
    seconds: float
    tokens: int
    all_tokens: int


class Trainer:
    """Trains a model over the documents of a corpus.

    Args:
        backend: runs the steps.
        loss: objective over the model.
        corpus: all documents; `train_N` and `held_out_N` name those that train and those that measure.
        plan: how documents become steps.
        grouping: how rows become micro-batches.
        schedule: learning rate per step.
        cadence: when things happen.
        store: where checkpoints go.
        identity: what must not change between the parts of an interrupted run.
        run_dir: where faults are written.
        feed: where the steps come from; by default the documents `train_N` of the corpus.
    """

    def __init__(
        self,
        *,
        backend: SingleDevice,
        loss: ObjectiveLoss,
        corpus: Corpus,
        train_N: NDArray[np.int64],
        held_out_N: NDArray[np.int64],
        plan: BatchPlan,
        grouping: MicroBatching,
        schedule: Schedule,
        cadence: Cadence,
        store: CheckpointStore,
        identity: dict[str, Any],
        run_dir: Path,
        feed: Feed | None = None,
    ) -> None:
        self.backend, self.loss, self.corpus = backend, loss, corpus
        self.train_N, self.held_out_N, self.plan, self.grouping = train_N, held_out_N, plan, grouping
        self.schedule, self.cadence, self.store = schedule, cadence, store
        self.identity, self.run_dir = identity, run_dir
        self.feed = feed if feed is not None else TableFeed(corpus, train_N, plan)
        self.observers: list[Observer] = []  # receive every event
        self.step = 0
        self.position = Position()
        self.evals: dict[int, float] = {}
        self.tokens = self._tokens_before = 0
        self._began = time.monotonic()

    # ---------------------------------------------------------------- the loop

    def train(self) -> Outcome:
        """Run to the end, to the time limit, or until asked to stop; a checkpoint is written in every case.

        Raises:
            NonFiniteError: a loss or gradient was not finite and the settings say to stop there.
            StorageError: a checkpoint could not be written.
        """
        began = self._began = time.monotonic()
        resumed = self.step > 0
        self._emit(
            Started(
                step=self.step,
                total_steps=self.cadence.total_steps,
                resumed=resumed,
                trained_parameters=sum(p.numel() for p in self.backend.trained_parameters().values()),
                device=str(self.backend.device),
            )
        )
        reason = "complete"
        saved_at = self.step if resumed else None
        if not resumed:
            self._evaluate()
        self.loss.causal.model.train()
        with StopRequest() as stop:
            for data in self._remaining_steps():
                self._run_step(data)
                if self._due(self.cadence.eval_every):
                    self._evaluate()
                if self._due(self.cadence.save_every):
                    self._save()
                    saved_at = self.step
                if stop.requested:
                    reason = "interrupted"
                    break
                limit = self.cadence.max_seconds
                if (
                    limit is not None
                    and time.monotonic() - began >= limit
                    and self.step < self.cadence.total_steps
                ):
                    reason = "time"
                    break
            if reason != "interrupted":
                self._evaluate()
            if saved_at != self.step:
                self._save()
        seconds = time.monotonic() - began
        self._emit(Finished(step=self.step, reason=reason, seconds=seconds))
        return Outcome(
            reason=reason,
            step=self.step,
            first_eval=self.evals.get(0),
            last_eval=self.evals.get(self.step),
            seconds=seconds,
            tokens=self.tokens - self._tokens_before,
            all_tokens=self.tokens,
        )

    def _remaining_steps(self) -> Iterator[Step]:
        """The data of each step from the current position on, up to the last step of the run."""
        if self.step >= self.cadence.total_steps:
            return
        for data in self.feed.steps(self.position):
            yield data
            if self.step >= self.cadence.total_steps:
                return

    def _run_step(self, data: Step) -> None:
        started = time.monotonic()
        groups = micro_batches(
            data.corpus,
            data.rows,
            rows_per_batch=self.grouping.rows_per_batch,
            max_tokens=self.grouping.max_tokens,
        )
        batches = [collate(data.corpus, documents) for documents in groups]
        rate = self.schedule.apply(self.backend.optimizer, self.step)
        result = train_step(self.backend, batches, self.loss, self.cadence.max_grad_norm)
        self.step += 1
        before, self.position = self.position, data.position
        self._report_step(batches, result, rate, data.epochs, time.monotonic() - started)
        if result.fault is not None:
            self._handle_fault(result, batches, data, before)

    def _handle_fault(
        self, result: StepResult, batches: list[TokenBatch], data: Step, before: Position
    ) -> None:
        report = write_fault(self.run_dir / "faults", self.step, result, batches, data.corpus)
        if self.cadence.on_non_finite == "stop":
            self._emit(Finished(step=self.step, reason="non-finite", seconds=time.monotonic() - self._began))
            error = fault_error(self.step, result, report)
            # nothing was applied: keep what was learned before, with the faulty step still to come
            self.step -= 1
            self.position = before
            if self.step:
                self._save()
            raise error
        self._warn(
            f"The {result.fault} of step {self.step} is not finite; the step is skipped. See {report}."
        )

    # ---------------------------------------------------------------- measuring

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _evaluate(self) -> None:
        """Measure the held-out loss unless it is already known for this step."""
        if self.cadence.eval_every is None or not len(self.held_out_N) or self.step in self.evals:
            return
        started = time.monotonic()
        measured = held_out_loss(
            self.loss.causal,
            self.corpus,
            self.held_out_N,
            max_tokens=self.grouping.max_tokens,
            autocast=self.backend.autocast(),
        )
        self.evals[self.step] = measured.loss
        if not math.isfinite(measured.loss):
            self._warn(f"The held-out loss at step {self.step} is {measured.loss}: the model has diverged.")
        self._emit(
            Evaluated(
                step=self.step,
                loss=measured.loss,
                by_source=measured.by_source,
                tokens=measured.tokens,
                seconds=time.monotonic() - started,
            )
        )

    def _report_step(
        self, batches: list[TokenBatch], result: StepResult, rate: float, epochs: float, seconds: float
    ) -> None:
        tokens = sum(batch.tokens for batch in batches)
        supervised = sum(batch.supervised for batch in batches)
        self.tokens += tokens
        self._emit(
            Stepped(
                step=self.step,
                epoch=epochs,
                loss=result.loss,
                grad_norm=result.grad_norm,
                learning_rate=rate,
                tokens=tokens,
                supervised_tokens=supervised,
                tokens_per_second=tokens / seconds,
                supervised_tokens_per_second=supervised / seconds,
                seconds=seconds,
                memory_gib=peak_memory_gib(self.backend.device),
                loss_scale=result.loss_scale,
                applied=result.applied,
            )
        )

    def _emit(self, event: Event) -> None:
        for observer in self.observers:
            observer.on_event(event)

    def _warn(self, message: str) -> None:
        self._emit(Warned(step=self.step, message=message))

    # ---------------------------------------------------------------- saving and going on

    def _save(self) -> None:
        started = time.monotonic()
        tensors, optimizer = split_state("optimizer", self.backend.state())
        rng_tensors, rng = rng_state()
        parameters = {f"model/{name}": p for name, p in self.backend.trained_parameters().items()}
        state = {
            "step": self.step,
            "epoch": self.position.epoch,
            "step_in_epoch": self.position.step_in_epoch,
            "stream": self.position.stream,
            "tokens": self.tokens,
            "grouping": [self.grouping.rows_per_batch, self.grouping.max_tokens],
            "evals": {str(step): loss for step, loss in self.evals.items()},
            "identity": self.identity,
            "optimizer": optimizer,
            "rng": rng,
        }
        checkpoint = self.store.save(
            self.step, {**parameters, **tensors, **rng_tensors}, state, metric=self.evals.get(self.step)
        )
        self._emit(Saved(step=self.step, path=str(checkpoint.path), seconds=time.monotonic() - started))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if the run had never stopped.

        Raises:
            UserError: the settings differ from those of the run that wrote it in a way that matters.
        """
        state = checkpoint.state()
        _check_identity(state["identity"], self.identity, checkpoint.path)
        tensors = checkpoint.tensors()
        self.backend.load_trained_parameters(
            {
                name.removeprefix("model/"): tensor
                for name, tensor in tensors.items()
                if name.startswith("model/")
            }
        )
        self.backend.load_state(join_state("optimizer", tensors, state["optimizer"]))
        restore_rng(tensors, state["rng"])
        self.step = state["step"]
        self.tokens = self._tokens_before = state["tokens"]
        self.position = Position(state["epoch"], state["step_in_epoch"], state.get("stream"))
        if self.grouping.rows_per_batch is None:  # a number in the settings counts; `auto` is what it was
            self.grouping = MicroBatching(*state["grouping"])
        self.evals = {int(step): loss for step, loss in state["evals"].items()}


def _check_identity(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    changed = sorted(name for name in {**before, **now} if before.get(name) != now.get(name))
    if changed:
        named = [name for name in changed if name != "data"]
        differences = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in named)
        differences = differences or "its data has changed"
        raise UserError(
            f"The checkpoint {path} belongs to a run with other settings: {differences}.",
            hint="Undo the change to go on, or choose another output.dir to start anew.",
        )


def exact_cuda_algorithms() -> None:
    """Make CUDA runs repeat bit for bit, or fail where an operation cannot."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
