"""Where turns stand under a template that hides it (a loop over indices, a macro), in linear time.

The conversation is rendered once more with a mark on either side of each content. Taking the marks out must
give the first text back, or nothing was learned; then each content has its place, and what stands between two
contents is the end of one turn and the header of the next. Both are known from probes of fixed size. Rejected as
the rule: rendering every prefix, which is quadratic. It remains for short conversations that cannot be marked,
such as a turn of tool calls without content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.data.chat import RowProblem
from tunesmith.data.masks import Message
from tunesmith.data.template import ChatTemplate, Span

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters, which no text may hold."""

_MOST_PREFIXES = 32
"""Turns up to which prefixes are rendered: 32 cost about as much as a conversation of 500."""


class HiddenTurns:
    """Finds turns of one template by marks.

    Args:
        template: the compiled template.
        variables: what every rendering gets.
        headers: what may stand in front of the assistant's text.
        eos: the tokenizer's EOS.
    """

    def __init__(
        self, template: ChatTemplate, variables: Mapping[str, Any], headers: Sequence[str], eos: str | None
    ) -> None:
        self._template = template
        self._variables = variables
        self._headers = headers
        self._eos = eos or ""
        self._trailer = self._find_trailer()

    def _render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> str:
        return self._template.render(messages, tools=tools, variables=self._variables).text

    def _find_trailer(self) -> str | None:
        """What is written behind an assistant's text inside a conversation; None where no probe tells."""
        talk: list[Message] = [
            {"role": role, "content": f"tunesmith {number}"}
            for number, role in enumerate(("user", "assistant", "user"))
        ]
        try:
            short, long = self._render(talk[:2], None), self._render(talk, None)
        except RowProblem:
            return None
        if not long.startswith(short):
            short = short.removesuffix(self._eos)
        place = short.find("tunesmith 1")
        if place < 0 or not long.startswith(short):
            return None
        return short[place + len("tunesmith 1") :]

    def spans(
        self,
        text: str,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        wanted: Sequence[int],
    ) -> tuple[list[Span], bool]:
        """The spans of the messages `wanted`, and whether prefixes had to be rendered.

        Raises:
            RowProblem: "template gives no assistant span".
        """
        found = self._by_marks(text, messages, tools, wanted)
        if found is not None:
            return found, False
        if len(wanted) > _MOST_PREFIXES:
            raise _no_span(f"it hides {len(wanted)} turns, and cannot be rendered with marks")
        return self._by_prefixes(text, messages, tools, wanted), True

    def _by_marks(
        self,
        text: str,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        wanted: Sequence[int],
    ) -> list[Span] | None:
        contents = [message["content"].strip() for message in messages]
        if self._trailer is None or not all(contents) or _OPEN in text or _CLOSE in text:
            return None
        marked = [
            {**message, "content": message["content"].replace(core, f"{_OPEN}{core}{_CLOSE}", 1)}
            for message, core in zip(messages, contents, strict=True)
        ]
        try:
            pieces = self._render(marked, tools).split(_OPEN)
        except RowProblem:
            return None
        bounds: list[Span] = []
        position = len(pieces[0])
        for piece in pieces[1:]:
            if piece.count(_CLOSE) != 1:
                return None
            bounds.append((position, position + piece.index(_CLOSE)))
            position += len(piece) - 1
        same = "".join(pieces).replace(_CLOSE, "") == text
        if not same or [text[start:end] for start, end in bounds] != contents:
            return None
        return self._around(text, bounds, messages, wanted)

    def _around(
        self, text: str, bounds: list[Span], messages: Sequence[Message], wanted: Sequence[int]
    ) -> list[Span] | None:
        """The turns around the contents at `bounds`, which are without their outer blanks."""
        spans: list[Span] = [(0, 0)] * len(bounds)
        trailer = self._trailer or ""
        for number in wanted:
            start, end = bounds[number]
            content = messages[number]["content"]
            lead = len(content) - len(content.lstrip())
            floor = bounds[number - 1][1] if number else 0
            begins = [
                place - len(header)
                for place in (start, start - lead)  # a template may trim, or not
                for header in self._headers
                if text.endswith(header, floor, place)
            ]
            while end < len(text) and text[end].isspace() and not text.startswith(trailer, end):
                end += 1
            last = number == len(bounds) - 1
            if not begins or not (last or text.startswith(trailer, end)):
                return None
            spans[number] = (begins[0], len(text) if last else end + len(trailer))
        return spans

    def _by_prefixes(
        self,
        text: str,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        wanted: Sequence[int],
    ) -> list[Span]:
        """Spans as the growth of the text from one prefix to the next."""

        def end_of(count: int) -> int:
            if count in (0, len(messages)):
                return len(text) if count else 0
            try:
                prefix = self._render(messages[:count], tools)
            except RowProblem as error:
                raise _no_span(f"it fails on the first {count} messages ({error.detail})") from error
            if not text.startswith(prefix):
                prefix = prefix.removesuffix(self._eos)
            if not text.startswith(prefix):
                raise _no_span(f"the first {count} messages are written differently on their own")
            return len(prefix)

        spans = [(0, 0)] * len(messages)
        for number in wanted:
            spans[number] = (end_of(number), end_of(number + 1))
            if spans[number][0] >= spans[number][1]:
                raise _no_span(f"message {number} is not written")
        return spans


def _no_span(detail: str) -> RowProblem:
    return RowProblem("template gives no assistant span", detail)
