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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tunesmith.contracts.errors import DataError
from tunesmith.data.cache import cache_folder, content_key, obtain
from tunesmith.data.formats import AS_USUAL, Format, Reading, resolve_format
from tunesmith.data.pipeline import Pipeline, Prepared, short_collections
from tunesmith.data.proof import REASON
from tunesmith.data.render import Encoded, Rendered, Renderer
from tunesmith.data.sources import Row, Source
from tunesmith.data.table import DataReport, TableWriter, TokenTable

VERSION = 1
"""Raise it when reading or accounting changes: it invalidates every cached table."""

_BATCH = 512
_SAMPLE = 64
_EXAMPLES, _EXAMPLES_PER_REASON = 20, 5
_UNTRAINABLE, _TOO_LONG, _CUT = "nothing to train on", "too long", "truncated"

Overlong = Literal["drop", "truncate", "error"]
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
    malformed: Malformed = "drop",
    cache_dir: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenTable:
    """The tokens of all rows of a source that train, from the cache where they are there.

    Args:
        source: where the rows come from.
        format: a key of `FORMATS`, or `auto`.
        columns: renames, the format's own name of a column to its name in the data.
        reading: how rows are read beyond their columns.
        renderer: makes text, tokens and mask of a row.
        sequence_length: most tokens a row may have.
        overlong: what becomes of longer rows.
        malformed: what becomes of rows that cannot be read or would train nothing.
        cache_dir: where the table is kept; `default_cache_dir()` where it is not given.
        progress: called with the number of rows done, after every batch.

    Raises:
        DataError: where the source or its format cannot be understood, rows are refused by `overlong` or
            `malformed`, or no row remains.
        StorageError: where the disk is full.
    """
    columns = dict(columns or {})
    key = table_key(
        source,
        format=format,
        columns=columns,
        reading=reading,
        renderer=renderer,
        sequence_length=sequence_length,
        overlong=overlong,
        malformed=malformed,
    )

    def build(folder: Path) -> None:
        run = _Run(renderer, sequence_length, cut=overlong == "truncate")
        with TableWriter(folder) as writer, short_collections():
            run.tokenize(source, format, columns, reading, writer, progress)
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
            "sequence_length": sequence_length,
            "overlong": overlong,
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
        source, format, columns, reading, renderer, sequence_length, overlong, malformed: as in `tokenize_source`.
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
        malformed: Malformed = "drop",
    ) -> None:
        self.source, self._format, self._columns = source, format, dict(columns or {})
        self._reading, self._renderer, self._sequence_length = reading, renderer, sequence_length
        self._overlong, self._malformed = overlong, malformed
        self._run = _Run(renderer, sequence_length, cut=overlong == "truncate")
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
            "sequence_length": self._sequence_length,
            "overlong": self._overlong,
            "malformed": self._malformed,
        }
        return content_key(parts)

    def feed(self, sink: Sink, at: int = 0) -> Iterator[None]:
        """Hand the documents from row `at` on to `sink`; stops after every batch of rows.

        Raises:
            DataError: as `tokenize_source`; what the settings refuse ends the run where it is met.
        """
        rows, found = find_format(self.source, self._format, self._columns, self._reading)
        self.report.format = found.name
        if at:
            rows = self.source.rows(at)
        while batch := list(islice(rows, _BATCH)):
            self._run.batch(batch, found, self._columns, sink)
            _refuse(self.report, self.source.label, self._overlong, self._malformed)
            yield
        if not at:
            _refuse_empty(self.report, self.source.label)


