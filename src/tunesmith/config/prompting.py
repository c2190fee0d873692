"""From messages to the tokens that a server would show a model, and what ends the model's turn.

The template is the tokenizer's own, which a run saves beside its result, rendered as in training: in the sandbox,
with the day of the run, and with what the template cannot write moved into what it can (`data.adapt`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from tunesmith.contracts.errors import DataError
from tunesmith.data.adapt import adapt, probe
from tunesmith.data.formats import Conversation, RowProblem
from tunesmith.data.render import resolve_template
from tunesmith.data.template import FIXED_DATE, ChatTemplate

_QUESTION, _ANSWER = "tunesmith question", "tunesmith answer"


class Prompter:
    """Writes prompts with the chat template of a tokenizer.

    Args:
        tokenizer: whose template is taken; ChatML where it has none.
        date: the day that the template writes, as year-month-day; None takes that of runs which name none.

    Attributes:
        has_template: whether the tokenizer has a template of its own.

    Raises:
        DataError: the template is not valid Jinja, or writes no question.
    """

    def __init__(self, tokenizer: Any, date: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._variables = dict(tokenizer.special_tokens_map)
        self.has_template = bool(tokenizer.chat_template)
        day = datetime.fromisoformat(date or FIXED_DATE)
        self._template = ChatTemplate(resolve_template("auto", tokenizer), day)
        self._can = probe(self._template, self._variables)
        try:
            written = self.text([{"role": "user", "content": _QUESTION}])
        except RowProblem as problem:
            raise DataError(f"The chat template cannot write a question: {problem.detail}.") from problem
        if _QUESTION not in written:
            raise DataError("The chat template writes nothing of a user's question.")

    def text(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """The text of a prompt.

        Raises:
            RowProblem: "template error", where the template refuses the messages.
        """
        item = Conversation([dict(message) for message in messages], [dict(t) for t in tools or ()] or None)
        adapted, shown, _ = adapt(item, self._can)
        trace = self._template.render(
            adapted, tools=shown, variables=self._variables, add_generation_prompt=True
        )
        return trace.text

    def ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """The tokens of a prompt.

        Raises:
            RowProblem: "template error".
        """
        ids: list[int] = self._tokenizer(self.text(messages, tools), add_special_tokens=False)["input_ids"]
        return ids

    def ends(self) -> tuple[tuple[int, ...], str]:
        """Tokens that end the assistant's turn in the template, and where it ends with none of them the text.

        A template may end its last turn otherwise than earlier ones: both ends count. What stands behind an answer
        is the end where it begins with a control token; where the tokenizer lacks the template's tokens the end is
        plain text.
        """
        turns = [
            {"role": role, "content": text}
            for role, text in (("user", _QUESTION), ("assistant", _ANSWER)) * 2
        ]
        try:
            written = self._template.render(turns, variables=self._variables).text
        except RowProblem:
            return (), ""
        control = {
            str(token): number
            for number, token in self._tokenizer.added_tokens_decoder.items()
            if str(token).strip()
        }
        tails = [piece.partition(_QUESTION)[0].strip() for piece in written.split(_ANSWER)[1:]]
        found = [[token for token in control if tail.startswith(token)] for tail in tails]
        ids = dict.fromkeys(control[max(tokens, key=len)] for tokens in found if tokens)
        return tuple(ids), "" if ids or not tails else tails[-1]
