"""A conversation with a result: its messages, what of them fits into the model's context, and the answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith.config.load_result import Loaded, only_base
from tunesmith.contracts.errors import UserError
from tunesmith.data.formats import RowProblem
from tunesmith.models.generate import Sampling, Stream, generate

Message = dict[str, Any]

_SHARE = 4
"""A question leaves at least a quarter of the context to its answer, or all of `max_tokens` where that is less."""


@dataclass(frozen=True, slots=True)
class Prompted:
    """What the model is shown.

    Attributes:
        ids: tokens of the prompt.
        left_out: messages at the beginning of the conversation that did not fit.
        most: tokens that the answer may have.
    """

    ids: list[int]
    left_out: int
    most: int


@dataclass
class ChatSession:
    """A conversation.

    Args:
        loaded: who answers.
        sampling: how.
        seed: of the random draws; each turn has its own, and repeats with the same conversation.
        system: the system prompt; None for none.

    Attributes:
        messages: turns of user and assistant so far.
    """

    loaded: Loaded
    sampling: Sampling
    seed: int = 0
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.messages.clear()

    def ask(self, question: str) -> Prompted:
        """Add a question, and the prompt for its answer; a question that cannot be asked is not added.

        Raises:
            UserError: it is longer than the context, or the template refuses the conversation.
        """
        self.messages.append({"role": "user", "content": question})
        try:
            return self._prompt()
        except UserError:
            self.messages.pop()
            raise

    def answer(self, prompted: Prompted, hand_on: Callable[[str], None], *, base: bool = False) -> str:
        """What the model answers; each piece of text is handed on as it is written.

        Args:
            base: answer with the adapter switched off.

        Raises:
            UserError: there is no base to answer.
        """
        loaded = self.loaded
        with only_base(loaded, base):
            (found,) = generate(
                loaded.model,
                loaded.tokenizer,
                [prompted.ids],
                sampling=replace(self.sampling, max_tokens=prompted.most),
                stop=loaded.stop,
                seeds=[self.seed + len(self.messages)],
                streamer=Stream(loaded.tokenizer, hand_on, loaded.stop.text),
            )
        return found.text

    def reply(self, text: str) -> None:
        """Add an answer to the conversation."""
        self.messages.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget the last question, which got no answer."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def save(self, path: Path) -> None:
        """Append the conversation to a file, as one row of `messages` that `tunesmith train` reads.

        Raises:
            UserError: nothing has been said, or the file cannot be written.
        """
        if not self.messages:
            raise UserError("There is nothing to save yet.", hint="Say something first.")
        row = json.dumps({"messages": self._whole(self.messages)}, ensure_ascii=False)
        try:
            with path.open("a", encoding="utf-8") as stream:
                stream.write(row + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from error

    def _whole(self, messages: list[Message]) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *messages]

    def _prompt(self) -> Prompted:
        """The prompt, without the oldest turns where all of them do not fit."""
        context = self.loaded.context
        start = 0
        while True:
            shown = self.messages[start:]
            try:
                ids = self.loaded.prompter.ids(self._whole(shown))
            except RowProblem as problem:
                raise UserError(
                    f"The chat template refuses this conversation: {problem.detail}.",
                    hint="Begin anew with /reset.",
                ) from problem
            if context is None:
                return Prompted(ids, start, self.sampling.max_tokens)
            room = context - len(ids)
            if room >= min(self.sampling.max_tokens, context // _SHARE):
                return Prompted(ids, start, min(self.sampling.max_tokens, room))
            following = [
                n for n in range(start + 1, len(self.messages)) if self.messages[n]["role"] == "user"
            ]
            if following:
                start = following[0]
            elif room > 0:
                return Prompted(ids, start, min(self.sampling.max_tokens, room))
            else:
                raise UserError(
                    f"This question has {len(ids):,} tokens with all around it, and the model takes {context:,}.",
                    hint="Ask in fewer words.",
                )
