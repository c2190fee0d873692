"""From documents to the micro-batches of an optimizer step.

The order of an epoch is a pure function of (seed, epoch, lengths): nothing is drawn while training, so a
resumed run needs two integers to find its place, and every rank can compute the same plan.

    documents ── shuffle, mix sources ──> pack into rows ──> shuffle rows ──> cut into steps
    step ── share out over ranks ──> group rows ──> micro-batches ──> TokenBatch

Documents of one group, such as the two answers of a pair, lie one behind the other in their source and are drawn,
packed and held out together: what is said of documents below is done to groups, by the number of their first one.

Which rank takes a row and how rows are grouped into micro-batches changes speed and memory and nothing else:
losses are normalised by the supervised tokens of the whole step.

Shape suffixes: T tokens, D documents, S supervised tokens, N documents of the corpus, E documents of an epoch,
R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.contracts.batch import TokenBatch
from tunesmith.data.mixing import CONCATENATE, Mix, draw_epoch
from tunesmith.data.packing import pack_flat
from tunesmith.data.ranks import Shares, attention_costs, balance_rows

_DOCUMENTS, _ROWS, _HELD_OUT = 0, 1, 2  # what a random stream is for
_WINDOW = 128
"""Rows that interleaved documents are packed into at once. Each window ends with a row that is part empty: packs of
2,048 tokens with an instruction set's lengths were 97.4% full at 32 rows, 99.2% at 128, 99.6% at 256."""


