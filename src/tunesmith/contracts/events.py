"""What a run says while it runs: one small record per happening, written to `events.jsonl` and shown by the CLI.

Torch-free, so that whatever watches a run needs no training stack.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The base of every event; `step` is the number of optimizer steps that are complete.

    Attributes:
        kept: whether `events.jsonl` has it; otherwise it is for those who watch.
    """

    kind: ClassVar[str]
    kept: ClassVar[bool] = True
    step: int

    def record(self) -> dict[str, Any]:
        """The event as a JSON object with its kind first."""
        return {"event": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Event):
    """Training begins, or goes on from a checkpoint."""

    kind: ClassVar[str] = "start"
    total_steps: int
    resumed: bool
    trained_parameters: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped(Event):
    """An optimizer step is complete.

    `loss` is the mean over the step's supervised tokens, `seconds` the wall time since the last step,
    `memory_gib` the peak of the device's allocated memory (of the process on CPU) and `memory_now_gib` what is
    allocated when the step is over, `applied` False where the step was skipped.
    """

    kind: ClassVar[str] = "step"
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    supervised_tokens_per_second: float
    seconds: float
    memory_gib: float
    loss_scale: float
    applied: bool
    memory_now_gib: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Event):
    """Something was measured of a step on request; the values by their names (`training.noise_scale`)."""

    kind: ClassVar[str] = "measure"
    values: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared(Event):
    """What the plan of the run foresaw, beside what its first steps took.

    `planned_gib` and `measured_gib` are peaks of allocated memory, `reserved_gib` what the allocator holds for them;
    tokens a second are those of steps.
    """

    kind: ClassVar[str] = "plan"
    planned_gib: float
    measured_gib: float
    reserved_gib: float
    planned_tokens_per_second: float
    measured_tokens_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """The held-out loss was measured: the mean, and that of each source where there are several."""

    kind: ClassVar[str] = "eval"
    loss: float
    tokens: int
    seconds: float
    by_source: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Underway(Event):
    """Something between steps takes its time: `what` it is, and how many of its parts are done.

    `total` is 0 where there are no parts to be counted. What it comes to is another event.
    """

    kind: ClassVar[str] = "underway"
    kept: ClassVar[bool] = False
    what: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled(Event):
    """The model answered a prompt: `prompt` as a person reads it, `seconds` the wall time of the answer."""

    kind: ClassVar[str] = "sample"
    prompt: str
    answer: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(Event):
    """A checkpoint was written."""

    kind: ClassVar[str] = "checkpoint"
    path: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(Event):
    """Something that a person should know; the run goes on."""

    kind: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """Training is over: `reason` is complete, time, early stop, interrupted or non-finite."""

    kind: ClassVar[str] = "end"
    reason: str
    seconds: float


class Observer(Protocol):
    """Receives every event of a run, in order."""

    def on_event(self, event: Event) -> None:
        """Called from the training loop; must not raise."""
        ...
