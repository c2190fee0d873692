"""From a source to its token table: read, convert, render, tokenise, and account for every row.

Nothing is lost in silence: a row trains, or it is counted under a reason, and the first of each reason are
named with their place. What the settings refuse ends the run, after the whole source was read, so that one
message can say how many rows are concerned. Rows go through in batches, because the tokenizer works on many
texts at once; memory stays the same for every size of source. A
table's batches overlap, see `pipeline.py`.

Rejected: `datasets.map`. It caches by pickling code, so a changed comment retokenises and a changed template
may not, and a function applied to rows cannot drop one of them and say why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tunesmith.contracts.errors import DataError
from tunesmith.contracts.plural import counted
from tunesmith.data.cache import cache_folder, content_key, obtain
from tunesmith.data.cutting import TOO_LONG, TRUNCATED, Fit, Joiner, Overlong, Piece
from tunesmith.data.formats import AS_USUAL, Format, Reading, RowProblem, resolve_format
from tunesmith.data.pipeline import Pipeline, Prepared, short_collections
from tunesmith.data.proof import REASON
from tunesmith.data.render import NOTE_SOME, Encoded, Rendered, Renderer
from tunesmith.data.sources import Row, Source
from tunesmith.data.table import DataReport, TableWriter, TokenTable
from tunesmith.data.workers import Done, prepare_rows

VERSION = 2
"""Raise it when reading or accounting changes: it invalidates every cached table."""

_BATCH = 512
_SAMPLE = 64
_EXAMPLES, _EXAMPLES_PER_REASON = 20, 5

Malformed = Literal["drop", "error"]


def default_cache_dir() -> Path:
    """Where tables are kept unless the settings say otherwise."""
    return cache_folder("tokens")


def tokenize_source(
    source: Source,
    *,
    format: str = "auto",  # noqa: A002 the name of the setting
    columns: Mapping[str, str] | None = None,
    reading: Reading = AS_USUAL,
    renderer: Renderer,
    sequence_length: int,
    overlong: Overlong = "truncate",
    overlap: int = 1,
    join_texts: bool = False,
    malformed: Malformed = "drop",
    cache_dir: Path | None = None,
    progress: Callable[[int], None] | None = None,
    workers: int | None = None,
) -> TokenTable:
    """The tokens of all rows of a source that train, from the cache where they are there.

    Args:
        source: where the rows come from.
        format: a key of `FORMATS`, or `auto`.
        columns: renames, the format's own name of a column to its name in the data.
        reading: how rows are read beyond their columns.
        renderer: makes text, tokens and mask of a row.
        sequence_length: most tokens a row may have.
        overlong, overlap, join_texts: what becomes of longer rows and of short texts, see `cutting.Fit`.
        malformed: what becomes of rows that cannot be read or would train nothing.
        cache_dir: where the table is kept; `default_cache_dir()` where it is not given.
        progress: called with the number of rows done, after every batch.
        workers: processes that prepare rows, see `workers.prepare_rows`; the table does not depend on it.

    Raises:
        DataError: where the source or its format cannot be understood, rows are refused by `overlong` or
            `malformed`, or no row remains.
        StorageError: where the disk is full.
    """
    columns = dict(columns or {})
    fit = Fit(sequence_length, overlong, overlap, join_texts)
    key = table_key(
        source,
        format=format,
        columns=columns,
        reading=reading,
        renderer=renderer,
        sequence_length=sequence_length,
        overlong=overlong,
        overlap=overlap,
        join_texts=join_texts,
        malformed=malformed,
    )

    def build(folder: Path) -> None:
        run = _Run(renderer, fit)
        with TableWriter(folder) as writer, short_collections():
            run.tokenize(source, format, columns, reading, writer, progress, workers)
            _refuse(run.report, source.label, overlong, malformed)
            _refuse_empty(run.report, source.label)
            writer.finish(run.report)

    return obtain(cache_dir or default_cache_dir(), key, build, TokenTable)


def table_key(
    source: Source,
    *,
    format: str,  # noqa: A002 the name of the setting
    columns: Mapping[str, str],
    reading: Reading = AS_USUAL,
    renderer: Renderer,
    sequence_length: int,
    overlong: Overlong,
    overlap: int = 1,
    join_texts: bool = False,
    malformed: Malformed,
) -> str:
    """The name of a table in the cache: a hash of everything that decides its content."""
    return content_key(
        {
            "version": VERSION,
            "source": source.fingerprint(),
            "label": source.label,
            "selection": source.selection,
            "format": format,
            "columns": dict(columns),
            "reading": asdict(reading),
            "renderer": renderer.fingerprint(),
            "fit": asdict(Fit(sequence_length, overlong, overlap, join_texts)),
            "malformed": malformed,
        }
    )


class Sink(Protocol):
    """Takes documents: `table.TableWriter` writes them, a stream keeps them until they are drawn."""

    def add(
        self,
        ids: NDArray[np.int32],
        trained: NDArray[np.bool_],
        row: int,
        where: str,
        *,
        joined: bool = False,
    ) -> None:
        """Take a document; see `TableWriter.add`."""
        ...


class SourceStream:
    """The documents of a source one after the other, tokenised as they are asked for and kept nowhere.

    Args:
        source, format, columns, reading, renderer, sequence_length, overlong, overlap, join_texts, malformed: as in
            `tokenize_source`; texts are joined within each batch of rows.
    """

    def __init__(
        self,
        source: Source,
        *,
        format: str = "auto",  # noqa: A002 the name of the setting
        columns: Mapping[str, str] | None = None,
        reading: Reading = AS_USUAL,
        renderer: Renderer,
        sequence_length: int,
        overlong: Overlong = "truncate",
        overlap: int = 1,
        join_texts: bool = False,
        malformed: Malformed = "drop",
    ) -> None:
        self.source, self._format, self._columns = source, format, dict(columns or {})
        self._reading, self._renderer = reading, renderer
        self._fit, self._malformed = Fit(sequence_length, overlong, overlap, join_texts), malformed
        self._run = _Run(renderer, self._fit)
        self.report = self._run.report
        """What became of the rows read so far, in every pass and also ahead of what was drawn."""

    def fingerprint(self) -> str:
        """Changes with the settings and with the source's stamp, for which the source is not read."""
        parts = {
            "version": VERSION,
            "stamp": self.source.stamp(),
            "label": self.source.label,
            "selection": self.source.selection,
            "format": self._format,
            "columns": self._columns,
            "reading": asdict(self._reading),
            "renderer": self._renderer.fingerprint(),
            "fit": asdict(self._fit),
            "malformed": self._malformed,
        }
        return content_key(parts)

    def feed(self, sink: Sink, at: int = 0) -> Iterator[int]:
        """Hand the documents from row `at` on to `sink`; stops after every batch, with the row behind it.

        Raises:
            DataError: as `tokenize_source`; what the settings refuse ends the run where it is met.
        """
        rows, found = find_format(self.source, self._format, self._columns, self._reading)
        self.report.format = found.name
        if at:
            rows = self.source.rows(at)
        while batch := list(islice(rows, _BATCH)):
            self._run.batch(batch, found, self._columns, sink)
            _refuse(self.report, self.source.label, self._fit.overlong, self._malformed)
            yield batch[-1].index + 1
        if not at:
            _refuse_empty(self.report, self.source.label)


