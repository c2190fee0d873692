"""Readers: one file in, its rows out, each with the place where a person finds it.

A reader is a generator of `Found`. A row that cannot be read does not end the file: it becomes a `Found`
with a problem, so that it can be counted and named later. Only damage after which the following rows cannot
be located (a broken JSON array, a cut-off gzip stream) raises a `DataError`.

Rejected: `datasets.load_dataset("json", ...)`. It stops at the first bad line, unifies the keys of all rows
and does not know line numbers; pandas has the same faults. All readers here take time linear in the size of
the file, also for a single line of many megabytes.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from tunesmith.contracts.errors import DataError
from tunesmith.data.columnar import read_arrow, read_parquet
from tunesmith.data.found import Found, Stored

Reader = Callable[[Stored, str], Iterator[Found]]
"""Takes the file and the name under which its rows are reported."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK = re.compile(r"[ \t\r\n]*")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
"""What `errors="surrogateescape"` makes of a byte that is not UTF-8."""
_ROW_KEYS = ("data", "rows", "train", "examples", "instances")
"""Keys under which a JSON object commonly holds its rows; the first that fits wins."""
_TURN_KEYS = ("messages", "conversations")
"""Keys of one conversation: an object with these is a row itself."""


@contextmanager
def _open_binary(path: Stored, label: str) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The file's bytes, unzipped where its name ends in `.gz`."""
    try:
        with path.open("rb") as stream:
            if path.name.lower().endswith(".gz"):
                with gzip.open(stream, "rb") as unzipped:
                    yield unzipped
            else:
                yield stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{label} is not a complete gzip file: {error}.", hint="Download or compress it again."
        ) from error
    except OSError as error:
        raise DataError(f"{label} cannot be read: {error.strerror or error}.") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _as_row(where: str, value: Any) -> Found:
    if isinstance(value, dict):
        return Found(where, value)
    return Found(where, None, f"row is {_kind(value)}, not an object")


def _not_utf8(byte: int, column: int) -> str:
    return f"line is not valid UTF-8 (byte 0x{byte:02x} at column {column})"


def _lines(path: Stored, label: str) -> Iterator[tuple[str, str | None, str]]:
    """Place, text and problem of every line that is not blank; text is None where there is a problem."""
    with _open_binary(path, label) as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
            where = f"{label}:{number}"
            try:
                line = raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield where, None, _not_utf8(raw[error.start], error.start + 1)
                continue
            if line.strip():
                yield where, line, ""


def read_text(path: Stored, label: str) -> Iterator[Found]:
    """Every line that is not blank is a row `{"text": line}`."""
    for where, line, problem in _lines(path, label):
        yield Found(where, None, problem) if line is None else Found(where, {"text": line})


def read_json_lines(path: Stored, label: str) -> Iterator[Found]:
    """One JSON object per line; blank lines are skipped."""
    for where, line, problem in _lines(path, label):
        if line is None:
            yield Found(where, None, problem)
            continue
        try:
            yield _as_row(where, json.loads(line))
        except json.JSONDecodeError as error:
            yield Found(where, None, f"invalid JSON at column {error.colno}: {error.msg}")
        except RecursionError:
            yield Found(where, None, "invalid JSON: nested too deeply")
        except ValueError as error:  # an integer of more digits than Python converts
            yield Found(where, None, f"invalid JSON: {error}")


class _JsonText:
    """A JSON document that is walked value by value while lines are counted, each character once."""

    def __init__(self, text: str, label: str) -> None:
        self.text = text
        self.label = label
        self.position = 0
        self._decoder = json.JSONDecoder()
        self._counted = 0
        self._line = 1

    def line(self) -> int:
        """Line of the current position, from 1."""
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        match = _BLANK.match(self.text, self.position)
        assert match is not None, "the pattern matches the empty string"
        self.position = match.end()
        return self.text[self.position : self.position + 1]

    def expect(self, characters: str) -> str:
        """Step over one of `characters`, or raise a `DataError`."""
        found = self.peek()
        if not found or found not in characters:
            raise self.broken("expected " + " or ".join(f"'{c}'" for c in characters), self.position)
        self.position += 1
        return found

    def value(self) -> Any:
        """The JSON value at the current position, or a `DataError`."""
        self.peek()
        try:
            value, self.position = self._decoder.raw_decode(self.text, self.position)
        except json.JSONDecodeError as error:
            raise self.broken(error.msg, error.pos) from error
        except (RecursionError, ValueError) as error:
            raise self.broken(str(error), self.position) from error
        return value

    def broken(self, reason: str, position: int) -> DataError:
        line = self.text.count("\n", 0, position) + 1
        column = position - self.text.rfind("\n", 0, position)
        return DataError(
            f"{self.label} is not valid JSON at line {line}, column {column}: {reason}.",
            hint="Rows behind the error cannot be located; mend it, or write one object per line (.jsonl).",
        )

    def rows(self) -> Iterator[Found]:
        """The elements of the array at the current position."""
        self.expect("[")
        if self.peek() == "]":
            self.position += 1
            return
        while True:
            self.peek()
            where, start = f"{self.label}:{self.line()}", self.position
            value = self.value()
            bad = _ESCAPED_BYTE.search(self.text, start, self.position)
            if bad is None:
                yield _as_row(where, value)
            else:
                column = bad.start() - self.text.rfind("\n", 0, bad.start())
                yield Found(where, None, _not_utf8(ord(bad.group()) - 0xDC00, column))
            if self.expect(",]") == "]":
                return

    def enter(self, key: str) -> None:
        """Move from the start of an object to the value under its last `key`."""
        self.expect("{")
        target = self.position
        while True:
            found = self.value()
            self.expect(":")
            if found == key:
                target = self.position
            self.value()
            if self.expect(",}") == "}":
                break
        self.position = target


