"""Rows of a file as prompts: what `tunesmith generate` answers.

A row is read by the formats of the data layer. Where it holds an answer of its own, as the rows of a test set do, the
prompt is what stands before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.data.formats import FORMATS, Conversation, Prompt, RowProblem, convert
from tunesmith.data.sources import open_source

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row of a file of prompts.

    Attributes:
        index: its number in the file, from 0.
        where: its place for people.
        messages: the prompt; empty where there is a problem.
        tools: signatures of tools, None where there are none.
        problem: why it cannot be answered; None where it can.
    """

    index: int
    where: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    problem: str | None


def prompt_rows(path: str, limit: int | None = None) -> Iterator[PromptRow]:
    """The rows of a file, folder, pattern or hub data set as prompts.

    Args:
        limit: stop behind so many rows.

    Raises:
        DataError: nothing has that name, or it is damaged so that rows cannot be located.
    """
    for row in open_source(path).rows():
        if limit is not None and row.index >= limit:
            return
        if row.record is None:
            yield PromptRow(row.index, row.where, [], None, row.problem)
            continue
        try:
            messages, tools = prompt_of(row.record)
        except RowProblem as problem:
            yield PromptRow(row.index, row.where, [], None, str(problem))
        else:
            yield PromptRow(row.index, row.where, messages, tools, None)


def prompt_of(record: Mapping[str, Any]) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Messages and tools of a prompt.

    Raises:
        RowProblem: the row holds none.
    """
    keys = {str(key).casefold() for key in record}
    alpaca, prompts = FORMATS["alpaca"], FORMATS["prompt"]
    if alpaca.detect(keys):
        item = convert(alpaca, record, {})
    elif any(name in keys for name in ("prompt", *prompts.columns["prompt"].aliases)):
        item = convert(prompts, record, {})
    else:
        text = record.get("text")
        if not isinstance(text, str) or not text.strip():
            raise RowProblem(
                "no prompt", f"needs `prompt`, `messages` or `text`; has {', '.join(map(str, record))}"
            )
        return [{"role": "user", "content": text}], None
    assert isinstance(item, Conversation | Prompt), "these two formats give these two kinds"
    messages = [_plain(message) for message in item.messages]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise RowProblem("no prompt", "nothing stands before the answer")
    return messages, item.tools


def _plain(message: Message) -> Message:
    """The message without the marks that say whether it trains."""
    return {key: value for key, value in message.items() if key not in ("train", "weight")}
