"""Wires `tunesmith data check`: a source read, rendered and tokenised on its own, and nothing written anywhere.

Every row goes the way that it goes in training, through the same functions. What is kept of a row are its lengths,
its number and hashes of its tokens, 32 bytes, so memory does not grow with the text. Rejected: `tokenize_source`
with its report. It refuses a set of which no row trains, which is when a report is needed most, and its table knows
neither the length of a row that was cut nor which rows were changed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.config.check_kinds import Counts, documents_of, foreign, legible
from tunesmith.config.check_report import (
    DUPLICATES,
    EXAMPLES,
    RANKS,
    ROWS_OF_RANK,
    DataCheck,
    Finding,
    Findings,
    Marks,
    Shown,
)
from tunesmith.config.separators import separator_hint
from tunesmith.contracts.errors import DataError
from tunesmith.data.cutting import TRUNCATED, Fit, Joiner, Piece
from tunesmith.data.formats import (
    AS_USUAL,
    KINDS,
    SUPERVISED,
    Format,
    Prompt,
    Reading,
    RowProblem,
    convert,
    resolve_format,
)
from tunesmith.data.masks import NOTE_END
from tunesmith.data.packing import pack_best_fit, packing_efficiency
from tunesmith.data.ranks import attention_costs, mean_imbalance
from tunesmith.data.remote import Tell
from tunesmith.data.render import (
    NOTE_CUT,
    NOTE_DATE,
    NOTE_LITERAL,
    NOTE_PREFIXES,
    NOTE_SOME,
    NOTE_SPLIT,
    Encoded,
    Rendered,
    Renderer,
    resolve_template,
)
from tunesmith.data.sources import Row, Source, open_source
from tunesmith.data.tokenize import sample_columns
from tunesmith.settings.urls import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMARKS = frozenset({NOTE_CUT, NOTE_DATE, NOTE_END, NOTE_LITERAL, NOTE_PREFIXES, NOTE_SPLIT})
"""Notes that are good to know; a row with any other note trains on something else than the file says."""

PIECES = "plain texts longer than a document were split"
_IN_A_RUN_FILE = (
    "Columns of other names, and `format: custom`, belong into a run file: `tunesmith data check run.yaml`."
)
_BATCH = 512
_SHORT, _MOST_SHOWN, _ALIKE = 400, 4, 2
"""A row of at most this many tokens is shown whole; how many rows are shown, and how many of them that look alike."""


@dataclass(frozen=True)
class Plan:
    """How the rows of a source are read and fitted, as a run file says it.

    Attributes:
        format: a key of `FORMATS`, or `auto`.
        columns: renames, the format's own name of a column to its name in the data.
        reading: how rows are read beyond their columns.
        fit: how they become documents of a bounded length.
    """

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    reading: Reading = AS_USUAL
    fit: Fit = field(default_factory=lambda: Fit(2048))


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
    tell: Tell | None = None,
) -> DataCheck:
    """Read, render and tokenise every row of a data set, and account for it.

    Args:
        path: a file, a folder, a glob pattern, an address, or the id of a hub data set.
        tokenizer: a fast tokenizer.
        name: of the tokenizer, for the report.
        format: a key of `FORMATS`, or `auto`.
        template: as `data.template` has it.
        sequence_length: longer rows are cut, as `data.overlong: truncate` does.
        most_rows: read only the first rows.
        progress: called with the number of rows done, after every batch.
        tell: gets lines about downloads from addresses.

    Raises:
        DataError: the data, its format or the template cannot be understood.
    """
    source = open_source(path, tell=tell)
    renderer = Renderer(tokenizer, resolve_template(template, tokenizer))
    check = DataCheck(shown(path), name, template, sequence_length)
    plan = Plan(format, fit=Fit(sequence_length))
    return check_source(source, check, renderer, plan, most_rows, progress)


def check_source(
    source: Source,
    check: DataCheck,
    renderer: Renderer,
    plan: Plan,
    most_rows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> DataCheck:
    """Read, render and tokenise every row of a source; fills `check`, and returns it.

    Raises:
        DataError: the data or its format cannot be understood.
    """
    _Pass(check, renderer, plan).run(source, most_rows, progress)
    return check


class _Pass:
    """One pass over a source."""

    def __init__(self, check: DataCheck, renderer: Renderer, plan: Plan) -> None:
        self.check, self.renderer, self.plan, self.fit = check, renderer, plan, plan.fit
        self._joiner = Joiner(self.fit.sequence_length, self.fit.overlap) if self.fit.join_texts else None
        self._lengths, self._fitted = array("i"), array("i")
        self._rows = array("q")
        self._digests, self._prompts = array("Q"), array("Q")
        self._looks: Counter[tuple[object, ...]] = Counter()

    def run(self, source: Source, most_rows: int | None, progress: Callable[[int], None] | None) -> None:
        check = self.check
        every, found = self._find_format(source)
        rows = every if most_rows is None else islice(every, most_rows)
        while batch := list(islice(rows, _BATCH)):
            made = [(row, *documents) for row in batch if (documents := self._render(row, found)) is not None]
            encoded = iter(self.renderer.encode([text for _, texts, _ in made for text in texts]))
            for row, texts, counts in made:
                if self._count(row, texts, [next(encoded) for _ in texts], found):
                    self._add(counts)
            check.rows_in += len(batch)
            if progress is not None:
                progress(check.rows_in)
        check.partial = most_rows is not None and next(every, None) is not None
        self._finish()

    def _find_format(self, source: Source) -> tuple[Iterator[Row], Format]:
        """All rows and their format: as training finds it, else one of a kind that does not train yet."""
        check, name, columns, reading = self.check, self.plan.format, self.plan.columns, self.plan.reading
        rows, sample = sample_columns(source)
        try:
            found = resolve_format(name, columns, sample, reading=reading)
        except DataError as error:
            try:
                found = resolve_format(name, columns, sample, reading=reading, kinds=KINDS)
            except DataError:
                raise DataError(error.message, hint=_hint(error.hint, list(sample))) from None
        check.format, check.summary, check.kind = found.name, found.summary, KINDS[found.kind]
        if found.kind not in SUPERVISED:
            check.instead = found.instead or "No objective of this version trains on it."
        renamed = set(columns.values())
        known = {
            column: column in renamed or str(column).casefold() in found.names or column in found.names
            for column in sample
        }
        if reading.template:
            known = dict.fromkeys(sample, True)
        check.columns = tuple(str(column) for column, read in known.items() if read)
        check.ignored = tuple(str(column) for column, read in known.items() if not read)
        return rows, found

    def _render(self, row: Row, found: Format) -> tuple[list[Rendered], Counts] | None:
        if row.record is None:
            self._drop(row, RowProblem("unreadable", row.problem or ""))
            return None
        try:
            return documents_of(convert(found, row.record, self.plan.columns), self.renderer)
        except RowProblem as problem:
            self._drop(row, problem)
            return None

    def _add(self, counts: Counts) -> None:
        for name, count in counts.items():
            self.check.counts[name] = self.check.counts.get(name, 0) + count

    def _drop(self, row: Row, problem: RowProblem) -> None:
        _find(self.check.dropped, problem.reason).add(row.where, problem.detail)

    def _documents(self, text: Rendered, tokens: Encoded, found: Format) -> list[Piece] | RowProblem:
        """What `Fit.documents` makes of it; a prompt need not train, and joined texts are cut later."""
        problem = tokens.problem or foreign(text, tokens, self.renderer.tokenizer)
        if problem is not None:
            return problem
        whole = found.kind is Prompt or (text.plain and self._joiner is not None)
        if whole:
            limit = None if text.plain else self.fit.sequence_length
            return [Piece(tokens.ids[:limit], tokens.trained[:limit])]
        return self.fit.documents(tokens, plain=text.plain)

    def _count(self, row: Row, documents: list[Rendered], tokens: list[Encoded], found: Format) -> bool:
        """Account for a row that was tokenised; whether it is kept."""
        check = self.check
        made = [self._documents(*each, found) for each in zip(documents, tokens, strict=True)]
        problems = [each for each in made if isinstance(each, RowProblem)]
        pieces = [piece for each in made if not isinstance(each, RowProblem) for piece in each]
        # a pair needs both of its answers, a conversation that was split any of its turns
        if problems and (found.kind not in SUPERVISED or not pieces):
            self._drop(row, problems[0])
            return False
        parts = (*[text.notes for text in documents], *[each.notes for each in tokens])
        notes = dict.fromkeys(chain.from_iterable(parts))
        if problems:
            notes[NOTE_SOME] = None
        cut = self._cut(row, documents, tokens)
        if len(pieces) > len(documents):
            _find(check.remarks, PIECES).add(
                row.where, f"{len(tokens[0].ids)} tokens in {len(pieces)} documents"
            )
        for note in notes:
            _find(check.remarks if note in REMARKS else check.changed, note).add(row.where)
        check.rows_kept += 1
        check.rows_changed += cut or not REMARKS.issuperset(notes)
        self._lengths.extend(len(each.ids) for each in tokens)
        if self._joiner is not None and documents[0].plain:
            pieces = [piece for piece, _, _ in self._joiner.add(tokens[0].ids, row.index, row.where)]
        self._measure(pieces)
        self._mark(row, tokens)
        self._show(row, documents[0], tokens[0])
        return True

    def _cut(self, row: Row, documents: list[Rendered], tokens: list[Encoded]) -> bool:
        """Whether a row is cut at the sequence length."""
        check, limit = self.check, self.fit.sequence_length
        cut = [
            each
            for text, each in zip(documents, tokens, strict=True)
            if self.fit.truncates(each, plain=text.plain)
        ]
        if not cut or self.fit.overlong in ("drop", "error"):
            return False
        _find(check.changed, TRUNCATED).add(
            row.where, f"{max(len(each.ids) for each in cut)} tokens cut to {limit}"
        )
        lost = sum(int(np.count_nonzero(each.trained[limit:])) for each in cut)
        check.lost_tokens += lost
        check.cut_answers += lost > 0
        return True

    def _measure(self, pieces: list[Piece]) -> None:
        for ids, trained in pieces:
            self.check.tokens += len(ids)
            self.check.trained_tokens += int(np.count_nonzero(trained))
            self._fitted.append(len(ids))

    def _mark(self, row: Row, tokens: list[Encoded]) -> None:
        whole, prompt = (hashlib.blake2b(digest_size=8) for _ in range(2))
        for each in tokens:
            whole.update(each.ids.tobytes() + b"/")
        before = int(np.argmax(tokens[0].trained)) if tokens[0].trained.any() else 0
        prompt.update(tokens[0].ids[:before].tobytes())
        self._rows.append(row.index)
        self._digests.append(int.from_bytes(whole.digest(), "little"))
        self._prompts.append(int.from_bytes(prompt.digest(), "little") if before > 1 else 0)

    def _show(self, row: Row, text: Rendered, tokens: Encoded) -> None:
        """Keep the first short rows of each look to be shown, without one the shortest of all."""
        examples, length = self.check.examples, len(tokens.ids)
        look = (length <= _SHORT, min(len(text.spans), 3), text.notes)
        if examples and len(examples[0].encoded.ids) > _SHORT:
            wanted = length < len(examples[0].encoded.ids)
            if wanted:
                examples.clear()
        else:
            wanted = not examples or (
                length <= _SHORT and self._looks[look] < _ALIKE and len(examples) < _MOST_SHOWN
            )
        if wanted:
            self._looks[look] += 1
            limit = self.fit.sequence_length if self.fit.truncates(tokens, plain=text.plain) else length
            examples.append(Shown(row.where, *legible(text, tokens, self.renderer.tokenizer), limit))

    def _finish(self) -> None:
        check, limit = self.check, self.fit.sequence_length
        if self._joiner is not None:
            self._measure([piece for piece, _, _ in self._joiner.finish()])
        check.lengths = np.array(self._lengths, dtype=np.int64)
        fitted = np.array(self._fitted, dtype=np.int64)
        packs = pack_best_fit(fitted, limit)
        check.packs = len(packs)
        check.efficiency = packing_efficiency(fitted, packs, limit)
        costs = attention_costs(fitted, packs)
        for ranks in RANKS:
            shares = mean_imbalance(costs, ranks, ranks * ROWS_OF_RANK)
            if shares is not None:
                check.imbalance[ranks] = (shares.before, shares.after)
        check.marks = Marks.of(self._rows, self._digests, self._prompts)
        self._find_duplicates(check.marks)

    def _find_duplicates(self, marks: Marks) -> None:
        """Rows whose tokens another row has too; only their numbers are known by now."""
        _, first_N, own_N = np.unique(marks.digests, return_index=True, return_inverse=True)
        repeats = np.flatnonzero(first_N[own_N] != np.arange(len(own_N)))
        if repeats.size:
            found = _find(self.check.remarks, DUPLICATES)
            for number in repeats[:EXAMPLES]:
                found.add(f"row {marks.rows[number]}", f"as row {marks.rows[first_N[own_N[number]]]}")
            found.count = int(repeats.size)


def _hint(hint: str | None, columns: list[str]) -> str:
    """What to do about columns that no format fits."""
    separators = separator_hint(columns)
    if separators is not None:
        return separators
    return f"{hint}\n{_IN_A_RUN_FILE}" if hint else _IN_A_RUN_FILE


def _find(findings: Findings, name: str) -> Finding:
    return findings.setdefault(name, Finding())
