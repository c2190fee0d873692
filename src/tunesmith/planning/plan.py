"""What a plan is asked for, and what it says: the words that the command, a run and the solver share. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby

from tunesmith.planning.facts import Work

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "head", "workspace", "reserve")
"""What memory of a card goes to, in the order in which tables and pictures show it. `activations` is what all layers
keep at the moment at which it is most; `reserve` is what the allocator and libraries hold beside tensors."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the run wants, and what it may use.

    Attributes:
        card: name of a row of `CARDS`.
        work: how one row of a micro-batch trains, with its documents.
        rows: rows of an optimizer step.
        steps: optimizer steps of the run, None where they are not known.
        micro_batch: rows that go through the model at once, None to choose.
        policy: `auto`, or the policy of every layer.
        budget: share of the card's memory that may be used (at most 1), or bytes.
        host_bytes: memory of the host that may be pinned, None where it is not known.
    """

    card: str
    work: Work
    rows: int
    steps: int | None = None
    micro_batch: int | None = None
    policy: str = "auto"
    budget: float = 0.92
    host_bytes: int | None = None

    def work_of(self, rows: int) -> Work:
        """The work of a micro-batch of so many rows."""
        work = self.work
        return replace(work, documents=work.documents * rows, supervised=work.supervised * rows)


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a plan that are compared with another's.

    Attributes:
        card: name of a row of `CARDS`.
        fits: whether it stays under its budget.
        missing_bytes: what it lacks where it does not.
        peak_bytes: the most memory in use at any moment of a step.
        micro_batch_rows: rows that go through the model at once.
        step_seconds: of an optimizer step.
        tokens_per_second: tokens through the model, supervised or not.
        total_seconds: of the run, None where its steps are not known.
    """

    card: str
    fits: bool
    missing_bytes: int
    peak_bytes: int
    micro_batch_rows: int
    step_seconds: float
    tokens_per_second: float
    total_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """What a change of settings would make of the run.

    Attributes:
        what: the change in words: `QLoRA instead of LoRA`.
        settings: the change as settings: `model.quantize=nf4`; empty where it is none, as with another card.
        summary: of the plan with it.
    """

    what: str
    settings: tuple[str, ...]
    summary: Summary


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run is laid out over the memory of a card and the layers of a model.

    Attributes:
        card: name of a row of `CARDS`.
        budget_bytes: that may be used.
        parts: bytes of each of `PARTS`; what is not there at the peak of the step counts by its own most.
        host_bytes: pinned memory of the host.
        micro_batch_rows: rows that go through the model at once; tokens: of them.
        policies: one for each layer, from the first to the last.
        chunks: sizes by which work is cut: `head`, tokens of the head at once; `mlp`, tokens of the gated MLP at once
            where it is tiled.
        peak_bytes: the most memory in use at any moment of a step.
        step_seconds: of an optimizer step.
        tokens_per_second: tokens through the model, supervised or not.
        total_seconds: of the run, None where its steps are not known.
        timeline: (what happens, bytes of each part that is there) in the order of one micro-batch.
        fits: whether the peak is within the budget; missing_bytes: what lacks where it is not.
        nearest: the least changes under which it fits, the best first; empty where it fits.
        alternatives: what other choices would change.
    """

    card: str
    budget_bytes: int
    parts: dict[str, int]
    host_bytes: int
    micro_batch_rows: int
    tokens: int
    policies: tuple[str, ...]
    chunks: dict[str, int]
    peak_bytes: int
    step_seconds: float
    tokens_per_second: float
    total_seconds: float | None
    timeline: tuple[tuple[str, dict[str, int]], ...]
    fits: bool
    missing_bytes: int = 0
    nearest: tuple[Alternative, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

    @property
    def strip(self) -> tuple[tuple[str, int], ...]:
        """Policies of layers that follow each other: (name, how many)."""
        return tuple((name, len(list(group))) for name, group in groupby(self.policies))

    @property
    def summary(self) -> Summary:
        """The figures that are compared."""
        return Summary(
            card=self.card,
            fits=self.fits,
            missing_bytes=self.missing_bytes,
            peak_bytes=self.peak_bytes,
            micro_batch_rows=self.micro_batch_rows,
            step_seconds=self.step_seconds,
            tokens_per_second=self.tokens_per_second,
            total_seconds=self.total_seconds,
        )
