"""The training loop: plan, step, measure, save; read it top to bottom in `Trainer.train`.

There are no hooks to subclass. What happens is said as events to observers; what the run needs to go on after a
kill is in the checkpoint (`snapshot`).
"""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.contracts.batch import TokenBatch
from tunesmith.contracts.best import best_step
from tunesmith.contracts.events import (
    Evaluated,
    Event,
    Finished,
    Observer,
    Sampled,
    Saved,
    Started,
    Stepped,
    Underway,
    Warned,
)
from tunesmith.data.batches import Corpus, collate, micro_batches
from tunesmith.data.feed import Feed, Position, Step
from tunesmith.distributed.single import SingleDevice
from tunesmith.training.cadence import (
    Cadence,
    MicroBatching,
    Outcome,
    evaluations_without_gain,
)
from tunesmith.training.checkpoint import Checkpoint, CheckpointStore
from tunesmith.training.evaluate import held_out_loss
from tunesmith.training.foresight import Forecast, Foresight, reserved_gib
from tunesmith.training.guard import fault_error, write_fault
from tunesmith.training.interrupt import StopRequest
from tunesmith.training.metrics import memory_gib, peak_memory_gib
from tunesmith.training.noise_scale import Gauges, Wanted
from tunesmith.training.optim import Schedule
from tunesmith.training.replan import OutOfRoomError, Replanner
from tunesmith.training.sample import Sampler
from tunesmith.training.snapshot import restore_snapshot, take_snapshot
from tunesmith.training.step import ObjectiveLoss, StepResult, train_step