@dataclass
class _Run:
    """One pass over a source."""

    renderer: Renderer
    fit: Fit
    report: DataReport = field(default_factory=DataReport)
    named: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    joiner: Joiner | None = None

    def __post_init__(self) -> None:
        if self.fit.join_texts:
            self.joiner = Joiner(self.fit.sequence_length, self.fit.overlap)

    def tokenize(
        self,
        source: Source,
        format_name: str,
        columns: Mapping[str, str],
        reading: Reading,
        writer: TableWriter,
        progress: Callable[[int], None] | None,
        workers: int | None,
    ) -> None:
        rows, found = find_format(source, format_name, columns, reading)
        self.report.format = found.name
        pipeline = Pipeline(self.renderer, found, columns)
        for prepared in prepare_rows(source, rows, pipeline, _BATCH, workers):
            self._account(prepared, writer)
            if progress is not None:
                progress(self.report.rows_in)
        self._flush(writer)

    def batch(self, batch: list[Row], found: Format, columns: Mapping[str, str], sink: Sink) -> None:
        """Hand the documents of some rows to `sink` and account for all of them."""
        self._account(Pipeline(self.renderer, found, columns).prepare(batch), sink)
        self._flush(sink)

    def _account(self, prepared: Prepared | Done, sink: Sink) -> None:
        for row, problem in prepared.dropped:
            self._drop(row, problem.reason, problem.detail)
        for _, documents in groupby(prepared.documents(), key=lambda document: document[0].index):
            self._keep(list(documents), sink)
        self.report.rows_in += prepared.count
        self.report.notes = [f"{note} ({counted(count, 'row')})" for note, count in self.notes.items()]

    def _keep(self, made: list[tuple[Row, Rendered, Encoded]], sink: Sink) -> None:
        """Account for a row: one document, or one for each turn, which may be cut into several."""
        row = made[0][0]
        problem: RowProblem | None = None
        truncated, kept = 0, 0
        notes: tuple[str, ...] = ()
        for _, text, tokens in made:
            if self.joiner is not None and text.plain and tokens.problem is None:
                self._add_all(self.joiner.add(tokens.ids, row.index, row.where), sink)
            else:
                pieces = self.fit.documents(tokens, plain=text.plain)
                if isinstance(pieces, RowProblem):
                    problem = problem or pieces
                    continue
                self._add_all([(piece, row.index, row.where) for piece in pieces], sink)
                if len(tokens.ids) > self.fit.sequence_length and self.fit.truncates(
                    tokens, plain=text.plain
                ):
                    truncated = truncated or len(tokens.ids)
            kept += 1
            notes += text.notes + tokens.notes
        if not kept:
            assert problem is not None, "a row without documents has a reason"
            self._drop(row, problem.reason, problem.detail)
            return
        self.report.rows_kept += 1
        if truncated:
            self.report.truncated += 1
            self._name(row, TRUNCATED, f"{truncated} tokens cut to {self.fit.sequence_length}")
        if problem is not None:
            notes += (NOTE_SOME,)
        if notes:
            self.notes.update(dict.fromkeys(notes, 1))

    def _add_all(self, documents: Iterable[tuple[Piece, int, str]], sink: Sink) -> None:
        for (ids, trained), row, where in documents:
            sink.add(ids, trained, row, where)
            self.report.tokens += len(ids)
            self.report.trained_tokens += int(np.count_nonzero(trained))

    def _flush(self, sink: Sink) -> None:
        """Hand on what waits for more text."""
        if self.joiner is not None:
            self._add_all(self.joiner.finish(), sink)

    def _drop(self, row: Row, reason: str, detail: str) -> None:
        self.report.dropped[reason] = self.report.dropped.get(reason, 0) + 1
        self._name(row, reason, detail)

    def _name(self, row: Row, reason: str, detail: str) -> None:
        if self.named[reason] >= _EXAMPLES_PER_REASON or len(self.report.examples) >= _EXAMPLES:
            return
        line = f"{row.where}: {reason}" + (f" ({detail})" if detail else "")
        if line not in self.report.examples:  # a stream meets a row in each pass
            self.named[reason] += 1
            self.report.examples.append(line)


