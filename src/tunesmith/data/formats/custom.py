"""Rows of any columns, by format strings from the run file.

`{user: "{question}\\n{hint}", assistant: "{answer}"}` names columns between braces and nothing else: no
attribute, no index, no conversion. Rejected: `str.format`, whose fields reach into objects, and Jinja, which
is a language where a mapping is needed.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from functools import partial
from typing import Any

from tunesmith.contracts.errors import DataError
from tunesmith.data.formats.contract import (
    Column,
    Conversation,
    Format,
    Item,
    Message,
    Segments,
    Text,
    never,
)
from tunesmith.data.reading import AS_USUAL, Reading, RowProblem, as_text

Piece = tuple[str, str | None]
"""Text as it is, and the column that follows it."""

_SHAPES: tuple[tuple[frozenset[str], frozenset[str], type], ...] = (
    (frozenset({"user", "assistant"}), frozenset({"system"}), Conversation),
    (frozenset({"prompt", "completion"}), frozenset(), Segments),
    (frozenset({"text"}), frozenset(), Text),
)
"""What a template must have, what it may have, and what rows become."""

EXAMPLE_TEMPLATE = {
    "system": "You answer in one word.",
    "user": "{country}: capital?",
    "assistant": "{capital}",
}


def _parse(role: str, text: str) -> list[Piece]:
    """The pieces of a format string.

    Raises:
        DataError: where it is malformed or a field is more than the name of a column.
    """
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise _bad(role, f"is malformed ({error})") from error
    for _, name, spec, conversion in pieces:
        if name is None:
            continue
        if not name or spec or conversion or any(letter in name for letter in ".[]"):
            raise _bad(role, f"has the field {{{name}}}, which is not just the name of a column")
    return [(before, name) for before, name, _, _ in pieces]


def _bad(role: str, what: str) -> DataError:
    return DataError(
        f"The template of {role!r} {what}.",
        hint="Write column names between braces, such as {question}; {{ and }} are braces themselves.",
    )


def custom_format(template: Mapping[str, str]) -> Format:
    """The format of rows that are read by these format strings.

    Raises:
        DataError: where the roles fit none of the shapes, or a format string cannot be used.
    """
    shape = next(
        (row for row in _SHAPES if row[0] <= template.keys() and template.keys() <= row[0] | row[1]), None
    )
    if shape is None:
        given = ", ".join(template) or "nothing"
        raise DataError(
            f"The format custom cannot read rows by a template of {given}.",
            hint="`template` needs user and assistant (and may have system), or prompt and completion, or text.",
        )
    parsed = {role: _parse(role, text) for role, text in template.items()}
    fields = dict.fromkeys(name for pieces in parsed.values() for _, name in pieces if name is not None)
    return Format(
        "custom",
        shape[2],
        "columns put together by format strings",
        {name: Column(True, "named in the template") for name in fields},
        never,
        partial(_convert, parsed, shape[2]),
        {},
    )


def _fill(pieces: list[Piece], record: Mapping[str, Any]) -> str:
    text = []
    for before, name in pieces:
        text.append(before)
        if name is not None:
            value = record.get(name)
            if value is None:
                raise RowProblem("missing column", name)
            text.append(as_text(value, name))
    return "".join(text)


def _convert(
    parsed: Mapping[str, list[Piece]],
    kind: type,
    record: Mapping[str, Any],
    _: Reading = AS_USUAL,
    /,
) -> Item:
    texts = {role: _fill(pieces, record) for role, pieces in parsed.items()}
    if kind is Text:
        if not texts["text"].strip():
            raise RowProblem("empty text")
        return Text(texts["text"])
    answer = "assistant" if kind is Conversation else "completion"
    if not texts[answer].strip():
        raise RowProblem("empty answer")
    if kind is Segments:
        parts = [(texts["prompt"], False), (texts["completion"], True)]
        return Segments([part for part in parts if part[0]])
    messages: list[Message] = [
        {"role": role, "content": texts[role]} for role in ("system", "user", "assistant") if role in texts
    ]
    return Conversation(messages)


def _unbound(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Item:
    return custom_format(reading.template).convert(record, reading)


CUSTOM_FORMAT = Format(
    "custom",
    Conversation,
    "any columns, put together by the format strings of `template`",
    {},
    never,
    _unbound,
    {"country": "France", "capital": "Paris"},
    reading=Reading(template=EXAMPLE_TEMPLATE),
)
