"""Steps from sources that are read while the run goes on: for data larger than disk or memory.

    sources ── interleave by share ──> buffer of documents ── shuffle, pack, shuffle rows ──> rows ──> steps

Nothing is written. A buffer is filled with documents of all sources, in the proportion of their weights, until it
holds its number of tokens; it is shuffled, packed and handed out row by row, and the next one begins where it ended.
So the order is a function of the seed, the buffer's size and the position at which a buffer began: a few integers
for each source, which stand in the checkpoint. A resumed run passes over the rows before them, fills the same buffer
again, and goes on behind the rows that were trained. A source's place is the row at which a batch begins, and how
much of it is drawn: one row may be several documents, and several rows one.

The next buffer is filled in a thread while the steps of this one train; the tokenizer leaves Python's lock, and so
does the device. Rejected: a buffer that gives a random document and takes a new one (as `datasets` shuffles): its
content depends on everything read before, so it would have to be saved, or read again from the first row.

Shape suffixes: N documents (or groups of documents that belong together) of the buffer, R rows.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tunesmith.contracts.errors import DataError
from tunesmith.data.batches import BatchPlan, Corpus, Row, pack_shuffled
from tunesmith.data.cache import content_key
from tunesmith.data.feed import Position, Step
from tunesmith.data.tokenize import Sink

_BUFFER = 3  # what a random stream is for, beside those of `batches`

Item = TypeVar("Item")


class Document(NamedTuple):
    """A document in memory.

    `row` is the index of its data row in the source; `joined` says that it belongs with the document before it.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    row: int
    where: str
    joined: bool


class Streamed(Protocol):
    """A source as `tokenize.SourceStream` provides it."""

    def feed(self, sink: Sink, at: int = 0) -> Iterator[int]: ...
    def fingerprint(self) -> str: ...


