"""Formats: what the columns of a row mean, and how it becomes a conversation or plain text.

`FORMATS` is the whole list; a format is a row of it. `auto` asks each format, in the order of the table,
whether the columns are its own; it never looks at values, so that all rows of a source are read alike.
Rejected: guessing per row. A file whose rows change meaning half-way is a mistake that should be seen.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.contracts.errors import DataError
from tunesmith.data.chat import RowProblem as RowProblem
from tunesmith.data.chat import as_text, read_messages, read_tools


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form (see `chat.py`) and the signatures of the tools that may be called."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Text:
    """Plain text, all of which trains."""

    text: str


@dataclass(frozen=True)
class Column:
    """A column of a format: whether a row must have it, what it holds, and names it also goes by."""

    required: bool
    help: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """How rows are laid out.

    Attributes:
        name: its name in the settings.
        summary: one sentence.
        columns: the format's own names of its columns.
        detect: whether a row with these columns is probably of this format.
        convert: one row to what it says; raises `RowProblem`.
        example: a row of this format.
    """

    name: str
    summary: str
    columns: Mapping[str, Column]
    detect: Callable[[Collection[str]], bool]
    convert: Callable[[Mapping[str, Any]], Conversation | Text]
    example: Mapping[str, Any]


_ALPACA = {
    "instruction": Column(True, "what the user asks"),
    "output": Column(True, "the answer that trains", ("response",)),
    "input": Column(False, "text that the instruction is about, put below it", ("context",)),
    "system": Column(False, "the system prompt"),
    "history": Column(False, "earlier turns, a list of [user, assistant]"),
}
_CHAT = {
    "messages": Column(
        True, "list of {role, content}, or ShareGPT's {from, value}", ("conversations", "conversation")
    ),
    "tools": Column(False, "signatures of the tools, a list or a JSON string"),
    "system": Column(False, "the system prompt, where it is not the first message"),
}
_PAIR = {
    "prompt": Column(True, "what the user asks", ("question", "query", "instruction", "input")),
    "response": Column(True, "the answer that trains", ("answer", "completion", "output")),
    "system": Column(False, "the system prompt"),
}
_TEXT = {"text": Column(True, "plain text, all of which trains", ("content",))}

_PREFERENCE = frozenset(
    {"chosen", "rejected", "chosen_messages", "rejected_messages", "kto_tag", "label", "score_chosen"}
)
"""Columns of preference data: such rows hold answers that must not be imitated."""


def _take(record: Mapping[str, Any], columns: Mapping[str, Column], name: str) -> Any:
    """The value of a column under its own name or an alias; None where the row has neither."""
    return next((record[key] for key in (name, *columns[name].aliases) if record.get(key) is not None), None)


def _need(record: Mapping[str, Any], columns: Mapping[str, Column], name: str) -> Any:
    value = _take(record, columns, name)
    if value is None:
        raise RowProblem("missing column", name)
    return value


def _has(keys: Collection[str], columns: Mapping[str, Column], name: str) -> bool:
    return any(key in keys for key in (name, *columns[name].aliases))


def _system(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = record.get("system")
    return [{"role": "system", "content": as_text(text, "system")}] if text not in (None, "") else []


def _exchange(question: str, answer: str) -> list[dict[str, Any]]:
    if not answer.strip():
        raise RowProblem("empty answer")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _detect_alpaca(keys: Collection[str]) -> bool:
    # `instruction` and `response` alone are a pair; with an input they would lose it there
    paired = "output" in keys or ("response" in keys and _has(keys, _ALPACA, "input"))
    return "instruction" in keys and paired and not _PREFERENCE.intersection(keys)


def _convert_alpaca(record: Mapping[str, Any]) -> Conversation:
    messages = _system(record)
    history = record.get("history") or []
    if not isinstance(history, list):
        raise RowProblem("malformed history", "history is not a list")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowProblem("malformed history", "a turn is not [user, assistant]")
        messages += _exchange(as_text(turn[0], "history"), as_text(turn[1], "history"))
    question = as_text(_need(record, _ALPACA, "instruction"), "instruction")
    extra = _take(record, _ALPACA, "input")
    if extra not in (None, ""):
        question = f"{question}\n\n{as_text(extra, 'input')}"
    answer = as_text(_need(record, _ALPACA, "output"), "output")
    return Conversation(messages + _exchange(question, answer))


def _detect_chat(keys: Collection[str]) -> bool:
    return _has(keys, _CHAT, "messages") and not _PREFERENCE.intersection(keys)


def _convert_chat(record: Mapping[str, Any]) -> Conversation:
    messages = read_messages(_need(record, _CHAT, "messages"))
    system = _system(record)
    if system and messages[0]["role"] == "system":
        if messages[0]["content"] != system[0]["content"]:
            messages[0]["content"] = f"{system[0]['content']}\n\n{messages[0]['content']}"
    else:
        messages = system + messages
    return Conversation(messages, read_tools(record.get("tools")))


def _detect_pair(keys: Collection[str]) -> bool:
    paired = _has(keys, _PAIR, "prompt") and _has(keys, _PAIR, "response")
    return paired and not _PREFERENCE.intersection(keys)


def _convert_pair(record: Mapping[str, Any]) -> Conversation:
    question = as_text(_need(record, _PAIR, "prompt"), "prompt")
    answer = as_text(_need(record, _PAIR, "response"), "response")
    return Conversation(_system(record) + _exchange(question, answer))


def _detect_text(keys: Collection[str]) -> bool:
    return _has(keys, _TEXT, "text") and not _PREFERENCE.difference({"label"}).intersection(keys)


def _convert_text(record: Mapping[str, Any]) -> Text:
    text = as_text(_need(record, _TEXT, "text"), "text")
    if not text.strip():
        raise RowProblem("empty text")
    return Text(text)


_TEXT_FORMAT = Format(
    "text",
    "plain text, as in pretraining",
    _TEXT,
    _detect_text,
    _convert_text,
    {"text": "Crepes are thin pancakes from Brittany."},
)

FORMATS: dict[str, Format] = {
    "alpaca": Format(
        "alpaca",
        "an instruction, an optional input and an output",
        _ALPACA,
        _detect_alpaca,
        _convert_alpaca,
        {"instruction": "Translate into French.", "input": "Good morning", "output": "Bonjour"},
    ),
    "chat": Format(
        "chat",
        "a list of messages, OpenAI's or ShareGPT's, with or without tools",
        _CHAT,
        _detect_chat,
        _convert_chat,
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
    ),
    "pair": Format(
        "pair",
        "a prompt and a response",
        _PAIR,
        _detect_pair,
        _convert_pair,
        {"prompt": "What is 6 times 7?", "response": "42"},
    ),
    "text": _TEXT_FORMAT,
    "completion": _TEXT_FORMAT,
}
"""Every format by its name; `completion` is another name of `text`. `auto` tries them in this order."""


def resolve_format(name: str, columns: Mapping[str, str], first_record: Mapping[str, Any]) -> Format:
    """The format of a source.

    Args:
        name: a key of `FORMATS`, or `auto` to decide by the columns.
        columns: renames, the format's own name of a column to its name in the data.
        first_record: a row of the data, or the columns of several rows together.

    Raises:
        DataError: for an unknown name, a rename of a column that the data lacks, a rename to a name that the
            format lacks, and where no format fits or the named one misses a column.
    """
    _check_renames(columns, first_record)
    keys = _rename(first_record, columns).keys()
    if name == "auto":
        found = next((row for row in FORMATS.values() if row.detect(keys)), None)
        if found is None:
            raise _no_match(first_record)
    else:
        named = FORMATS.get(name)
        if named is None:
            raise DataError(f"There is no format {name!r}.", hint=_nearest(name, ["auto", *FORMATS]))
        found = named
        missing = [
            key
            for key, column in found.columns.items()
            if column.required and not _has(keys, found.columns, key)
        ]
        if missing:
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
    return found


def convert(format: Format, record: Mapping[str, Any], columns: Mapping[str, str]) -> Conversation | Text:  # noqa: A002
    """One row in its meaning, after the renames.

    Raises:
        RowProblem: where the row cannot train.
    """
    return format.convert(_rename(record, columns) if columns else record)


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


def _no_match(record: Mapping[str, Any]) -> DataError:
    formats = ", ".join(_needs(row) for name, row in FORMATS.items() if name == row.name)
    preference = sorted(_PREFERENCE.intersection(record))
    if preference:
        return DataError(
            f"No format matches the columns {_listed(record)}: {preference[0]!r} marks preference data.",
            hint=f"Name a format to train on one answer of each row anyway; the formats are {formats}.",
        )
    required = [
        (own, there)
        for row in FORMATS.values()
        for own, column in row.columns.items()
        if column.required
        for there in difflib.get_close_matches(own, [str(key) for key in record], n=1, cutoff=0.7)
    ]
    rename = f" such as `columns: {{{required[0][0]}: {required[0][1]}}}`" if required else ""
    return DataError(
        f"No format matches the columns {_listed(record)}.",
        hint=f"The formats and what they need: {formats}. Name the columns with `columns`{rename}.",
    )
