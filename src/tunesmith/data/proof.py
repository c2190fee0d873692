"""The prefix proof: a row trains on nothing that a server would not show.

For each turn that trains, the server's prompt (the messages before it and a generation prompt) has to be the
beginning of the row. Where it is not, the model learns to go on from a text that it will never see: a template
that strips the reasoning of earlier turns but opens a thinking block in its prompt, or one that writes the tools
in front of the last question.

Rendering the prompt of each turn of each row would cost quadratic time in long rows. What a template does
depends on the shape of a conversation: its roles, which keys its messages have, and the few things that the
template itself looks for in a text (`'</think>' in content`). So each shape is proved once, by rendering, and
remembered. In a conversation of many turns each kind of turn is proved once: the shapes around it and whether it
stands before or behind the last question. The tokens at the seam are compared in every row (`seams.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunesmith.data.chat import RowProblem
from tunesmith.data.masks import Message, Turn
from tunesmith.data.template import ChatTemplate

REASON = "prompt is not a prefix"
"""Under what rows are counted that fail."""

_EVERY_TURN = 8
"""Trained turns up to which each of a row's prompts is rendered, when its shape is new."""

_MOST_SHAPES = 1 << 14


class PrefixProof:
    """Proves prompts of one template.

    Args:
        template: the compiled template.
        variables: what every rendering gets, such as `bos_token`.
        describe: says of a prompt and a text where they part.

    Attributes:
        shapes: number of shapes that were proved by rendering.
    """

    def __init__(
        self, template: ChatTemplate, variables: Mapping[str, Any], describe: Callable[[str, str], str]
    ) -> None:
        self._template = template
        self._describe = describe
        self._variables = variables
        self._needles = template.needles
        self._kinds: dict[tuple[Any, ...], int] = {}
        self._proved: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self.shapes = 0

    def _shape(self, message: Message) -> int:
        content = message["content"]
        shape = (
            message["role"],
            *[key for key, value in message.items() if value],
            len(message.get("tool_calls") or ()),
            content.strip() == "",
            *[needle in content for needle in self._needles],
        )
        return self._kinds.setdefault(shape, len(self._kinds))

    def prompts(
        self,
        text: str,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None,
        turns: Sequence[Turn],
    ) -> list[int | RowProblem]:
        """For each turn the length of its prompt in `text`, or why the prompt is not the beginning of it."""
        shapes = tuple([self._shape(message) for message in messages])
        headers = tuple([text[turn.begin : turn.start] for turn in turns])
        key = (shapes, len(tools or ()), tuple([turn.number for turn in turns]), headers)
        extras = self._proved.get(key)
        if extras is not None and all(map(text.startswith, extras, [turn.start for turn in turns])):
            return [turn.start + len(extra) for turn, extra in zip(turns, extras, strict=True)]
        self.shapes += 1
        classes = _kinds_of_turns(shapes, messages, turns)
        known: dict[tuple[Any, ...], int | RowProblem] = {}
        found: list[int | RowProblem] = []
        for turn, kind in zip(turns, classes, strict=True):
            if kind not in known:
                result = self._prompt(text, messages, tools, turn)
                known[kind] = result if isinstance(result, RowProblem) else result - turn.start
            extra = known[kind]
            found.append(extra if isinstance(extra, RowProblem) else turn.start + extra)
        self._remember(key, text, turns, found)
        return found

    def _remember(
        self, key: tuple[Any, ...], text: str, turns: Sequence[Turn], found: Sequence[int | RowProblem]
    ) -> None:
        """Keep a proof that holds for every turn; what a prompt adds to the header has to be there again."""
        extras = []
        for turn, length in zip(turns, found, strict=True):
            if isinstance(length, RowProblem) or length < turn.start:
                return
            extras.append(text[turn.start : length])
        if len(self._proved) >= _MOST_SHAPES:
            self._proved.clear()
        self._proved[key] = tuple(extras)

    def _prompt(
        self, text: str, messages: Sequence[Message], tools: list[dict[str, Any]] | None, turn: Turn
    ) -> int | RowProblem:
        if turn.number == 0:
            return turn.start  # nobody asked: there is no prompt to compare with
        try:
            prompt = self._template.render(
                messages[: turn.number], tools=tools, variables=self._variables, add_generation_prompt=True
            ).text
        except RowProblem as error:
            return RowProblem(REASON, f"message {turn.number}: the template fails on it ({error.detail})")
        if text.startswith(prompt):
            return len(prompt)
        return RowProblem(REASON, f"message {turn.number}: {self._describe(prompt, text)}")


def _kinds_of_turns(
    shapes: Sequence[int], messages: Sequence[Message], turns: Sequence[Turn]
) -> list[tuple[Any, ...]]:
    """For each turn what decides how its prompt is written; each its own where there are few."""
    if len(turns) <= _EVERY_TURN:
        return [(turn.number,) for turn in turns]
    last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=0)
    return [
        (
            *shapes[max(0, turn.number - 2) : turn.number + 2],
            turn.number < 3,
            turn.number > last,
            turn.number == turns[-1].number,
            turn.start - turn.begin,
        )
        for turn in turns
    ]