class DocumentList:
    """`batches.Documents` in memory; also a `tokenize.Sink`."""

    def __init__(self, documents: Sequence[Document] = ()) -> None:
        self.documents = list(documents)

    def add(
        self,
        ids: NDArray[np.int32],
        trained: NDArray[np.bool_],
        row: int,
        where: str,
        *,
        joined: bool = False,
    ) -> None:
        """Append a document; its arrays are copied, because a slice would keep the whole row in memory."""
        self.documents.append(Document(ids.copy(), trained.copy(), row, where, joined))

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 `[N]`, tokens of each document."""
        return np.array([len(document.ids) for document in self.documents], dtype=np.int64)

    def ids(self, index: int) -> NDArray[np.int32]:
        """int32 `[T]`, the tokens of a document."""
        return self.documents[index].ids

    def trained(self, index: int) -> NDArray[np.bool_]:
        """bool `[T]`, whether each token of a document is a target."""
        return self.documents[index].trained

    def where(self, index: int) -> str:
        """The place of the row behind a document."""
        return self.documents[index].where


@dataclass
class _Place:
    """Where a buffer begins; plain values, for the checkpoint.

    Attributes:
        epoch: passes that are over, as `mix.stop` counts them; a new one goes on in sources that have not ended.
        buffer: buffers of this epoch that are over.
        rows: for each source the row at which the batch begins that is drawn from.
        taken: groups of documents of that batch that are drawn: one row may be several.
        drawn: documents of each source in this epoch, which decide whose turn it is.
        ended: whether each source has been used up in this epoch.
    """

    epoch: int
    buffer: int
    rows: list[int]
    taken: list[int]
    drawn: list[int]
    ended: list[bool]

    @classmethod
    def first(cls, sources: int) -> _Place:
        return cls(0, 0, [0] * sources, [0] * sources, [0] * sources, [False] * sources)

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def begin_epoch(self) -> None:
        self.epoch, self.buffer = self.epoch + 1, 0
        self.drawn, self.ended = [0] * len(self.drawn), [False] * len(self.ended)


@dataclass
class _Buffer:
    """A packed buffer: its groups, its rows of them in training order, where it begins and where the next does."""

    place: Mapping[str, Any]
    groups: list[list[Document]]
    rows: list[Row]
    behind: Mapping[str, Any]


@dataclass
class _Reader:
    """The groups of documents of a source from a place on, a batch of its rows tokenised at once.

    Attributes:
        row: where the batch begins that is drawn from; batches that begin alike hold the same documents.
        taken: groups of it that are drawn.
    """

    source: Streamed
    row: int
    taken: int
    _ahead: DocumentList = field(default_factory=DocumentList)
    _batches: Iterator[int] | None = None
    _behind: int = 0

    def next(self) -> list[Document] | None:
        """The next group, mostly of one document; None once where the source ends, which then starts over."""
        while not self._ahead.documents:
            if not self._read():
                return None
        self.taken += 1
        return self._pop()

    def _pop(self) -> list[Document]:
        ahead = self._ahead.documents
        group = [ahead.pop()]
        while ahead and ahead[-1].joined:
            group.append(ahead.pop())
        return group

    def _read(self) -> bool:
        """Tokenise the next batch, without what was drawn of it before; False where the source ends."""
        drawn = 0
        if self._batches is None:
            self._batches, drawn = self.source.feed(self._ahead, self.row), self.taken
            self._behind = self.row
        self.row, self.taken = self._behind, drawn
        behind = next(self._batches, None)
        if behind is None:
            self.row, self.taken, self._batches = 0, 0, None
            return False
        self._behind = behind
        self._ahead.documents.reverse()  # so that the first one is at the end, where it is cheap to take
        for _ in range(drawn):
            self._pop()
        return True


class StreamFeed:
    """Steps over streamed sources.

    Args:
        sources: the sources.
        weights: their shares of the documents.
        plan: how documents become steps; its `mix.stop` says where an epoch ends.
        buffer_tokens: tokens that are shuffled and packed at once.

    Attributes:
        vocabulary: where it is given, a document with this token or a higher one ends the run.
    """

    def __init__(
        self, sources: Sequence[Streamed], weights: Sequence[float], plan: BatchPlan, buffer_tokens: int
    ) -> None:
        self._sources, self._weights, self._plan = list(sources), list(weights), plan
        self._buffer_tokens = buffer_tokens
        self.vocabulary: int | None = None

    def fingerprint(self) -> str:
        """Changes with anything that decides the order, and with the stamps of the sources."""
        sources = [source.fingerprint() for source in self._sources]
        return content_key({"sources": sources, "weights": self._weights, "buffer": self._buffer_tokens})

    def steps(self, position: Position) -> Iterator[Step]:
        """The steps from a position on, epoch after epoch.

        Raises:
            DataError: a source cannot be read, or holds a row that the settings refuse.
        """
        stream = dict(position.stream or _Place.first(len(self._sources)).plain())
        done = stream.pop("done", 0)
        rows: list[list[Document]] = []
        room = self._room()
        for buffer in _ahead(lambda stop: self._buffers(_Place(**stream), stop)):
            for number in range(done, len(buffer.rows)):
                row = [document for index in buffer.rows[number] for document in buffer.groups[index]]
                rows.append(row)
                room -= 1 if self._plan.rows_per_step is not None else _length(row)
                if room <= 0:
                    yield _step(rows, buffer, number + 1)
                    rows, room = [], self._room()
            done = 0

    def _room(self) -> int:
        size = self._plan.rows_per_step or self._plan.tokens_per_step
        assert size is not None
        return size

    def _buffers(self, place: _Place, stop: threading.Event) -> Iterator[_Buffer]:
        """Buffer after buffer, from the place where one begins."""
        readers = list(map(_Reader, self._sources, place.rows, place.taken))
        while not stop.is_set():
            begins = place.plain()
            groups = self._fill(readers, place, stop)
            yield _Buffer(begins, groups, self._pack(groups, begins), place.plain())

    def _fill(self, readers: Sequence[_Reader], place: _Place, stop: threading.Event) -> list[list[Document]]:
        """Draw documents until the buffer is full or the epoch over; moves `place` behind them."""
        groups: list[list[Document]] = []
        tokens = 0
        while tokens < self._buffer_tokens and not stop.is_set():
            # the stride of `mixing`: the k-th document of a source stands at (k + 1/2) / weight
            turn = min(range(len(readers)), key=lambda n: ((place.drawn[n] + 0.5) / self._weights[n], n))
            group = readers[turn].next()
            place.rows[turn], place.taken[turn] = readers[turn].row, readers[turn].taken
            if group is None:
                place.ended[turn] = True
                if self._plan.mix.stop == "first_exhausted" or all(place.ended):
                    place.begin_epoch()
                    return groups
                continue
            tokens += self._check(group)
            place.drawn[turn] += 1
            groups.append(group)
        place.buffer += 1
        return groups

    def _check(self, group: Sequence[Document]) -> int:
        """The tokens of a group that can train.

        Raises:
            DataError: its documents do not fit into a pack together, or the model lacks a token of theirs.
        """
        tokens = _length(group)
        if self._plan.packing and tokens > self._plan.sequence_length:
            raise DataError(
                f"The documents of {group[0].where} have {tokens} tokens together, which is longer than a pack.",
                hint="Raise train.sequence_length until both fit, or set train.packing: false.",
            )
        if self.vocabulary is not None:
            for document in group:
                _check_vocabulary(document, self.vocabulary)
        return tokens

    def _pack(self, groups: Sequence[Sequence[Document]], begins: Mapping[str, Any]) -> list[Row]:
        """Rows of groups in training order, drawn by the seed and the number of the buffer."""
        seed = np.random.SeedSequence([self._plan.seed, begins["epoch"], _BUFFER, begins["buffer"]])
        rng = np.random.Generator(np.random.PCG64(seed))
        order_N = rng.permutation(len(groups))
        if not self._plan.packing:
            return [(index,) for index in order_N.tolist()]
        lengths_N = np.array([_length(group) for group in groups], dtype=np.int64)
        return pack_shuffled(order_N, lengths_N[order_N], self._plan.sequence_length, rng)


def _length(group: Sequence[Document]) -> int:
    return sum(len(document.ids) for document in group)


def _check_vocabulary(document: Document, vocabulary: int) -> None:
    largest = int(document.ids.max())
    if largest >= vocabulary:
        raise DataError(
            f"{document.where} holds token {largest}, and the model has embeddings for {vocabulary} tokens only.",
            hint="Use the tokenizer that belongs to the model, or resize its embeddings and save it first.",
        )


def _step(rows: Sequence[Sequence[Document]], buffer: _Buffer, done: int) -> Step:
    """A step of rows, the last of which is the one before row `done` of `buffer`."""
    at_end = done == len(buffer.rows)
    place = {**buffer.behind, "done": 0} if at_end else {**buffer.place, "done": done}
    documents = [document for row in rows for document in row]
    ends = np.cumsum([len(row) for row in rows]).tolist()
    numbers = [tuple(range(end - len(row), end)) for row, end in zip(rows, ends, strict=True)]
    return Step(
        Corpus([DocumentList(documents)]), numbers, Position(place["epoch"], 0, place), float(place["epoch"])
    )


def _ahead(start: Callable[[threading.Event], Iterator[Item]]) -> Iterator[Item]:
    """The items of an iterator without end, each made in a thread while the one before it is used.

    Args:
        start: begins the iterator, which ends early where the event is set.
    """
    made: queue.Queue[tuple[Item, None] | tuple[None, BaseException]] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def hand_over(item: tuple[Item, None] | tuple[None, BaseException]) -> None:
        while not stop.is_set():
            try:
                made.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def make() -> None:
        try:
            for item in start(stop):
                hand_over((item, None))
        except BaseException as error:  # raised again where the items are used
            hand_over((None, error))

    thread = threading.Thread(target=make, name="tunesmith-stream", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        stop.set()
        thread.join()