@dataclass
class _Run:
    """One pass over a source."""

    renderer: Renderer
    sequence_length: int
    cut: bool
    report: DataReport = field(default_factory=DataReport)
    named: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def tokenize(
        self,
        source: Source,
        format_name: str,
        columns: Mapping[str, str],
        reading: Reading,
        writer: TableWriter,
        progress: Callable[[int], None] | None,
    ) -> None:
        rows, found = find_format(source, format_name, columns, reading)
        self.report.format = found.name
        batches = iter(lambda: list(islice(rows, _BATCH)), [])
        for prepared in Pipeline(self.renderer, found, columns).ahead(batches):
            self._account(prepared, writer)
            if progress is not None:
                progress(self.report.rows_in)

    def batch(self, batch: list[Row], found: Format, columns: Mapping[str, str], sink: Sink) -> None:
        """Hand the documents of some rows to `sink` and account for all of them."""
        self._account(Pipeline(self.renderer, found, columns).prepare(batch), sink)

    def _account(self, prepared: Prepared, sink: Sink) -> None:
        for row, problem in prepared.dropped:
            self._drop(row, problem.reason, problem.detail)
        for row, text, tokens in prepared.documents():
            self._keep(row, text, tokens, sink)
        self.report.rows_in += prepared.count
        self.report.notes = [f"{note} ({count} rows)" for note, count in self.notes.items()]

    def _keep(self, row: Row, text: Rendered, tokens: Encoded, sink: Sink) -> None:
        if tokens.problem is not None:
            self._drop(row, tokens.problem.reason, tokens.problem.detail)
            return
        length = len(tokens.ids)
        too_long = length > self.sequence_length
        if too_long and not self.cut:
            self._drop(row, _TOO_LONG, f"{length} tokens, the longest row may have {self.sequence_length}")
            return
        ids, trained = tokens.ids[: self.sequence_length], tokens.trained[: self.sequence_length]
        if not trained.any():
            self._drop(row, _UNTRAINABLE, f"within {self.sequence_length} tokens" if too_long else "")
            return
        if too_long:
            self.report.truncated += 1
            self._name(row, _CUT, f"{length} tokens cut to {self.sequence_length}")
        sink.add(ids, trained, row.index, row.where)
        self.report.rows_kept += 1
        self.report.tokens += len(ids)
        self.report.trained_tokens += int(trained.sum())
        if text.notes or tokens.notes:
            self.notes.update(dict.fromkeys(text.notes + tokens.notes, 1))

    def _drop(self, row: Row, reason: str, detail: str) -> None:
        self.report.dropped[reason] = self.report.dropped.get(reason, 0) + 1
        self._name(row, reason, detail)

    def _name(self, row: Row, reason: str, detail: str) -> None:
        self.named[reason] += 1
        if self.named[reason] <= _EXAMPLES_PER_REASON and len(self.report.examples) < _EXAMPLES:
            self.report.examples.append(f"{row.where}: {reason}" + (f" ({detail})" if detail else ""))


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
    too_long = report.dropped.get(_TOO_LONG, 0)
    if overlong == "error" and too_long:
        raise _refusal(report, label, [_TOO_LONG], "Raise train.sequence_length, or set data.overlong.")
    broken = [reason for reason in report.dropped if reason != _TOO_LONG]
    if malformed == "error" and broken:
        raise _refusal(report, label, broken, "Mend these rows, or set data.malformed to drop.")


def _refuse_empty(report: DataReport, label: str) -> None:
    """Raise where nothing is left."""
    if report.rows_kept == 0:
        hint = "`tunesmith inspect` shows what becomes of a row; set format and columns if rows are read wrongly."
        if REASON in report.dropped:
            hint = "Set data.template to the model's own or a named one, or data.prefix_mismatch to context or allow."
        raise _refusal(report, label, list(report.dropped), hint, none_left=True)


def _refusal(
    report: DataReport, label: str, reasons: list[str], hint: str, *, none_left: bool = False
) -> DataError:
    counts = ", ".join(f"{reason} {report.dropped[reason]}" for reason in reasons)
    total = sum(report.dropped[reason] for reason in reasons)
    what = "No row" if none_left else f"{total} of the {report.rows_in} rows"
    verdict = f"of {label} can train" if none_left else f"of {label} are refused"
    named = [line for line in report.examples if any(f": {reason}" in line for reason in reasons)]
    lines = "".join(f"\n  {line}" for line in named[:_EXAMPLES_PER_REASON])
    return DataError(f"{what} {verdict}: {counts}.{lines}", hint=hint)
