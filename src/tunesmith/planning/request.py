"""What a plan is asked for. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tunesmith.planning.cards import CARDS
from tunesmith.planning.facts import ModelFacts, Work
from tunesmith.planning.fit import BUSY_TOKENS, ROUNDING, fits_in_float32

APART = 1.25
"""Sizes of micro-batches that are tried differ by this factor at least."""


BFLOAT16 = (8, 0)
"""The compute capability from which on a card has bfloat16."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the run wants, and what it may use.

    Attributes:
        card: name of a row of `CARDS`.
        work: how one row of a micro-batch trains, with its documents.
        rows: rows of an optimizer step.
        steps: optimizer steps of the run, None where they are not known.
        batch_tokens: tokens of an optimizer step, where it is given in them: `rows` then are as many as hold them.
        run_tokens: tokens of the run, where they are given: so are `steps`.
        trained_in: what weights train in where all of them do: `float32`, `bfloat16`, or `auto` for float32 where the
            card holds that; None where `work` says it already. See `settled`.
        micro_batch: rows that go through the model at once, None to choose.
        policy: `auto`, or the policy of every layer.
        embedding: where the input embedding lies: `device`, `host`, or `auto` for what is faster.
        budget: share of the card's memory that may be used (at most 1), or bytes.
        host_bytes: memory of the host that may be pinned, None where it is not known.
        published_quantized: whether the checkpoint is, so that its weights cannot be held otherwise.
    """

    card: str
    work: Work
    rows: int
    steps: int | None = None
    batch_tokens: int | None = None
    run_tokens: int | None = None
    trained_in: str | None = None
    micro_batch: int | None = None
    policy: str = "auto"
    embedding: str = "auto"
    budget: float = 0.92
    host_bytes: int | None = None
    published_quantized: bool = False

    def work_of(self, rows: int) -> Work:
        """The work of a micro-batch of so many rows."""
        work = self.work
        return replace(work, documents=work.documents * rows, supervised=work.supervised * rows)

    def of_length(self, length: int) -> PlanRequest:
        """The request with rows of so many tokens, each of them one document; of what is given in tokens more rows or
        fewer, and as many steps as follow from them."""
        work = self.work
        supervised = -(-work.supervised * length // work.tokens)
        rows = self.rows if self.batch_tokens is None else -(-self.batch_tokens // length)
        steps = self.steps if self.run_tokens is None else -(-self.run_tokens // (rows * length))
        return replace(
            self, work=replace(work, documents=(length,), supervised=supervised), rows=rows, steps=steps
        )

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


def settled(model: ModelFacts, request: PlanRequest) -> PlanRequest:
    """The request with the type of weights that train decided for its card, as `config.make_model.weights_dtype` has
    it; as it is where its work says that already."""
    if request.trained_in is None:
        return request
    itemsize = _trained_itemsize(model, request)
    return replace(request, work=replace(request.work, trained_itemsize=itemsize))


def _trained_itemsize(model: ModelFacts, request: PlanRequest) -> int:
    """Bytes of a trained parameter."""
    work, card = request.work, CARDS[request.card]
    if not work.full or work.optimizer not in ROUNDING:
        return 4
    if request.trained_in != "auto":
        return 2 if request.trained_in == "bfloat16" else 4
    fits = card.capability < BFLOAT16 or fits_in_float32(
        trained=model.parameters, frozen_bytes=0, optimizer=work.optimizer, device_bytes=card.memory_bytes
    )
    return 4 if fits else 2
