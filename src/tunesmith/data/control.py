"""Control tokens in the text of users, tools and system prompts stay text.

A user who writes `<|im_end|>` must not end a turn. Before rendering, each control string outside the
assistant's turns is replaced by characters of a private plane, one for one, so that neither the template nor a
search for headers can take it for its own; afterwards it is put back, and its piece of the text (from the control
token before it to the one behind it) is tokenised with control tokens switched off.

Rejected: escaping it by a blank inside, which changes what the model reads; and dropping the row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunesmith.data.chat import RowProblem
from tunesmith.data.formats import Conversation
from tunesmith.data.template import Span

_FIRST, _FILL = 0x100000, "\ufdd3"
_PLACEHOLDER = re.compile(f"[\U00100000-\U0010fffd]{_FILL}*")
_MOST_STRINGS = 0xFFFD


class ControlText:
    """Finds, hides and brings back the control strings of one tokenizer.

    Args:
        strings: the special tokens.

    Attributes:
        strings: those that are looked for, longest first.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = sorted((text for text in strings if text.strip()), key=lambda text: (-len(text), text))
        self.strings = self.strings[:_MOST_STRINGS]
        self._numbers = {text: number for number, text in enumerate(self.strings)}
        # sorted by length, so the longest of those that start at a place is taken, as tokenizers do
        self._pattern = re.compile("|".join(map(re.escape, self.strings))) if self.strings else None

    def spans(self, text: str) -> list[Span]:
        """Where control strings stand in a text."""
        return [match.span() for match in self._pattern.finditer(text)] if self._pattern else []

    def hide(self, conversation: Conversation) -> Conversation:
        """The conversation without control strings outside the assistant's turns; itself where it has none.

        Raises:
            RowProblem: "unsupported content", where such a row also holds characters of the private plane.
        """
        if self._pattern is None or not self._is_in(conversation):
            return conversation
        if _has_private([conversation.messages, conversation.tools]):
            raise RowProblem("unsupported content", "control tokens beside private characters")
        messages = [
            message
            if message["role"] == "assistant"
            else {key: value if key == "role" else self._hide(value) for key, value in message.items()}
            for message in conversation.messages
        ]
        return replace(conversation, messages=messages, tools=self._hide(conversation.tools))

    def _is_in(self, conversation: Conversation) -> bool:
        assert self._pattern is not None, "a tokenizer without control tokens was asked"
        for message in conversation.messages:
            if message["role"] != "assistant" and self._pattern.search(message["content"]):
                return True
        return any(self._pattern.search(text) for text in _texts(conversation.tools))

    def _hide(self, value: Any) -> Any:
        if isinstance(value, str):
            assert self._pattern is not None, "a tokenizer without control tokens was asked"
            return self._pattern.sub(self._placeholder, value)
        if isinstance(value, dict):
            return {self._hide(key): self._hide(item) for key, item in value.items()}
        return [self._hide(item) for item in value] if isinstance(value, list) else value

    def _placeholder(self, match: re.Match[str]) -> str:
        text = match.group()
        return chr(_FIRST + self._numbers[text]) + _FILL * (len(text) - 1)

    def show(self, text: str) -> tuple[str, list[Span]]:
        """The text with its control strings, and the pieces that are to be tokenised without control tokens."""
        hidden = [match.span() for match in _PLACEHOLDER.finditer(text)]
        bounds = [0, *[place for span in self.spans(text) for place in span], len(text)]
        pieces = [
            (start, end)
            for start, end in zip(bounds[::2], bounds[1::2], strict=True)
            if any(start <= first < end for first, _ in hidden)
        ]
        shown = _PLACEHOLDER.sub(self._show, text)
        assert len(shown) == len(text), "a template changed the placeholder of a control string"
        return shown, pieces

    def _show(self, match: re.Match[str]) -> str:
        number = ord(match.group()[0]) - _FIRST
        whole = number < len(self.strings) and len(self.strings[number]) == len(match.group())
        return self.strings[number] if whole else match.group()


def _texts(value: Any) -> list[str]:
    """All strings in a nested value, keys as well."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in _texts(part)]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _has_private(value: Any) -> bool:
    return any(_PLACEHOLDER.search(text) or _FILL in text for text in _texts(value))