Row = tuple[int, ...]
"""The documents of one row."""


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
        sources: tokenised sources. One with an array `groups` (int64 `[N]`, equal for neighbours that belong
            together) has groups; in others each document is one of its own. So with `rows`, the data rows, whose
            documents are held out together.
        weights: average number of appearances of a document per epoch, one per source; under `interleave` the
            sources' shares.
        names: what reports call the sources.
    """

    def __init__(
        self,
        sources: Sequence[Documents],
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.sources = list(sources)
        self.weights = list(weights) if weights is not None else [1.0] * len(self.sources)
        self.names = list(names) if names is not None else [str(n) for n in range(len(self.sources))]
        self._starts = np.cumsum([0, *(len(source) for source in self.sources)])
        lengths = [np.asarray(source.lengths, dtype=np.int64) for source in self.sources]
        self.lengths = np.concatenate([np.empty(0, dtype=np.int64), *lengths])
        self._first_N = self._firsts_by("groups")
        self._first_of_row_N = self._firsts_by("rows") & self._first_N
        self._grouped = not self._first_N.all()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _firsts_by(self, name: str) -> NDArray[np.bool_]:
        """bool `[N]`, whether a document has another number in an array of its source than the one before it."""
        firsts = [_first_of_group(source, name) for source in self.sources]
        return np.concatenate([np.empty(0, dtype=np.bool_), *firsts])

    def locate(self, document: int) -> tuple[Documents, int]:
        """The source of a document and its index there."""
        source = int(np.searchsorted(self._starts, document, side="right")) - 1
        return self.sources[source], document - int(self._starts[source])

    def where(self, document: int) -> str:
        """`file:line` of a document."""
        source, index = self.locate(document)
        return source.where(index)

    def by_source(self, documents_N: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The documents of each source, in the given order."""
        source_N = np.searchsorted(self._starts, documents_N, side="right") - 1
        return [documents_N[source_N == number] for number in range(len(self.sources))]

    def firsts(self, documents_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the documents that are the first of their group: all of them where there are no groups."""
        return documents_N[self._first_N[documents_N]] if self._grouped else documents_N

    def members(self, rows: list[Row]) -> list[Row]:
        """Rows of documents from rows of groups, which are named by their first documents."""
        if not self._grouped:
            return rows
        sizes = self._sizes().tolist()
        return [tuple(d for first in row for d in range(first, first + sizes[first])) for row in rows]

    def group_lengths(self, firsts_E: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of all documents of each group, int64 `[E]`, by its first one."""
        if not self._grouped:
            return self.lengths[firsts_E]
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return np.asarray(ends[firsts_E + self._sizes()[firsts_E]] - ends[firsts_E])

    def _sizes(self) -> NDArray[np.int64]:
        """int64 `[N]`, the documents of the group that a document is the first of; 0 for the others."""
        firsts = np.flatnonzero(self._first_N)
        sizes_N = np.zeros(len(self), dtype=np.int64)
        sizes_N[firsts] = np.diff(np.append(firsts, len(self)))
        return sizes_N

    def hold_out(
        self, fraction: float, max_rows: int | None, seed: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Split the document numbers into (train, held out); all documents of a data row lie on one side."""
        firsts = np.flatnonzero(self._first_of_row_N)
        held_N = hold_out(len(firsts), fraction, max_rows, seed)
        held_N = np.repeat(held_N, np.diff(np.append(firsts, len(self))))
        return np.flatnonzero(~held_N), np.flatnonzero(held_N)

    def draw(
        self,
        documents_N: NDArray[np.int64],
        seed: int,
        epoch: int,
        mix: Mix = CONCATENATE,
    ) -> NDArray[np.int64]:
        """The documents of an epoch in order, int64 `[E]`, sources mixed by their weights."""
        own = self.by_source(self.firsts(documents_N))
        return draw_epoch(own, self.weights, mix, _generator(seed, epoch, _DOCUMENTS))


def hold_out(count: int, fraction: float, max_rows: int | None, seed: int) -> NDArray[np.bool_]:
    """bool `[count]`, which of that many rows are held out; at least one stays in training."""
    held = min(round(count * fraction), max_rows or count, count - 1)
    if fraction > 0 and count > 1:
        held = max(held, 1)
    held_N = np.zeros(count, dtype=np.bool_)
    held_N[_generator(seed, 0, _HELD_OUT).permutation(count)[: max(0, held)]] = True
    return held_N


def _first_of_group(source: Documents, name: str) -> NDArray[np.bool_]:
    """bool `[N]`, whether a document begins a group; without the array each is one of its own."""
    groups_N = getattr(source, name, None)
    first_N = np.ones(len(source), dtype=np.bool_)
    if groups_N is not None:
        first_N[1:] = groups_N[1:] != groups_N[:-1]
    return first_N


@dataclass(frozen=True)
class BatchPlan:
    """How documents become rows and rows become steps.

    Attributes:
        sequence_length: capacity of a pack in tokens.
        packing: several documents a row, or one.
        rows_per_step: rows of a step, or None where `tokens_per_step` counts.
        tokens_per_step: a step takes rows until it holds this many tokens.
        seed: seed of the order.
        mix: how sources share an epoch.
    """

    sequence_length: int
    packing: bool
    rows_per_step: int | None
    tokens_per_step: int | None
    seed: int
    mix: Mix = CONCATENATE


def rows_of_epoch(corpus: Corpus, documents_N: NDArray[np.int64], plan: BatchPlan, epoch: int) -> list[Row]:
    """All rows of an epoch in training order; one that interleaves keeps the proportion of sources along it."""
    drawn_E = corpus.draw(documents_N, plan.seed, epoch, plan.mix)
    if not plan.packing:
        return corpus.members([(first,) for first in drawn_E.tolist()])
    lengths_E = corpus.group_lengths(drawn_E)
    rng = _generator(plan.seed, epoch, _ROWS)
    window = plan.sequence_length * _WINDOW if plan.mix.interleaved else max(1, int(lengths_E.sum()))
    rows: list[Row] = []
    for start, end in _windows(lengths_E, window):
        rows += pack_shuffled(drawn_E[start:end], lengths_E[start:end], plan.sequence_length, rng)
    return corpus.members(rows)


def pack_shuffled(
    documents_E: NDArray[np.int64], lengths_E: NDArray[np.int64], capacity: int, rng: np.random.Generator
) -> list[Row]:
    """Rows of documents with these lengths, in random order."""
    packed_E, ends_R = pack_flat(lengths_E, capacity)
    documents, order_R = documents_E[packed_E].tolist(), rng.permutation(len(ends_R))
    starts_R = np.concatenate([[0], ends_R[:-1]]) if len(ends_R) else ends_R
    bounds = zip(starts_R[order_R].tolist(), ends_R[order_R].tolist(), strict=True)
    return [tuple(documents[start:end]) for start, end in bounds]


def _windows(lengths_E: NDArray[np.int64], tokens: int) -> list[tuple[int, int]]:
    """Consecutive documents of about so many tokens, as (first, behind the last)."""
    if not lengths_E.size:
        return []
    window_E = (np.cumsum(lengths_E) - 1) // tokens
    bounds = [0, *(np.flatnonzero(np.diff(window_E)) + 1).tolist(), len(lengths_E)]
    return list(pairwise(bounds))


def steps_of_epoch(corpus: Corpus, rows: Sequence[Row], plan: BatchPlan) -> list[list[Row]]:
    """Cut the rows of an epoch into optimizer steps; the last one may be smaller."""
    if plan.rows_per_step is not None:
        size = plan.rows_per_step
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    assert plan.tokens_per_step is not None
    steps: list[list[Row]] = []
    room = 0
    for row, length in zip(rows, _row_lengths(corpus, rows), strict=True):
        if room <= 0:
            steps.append([])
            room = plan.tokens_per_step
        steps[-1].append(row)
        room -= length
    return steps


def _row_lengths(corpus: Corpus, rows: Sequence[Row]) -> list[int]:
    """Tokens of each row."""
    if not rows:
        return []
    starts_R = np.cumsum([0, *(len(row) for row in rows[:-1])])
    documents_E = np.fromiter((document for row in rows for document in row), dtype=np.int64)
    return list(np.add.reduceat(corpus.lengths[documents_E], starts_R).tolist())


def shares_of_step(corpus: Corpus, rows: Sequence[Row], world_size: int) -> Shares:
    """Which rows of a step each rank takes, by the attention cost of their documents."""
    return balance_rows(attention_costs(corpus.lengths, rows), world_size)


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
