"""A row between its meaning and its batch: `Rendered` text with spans, `Encoded` tokens with a mask.

Also the notes that say what was done to a row, and the small functions that make and cut spans.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.adapt import REASONING_KEYS, Message
from tunesmith.data.chat import RowProblem
from tunesmith.data.formats import Segments
from tunesmith.data.masks import Turn, merge
from tunesmith.data.template import Span

NOTE_PREFIXES = "the template hides where turns stand: found by rendering every prefix, which is slow"
NOTE_CHATML = (
    "ChatML's <|im_start|> and <|im_end|> are not tokens of this tokenizer: they train as plain text"
)
NOTE_DATE = "the template writes a date: that of data.date"
NOTE_THINKING = (
    "the template drops the reasoning of earlier turns, as a server will: they train without it "
    "(data.prefix_mismatch: split makes a document of each turn, which keeps it)"
)
NOTE_SPLIT = "split at its turns, each a document as a server would show it"
NOTE_SOME = "some of its turns do not fit and were left out"
NOTE_CONTEXT = "a server's prompt is not the beginning of some turns: they are context"
NOTE_ALLOWED = "a server's prompt is not the beginning of some turns that train"
NOTE_CUT = "the answer would merge with the end of the prompt: its tokens were cut there"
NOTE_LITERAL = "control tokens in the text of a user, a tool or the system were kept as plain text"
NOTE_WEIGHT = "weights of messages other than 0 and 1 count as 1"

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rendered:
    """The text of a row.

    Attributes:
        text: what the model sees.
        spans: supervised characters, in order, not overlapping.
        messages: the span of each message; empty where it is unknown. None for plain text.
        notes: what was moved or is remarkable, for reports.
        plain: plain text, which gets the tokenizer's special tokens; a template writes them itself.
        turns: the assistant's turns that train; a server's prompt ends where each `start`s.
        literal: pieces of the text in which control tokens are plain text.
        tokens: of a row that was tokenised elsewhere: ids and whether each is a target.
    """

    text: str
    spans: list[Span]
    messages: list[Span] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    plain: bool = False
    turns: Sequence[Turn] = ()
    literal: Sequence[Span] = ()
    tokens: tuple[list[int], list[bool]] | None = None


@dataclass(frozen=True)
class Encoded:
    """The tokens of a row.

    Attributes:
        ids: int32 `[T]`.
        trained: bool `[T]`, whether the token is a target. Never the first one: nothing predicts it.
        offsets: int32 `[T, 2]`, the characters behind each token.
        notes: what is remarkable about the tokens, for reports.
        problem: why the row is refused, found out on its tokens.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int32]
    notes: tuple[str, ...] = ()
    problem: RowProblem | None = None


def without_surrogates(text: str) -> str:
    """The text with lone surrogates, which no tokenizer takes, replaced one for one."""
    return _SURROGATE.sub("\ufffd", text)


def join(item: Segments) -> Rendered:
    """Labelled parts as one text; equal labels in a row are one span."""
    pieces, spans, position = [], [], 0
    for part, trained in item.parts:
        part = without_surrogates(part)
        if trained:
            spans.append((position, position + len(part)))
        position += len(part)
        pieces.append(part)
    return Rendered("".join(pieces), merge(spans))


def take_flags(messages: Sequence[Message]) -> tuple[str, ...]:
    """Take `train` and `weight` out of the messages, before a template or a proof looks at their keys."""
    weights = [message.pop("weight", None) for message in messages]
    for message in messages:
        message.pop("train", None)
    return (NOTE_WEIGHT,) if any(weight not in (None, 0, 1) for weight in weights) else ()


def without(length: int, out: Sequence[Span]) -> list[Span]:
    """All of a text but some spans."""
    bounds = [0, *[place for span in merge(out) for place in span], length]
    return merge(zip(bounds[::2], bounds[1::2], strict=True))


def without_turns(spans: Sequence[Span], turns: Sequence[Turn]) -> list[Span]:
    """Spans that do not lie in one of the turns."""
    return [span for span in spans if not any(turn.begin <= span[0] < turn.end for turn in turns)]


def lost_reasoning(message: Message, written: str) -> bool:
    """Whether a turn has reasoning that the template did not write."""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    if reasoning is not None:
        return reasoning.strip() not in written
    return "</think>" in message["content"] and "</think>" not in written
