"""Rows prepared by several processes at once, handed on in the order of their source.

Rendering is Python, so one process keeps one core busy. Worker number n of N reads the source itself and prepares
every Nth batch, from the nth on. So nothing has to be sent to it. What it sends back (tokens, mask, and a line of
JSON for each document) comes through a pipe; when the pipe is full it waits, so memory does not grow. The batches
are those of one process and are taken in their order, so a table is the same bytes for any number of workers.

Workers are forks. A process that starts anew would first import transformers and load the tokenizer, which takes as
long as tens of thousands of rows; a fork has all that. It runs nothing but this preparation, it neither prints nor
uses torch, and the tokenizer in it starts no threads. It leaves by `os._exit`, so nothing that it inherited is
flushed or cleaned up twice. When the process that reads from it dies, its pipe breaks and it ends; on Ctrl-C its
parent ends it. Where an error ends a batch, the parent prepares that batch itself and meets the error with its trace.

Rejected: `multiprocessing`, which pickles rows in both directions, and whose pools hang when a worker is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice
from typing import IO, Any, NoReturn

import numpy as np

from tunesmith.contracts.errors import UserError
from tunesmith.data.pipeline import Pipeline, Prepared
from tunesmith.data.reading import RowProblem
from tunesmith.data.rendered import Encoded, Rendered
from tunesmith.data.sources import Row, Source

_MOST_WORKERS = 8
"""More are not worth their reading: each reads every row, a tenth of the work of preparing it."""
_FEW = 2
"""Batches for which no worker is started and no word is learnt, on two cores: 999 rows of Alpaca's take 203
milliseconds so, 253 with two workers, and 321 by words in one process."""
_HEAD = struct.Struct("<qq")
"""Bytes of JSON and number of tokens of a batch; `_END` behind the last one, `_FAILED` in place of one."""
_END, _FAILED = -1, -2
_PIPE_BYTES = 1 << 20
_SIGNALS = {signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL}
"""What a worker does at a signal: Ctrl-C reaches it, too, but its parent ends it."""
_PARALLELISM = "TOKENIZERS_PARALLELISM"
_NO_OFFSETS = np.zeros((0, 2), dtype=np.int32)


@dataclass(frozen=True)
class Done:
    """A batch that a worker has prepared; read as `pipeline.Prepared` is.

    Attributes:
        count: all rows of the batch.
        dropped: those that cannot be rendered, and why; the rows are without their records.
        made: the documents of the others, of whose text only the notes and the kind are kept.
    """

    count: int
    dropped: list[tuple[Row, RowProblem]]
    made: list[tuple[Row, Rendered, Encoded]]

    def documents(self) -> Iterator[tuple[Row, Rendered, Encoded]]:
        """As `Prepared.documents`."""
        return iter(self.made)


def prepare_rows(
    source: Source, rows: Iterator[Row], pipeline: Pipeline, size: int, workers: int | None = None
) -> Generator[Prepared | Done, None, None]:
    """The rows of a source in batches, prepared in order.

    Args:
        source: where the rows come from.
        rows: all of them; what is read of it here is not read again.
        pipeline: prepares a batch.
        size: rows of a batch.
        workers: processes that prepare; 0 and 1 are none but this one, None is one for each core. Sources of few
            batches and those that cannot be read again at little cost are prepared in this process.

    Raises:
        UserError: where a worker has been killed.
    """
    batches = in_batches(rows, size)
    number = default_workers() if workers is None else workers
    head = list(islice(batches, _FEW + 1))
    if len(head) <= _FEW or number < 2 or not source.is_local:
        yield from pipeline.ahead(chain(head, batches), by_words=len(head) > _FEW)
        return
    done = 0
    with contextlib.closing(_from_workers(source, pipeline, size, number)) as prepared:
        for one in prepared:
            if one is None:
                break
            done += 1
            yield one
        else:
            return
    yield from pipeline.ahead(islice(in_batches(source.rows(), size), done, None))


def in_batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Rows, so many at once."""
    return iter(lambda: list(islice(rows, size)), [])