def sample_columns(source: Source) -> tuple[Iterator[Row], dict[str, Any]]:
    """All rows of the source, and the columns of the first ones together, each with its first value.

    Raises:
        DataError: none of them can be read.
    """
    rows = source.rows()
    head: list[Row] = []
    sample: dict[str, Any] = {}
    for row in rows:
        head.append(row)
        sample = {**(row.record or {}), **sample}
        if len(head) >= _SAMPLE and sample:
            break
    if not sample:
        raise DataError(
            f"No row of {source.label} can be read; {head[0].where}: {head[0].problem or 'no columns'}.",
            hint="Check that the file is of the kind that its suffix says.",
        )
    return chain(head, rows), sample


def find_format(
    source: Source, name: str, columns: Mapping[str, str], reading: Reading = AS_USUAL
) -> tuple[Iterator[Row], Format]:
    """All rows of the source, and their format by the columns of the first ones together."""
    rows, sample = sample_columns(source)
    return rows, resolve_format(name, columns, sample, reading=reading)


def _refuse(report: DataReport, label: str, overlong: Overlong, malformed: Malformed) -> None:
    """Raise where the settings do not accept what was dropped."""
    too_long = report.dropped.get(TOO_LONG, 0)
    if overlong == "error" and too_long:
        raise _refusal(report, label, [TOO_LONG], "Raise train.sequence_length, or set data.overlong.")
    broken = [reason for reason in report.dropped if reason != TOO_LONG]
    if malformed == "error" and broken:
        raise _refusal(report, label, broken, "Mend these rows, or set data.malformed to drop.")


def _refuse_empty(report: DataReport, label: str) -> None:
    """Raise where nothing is left."""
    if report.rows_kept == 0:
        hint = "`tunesmith inspect` shows what becomes of a row; set format and columns if rows are read wrongly."
        if REASON in report.dropped:
            hint = (
                "Set data.template to the model's own or a named one, or data.prefix_mismatch to split (a document "
                "for each turn), context or allow; train_on: last trains the last turn only."
            )
        raise _refusal(report, label, list(report.dropped), hint, none_left=True)


def _refusal(
    report: DataReport, label: str, reasons: list[str], hint: str, *, none_left: bool = False
) -> DataError:
    counts = ", ".join(f"{reason} {report.dropped[reason]}" for reason in reasons)
    total = sum(report.dropped[reason] for reason in reasons)
    what = "No row" if none_left else f"{total:,} of the {counted(report.rows_in, 'row')}"
    verdict = f"of {label} can train" if none_left else f"of {label} are refused"
    named = [line for line in report.examples if any(f": {reason}" in line for reason in reasons)]
    lines = "".join(f"\n  {line}" for line in named[:_EXAMPLES_PER_REASON])
    return DataError(f"{what} {verdict}: {counts}.{lines}", hint=hint)
