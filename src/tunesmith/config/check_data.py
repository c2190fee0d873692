"""Wires `tunesmith data check`: a data set read, rendered and tokenised on its own, without a run file.

Every row goes the way that it goes in training, through the same functions, and nothing is written anywhere.
What is kept of a row is its length, a hash of its tokens and its number, 24 bytes, so memory does not grow with
the text. Rejected: `tokenize_source` with its report. It refuses a set of which no row trains, which is when a
report is needed most, and its table knows neither the length of a row that was cut nor which rows were changed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.config.check_kinds import Counts, documents_of, legible
from tunesmith.config.check_report import DataCheck, Finding, Findings, Shown
from tunesmith.contracts.errors import DataError
from tunesmith.data.formats import KINDS, SUPERVISED, Format, Prompt, RowProblem, convert, resolve_format
from tunesmith.data.masks import NOTE_END
from tunesmith.data.packing import pack_best_fit, packing_efficiency
from tunesmith.data.render import (
    NOTE_CUT,
    NOTE_DATE,
    NOTE_LITERAL,
    NOTE_PREFIXES,
    Encoded,
    Rendered,
    Renderer,
    resolve_template,
)
from tunesmith.data.sources import Row, Source, open_source
from tunesmith.data.tokenize import sample_columns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMARKS = frozenset({NOTE_CUT, NOTE_DATE, NOTE_END, NOTE_LITERAL, NOTE_PREFIXES})
"""Notes that are good to know; a row with any other note trains on something else than the file says."""

_IN_A_RUN_FILE = (
    "Columns of other names, and `format: custom`, belong into a run file, which `tunesmith inspect` reads."
)
_BATCH = 512
_EXAMPLES = 5
_SHORT = 400
"""A row of at most this many tokens is shown whole."""


def check_data(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    format: str = "auto",  # noqa: A002 the name of the setting
    template: str = "auto",
    sequence_length: int = 2048,
    most_rows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DataCheck:
    """Read, render and tokenise every row of a data set, and account for it.

    Args:
        path: a file, a folder, a glob pattern, or the id of a hub data set.
        tokenizer: a fast tokenizer.
        name: of the tokenizer, for the report.
        format: a key of `FORMATS`, or `auto`.
        template: as `data.template` has it.
        sequence_length: longer rows are cut, as `data.overlong: truncate` does.
        most_rows: read only the first rows.
        progress: called with the number of rows done, after every batch.

    Raises:
        DataError: the data, its format or the template cannot be understood.
    """
    source = open_source(path)
    renderer = Renderer(tokenizer, resolve_template(template, tokenizer))
    check = DataCheck(path, name, template, sequence_length)
    _Pass(check, renderer).run(source, format, most_rows, progress)
    return check


class _Pass:
    """One pass over a source."""

    def __init__(self, check: DataCheck, renderer: Renderer) -> None:
        self.check = check
        self.renderer = renderer
        self._lengths = array("q")
        self._rows = array("q")
        self._digests = array("Q")

    def run(
        self, source: Source, name: str, most_rows: int | None, progress: Callable[[int], None] | None
    ) -> None:
        check = self.check
        every, found = self._find_format(source, name)
        rows = every if most_rows is None else islice(every, most_rows)
        while batch := list(islice(rows, _BATCH)):
            made = [(row, *documents) for row in batch if (documents := self._render(row, found)) is not None]
            encoded = iter(self.renderer.encode([text for _, texts, _ in made for text in texts]))
            for row, texts, counts in made:
                if self._count(row, texts, [next(encoded) for _ in texts]):
                    self._add(counts)
            check.rows_in += len(batch)
            if progress is not None:
                progress(check.rows_in)
        check.partial = most_rows is not None and next(every, None) is not None
        self._finish()

    def _find_format(self, source: Source, name: str) -> tuple[Iterator[Row], Format]:
        """All rows and their format: as training finds it, else one of a kind that does not train yet."""
        check = self.check
        rows, sample = sample_columns(source)
        try:
            found = resolve_format(name, {}, sample)
        except DataError as error:
            try:
                found = resolve_format(name, {}, sample, kinds=KINDS)
            except DataError:
                raise DataError(error.message, hint=_hint(error.hint, list(sample))) from None
        check.format, check.summary, check.kind = found.name, found.summary, KINDS[found.kind]
        if found.kind not in SUPERVISED:
            check.instead = found.instead or "No objective of this version trains on it."
        known = {column: str(column).casefold() in found.names or column in found.names for column in sample}
        check.columns = tuple(str(column) for column, read in known.items() if read)
        check.ignored = tuple(str(column) for column, read in known.items() if not read)
        return rows, found

    def _render(self, row: Row, found: Format) -> tuple[list[Rendered], Counts] | None:
        if row.record is None:
            self._drop(row, "unreadable", row.problem or "")
            return None
        try:
            return documents_of(convert(found, row.record, {}), self.renderer)
        except RowProblem as problem:
            self._drop(row, problem.reason, problem.detail)
            return None

    def _add(self, counts: Counts) -> None:
        for name, count in counts.items():
            self.check.counts[name] = self.check.counts.get(name, 0) + count

    def _drop(self, row: Row, reason: str, detail: str) -> None:
        _find(self.check.dropped, reason).add(row.where, detail)

    def _count(self, row: Row, documents: list[Rendered], tokens: list[Encoded]) -> bool:
        """Account for a row that was tokenised; whether it is kept."""
        check, limit = self.check, self.check.sequence_length
        refused = next((each.problem for each in tokens if each.problem is not None), None)
        if refused is None and documents[0].tokens is not None:
            refused = self._foreign(tokens[0])
        lengths = [len(each.ids) for each in tokens]
        trained = [int(np.count_nonzero(each.trained[:limit])) for each in tokens]
        longest = max(lengths)
        if refused is None and not all(trained) and check.kind != KINDS[Prompt]:
            refused = RowProblem("nothing to train on", f"within {limit} tokens" if longest > limit else "")
        if refused is not None:
            self._drop(row, refused.reason, refused.detail)
            return False
        parts = (*[text.notes for text in documents], *[each.notes for each in tokens])
        notes = dict.fromkeys(chain.from_iterable(parts))
        if longest > limit:
            _find(check.changed, "truncated").add(row.where, f"{longest} tokens cut to {limit}")
        for note in notes:
            _find(check.remarks if note in REMARKS else check.changed, note).add(row.where)
        check.rows_kept += 1
        check.rows_changed += longest > limit or not REMARKS.issuperset(notes)
        check.tokens += sum(min(length, limit) for length in lengths)
        check.trained_tokens += sum(trained)
        self._lengths.extend(lengths)
        self._rows.append(row.index)
        digest = hashlib.blake2b(digest_size=8)
        for each in tokens:
            digest.update(each.ids.tobytes() + b"/")
        self._digests.append(int.from_bytes(digest.digest(), "little"))
        self._show(row, documents[0], tokens[0])
        return True

    def _foreign(self, tokens: Encoded) -> RowProblem | None:
        """What is wrong with a row that was tokenised with another tokenizer, where it shows."""
        known, highest = len(self.renderer.tokenizer), int(tokens.ids.max(initial=0))
        if highest < known:
            return None
        return RowProblem("bad tokens", f"token {highest} is none of the {known:,} of this tokenizer")

    def _show(self, row: Row, text: Rendered, tokens: Encoded) -> None:
        """Keep the first short row to be shown; without one the shortest of all."""
        shown, length = self.check.shown, len(tokens.ids)
        better = shown is None or (len(shown.encoded.ids) > _SHORT and length < len(shown.encoded.ids))
        if better:
            self.check.shown = Shown(row.where, *legible(text, tokens, self.renderer.tokenizer))

    def _finish(self) -> None:
        check = self.check
        check.lengths = np.array(self._lengths, dtype=np.int64)
        capped = np.minimum(check.lengths, check.sequence_length)
        packs = pack_best_fit(capped, check.sequence_length)
        check.packs = len(packs)
        check.efficiency = packing_efficiency(capped, packs, check.sequence_length)
        self._find_duplicates()

    def _find_duplicates(self) -> None:
        """Rows whose tokens another row has too; only their numbers are known by now."""
        digests_N = np.array(self._digests, dtype=np.uint64)
        _, first_N, own_N = np.unique(digests_N, return_index=True, return_inverse=True)
        repeats = np.flatnonzero(first_N[own_N] != np.arange(len(digests_N)))
        if repeats.size:
            found = _find(self.check.remarks, "exact duplicates of an earlier row")
            for number in repeats[:_EXAMPLES]:
                found.add(f"row {self._rows[number]}", f"as row {self._rows[first_N[own_N[number]]]}")
            found.count = int(repeats.size)


def _hint(hint: str | None, columns: list[str]) -> str:
    """What to do about columns that no format fits."""
    if len(columns) == 1 and any(separator in columns[0] for separator in ";|\t"):
        return (
            "Fields are separated by commas in a .csv file and by tabs in a .tsv file; this one has others."
        )
    return f"{hint}\n{_IN_A_RUN_FILE}" if hint else _IN_A_RUN_FILE


def _find(findings: Findings, name: str) -> Finding:
    return findings.setdefault(name, Finding())
