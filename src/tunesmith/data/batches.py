"""From documents to the micro-batches of an optimizer step.

The order of an epoch is a pure function of (seed, epoch, lengths): nothing is drawn while training, so a
resumed run needs two integers to find its place, and every rank can compute the same plan.

    documents ── shuffle, repeat by weight ──> pack into rows ──> shuffle rows ──> cut into steps
    step ── group rows ──> micro-batches ──> TokenBatch

How rows are grouped into micro-batches changes speed and memory and nothing else: losses are normalised by
the supervised tokens of the whole step.

Shape suffixes: T tokens, D documents, S supervised tokens, N documents of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.contracts.batch import TokenBatch
from tunesmith.data.packing import pack_best_fit

_DOCUMENTS, _ROWS, _HELD_OUT = 0, 1, 2  # what a random stream is for


class Documents(Protocol):
    """A tokenised source, as `table.TokenTable` provides it."""

    def __len__(self) -> int: ...
    @property
    def lengths(self) -> NDArray[np.int64]: ...
    def ids(self, index: int) -> NDArray[np.int32]: ...
    def trained(self, index: int) -> NDArray[np.bool_]: ...
    def where(self, index: int) -> str: ...


def _generator(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, purpose])))


class Corpus:
    """Several tokenised sources as one numbered list of documents, some of them held out.

    Args:
        sources: tokenised sources.
        weights: average number of appearances of a document per epoch, one per source.
    """

    def __init__(self, sources: Sequence[Documents], weights: Sequence[float] | None = None) -> None:
        self.sources = list(sources)
        self.weights = list(weights) if weights is not None else [1.0] * len(self.sources)
        self._starts = np.cumsum([0, *(len(source) for source in self.sources)])
        self.lengths = np.concatenate([np.asarray(s.lengths, dtype=np.int64) for s in self.sources])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, document: int) -> tuple[Documents, int]:
        """The source of a document and its index there."""
        source = int(np.searchsorted(self._starts, document, side="right")) - 1
        return self.sources[source], document - int(self._starts[source])

    def where(self, document: int) -> str:
        """`file:line` of a document."""
        source, index = self.locate(document)
        return source.where(index)

    def hold_out(
        self, fraction: float, max_rows: int | None, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Split the document numbers into (train, held out); at least one document stays in training."""
        count = min(round(len(self) * fraction), max_rows or len(self), len(self) - 1)
        if fraction > 0 and len(self) > 1:
            count = max(count, 1)
        order = _generator(seed, 0, _HELD_OUT).permutation(len(self))
        return np.sort(order[count:]), np.sort(order[:count])

    def draw(self, documents_N: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
        """The documents of an epoch in random order, each source repeated or thinned by its weight."""
        rng = _generator(seed, epoch, _DOCUMENTS)
        drawn = []
        for number, weight in enumerate(self.weights):
            inside = (documents_N >= self._starts[number]) & (documents_N < self._starts[number + 1])
            own = documents_N[inside]
            whole, part = int(weight), weight - int(weight)
            drawn += [own] * whole
            if part > 0 and own.size:
                drawn.append(rng.permutation(own)[: max(round(part * own.size), 0 if whole else 1)])
        return rng.permutation(np.concatenate(drawn)) if drawn else documents_N[:0]


@dataclass(frozen=True)
class BatchPlan:
    """How documents become rows and rows become steps.

    Attributes:
        sequence_length: capacity of a pack in tokens.
        packing: several documents a row, or one.
        rows_per_step: rows of a step, or None where `tokens_per_step` counts.
        tokens_per_step: a step takes rows until it holds this many tokens.
        seed: seed of the order.
    """

    sequence_length: int
    packing: bool
    rows_per_step: int | None
    tokens_per_step: int | None
    seed: int


Row = tuple[int, ...]
"""The documents of one row."""


def rows_of_epoch(corpus: Corpus, documents_N: NDArray[np.int64], plan: BatchPlan, epoch: int) -> list[Row]:
    """All rows of an epoch in training order."""
    drawn = corpus.draw(documents_N, plan.seed, epoch)
    if not plan.packing:
        return [(int(document),) for document in drawn]
    packs = pack_best_fit(corpus.lengths[drawn], plan.sequence_length)
    order = _generator(plan.seed, epoch, _ROWS).permutation(len(packs))
    return [tuple(int(drawn[index]) for index in packs[number]) for number in order]


def steps_of_epoch(corpus: Corpus, rows: Sequence[Row], plan: BatchPlan) -> list[list[Row]]:
    """Cut the rows of an epoch into optimizer steps; the last one may be smaller."""
    if plan.rows_per_step is not None:
        size = plan.rows_per_step
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    assert plan.tokens_per_step is not None
    steps: list[list[Row]] = []
    room = 0
    for row in rows:
        if room <= 0:
            steps.append([])
            room = plan.tokens_per_step
        steps[-1].append(row)
        room -= int(corpus.lengths[list(row)].sum())
    return steps


def micro_batches(
    corpus: Corpus, rows: Sequence[Row], *, rows_per_batch: int | None, max_tokens: int
) -> Iterator[list[int]]:
    """Group consecutive rows of a step into micro-batches of documents.

    Args:
        rows_per_batch: rows of a micro-batch; None takes as many as hold `max_tokens` tokens.
        max_tokens: see there; a longer row is a micro-batch of its own.
    """
    group: list[int] = []
    rows_in_group = tokens = 0
    for row in rows:
        length = int(corpus.lengths[list(row)].sum())
        full = tokens + length > max_tokens if rows_per_batch is None else rows_in_group == rows_per_batch
        if group and full:
            yield group
            group, rows_in_group, tokens = [], 0, 0
        group.extend(row)
        rows_in_group += 1
        tokens += length
    if group:
        yield group


def collate(corpus: Corpus, documents: Sequence[int]) -> TokenBatch:
    """One packed row of documents with its supervised positions, on the CPU.

    Token t of a document is predicted from token t − 1, so a document's first token is never a target.
    """
    located = [corpus.locate(document) for document in documents]
    ids = [np.asarray(source.ids(index), dtype=np.int64) for source, index in located]
    trained = [np.array(source.trained(index), dtype=bool) for source, index in located]
    for mask in trained:
        mask[0] = False
    lengths_D = np.array([document_ids.size for document_ids in ids], dtype=np.int64)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths_D)])
    ids_T = np.concatenate(ids)
    targets_at = np.flatnonzero(np.concatenate(trained))
    document_T = np.repeat(np.arange(len(ids)), lengths_D)
    return TokenBatch(
        ids_T=torch.from_numpy(ids_T),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths_D])),
        lengths=tuple(int(length) for length in lengths_D),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        logit_index_S=torch.from_numpy(targets_at - 1),
        targets_S=torch.from_numpy(ids_T[targets_at]),
        weights_S=torch.ones(targets_at.size, dtype=torch.float32),
        document_S=torch.from_numpy(document_T[targets_at]),
        rows_D=tuple(int(document) for document in documents),
    )
