"""Plain text, as in pretraining."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tunesmith.data.formats.contract import PREFERENCE_COLUMNS, Column, Format, Text, has, need
from tunesmith.data.reading import AS_USUAL, Reading, RowProblem, as_text

_TEXT = {"text": Column(True, "plain text, all of which trains", ("content",))}


def _detect(keys: Collection[str]) -> bool:
    # a label beside a text is a class of that text, and does no harm
    return has(keys, _TEXT, "text") and PREFERENCE_COLUMNS.difference({"label"}).isdisjoint(keys)


def _convert(record: Mapping[str, Any], _: Reading = AS_USUAL, /) -> Text:
    text = as_text(need(record, _TEXT, "text"), "text")
    if not text.strip():
        raise RowProblem("empty text")
    return Text(text)


TEXT_FORMAT = Format(
    "text",
    Text,
    "plain text, as in pretraining",
    _TEXT,
    _detect,
    _convert,
    {"text": "Crepes are thin pancakes from Brittany."},
)
