"""From what a row says to tokens and their loss mask, both out of one rendering.

The text of a conversation is exactly what `tokenizer.apply_chat_template` writes. Its supervised part is
known by character (see `template.py`), the fast tokenizer gives the characters of each token, and a token
trains where it starts inside a supervised span. One pass, linear in the conversation. Rejected: rendering
every prefix (quadratic), and looking for the tokens of a header (a user can quote it).

Where an assistant's turn starts and ends (under `train_on: assistant`):

- It starts behind its header, the text that a generation prompt puts there when the model is asked to answer.
  In order: the whole generation prompt; its leading whole lines, longest first (a prompt that opens a
  thinking block, in front of a turn without one); what stands before the answer in a probe, if that is more
  than blanks. A turn that begins with none of them is supervised from its first character.
- It ends behind its last control token (a special or added token), if only blanks follow it in the turn;
  else with the turn. An EOS right behind the last turn belongs to it.
- `{% generation %}` blocks, where the template has them, are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.contracts.errors import DataError
from tunesmith.data.adapt import Message, adapt, probe
from tunesmith.data.chat import RowProblem
from tunesmith.data.formats import Conversation, Text
from tunesmith.data.template import CHATML, ChatTemplate, Span, Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = 1
"""Raise it when the same row would become other tokens: it invalidates every cached table."""

NOTE_PREFIXES = "the template hides where turns stand: found by rendering every prefix, which is slow"
NOTE_CHATML = (
    "ChatML's <|im_start|> and <|im_end|> are not tokens of this tokenizer: they train as plain text"
)
NOTE_DATE = "the template writes today's date"

_ANSWER = "tunesmith answer"
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
    """

    text: str
    spans: list[Span]
    messages: list[Span] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    plain: bool = False


@dataclass(frozen=True)
class Encoded:
    """The tokens of a row.

    Attributes:
        ids: int32 `[T]`.
        trained: bool `[T]`, whether the token is a target. Never the first one: nothing predicts it.
        offsets: int32 `[T, 2]`, the characters behind each token.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int32]


def resolve_template(setting: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a chat template.

    Args:
        setting: `auto` for the tokenizer's own (ChatML where it has none), `chatml`, or a Jinja file.
        tokenizer: whose template `auto` takes.

    Raises:
        DataError: where the file cannot be read.
    """
    if setting == "chatml":
        return CHATML
    if setting == "auto":
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default") or next(iter(own.values()), None)
        return own or CHATML
    path = Path(setting).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The chat template {path.absolute()} cannot be read ({getattr(error, 'strerror', error)}).",
            hint="data.template is auto, chatml, or the path of a Jinja file.",
        ) from error