class Trainer:
    """Trains a model over the documents of a corpus.

    Args:
        backend: runs the steps.
        loss: objective over the model.
        feed: where the steps come from.
        corpus: the documents that lie in tables, `held_out_N` (int64) those of them that measure.
        grouping: how rows become micro-batches.
        schedule: learning rate per step.
        cadence: when things happen.
        store: where checkpoints go.
        identity: what must not change between the parts of an interrupted run.
        run_dir: where faults are written.
        gauges: what is measured of the gradients.
        replanner: makes a step again that runs out of the device's memory.
        sampler: asks the model for sample answers; None does not.
        forecast: what the plan says of steps on a GPU, to be compared with the first of them.
    """

    def __init__(
        self,
        *,
        backend: SingleDevice,
        loss: ObjectiveLoss,
        feed: Feed,
        corpus: Corpus,
        held_out_N: NDArray[np.int64],
        grouping: MicroBatching,
        schedule: Schedule,
        cadence: Cadence,
        store: CheckpointStore,
        identity: dict[str, Any],
        run_dir: Path,
        gauges: Gauges,
        replanner: Replanner,
        sampler: Sampler | None = None,
        forecast: Forecast | None = None,
    ) -> None:
        self.backend, self.loss, self.feed = backend, loss, feed
        self.corpus, self.held_out_N, self.grouping = corpus, held_out_N, grouping
        self.schedule, self.cadence, self.store = schedule, cadence, store
        self.identity, self.run_dir = identity, run_dir
        self.gauges, self.replanner, self.sampler = gauges, replanner, sampler
        self.observers: list[Observer] = []  # receive every event
        if forecast is not None:
            reserved = partial(reserved_gib, backend.device)
            self.observers.append(Foresight(forecast, self._emit, reserved))
        self.step = 0
        self.position = Position()
        self.evals: dict[int, float] = {}
        self.tokens = self._tokens_before = self._steps_before = 0
        self.sampled_at: int | None = None
        self._saved_at: int | None = None
        self._began = self._saved_time = time.monotonic()

    # ---------------------------------------------------------------- the loop

    def train(self) -> Outcome:
        """Run to the end, to the time limit, or until asked to stop; a checkpoint is written in every case.

        Raises:
            NonFiniteError: a loss or gradient was not finite and the settings say to stop there.
            StorageError: a checkpoint could not be written.
        """
        self._began = self._saved_time = time.monotonic()
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
        if not resumed:
            self._evaluate()
            self._sample()
        self.loss.causal.model.train()
        with StopRequest() as stop:
            reason = self._over()  # a run that goes on may be over already
            for data in () if reason else self.feed.steps(self.position):
                self._run_step(data)
                if self._due(self.cadence.eval_every):
                    self._evaluate()
                if self._due(self.cadence.sample_every) and not stop.requested:
                    self._sample()
                reason = "interrupted" if stop.requested else self._over() or self._out_of_time()
                if reason:
                    break
                if self._save_due():
                    self._save()
            assert reason is not None, "a feed has no end"
            if reason != "interrupted":
                self._evaluate()
                self._sample()
            if self._saved_at != self.step:
                self._save()
        return self._end(reason)

    def _over(self) -> str | None:
        """Why there is nothing left to train, or None."""
        cadence = self.cadence
        if self.step >= cadence.total_steps:
            return "complete"
        if cadence.patience is not None and cadence.eval_every is not None:
            since = evaluations_without_gain(
                self.evals, every=cadence.eval_every, min_delta=cadence.min_delta
            )
            if since >= cadence.patience:
                return "early stop"
        return None

    def _out_of_time(self) -> str | None:
        limit = self.cadence.max_seconds
        return "time" if limit is not None and time.monotonic() - self._began >= limit else None

    def _end(self, reason: str) -> Outcome:
        seconds = time.monotonic() - self._began
        self._emit(Finished(step=self.step, reason=reason, seconds=seconds))
        best = best_step(self.evals)
        return Outcome(
            reason=reason,
            step=self.step,
            new_steps=self.step - self._steps_before,
            first_eval=self.evals.get(0),
            last_eval=self.evals.get(self.step),
            best_step=best,
            best_eval=None if best is None else self.evals[best],
            seconds=seconds,
            tokens=self.tokens - self._tokens_before,
            all_tokens=self.tokens,
        )

    def _run_step(self, data: Step) -> None:
        started = time.monotonic()
        rate = self.schedule.apply(self.backend.optimizer, self.step)
        wanted = self.gauges.wanted(self.step + 1)
        batches, result = self._make_step(data, wanted)
        self.step += 1
        before, self.position = self.position, data.position
        self._report_step(batches, result, rate, data.epochs, time.monotonic() - started)
        if result.squares is not None:
            counts = [self.loss.count(batch) for batch in batches]
            for event in self.gauges.events(self.step, wanted, result.squares.read(), counts):
                self._emit(event)
        if result.fault is not None:
            self._handle_fault(result, batches, data, before)

    def _groups(self, data: Step) -> list[list[int]]:
        rows, tokens = self.grouping.rows_per_batch, self.grouping.max_tokens
        return list(micro_batches(data.corpus, data.rows, rows_per_batch=rows, max_tokens=tokens))

    def _make_step(self, data: Step, wanted: Wanted) -> tuple[list[TokenBatch], StepResult]:
        """The micro-batches of a step and what it did; made again where it runs out of memory."""

        def attempt() -> tuple[list[TokenBatch], StepResult]:
            batches = [collate(data.corpus, documents) for documents in self._groups(data)]
            return batches, train_step(self.backend, batches, self.loss, self.cadence.max_grad_norm, wanted)

        def sizes() -> tuple[int, int]:
            lengths_N = data.corpus.lengths
            largest, longest = (
                max(int(lengths_N[list(documents)].sum()) for documents in parts)
                for parts in (self._groups(data), data.rows)
            )
            return largest, longest

        def regroup(max_tokens: int) -> None:
            self.grouping = MicroBatching(self.grouping.rows_per_batch, max_tokens)

        try:
            return self.replanner.make(
                attempt, step=self.step + 1, sizes=sizes, regroup=regroup, warn=self._warn
            )
        except OutOfRoomError:
            if self.step and self._saved_at != self.step:
                self._save()  # what was learned before
            raise

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
        with self.backend.for_measuring():
            measured = held_out_loss(
                self.loss.causal,
                self.corpus,
                self.held_out_N,
                max_tokens=self.grouping.max_tokens,
                autocast=self.backend.autocast(),
                progress=self._measuring,
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

    def _measuring(self, done: int, total: int) -> None:
        self._emit(Underway(step=self.step, what="held-out loss", done=done, total=total))

    def _sample(self) -> None:
        """Have the model answer the sample prompts unless it has done so at this step."""
        if self.sampler is None or self.sampled_at == self.step:
            return
        self._emit(Underway(step=self.step, what="sample answers"))
        started = time.monotonic()
        with self.backend.for_measuring():
            answers = self.sampler.answers()
        seconds = (time.monotonic() - started) / len(answers)
        for prompt, answer in zip(self.sampler.prompts, answers, strict=True):
            self._emit(Sampled(step=self.step, prompt=prompt.shown, answer=answer, seconds=seconds))
        self.sampled_at = self.step

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
                memory_now_gib=memory_gib(self.backend.device),
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

    def _save_due(self) -> bool:
        cadence = self.cadence
        waited = time.monotonic() - self._saved_time
        return (
            self._due(cadence.save_every)
            or (cadence.save_seconds is not None and waited >= cadence.save_seconds)
            or (cadence.save_best and best_step(self.evals) == self.step)
        )

    def _save(self) -> None:
        started = time.monotonic()
        tensors, state = take_snapshot(self)
        checkpoint = self.store.save(self.step, tensors, state, metric=self.evals.get(self.step))
        self._saved_at, self._saved_time = self.step, time.monotonic()
        self._emit(Saved(step=self.step, path=str(checkpoint.path), seconds=self._saved_time - started))

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint as if the run had never stopped.

        Raises:
            UserError: the settings differ from those of the run that wrote it in a way that matters.
        """
        restore_snapshot(self, checkpoint)
        self._saved_at = self._steps_before = self.step
        self._tokens_before = self.tokens


def exact_cuda_algorithms() -> None:
    """Make CUDA runs repeat bit for bit, or fail where an operation cannot."""
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