def default_workers() -> int:
    """One for each core that this process may use; none where forks are not safe (macOS)."""
    return min(_MOST_WORKERS, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 0


def _from_workers(
    source: Source, pipeline: Pipeline, size: int, number: int
) -> Generator[Done | None, None, None]:
    """Batches from workers, in order; None in place of one that failed, and no more."""
    workers: list[_Worker] = []
    try:
        try:
            with _single_threaded_tokenizer():
                for place in range(number):
                    workers.append(_Worker(partial(_share, source, size, place, number), pipeline, workers))
        except OSError:  # no process or no file may be had any more: it goes without
            yield None
            return
        for turn in count():
            batch = workers[turn % number].batch(source.label)
            if batch == _END:
                return
            yield batch if isinstance(batch, Done) else None
    finally:
        for worker in workers:
            worker.end()


def _share(source: Source, size: int, place: int, number: int) -> Iterator[list[Row]]:
    """The batches of one worker of `number`."""
    return islice(in_batches(source.rows(), size), place, None, number)


@contextlib.contextmanager
def _single_threaded_tokenizer() -> Iterator[None]:
    """In forks the tokenizer's threads are missing, and it has to know so before; see its own warning."""
    before = os.environ.get(_PARALLELISM)
    os.environ[_PARALLELISM] = "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            yield
    finally:
        if before is None:
            del os.environ[_PARALLELISM]
        else:
            os.environ[_PARALLELISM] = before


class _Worker:
    """A fork that prepares batches.

    Args:
        batches: begins to read them.
        pipeline: prepares one.
        others: workers that were started before.
    """

    def __init__(
        self, batches: Callable[[], Iterator[list[Row]]], pipeline: Pipeline, others: Sequence[_Worker] = ()
    ) -> None:
        reads, writes = os.pipe()
        self._stream: IO[bytes] = os.fdopen(reads, "rb")
        # until it has handlers of its own, a signal would have the fork clean up for its parent
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process = os.fork()
            if self._process == 0:
                for worker in (*others, self):  # else a pipe would not break when its reader dies
                    worker._stream.close()
                _work(batches, pipeline, writes, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(writes)
        with contextlib.suppress(OSError, AttributeError):  # a larger pipe is faster, not needed
            fcntl.fcntl(reads, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def batch(self, label: str) -> Done | int:
        """The next batch, `_END` or `_FAILED`."""
        head = self._read(_HEAD.size, label)
        length, tokens = _HEAD.unpack(head)
        if length < 0:
            return int(length)
        content = json.loads(self._read(length, label))
        ids = np.frombuffer(self._read(4 * tokens, label), dtype=np.int32)
        trained = np.frombuffer(self._read(tokens, label), dtype=np.bool_)
        return _unpack(content, ids, trained)

    def _read(self, length: int, label: str) -> bytes:
        found = self._stream.read(length)
        if len(found) < length:
            raise UserError(
                f"A process that prepares rows of {label} was ended from outside, perhaps for want of memory.",
                hint="Start again; data.workers: 0 prepares the rows in one process, which takes less memory.",
                exit_code=1,
            )
        return found

    def end(self) -> None:
        """Stop it, whatever it does, and leave no trace of it."""
        self._stream.close()
        os.kill(self._process, signal.SIGKILL)  # it is ours until it was waited for, also when it has ended
        os.waitpid(self._process, 0)


def _work(
    batches: Callable[[], Iterator[list[Row]]], pipeline: Pipeline, writes: int, mask: Iterable[int]
) -> NoReturn:
    """All that a worker does; it does not return."""
    try:
        for number, handler in _SIGNALS.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        with os.fdopen(writes, "wb") as stream:
            try:
                for batch in batches():
                    stream.writelines(_packed(pipeline.prepare(batch)))
                    stream.flush()
            except BrokenPipeError:
                raise
            except BaseException:  # whatever it is, the parent meets it again
                stream.write(_HEAD.pack(_FAILED, 0))
            else:
                stream.write(_HEAD.pack(_END, 0))
    finally:
        os._exit(0)


def _packed(prepared: Prepared) -> Sequence[bytes]:
    """A batch as bytes."""
    documents, ids, trained = [], [], []
    for row, text, tokens in prepared.documents():
        problem = tokens.problem and [tokens.problem.reason, tokens.problem.detail]
        documents.append(
            [row.index, row.where, text.plain, text.notes, tokens.notes, problem, len(tokens.ids)]
        )
        ids.append(tokens.ids.tobytes())
        trained.append(tokens.trained.tobytes())
    dropped = [[row.index, row.where, problem.reason, problem.detail] for row, problem in prepared.dropped]
    content = json.dumps([prepared.count, dropped, documents]).encode()
    ids_bytes = b"".join(ids)
    return _HEAD.pack(len(content), len(ids_bytes) // 4), content, ids_bytes, b"".join(trained)


def _unpack(content: Any, ids: Any, trained: Any) -> Done:
    number, dropped, documents = content
    made: list[tuple[Row, Rendered, Encoded]] = []
    start = 0
    for index, where, plain, notes, token_notes, problem, length in documents:
        end = start + length
        row = made[-1][0] if made and made[-1][0].index == index else Row(index, where, None, None)
        text = Rendered("", [], notes=tuple(notes), plain=plain)
        reason = RowProblem(*problem) if problem is not None else None
        tokens = Encoded(ids[start:end], trained[start:end], _NO_OFFSETS, tuple(token_notes), reason)
        made.append((row, text, tokens))
        start = end
    refused = [
        (Row(index, where, None, None), RowProblem(reason, detail))
        for index, where, reason, detail in dropped
    ]
    return Done(number, refused, made)
