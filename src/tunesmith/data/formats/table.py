"""`FORMATS`, the whole list, and how the format of a source is found.

`auto` asks each format, in the order of the table, whether the columns are its own; it never looks at values,
so that all rows of a source are read alike. Rejected: guessing per row. A file whose rows change meaning
half-way is a mistake that should be seen.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from tunesmith.contracts.errors import DataError
from tunesmith.data.chat import finish_messages
from tunesmith.data.formats.compared import COMPARED_FORMAT, SCORED_FORMAT, chosen_format
from tunesmith.data.formats.contract import (
    KINDS,
    PREFERENCE_COLUMNS,
    SUPERVISED,
    Conversation,
    Format,
    Item,
    Labelled,
    Preference,
    Prompt,
    Stepwise,
    has,
)
from tunesmith.data.formats.conversation import CHAT_FORMAT, GLAIVE_FORMAT
from tunesmith.data.formats.custom import CUSTOM_FORMAT, custom_format
from tunesmith.data.formats.instruction import ALPACA_FORMAT, JOINED_FORMAT, PAIR_FORMAT, SEGMENTS_FORMAT
from tunesmith.data.formats.preference import (
    APPROVED_FORMAT,
    CHOSEN_FORMAT,
    LABELLED_FORMAT,
    PREFERENCE_FORMAT,
    PROMPT_FORMAT,
    STEPWISE_FORMAT,
)
from tunesmith.data.formats.text import TEXT_FORMAT
from tunesmith.data.formats.tokenized import TOKENS_FORMAT
from tunesmith.data.reading import AS_USUAL, Reading, RowProblem

FORMATS: dict[str, Format] = {
    "tokens": TOKENS_FORMAT,
    "alpaca": ALPACA_FORMAT,
    "chat": CHAT_FORMAT,
    "glaive": GLAIVE_FORMAT,
    "pair": PAIR_FORMAT,
    "segments": SEGMENTS_FORMAT,
    "input_output": SEGMENTS_FORMAT,
    "text": TEXT_FORMAT,
    "completion": TEXT_FORMAT,
    "prompt_completion": JOINED_FORMAT,
    "custom": CUSTOM_FORMAT,
    "chosen": CHOSEN_FORMAT,
    "approved": APPROVED_FORMAT,
    "preference": PREFERENCE_FORMAT,
    "compared": COMPARED_FORMAT,
    "scored": SCORED_FORMAT,
    "labelled": LABELLED_FORMAT,
    "stepwise": STEPWISE_FORMAT,
    "prompt": PROMPT_FORMAT,
}
"""Every format by its name; `completion` is another name of `text`, `input_output` of `segments`. `auto` tries
them in this order."""


def resolve_format(
    name: str,
    columns: Mapping[str, str],
    first_record: Mapping[str, Any],
    *,
    reading: Reading = AS_USUAL,
    kinds: Collection[type] = SUPERVISED,
) -> Format:
    """The format of a source.

    Args:
        name: a key of `FORMATS`, or `auto` to decide by the columns.
        columns: renames, the format's own name of a column to its name in the data.
        first_record: a row of the data, or the columns of several rows together.
        reading: how rows are read beyond their columns; the format carries it to `convert`.
        kinds: what rows may become, keys of `KINDS`.

    Raises:
        DataError: for an unknown name, a rename of a column that the data lacks, a rename to a name that the
            format lacks, where no format fits or the named one misses a column, where rows would become
            another kind than these, and for a template that cannot be used.
    """
    _check_renames(columns, first_record)
    keys = {name for key in _rename(first_record, columns) for name in (str(key), str(key).casefold())}
    found = _detect(keys, first_record, kinds) if name == "auto" else _named(name, reading, keys)
    if found.kind not in kinds:
        raise _wrong_kind(found, f"The format {name} gives", kinds)
    if reading.template and found.name != "custom":
        raise DataError(
            f"The format {found.name} has no template for its rows.",
            hint="`template` of a source belongs to `format: custom`.",
        )
    missing = [
        key for key, column in found.columns.items() if column.required and not has(keys, found.columns, key)
    ]
    if missing and name != "auto":
        raise DataError(
            f"The format {name} needs the column {missing[0]!r}; the data has {_listed(first_record)}.",
            hint=f"Name it with `columns: {{{missing[0]}: NAME_IN_THE_DATA}}`.",
        )
    unknown = [key for key in columns if key not in found.columns]
    if unknown:
        raise DataError(
            f"The format {found.name} has no column {unknown[0]!r} that could be renamed.",
            hint=_nearest(unknown[0], list(found.columns)),
        )
    return found if reading == found.reading else replace(found, reading=reading)


def _named(name: str, reading: Reading, keys: Collection[str]) -> Format:
    if name not in FORMATS:
        raise DataError(f"There is no format {name!r}.", hint=_nearest(name, ["auto", *FORMATS]))
    if name == "chosen":
        return chosen_format(keys)
    return custom_format(reading.template) if name == "custom" else FORMATS[name]


def _detect(keys: Collection[str], record: Mapping[str, Any], kinds: Collection[type]) -> Format:
    fitting = [row for row in FORMATS.values() if row.detect(keys)]
    found = next((row for row in fitting if row.kind in kinds), None)
    if found is not None:
        return found
    if fitting:
        columns = f"The columns {_listed(record)} are of the format {fitting[0].name}:"
        raise _wrong_kind(fitting[0], columns, kinds)
    raise _no_match(record, kinds)


def convert(format: Format, record: Mapping[str, Any], columns: Mapping[str, str]) -> Item:  # noqa: A002
    """One row in its meaning, after the renames.

    Raises:
        RowProblem: where the row cannot train.
    """
    record = _fold(_rename(record, columns) if columns else record, format)
    try:
        return _finish(format.convert(record, format.reading), format.reading)
    except RecursionError as error:
        raise RowProblem("nested too deeply") from error


def _fold(record: Mapping[str, Any], format: Format) -> Mapping[str, Any]:  # noqa: A002
    """The row with columns in capitals under the names of the format that they are."""
    strange = {
        key: folded
        for key in record
        if key not in format.names
        and (folded := str(key).casefold()) != key
        and folded in format.names
        and folded not in record
    }
    return {strange.get(key, key): value for key, value in record.items()} if strange else record


def _finish(item: Item, reading: Reading) -> Item:
    """The row with reasoning and calls taken out of its text, and marked by what trains."""
    if isinstance(item, Conversation):
        messages, tools = finish_messages(item.messages, item.tools, reading)
        return Conversation(messages, tools, item.train_last_only or reading.last_answer_only)
    if isinstance(item, Prompt):
        messages, tools = finish_messages(item.messages, item.tools, reading)
        return replace(item, messages=messages, tools=tools)
    if isinstance(item, Preference | Labelled):
        answers = [item.chosen, item.rejected] if isinstance(item, Preference) else [item.answer]
        whole = [finish_messages([*item.prompt, *answer], item.tools, reading) for answer in answers]
        # a system turn that held nothing but tools is gone, and the prompt is shorter by it
        cut = [len(messages) - len(answer) for (messages, _), answer in zip(whole, answers, strict=True)]
        prompt, tools = whole[0][0][: cut[0]], whole[0][1]
        read = [messages[count:] for (messages, _), count in zip(whole, cut, strict=True)]
        if isinstance(item, Preference):
            return replace(item, prompt=prompt, chosen=read[0], rejected=read[1], tools=tools)
        return replace(item, prompt=prompt, answer=read[0], tools=tools)
    if isinstance(item, Stepwise):
        return replace(item, prompt=finish_messages(item.prompt, None, reading)[0])
    return item


def _rename(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    taken = set(columns.values())
    renamed = {key: value for key, value in record.items() if key not in taken}
    return renamed | {own: record[there] for own, there in columns.items() if there in record}


def _check_renames(columns: Mapping[str, str], record: Mapping[str, Any]) -> None:
    for own, there in columns.items():
        if there not in record:
            raise DataError(
                f"`columns` takes {own!r} from {there!r}, which the data lacks; it has {_listed(record)}.",
                hint=_nearest(there, list(record)),
            )


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(str, names)) or "no columns"


def _nearest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"Did you mean {close[0]!r}?" if close else f"There are {', '.join(names)}."


def _needs(row: Format) -> str:
    return f"{row.name} ({', '.join(key for key, column in row.columns.items() if column.required)})"


def _wrong_kind(row: Format, what: str, kinds: Collection[type]) -> DataError:
    wanted = ", ".join(KINDS[kind] for kind in KINDS if kind in kinds)
    return DataError(
        f"{what} {KINDS[row.kind]}, and this run trains on {wanted}.",
        hint=row.instead or "Name another format, or columns, to read these rows otherwise.",
    )


def _no_match(record: Mapping[str, Any], kinds: Collection[type]) -> DataError:
    rows = [row for name, row in FORMATS.items() if name == row.name and row.kind in kinds and row.columns]
    formats = ", ".join(_needs(row) for row in rows)
    preference = sorted(PREFERENCE_COLUMNS.intersection(record))
    if preference:
        return DataError(
            f"No format matches the columns {_listed(record)}: {preference[0]!r} marks preference data.",
            hint=f"Name a format to train on one answer of each row anyway; the formats are {formats}.",
        )
    required = [
        (own, there)
        for row in rows
        for own, column in row.columns.items()
        if column.required
        for there in difflib.get_close_matches(own, [str(key) for key in record], n=1, cutoff=0.7)
    ]
    rename = f" such as `columns: {{{required[0][0]}: {required[0][1]}}}`" if required else ""
    return DataError(
        f"No format matches the columns {_listed(record)}.",
        hint=f"The formats and what they need: {formats}. Name the columns with `columns`{rename}.",
    )
