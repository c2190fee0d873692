"""What `tunesmith init` sees in a data set: its format, names of columns, and how long its rows are.

The format is found as a run finds it. Where no format fits, columns whose names are nearly those of a format are
taken for them, and the run file says so. Rejected: guessing by values. A question and an answer look alike.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.config.separators import separator_hint
from tunesmith.contracts.errors import DataError, UserError
from tunesmith.data.formats import FORMATS, SUPERVISED, Format, RowProblem, Tokens, convert, resolve_format
from tunesmith.data.formats.contract import never
from tunesmith.data.readers import READERS, suffix_of
from tunesmith.data.sources import Source, open_source

ROWS = 2_000
"""Rows whose lengths are measured; the first ones, because a file is read from its start."""
_SAMPLE = 32
"""Rows whose columns decide the format."""
_ALIKE = 0.8
"""How alike two names must be: `questions` and `question` are 0.94, `instruct` and `instruction` 0.84, `test` and
`text` 0.75."""
_CHARACTERS = 4
"""Characters of a token where no tokenizer counts them: English has 4 to 5, code 3, Chinese 1 to 2."""


@dataclass(frozen=True)
class Look:
    """The format of a source.

    Attributes:
        source: opened.
        format: what its rows are.
        renames: what `columns` must say, the format's own names to those in the data.
        read: for each column of the format that the data has, its name there.
        guessed: the renames were found by likeness of names.
    """

    source: Source
    format: Format
    renames: dict[str, str]
    read: dict[str, str]
    guessed: bool = False

    @property
    def described(self) -> str:
        """The format in a sentence, with the columns that are read."""
        read = ", ".join(own if own == name else f"{own} from {name}" for own, name in self.read.items())
        return f"{self.format.summary}; columns: {read}" if read else self.format.summary


@dataclass(frozen=True)
class Lengths:
    """How long rows are, in tokens.

    Attributes:
        tokens: of each row, in rising order.
        rows: number of rows that were read, and `dropped` those of them that would not train.
        partial: there are more rows than were read.
        estimated: why tokens were not counted but estimated from characters; empty where they were counted.
        context: most tokens that the model was made for; None where it is not known.
    """

    tokens: list[int]
    rows: int
    dropped: int = 0
    partial: bool = False
    estimated: str = ""
    context: int | None = None

    @property
    def total(self) -> int:
        """Tokens of all rows."""
        return sum(self.tokens)

    def quantile(self, share: float) -> int:
        """The length that this share of the rows does not exceed."""
        return self.tokens[max(0, math.ceil(share * len(self.tokens)) - 1)]


def likely_data(folder: Path) -> Path | None:
    """The first file in a folder that could be training data; None where there is none."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and suffix_of(file) in READERS)
    # The word and not a part of one, as in constraints.txt.
    named = [file for file in files if re.search(r"(?<![a-z])train", file.name.lower())]
    rows = [file for file in files if suffix_of(file) not in (".txt", ".json")]  # mostly notes and settings
    return next(iter((*named, *rows)), None)


# ---------------------------------------------------------------- format


def columns_of(source: Source) -> dict[str, Any]:
    """The columns of the first rows together, each with its first value.

    Raises:
        DataError: no row can be read.
    """
    sample: dict[str, Any] = {}
    problem = "no columns"
    for row in islice(source.rows(), _SAMPLE):
        sample = {**(row.record or {}), **sample}
        problem = row.problem or problem
    if not sample:
        raise DataError(
            f"No row of {source.label} can be read: {problem}.", hint="Check that it is the file you meant."
        )
    return sample


def look_at(path: str, *, format: str = "auto", columns: Mapping[str, str] | None = None) -> Look:  # noqa: A002
    """The format of a data set that a run can train on.

    Args:
        path: as `data.train` takes it.
        format: a name of `FORMATS`, or `auto`.
        columns: renames, the format's own names to those in the data.

    Raises:
        DataError: it cannot be read, or no format fits.
    """
    source, renames = open_source(path), dict(columns or {})
    _refuse_unknown(renames)
    sample = columns_of(source)
    try:
        found, guessed = resolve_format(format, renames, sample), False
    except DataError as error:
        near = None if renames or format != "auto" else nearest_columns(sample)
        if near is None:
            raise DataError(error.message, hint=_hint(error, sample)) from None
        (found, renames), guessed = near, True
    return Look(source, found, renames, _read(found, renames, sample), guessed)


