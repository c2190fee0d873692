"""What a checkpoint holds of a running trainer, and a trainer put back to where a checkpoint was written.

Trained parameters, optimizer and random states as tensors; the place in the data, what was measured, and what must
not change between the parts of a run as plain values. Checkpoints lie between optimizer steps, so nothing of a
half-done accumulation is ever needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tunesmith.contracts.errors import UserError
from tunesmith.data.feed import Position
from tunesmith.distributed.single import SingleDevice
from tunesmith.training.cadence import MicroBatching
from tunesmith.training.checkpoint import Checkpoint
from tunesmith.training.state import join_state, restore_rng, rng_state, split_state

_MODEL = "model/"


class Running(Protocol):
    """What goes on and is put back, as `trainer.Trainer` has it."""

    backend: SingleDevice
    grouping: MicroBatching
    identity: dict[str, Any]
    step: int
    position: Position
    tokens: int
    evals: dict[int, float]
    sampled_at: int | None


def take_snapshot(trainer: Running) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain values that the run needs to go on, for `CheckpointStore.save`."""
    tensors, optimizer = split_state("optimizer", trainer.backend.state())
    rng_tensors, rng = rng_state()
    parameters = {f"{_MODEL}{name}": p for name, p in trainer.backend.trained_parameters().items()}
    state = {
        "step": trainer.step,
        "epoch": trainer.position.epoch,
        "step_in_epoch": trainer.position.step_in_epoch,
        "stream": trainer.position.stream,
        "tokens": trainer.tokens,
        "grouping": [trainer.grouping.rows_per_batch, trainer.grouping.max_tokens],
        "evals": {str(step): loss for step, loss in trainer.evals.items()},
        "sampled": trainer.sampled_at,
        "identity": trainer.identity,
        "optimizer": optimizer,
        "rng": rng,
    }
    return {**parameters, **tensors, **rng_tensors}, state


def restore_snapshot(trainer: Running, checkpoint: Checkpoint) -> None:
    """Put a trainer to where the checkpoint was written.

    Raises:
        UserError: the settings differ from those of the run that wrote it in a way that matters.
        StorageError: the checkpoint cannot be read.
    """
    state = checkpoint.state()
    _check_identity(state["identity"], trainer.identity, checkpoint.path)
    tensors = checkpoint.tensors()
    _load_weights(trainer.backend, tensors, state)
    restore_rng(tensors, state["rng"])
    trainer.step = state["step"]
    trainer.tokens = state["tokens"]
    trainer.position = Position(state["epoch"], state["step_in_epoch"], state.get("stream"))
    if trainer.grouping.rows_per_batch is None:  # a number in the settings counts; `auto` is what it was
        trainer.grouping = MicroBatching(*state["grouping"])
    trainer.evals = {int(step): loss for step, loss in state["evals"].items()}
    trainer.sampled_at = state.get("sampled")


def restore_weights(backend: SingleDevice, checkpoint: Checkpoint) -> int:
    """Give the model the weights of a checkpoint, to save them; the tokens that had been trained on by then.

    The optimizer's state comes along, because some answer with other weights than those they take gradients at.

    Raises:
        StorageError: the checkpoint cannot be read.
    """
    state = checkpoint.state()
    _load_weights(backend, checkpoint.tensors(), state)
    return int(state["tokens"])


def _load_weights(backend: SingleDevice, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    parameters = {name: tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
    backend.load_trained_parameters({name.removeprefix(_MODEL): p for name, p in parameters.items()})
    backend.load_state(join_state("optimizer", tensors, state["optimizer"]))


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
