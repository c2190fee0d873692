"""What a plan is asked for. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tunesmith.planning.facts import Work
from tunesmith.planning.fit import BUSY_TOKENS

APART = 1.25
"""Sizes of micro-batches that are tried differ by this factor at least."""


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
        embedding: where the input embedding lies: `device`, `host`, or `auto` for what is faster.
        budget: share of the card's memory that may be used (at most 1), or bytes.
        host_bytes: memory of the host that may be pinned, None where it is not known.
    """

    card: str
    work: Work
    rows: int
    steps: int | None = None
    micro_batch: int | None = None
    policy: str = "auto"
    embedding: str = "auto"
    budget: float = 0.92
    host_bytes: int | None = None

    def work_of(self, rows: int) -> Work:
        """The work of a micro-batch of so many rows."""
        work = self.work
        return replace(work, documents=work.documents * rows, supervised=work.supervised * rows)

    def budget_of(self, memory_bytes: int) -> int:
        """Bytes that may be used of a card with so many."""
        return int(self.budget * memory_bytes) if self.budget <= 1 else min(int(self.budget), memory_bytes)

    def micro_batches(self) -> list[int]:
        """Rows of a micro-batch that are worth a try, the fewest first: those that part a step evenly, up to what
        keeps a card busy."""
        if self.micro_batch is not None:
            return [min(self.micro_batch, self.rows)]
        most = min(self.rows, max(1, BUSY_TOKENS["cuda"] // self.work.tokens))
        even = {-(-self.rows // passes) for passes in range(1, self.rows + 1)}
        found: list[int] = []
        for rows in sorted((size for size in even if size <= most), reverse=True):
            if not found or rows == 1 or rows * APART <= found[-1]:
                found.append(rows)
        return found[::-1]
