"""What becomes of a step that runs out of the device's memory: it is made again under a leaner layout.

Nothing of a step is applied before all of its micro-batches are through, so a step that failed on the way has left
gradients and random states behind and nothing else. Gradients are dropped, random states put back, and the same rows
go through once more. Where only policies changed the gradients are the same bit for bit; where the micro-batch became
smaller the same sums are taken in another order.

An update that runs out of memory is not made again: some of the weights may have moved. Activations are gone by then,
so a leaner layout would not have helped it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from tunesmith.contracts.errors import UserError
from tunesmith.distributed.single import SingleDevice
from tunesmith.models.host_memory import NoHostMemoryError
from tunesmith.training.state import restore_rng, rng_state
from tunesmith.training.step import first_sentence

Made = TypeVar("Made")


class OutOfRoomError(UserError):
    """A step does not fit the device's memory, and nothing leaner is left; the step was not applied."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message, hint=hint, exit_code=1)


@dataclass(frozen=True, slots=True)
class Leaner:
    """A layout that was put in place of one that ran out of memory.

    Attributes:
        what: what it is, as the end of `from now on with …`.
        max_tokens: of a micro-batch, None where it stays.
    """

    what: str
    max_tokens: int | None = None


class Ladder(Protocol):
    """Ever leaner layouts of a run."""

    def down(self, largest: int, longest: int) -> Leaner | None:
        """Put the next leaner layout in place.

        Args:
            largest: tokens of the largest micro-batch of the step that failed.
            longest: tokens of its longest row.

        Returns:
            What changed, None where nothing leaner is left.
        """
        ...


class Replanner:
    """Makes steps, again where they run out of memory.

    Args:
        backend: whose gradients are dropped.
        ladder: the leaner layouts; None stops at once.
    """

    def __init__(self, backend: SingleDevice, ladder: Ladder | None) -> None:
        self._backend, self._ladder = backend, ladder

    def make(
        self,
        attempt: Callable[[], Made],
        *,
        step: int,
        sizes: Callable[[], tuple[int, int]],
        regroup: Callable[[int], None],
        warn: Callable[[str], None],
    ) -> Made:
        """Attempt a step until it is through.

        Args:
            attempt: makes it, with the grouping that holds then.
            step: its number, for messages.
            sizes: tokens of its largest micro-batch and of its longest row.
            regroup: takes the tokens of a smaller micro-batch.
            warn: is told of each change.

        Raises:
            OutOfRoomError: nothing leaner is left, or none is wanted, or it is the host that has no room; random
                states are as before the step.
        """
        tensors, plain = rng_state()
        while True:
            said, of_host = "", False
            try:
                return attempt()
            except NoHostMemoryError as error:
                said, of_host = str(error), True
            except torch.OutOfMemoryError as error:
                said = first_sentence(error)
            # only now: the error's frames held what the pass had made
            self._clear()
            restore_rng(tensors, plain)
            if of_host:
                raise _host_given_up(step, said)
            leaner = self._next(*sizes())
            if leaner is None:
                raise _given_up(step, said, asked=self._ladder is not None)
            if leaner.max_tokens is not None:
                regroup(leaner.max_tokens)
            warn(
                f"Step {step} ran out of the device's memory ({said}). It is made again, from now on with "
                f"{leaner.what}."
            )

    def _next(self, largest: int, longest: int) -> Leaner | None:
        if self._ladder is None:
            return None
        if self._backend.use_graphs:  # they hold what a micro-batch needs a second time
            self._backend.use_graphs = False
            return Leaner("no CUDA graphs")
        return self._ladder.down(largest, longest)

    def _clear(self) -> None:
        if self._backend.device.type == "cuda":  # copies may still write into what is let go of here
            torch.cuda.synchronize(self._backend.device)
        self._backend.discard()
        gc.collect()
        if self._backend.device.type == "cuda":
            torch.cuda.empty_cache()


def _host_given_up(step: int, said: str) -> OutOfRoomError:
    return OutOfRoomError(
        f"Step {step} ran out of host memory, where layers keep what backward needs ({said}).",
        hint="Free memory of this machine, or set memory.policy to one that does not offload.",
    )


def _given_up(step: int, said: str, *, asked: bool) -> OutOfRoomError:
    if not asked:
        return OutOfRoomError(
            f"Step {step} ran out of the device's memory ({said}), and memory.on_oom is stop.",
            hint="Set memory.on_oom: replan, or lower train.micro_batch.",
        )
    return OutOfRoomError(
        f"Step {step} ran out of the device's memory ({said}), and no leaner layout is left that the settings allow.",
        hint="Leave memory.policy and train.micro_batch at auto, or lower train.sequence_length; "
        "model.quantize: nf4 makes the weights smaller. `tunesmith plan` says what fits.",
    )