def _key_of_rows(value: dict[str, Any]) -> str | None:
    """The key under which an object holds a list of row objects, if there is one such key."""
    lists = [
        key
        for key, rows in value.items()
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) and key not in _TURN_KEYS
    ]
    named = [key for key in _ROW_KEYS if key in lists]
    alone = lists if len(value) == 1 else []
    return next(iter(named + alone), None)


def read_json(path: Stored, label: str) -> Iterator[Found]:
    """An array of objects, an object that holds one (under `data`, `rows`, `train`, ...), or JSON lines.

    Raises:
        DataError: where the text is not valid JSON, with line and column.
    """
    with _open_binary(path, label) as stream:
        text = stream.read().removeprefix(_BYTE_ORDER_MARK).decode("utf-8", errors="surrogateescape")
    document = _JsonText(text, label)
    first = document.peek()
    if first == "[":
        yield from document.rows()
        if document.peek():
            raise document.broken("text behind the end of the array", document.position)
    elif first == "{":
        yield from _read_json_object(document, path, label)
    elif first:
        raise document.broken("expected '[' or '{'", document.position)


def _read_json_object(document: _JsonText, path: Stored, label: str) -> Iterator[Found]:
    start = document.position
    line = document.line()
    first_line_end = document.text.find("\n", start)
    try:
        value = document.value()
    except DataError:
        head = document.text[start : first_line_end if first_line_end >= 0 else None].rstrip()
        if not head.endswith("}"):
            raise  # an object spread over lines: nothing behind the error can be located
        yield from read_json_lines(path, label)
        return
    if document.peek():
        yield from read_json_lines(path, label)
        return
    key = _key_of_rows(value)
    if key is None:
        yield Found(f"{label}:{line}", value)
        return
    document.position = start
    document.enter(key)
    document.peek()
    yield from document.rows()


def _read_table(path: Stored, label: str, dialect: type[csv.Dialect]) -> Iterator[Found]:
    csv.field_size_limit(sys.maxsize)  # the module's own limit of 128 KiB a field is a guard against our rows
    with _open_binary(path, label) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        table = csv.reader(text, dialect=dialect, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{label}:{table.line_num + 1}"
            try:
                fields = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield Found(where, None, f"invalid row: {error}")
                continue
            if not fields:
                continue
            if header is None:
                header = _check_header(fields, label)
            else:
                yield _table_row(where, header, fields)


def _check_header(names: list[str], label: str) -> list[str]:
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DataError(
            f"{label} names the column {sorted(repeated)[0]!r} more than once.",
            hint="The first line must name every column once.",
        )
    return names


def _table_row(where: str, header: list[str], fields: list[str]) -> Found:
    if len(fields) != len(header):
        return Found(where, None, f"row has {len(fields)} fields, the header names {len(header)}")
    for name, field in zip(header, fields, strict=True):
        bad = _ESCAPED_BYTE.search(field)
        if bad is not None:
            return Found(
                where, None, f"column {name!r} is not valid UTF-8 (byte 0x{ord(bad.group()) - 0xDC00:02x})"
            )
    return Found(where, dict(zip(header, fields, strict=True)))


def read_csv(path: Stored, label: str) -> Iterator[Found]:
    """Comma-separated values; the first line names the columns, and every cell is text."""
    return _read_table(path, label, csv.excel)


def read_tsv(path: Stored, label: str) -> Iterator[Found]:
    """Tab-separated values; the first line names the columns, and every cell is text."""
    return _read_table(path, label, csv.excel_tab)


class Located(NamedTuple):
    """A file with the name under which its rows are reported, and what reads it."""

    path: Stored
    label: str
    read: Reader


TEXT_READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_text,
}
"""Readers of text files, which may be zipped (`.jsonl.gz`)."""

READERS: dict[str, Reader] = {
    **TEXT_READERS,
    **{f"{suffix}.gz": reader for suffix, reader in TEXT_READERS.items()},
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
"""Every kind of file that can be read, by its suffix."""


def suffix_of(path: Path | str) -> str:
    """The suffix that decides how a file is read, in lower case: `.jsonl`, or `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return "".join(suffixes[-2:]) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


KINDS = f"The kinds that can be read: {', '.join(READERS)}."
"""The hint where a file is of no such kind."""


def reader_of(path: Path | str, label: str, *, hint: str = KINDS) -> Reader:
    """The reader of a file, by its name.

    Raises:
        DataError: there is none for its kind, with `hint`.
    """
    reader = READERS.get(suffix_of(path))
    if reader is None:
        raise DataError(
            f"{label} is of a kind that cannot be read ({suffix_of(path) or 'no suffix'}).", hint=hint
        )
    return reader
