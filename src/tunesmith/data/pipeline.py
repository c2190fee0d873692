"""Rows on their way to documents: converted and rendered here, tokenised in threads meanwhile, in order.

The tokenizer is Rust and works without Python's lock, so rendering a batch and tokenising the one before it take
the time of the longer one. What a row becomes does not depend on it: documents come in the order of their rows.

Where the tokens of words are remembered (`words.py`) there is little left for threads, and a batch is tokenised
where it is accounted for. On several cores `workers.py` runs this in several processes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field

from tunesmith.data.encoder import Batch, Encoder
from tunesmith.data.formats import Format, RowProblem, Supervised, convert
from tunesmith.data.render import Encoded, Rendered, Renderer
from tunesmith.data.seams import Tokenised
from tunesmith.data.sources import Row

UNREADABLE = "unreadable"
"""Under what rows are counted that have no record."""

_CHUNK, _THREADS = 128, 2
"""Rows that the tokenizer is given at once, and how many threads wait for it.

One thread waits up to 5 ms for Python's lock when its rows are done; the tokenizer then works for the other.
"""


@contextmanager
def short_collections() -> Iterator[None]:
    """Garbage collection passes over what is there now: with torch loaded, each full one takes 0.13 s.

    That is the time of a thousand rows. Whoever has frozen objects already keeps them so.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class _Chunk:
    """Rendered rows; their tokens come from `future`, or are still to be made where there is none."""

    rows: list[Row]
    work: Batch
    future: Future[dict[int, Tokenised]] | None


@dataclass
class Prepared:
    """A batch of rows between rendering and accounting.

    Attributes:
        encoder: tokenises them.
        count: all rows of the batch.
        dropped: those that cannot be rendered, and why.
        chunks: the others.
        behind: the batch whose tokens may be on their way behind this one.
    """

    encoder: Encoder
    count: int
    dropped: list[tuple[Row, RowProblem]] = field(default_factory=list)
    chunks: list[_Chunk] = field(default_factory=list)
    behind: Prepared | None = None

    def documents(self) -> Iterator[tuple[Row, Rendered, Encoded]]:
        """The documents of rows that were rendered, in order, with their tokens; those of a row lie together."""
        if any(chunk.work.is_alone for chunk in self.chunks):
            chunks = self.chunks + (self.behind.chunks if self.behind is not None else [])
            wait([chunk.future for chunk in chunks if chunk.future is not None])
        for chunk in self.chunks:
            tokens = chunk.work.encode() if chunk.future is None else chunk.future.result()
            encoded = self.encoder.finish(chunk.work, tokens, with_offsets=False)
            yield from zip(chunk.rows, chunk.work.rows, encoded, strict=True)


class Pipeline:
    """Prepares the rows of one source.

    Args:
        renderer: makes text, tokens and mask of a row.
        found: the format of the rows.
        columns: renames, as in `tokenize.tokenize_source`.
    """

    def __init__(self, renderer: Renderer, found: Format, columns: Mapping[str, str]) -> None:
        self._renderer = renderer
        self._found = found
        self._columns = columns

    def ahead(self, batches: Iterable[list[Row]], *, by_words: bool = True) -> Iterator[Prepared]:
        """Every batch, prepared, after the next one was rendered; threads end with the iterator.

        Args:
            batches: the rows.
            by_words: remember the tokens of words, which takes less processor time; for few rows, most of whose words
                are new, whole texts in threads take less time.
        """
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenize")
        before: Prepared | None = None
        try:
            for batch in batches:
                prepared = self.prepare(batch, threads, by_words=by_words)
                if before is not None:
                    before.behind = prepared
                    yield before
                    before.behind = None
                before = prepared
            if before is not None:
                yield before
        finally:
            threads.shutdown(cancel_futures=True)

    def prepare(
        self, batch: list[Row], threads: Executor | None = None, *, by_words: bool = True
    ) -> Prepared:
        """A batch, rendered; with threads, its tokens are on their way when this returns."""
        encoder = self._renderer.encoder
        prepared = Prepared(encoder, len(batch))
        step = len(batch) if threads is None else _CHUNK
        for start in range(0, len(batch), step):
            rows: list[Row] = []
            texts: list[Rendered] = []
            for row in batch[start : start + step]:
                documents = self._render(row)
                if isinstance(documents, RowProblem):
                    prepared.dropped.append((row, documents))
                else:
                    rows += [row] * len(documents)
                    texts += documents
            work = encoder.start(texts, with_offsets=False, by_words=by_words)
            future = threads.submit(work.encode) if threads is not None and work.in_thread else None
            prepared.chunks.append(_Chunk(rows, work, future))
        return prepared

    def _render(self, row: Row) -> list[Rendered] | RowProblem:
        if row.record is None:
            return RowProblem(UNREADABLE, row.problem or "")
        try:
            item = convert(self._found, row.record, self._columns)
            assert isinstance(item, Supervised), "`resolve_format` refuses formats of another kind"
            return self._renderer.documents(item)
        except RowProblem as problem:
            return problem.with_traceback(None)  # it would keep the frames of the rendering alive
