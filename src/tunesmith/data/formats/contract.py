"""The words of this package: what a row can mean, and what a format is.

Eight kinds of meaning. Those of `SUPERVISED` train by imitation; the others hold answers that must not be
imitated, or none, and are for objectives that compare or reward. Rejected: one class with optional fields. A
reader would have to guess which are set, and a preference row would pass where a conversation is expected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from tunesmith.data.reading import AS_USUAL, Reading, RowProblem

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form (see `chat.py`) and the signatures of the tools that may be called.

    Attributes:
        messages: in their order; `train` and `weight` of a message decide whether and how much it trains.
        tools: signatures, None where there are none.
        train_last_only: only the last of the messages that would train does.
    """

    messages: list[Message]
    tools: Tools = None
    train_last_only: bool = False


@dataclass(frozen=True)
class Text:
    """Plain text, all of which trains."""

    text: str


@dataclass(frozen=True)
class Segments:
    """Text in parts that are joined as they are, without a chat template; each part trains or not."""

    parts: list[tuple[str, bool]]


@dataclass(frozen=True)
class Tokens:
    """A row that was tokenised elsewhere.

    Attributes:
        ids: token ids; not negative, not checked against a vocabulary.
        trained: for each token whether it is a target.
    """

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, of which the first is better.

    Attributes:
        prompt: the messages that both answers follow.
        chosen: the messages of the better answer, an assistant's first.
        rejected: those of the worse one.
        tools: signatures of the tools, None where there are none.
        margin: by how much the first is better, in the data's own unit; None where it does not say.
    """

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: Tools = None
    margin: float | None = None


@dataclass(frozen=True)
class Labelled:
    """One answer to a prompt, and whether it is a good one."""

    prompt: list[Message]
    answer: list[Message]
    label: bool
    tools: Tools = None


@dataclass(frozen=True)
class Stepwise:
    """Steps of an answer, and for each whether it is right."""

    prompt: list[Message]
    steps: list[str]
    labels: list[bool]


@dataclass(frozen=True)
class Prompt:
    """A prompt without an answer, and the columns from which a reward may be computed."""

    messages: list[Message]
    tools: Tools = None
    columns: Mapping[str, Any] = field(default_factory=dict)


Item = Conversation | Text | Segments | Tokens | Preference | Labelled | Stepwise | Prompt

KINDS: dict[type, str] = {
    Conversation: "conversations",
    Text: "plain text",
    Segments: "labelled segments of text",
    Tokens: "tokens",
    Preference: "pairs of a better and a worse answer",
    Labelled: "answers labelled good or bad",
    Stepwise: "labelled steps",
    Prompt: "prompts without an answer",
}
"""What rows of each kind are called in messages and in the docs."""

Supervised = Conversation | Text | Segments | Tokens
"""What `render.Renderer` makes tokens of."""

SUPERVISED: tuple[type, ...] = (Conversation, Text, Segments, Tokens)
"""The same as a tuple. A format of another kind is refused before any row is read."""


@dataclass(frozen=True)
class Column:
    """A column of a format: whether a row must have it, what it holds, and names it also goes by."""

    required: bool
    help: str
    aliases: tuple[str, ...] = ()


class Convert(Protocol):
    """One row to what it says; raises `RowProblem`."""

    def __call__(self, record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Item: ...


@dataclass(frozen=True)
class Format:
    """How rows are laid out.

    Attributes:
        name: its name in the settings.
        kind: what a row becomes, a key of `KINDS`.
        summary: one sentence.
        columns: the format's own names of its columns. Names are found in capitals, too.
        detect: whether a row with these columns is probably of this format.
        convert: one row to what it says; raises `RowProblem`.
        example: a row of this format.
        instead: what someone who wants to imitate answers can do with such rows; for the other kinds.
        reading: how rows are read beyond their columns; `resolve_format` sets it.
    """

    name: str
    kind: type
    summary: str
    columns: Mapping[str, Column]
    detect: Callable[[Collection[str]], bool]
    convert: Convert
    example: Mapping[str, Any]
    instead: str = ""
    reading: Reading = AS_USUAL

    @cached_property
    def names(self) -> frozenset[str]:
        """All names of its columns."""
        return frozenset(name for own, column in self.columns.items() for name in (own, *column.aliases))


PREFERENCE_COLUMNS = frozenset(
    {
        "chosen", "rejected", "chosen_messages", "rejected_messages", "chosen_response", "rejected_response",
        "preferred_output", "non_preferred_output", "response_j", "response_k", "score_chosen", "score_rejected",
        "kto_tag", "label",
    }
)  # fmt: skip
"""Columns of rows that hold answers which must not be imitated."""


def prefers(keys: Collection[str]) -> bool:
    """Whether a row with these columns holds answers that must not be imitated."""
    return not PREFERENCE_COLUMNS.isdisjoint(keys)


def take(record: Mapping[str, Any], columns: Mapping[str, Column], name: str) -> Any:
    """The value of a column under its own name or an alias; None where the row has neither."""
    value = record.get(name)
    if value is None:
        for alias in columns[name].aliases:
            value = record.get(alias)
            if value is not None:
                break
    return value


def need(record: Mapping[str, Any], columns: Mapping[str, Column], name: str) -> Any:
    """As `take`.

    Raises:
        RowProblem: "missing column" where the row has neither.
    """
    value = take(record, columns, name)
    if value is None:
        raise RowProblem("missing column", name)
    return value


def has(keys: Collection[str], columns: Mapping[str, Column], name: str) -> bool:
    """Whether a column is there under its own name or an alias."""
    return name in keys or any(alias in keys for alias in columns[name].aliases)


def never(_keys: Collection[str]) -> bool:
    """The detection of formats that must be named."""
    return False