def _refuse_unknown(renames: Mapping[str, str]) -> None:
    """Refuse a name that no format has; what remains of the columns would be told as what does not fit."""
    known = sorted({own for row in FORMATS.values() for own in row.columns})
    for own in renames:
        if own not in known:
            near = difflib.get_close_matches(own, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The names are {', '.join(known)}."
            raise DataError(
                f"No format has a column {own!r} that could be called {renames[own]!r}.", hint=hint
            )


def _hint(error: DataError, sample: Mapping[str, Any]) -> str | None:
    """What to do, in flags of `init`; errors about data of another kind say themselves what."""
    if not error.message.startswith("No format matches") or "marks preference data" in error.message:
        return error.hint
    separators = separator_hint(list(sample))
    return (
        separators or f"Say which is what, as in --column prompt={next(iter(sample))} --column response=NAME."
    )


def nearest_columns(sample: Mapping[str, Any]) -> tuple[Format, dict[str, str]] | None:
    """A format whose required columns have names nearly as in the data, and the renames; None where there is none."""
    for name, row in FORMATS.items():
        required = [own for own, column in row.columns.items() if column.required]
        if name != row.name or row.kind not in SUPERVISED or row.detect is never:
            continue
        renames: dict[str, str] = {}
        for own in required:
            near = _nearest(
                {own, *row.columns[own].aliases}, [key for key in sample if key not in renames.values()]
            )
            if near is None:
                break
            renames[own] = near
        if len(renames) == len(required) and _reads(row, renames, sample):
            return row, renames
    return None


def _nearest(names: set[str], columns: list[str]) -> str | None:
    likeness = {column: max(_likeness(name, str(column).casefold()) for name in names) for column in columns}
    best = max(likeness, key=lambda column: likeness[column], default=None)
    return best if best is not None and likeness[best] >= _ALIKE else None


def _likeness(name: str, column: str) -> float:
    """From 0 to 1; 1 where the name is a word of the column's, as in `gold_answer`."""
    if name in re.split(r"[\W_]+", column):
        return 1.0
    return difflib.SequenceMatcher(None, name, column).ratio()


def _reads(row: Format, renames: Mapping[str, str], sample: Mapping[str, Any]) -> bool:
    """Whether a row of the data makes sense in this format."""
    try:
        convert(resolve_format(row.name, renames, sample), sample, renames)
    except (DataError, RowProblem):
        return False
    return True


def _read(found: Format, renames: Mapping[str, str], sample: Mapping[str, Any]) -> dict[str, str]:
    there = {str(key).casefold(): str(key) for key in sample}
    read: dict[str, str] = {}
    for own, column in found.columns.items():
        names = [renames[own]] if own in renames else [own, *column.aliases]
        name = next((there[each.casefold()] for each in names if each.casefold() in there), None)
        if name is not None and name not in read.values():
            read[own] = name
    return read


# ---------------------------------------------------------------- lengths


def measure(look: Look, model: str, progress: Callable[[str], None] = lambda _: None) -> Lengths:
    """Lengths of the first rows in tokens of a model; from characters where its tokenizer cannot be had.

    Args:
        model: as `model.name` has it.
        progress: called with what is done now.

    Raises:
        UserError: the model looks like a folder and is none, or no row can train.
    """
    progress("loading the tokenizer")
    from tunesmith.config.known_model import known_config
    from tunesmith.contracts.model_folder import local_folder
    from tunesmith.models.loader import load_tokenizer
    from tunesmith.training.quiet import quiet_libraries

    quiet_libraries()
    local = local_folder(model)
    try:
        tokenizer = load_tokenizer(model)
    except UserError as error:
        if local is not None:
            raise
        progress("measuring rows")
        return _estimate(look, error.message)
    config = known_config(model)
    context = getattr(config, "max_position_embeddings", None)
    progress("measuring rows")
    return _count(look, model, tokenizer, context if isinstance(context, int) else None)


def _count(look: Look, model: str, tokenizer: Any, context: int | None) -> Lengths:
    from tunesmith.config.check_data import Plan, check_source
    from tunesmith.config.check_report import DataCheck
    from tunesmith.data.render import Renderer, resolve_template

    renderer = Renderer(tokenizer, resolve_template("auto", tokenizer))
    check = DataCheck(look.source.label, model, "auto", Plan().fit.sequence_length)
    check_source(look.source, check, renderer, Plan(look.format.name, look.renames), ROWS)
    if not check.rows_kept:
        raise _nothing_trains(look, next(iter(check.dropped), "none can be read"))
    lengths = sorted(int(length) for length in check.lengths)
    dropped = check.rows_in - check.rows_kept
    return Lengths(lengths, check.rows_in, dropped, check.partial, context=context)


def _estimate(look: Look, why: str) -> Lengths:
    lengths, rows, reason = [], 0, "none can be read"
    found = look.source.rows()
    for row in islice(found, ROWS):
        rows += 1
        if row.record is None:
            continue
        try:
            item = convert(look.format, row.record, look.renames)
        except RowProblem as problem:
            reason = problem.reason
            continue
        lengths.append(
            len(item.ids) if isinstance(item, Tokens) else -(-_characters(vars(item)) // _CHARACTERS)
        )
    if not lengths:
        raise _nothing_trains(look, reason)
    return Lengths(sorted(lengths), rows, rows - len(lengths), next(found, None) is not None, why)


def _characters(value: Any) -> int:
    """Characters of all texts inside a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_characters(inner) for inner in value.values())
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0


def _nothing_trains(look: Look, reason: str) -> DataError:
    return DataError(
        f"No row of {look.source.label} would train as {look.format.name}: {reason}.",
        hint=f"`tunesmith data check {look.source.label}` says why, row by row.",
    )