class Renderer:
    """Renders rows with one tokenizer and one chat template.

    Args:
        tokenizer: a fast tokenizer.
        template: text of the chat template; None where there are no conversations.
        train_on: the assistant's turns, or every token.

    Raises:
        DataError: where the tokenizer is not a fast one, or the template is not valid Jinja.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        train_on: Literal["assistant", "all"] = "assistant",
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which cannot tell the place of a token.",
                hint="Use a model that comes with tokenizer.json (a fast tokenizer).",
            )
        self.tokenizer = tokenizer
        self.train_on = train_on
        self._eos = tokenizer.eos_token if isinstance(tokenizer.eos_token, str) else None
        self._eos_id = tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else None
        self._variables = dict(tokenizer.special_tokens_map)
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        self._control = tuple(token for token in added | {self._eos or ""} if token.strip())
        self.template = ChatTemplate(template) if template is not None else None
        if self.template is not None:
            self._can = probe(self.template, self._variables)
            self._headers = _find_headers(self.template, self._variables)
            self._notes = tuple(self._constant_notes(self.template))

    def _constant_notes(self, template: ChatTemplate) -> Iterable[str]:
        if template.source == CHATML and "<|im_end|>" not in self._control:
            yield NOTE_CHATML
        if "strftime_now" in template.names:
            yield NOTE_DATE

    @property
    def template_source(self) -> str | None:
        """Text of the chat template, None where there is none."""
        return self.template.source if self.template is not None else None

    def prompt(self, messages: Sequence[Message]) -> str:
        """What a server would show the model to have it answer `messages`.

        Raises:
            RowProblem: "template error".
            DataError: there is no chat template.
        """
        if self.template is None:
            raise DataError("There is no chat template to write a prompt with.")
        return self.template.render(messages, variables=self._variables, add_generation_prompt=True).text

    def fingerprint(self) -> str:
        """SHA-256 over all that decides which tokens a row becomes."""
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding"):  # set by whoever called the tokenizer last
            backend.pop(state, None)
        parts = {
            "version": CODE_VERSION,
            "template": self.template.source if self.template is not None else None,
            "train_on": self.train_on,
            "backend": backend,
            "special": self._variables,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def render(self, item: Conversation | Text) -> Rendered:
        """The text of a row and its supervised characters.

        Raises:
            RowProblem: "template error", or "template gives no assistant span".
            DataError: for a conversation where there is no template.
        """
        if isinstance(item, Text):
            text = _SURROGATE.sub("\ufffd", item.text)
            return Rendered(text, [(0, len(text))], plain=True)
        if self.template is None:
            raise DataError("The data holds conversations, but there is no chat template.")
        messages, tools, notes = adapt(item, self._can)
        trace = self.template.render(messages, tools=tools, variables=self._variables)
        notes = self._notes + notes
        spans = trace.messages
        if self.train_on == "all":
            supervised = [(0, len(trace.text))]
        elif trace.generation:
            supervised = _merge(trace.generation)
        else:
            if any(spans[number] == (0, 0) for number in _assistants(messages)):
                spans = self._spans_by_prefixes(self.template, messages, tools, trace)
                notes += (NOTE_PREFIXES,)
            supervised = self._supervised(trace.text, messages, spans)
        # one character for one, so the spans stay true
        return Rendered(_SURROGATE.sub("\ufffd", trace.text), supervised, spans, notes)

    def _supervised(self, text: str, messages: Sequence[Message], spans: Sequence[Span]) -> list[Span]:
        supervised = []
        for number in _assistants(messages):
            start, end = spans[number]
            last = number == len(messages) - 1
            header = next((header for header in self._headers if text.startswith(header, start, end)), "")
            body = text[start + len(header) : end]
            kept = body.rstrip()
            if last and self._eos and text.startswith(self._eos, end):
                end += len(self._eos)
            elif kept.endswith(self._control):
                end -= len(body) - len(kept)
            supervised.append((start + len(header), end))
        return _merge(supervised)

    def _spans_by_prefixes(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: list[dict[str, object]] | None,
        trace: Trace,
    ) -> list[Span]:
        """Spans of the assistant's turns as the growth of the text from one prefix to the next."""

        def end_of(count: int) -> int:
            if count in (0, len(messages)):
                return len(trace.text) if count else 0
            try:
                text = template.render(messages[:count], tools=tools, variables=self._variables).text
            except RowProblem as error:
                raise _no_span(f"it fails on the first {count} messages ({error.detail})") from error
            if not trace.text.startswith(text):
                text = text.removesuffix(self._eos or "")
            if not trace.text.startswith(text):
                raise _no_span(f"the first {count} messages are written differently on their own")
            return len(text)

        spans = [(0, 0)] * len(messages)
        for number in _assistants(messages):
            spans[number] = (end_of(number), end_of(number + 1))
            if spans[number][0] >= spans[number][1]:
                raise _no_span(f"message {number} is not written")
        return spans

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Tokens and mask of many rows, with one call of the tokenizer for each kind of text.

        Plain text gets the tokenizer's own special tokens, and EOS at its end if it has none there.
        """
        encoded: dict[int, Encoded] = {}
        for plain in (False, True):
            numbers = [number for number, row in enumerate(rendered) if row.plain == plain]
            if not numbers:
                continue
            batch = self.tokenizer(
                [rendered[number].text for number in numbers],
                add_special_tokens=plain,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for number, ids, offsets in zip(
                numbers, batch["input_ids"], batch["offset_mapping"], strict=True
            ):
                encoded[number] = self._encode(rendered[number], ids, offsets)
        return [encoded[number] for number in range(len(rendered))]

    def _encode(self, row: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
        if row.plain and self._eos_id is not None and ids[-1:] != [self._eos_id]:
            ids, offsets = [*ids, self._eos_id], [*offsets, (len(row.text), len(row.text))]
        offsets_T2 = np.asarray(offsets, dtype=np.int32).reshape(-1, 2)
        if row.plain or self.train_on == "all":
            trained_T = np.ones(len(ids), dtype=np.bool_)
        else:
            # the bounds of all spans in a row: a position behind an odd number of them is inside one
            bounds = np.asarray(row.spans, dtype=np.int64).reshape(-1)
            trained_T = np.searchsorted(bounds, offsets_T2[:, 0], side="right") % 2 == 1
        trained_T[:1] = False
        return Encoded(np.asarray(ids, dtype=np.int32), trained_T, offsets_T2)


def _assistants(messages: Sequence[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _merge(spans: Iterable[Span]) -> list[Span]:
    """The same characters as spans in order that neither are empty nor overlap."""
    merged: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _no_span(detail: str) -> RowProblem:
    return RowProblem("template gives no assistant span", detail)


def _find_headers(template: ChatTemplate, variables: Mapping[str, str]) -> tuple[str, ...]:
    """What may stand in front of an assistant's text in its turn, in the order in which it is tried."""
    question: Message = {"role": "user", "content": "tunesmith question"}
    headers: list[str] = []
    try:
        without = template.render([question], variables=variables).text
        prompted = template.render([question], variables=variables, add_generation_prompt=True).text
        prompt = prompted.removeprefix(without) if prompted.startswith(without) else ""
        lines = prompt.splitlines(keepends=True)
        headers = ["".join(lines[:count]) for count in range(len(lines), 0, -1)]
    except RowProblem:
        pass  # a template that refuses the probe has no generation prompt to go by
    try:
        trace = template.render([question, {"role": "assistant", "content": _ANSWER}], variables=variables)
        start, end = trace.messages[1]
        answer = trace.text.find(_ANSWER, start, end)
        if answer >= 0:
            headers.append(trace.text[start:answer])
    except RowProblem:
        pass  # as above
    return tuple(dict.fromkeys(header for header in headers if header.strip()))
