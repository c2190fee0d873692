"""Instructions: columns of questions and answers, and text of which a part trains.

Most data sets of this kind differ in the names of their columns only, so a variant is an alias and not a
function. A column has one use: where a set has `article` and `summary`, the article is what the user says;
where it has `question` as well, the article is what the question is about.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tunesmith.data.chat import ROLE_KEYS, read_messages
from tunesmith.data.formats.contract import (
    Column,
    Conversation,
    Format,
    Message,
    Segments,
    has,
    need,
    never,
    prefers,
    take,
)
from tunesmith.data.reading import AS_USUAL, Reading, RowProblem, as_flag, as_text, first_of, parse_json

SYSTEM = Column(False, "the system prompt", ("system_prompt", "system_message"))
_REASONING = Column(
    False,
    "what the assistant thinks before it answers",
    ("reasoning_content", "thinking", "complex_cot", "chain_of_thought"),
)
_CONTEXT = ("context", "passage", "article", "document")

ALPACA = {
    "instruction": Column(True, "what the user asks"),
    "output": Column(True, "the answer that trains", ("response",)),
    "input": Column(False, "text that the instruction is about, put below it", _CONTEXT),
    "system": SYSTEM,
    "history": Column(False, "earlier turns, a list of [user, assistant]"),
    "reasoning": _REASONING,
}
PAIR = {
    "prompt": Column(
        True,
        "what the user asks, a text or a list of messages",
        ("question", "query", "instruction", "input", "problem", "dialogue", "article", "document"),
    ),
    "response": Column(
        True,
        "the answer that trains, a text or a list of messages",
        ("solution", "answer", "completion", "output", "generation", "summary", "highlights"),
    ),
    "context": Column(
        False, "text that the prompt is about, put below it", ("passage", "article", "document")
    ),
    "system": SYSTEM,
    "reasoning": _REASONING,
}
_JOINED = {
    "prompt": Column(True, "text that does not train, or a list of messages"),
    "completion": Column(True, "text that trains and follows at once, or a list of messages"),
}
_SEGMENTS = {
    "segments": Column(True, "list of {text, label}; label says whether the text trains", ("input_output",))
}
_CHOICES = frozenset({"choices", "options"})
"""Columns without which such a question makes no sense, and which no format here reads."""


def system_message(record: Mapping[str, Any], columns: Mapping[str, Column]) -> list[Message]:
    """The system turn of a row that has its text in a column, or nothing."""
    text = take(record, columns, "system")
    if isinstance(text, list) and text and all(isinstance(part, Mapping) for part in text):
        return read_messages([{"role": "system", "content": text}], need_answer=False)  # as Anthropic has it
    return [{"role": "system", "content": as_text(text, "system")}] if text not in (None, "") else []


def _exchange(question: str, answer: str, reasoning: Any = None) -> list[Message]:
    if not answer.strip():
        raise RowProblem("empty answer")
    reply: Message = {"role": "assistant", "content": answer}
    if reasoning not in (None, ""):
        reply["reasoning_content"] = as_text(reasoning, "reasoning")
    return [{"role": "user", "content": question}, reply]


def _with_context(question: str, context: Any) -> str:
    return question if context in (None, "") else f"{question}\n\n{as_text(context, 'the context')}"


# ---------------------------------------------------------------- alpaca and pair


def _detect_alpaca(keys: Collection[str]) -> bool:
    # `instruction` and `response` alone are a pair; with an input they would lose it there
    paired = "output" in keys or ("response" in keys and has(keys, ALPACA, "input"))
    return "instruction" in keys and paired and not prefers(keys)


def convert_alpaca(record: Mapping[str, Any], _: Reading = AS_USUAL, /) -> Conversation:
    """An instruction, its input and its output, behind the turns of `history`."""
    messages = system_message(record, ALPACA)
    history = parse_json(record.get("history") or [], "malformed history", "history")
    if not isinstance(history, list):
        raise RowProblem("malformed history", "history is not a list")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowProblem("malformed history", "a turn is not [user, assistant]")
        messages += _exchange(as_text(turn[0], "history"), as_text(turn[1], "history"))
    question = as_text(need(record, ALPACA, "instruction"), "instruction")
    question = _with_context(question, take(record, ALPACA, "input"))
    answer = as_text(need(record, ALPACA, "output"), "output")
    return Conversation(messages + _exchange(question, answer, take(record, ALPACA, "reasoning")))


def detect_pair(keys: Collection[str]) -> bool:
    """Whether there are a prompt and a response, and no choices that they are about."""
    paired = has(keys, PAIR, "prompt") and has(keys, PAIR, "response")
    return paired and _CHOICES.isdisjoint(keys) and not prefers(keys)


def read_side(value: Any, role: str, what: str, reading: Reading = AS_USUAL) -> list[Message]:
    """A prompt or an answer as messages: of a text, one message of `role`; of a list, its messages."""
    if isinstance(value, Mapping) and value.get("messages") is not None:
        value = value["messages"]
    elif isinstance(value, Mapping) and first_of(value, ROLE_KEYS) is not None:
        value = [value]
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        return read_messages(value, reading, need_answer=role == "assistant")
    return [{"role": role, "content": as_text(value, what)}]


def convert_pair(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Conversation:
    """A prompt and a response; of lists of messages only those of the response train."""
    prompt, response = need(record, PAIR, "prompt"), need(record, PAIR, "response")
    system = system_message(record, PAIR)
    if isinstance(prompt, list | Mapping) or isinstance(response, list | Mapping):
        before = untrained(read_side(prompt, "user", "prompt", reading))
        after = read_side(response, "assistant", "response", reading)
        refuse_empty(after, "the response")
        return Conversation(system + before + after)
    context = take(record, PAIR, "context")
    if context is prompt:
        context = None  # one column has one use: here the article is what the user says
    question = _with_context(as_text(prompt, "prompt"), context)
    answer = as_text(response, "response")
    return Conversation(system + _exchange(question, answer, take(record, PAIR, "reasoning")))


def untrained(messages: list[Message]) -> list[Message]:
    """The messages with those of the assistant marked as not trained."""
    return [
        {**message, "train": False} if message["role"] == "assistant" else message for message in messages
    ]


def refuse_empty(messages: list[Message], what: str) -> None:
    """Refuse messages that do not end with an answer.

    Raises:
        RowProblem: "no messages", "no assistant turn" or "empty answer".
    """
    if not messages:
        raise RowProblem("no messages", what)
    last = messages[-1]
    if last["role"] != "assistant":
        raise RowProblem("no assistant turn", f"{what} does not end with an answer")
    if not any(last.get(key) for key in ("tool_calls", "reasoning_content")) and not last["content"].strip():
        raise RowProblem("empty answer", what)


# ---------------------------------------------------------------- text of which a part trains


def _convert_joined(record: Mapping[str, Any], _: Reading = AS_USUAL, /) -> Segments:
    prompt = as_text(need(record, _JOINED, "prompt"), "prompt")
    completion = as_text(need(record, _JOINED, "completion"), "completion")
    if not completion.strip():
        raise RowProblem("empty answer")
    return Segments([(prompt, False), (completion, True)] if prompt else [(completion, True)])


def _convert_segments(record: Mapping[str, Any], _: Reading = AS_USUAL, /) -> Segments:
    raw = parse_json(need(record, _SEGMENTS, "segments"), "malformed segments", "segments")
    if not isinstance(raw, list):
        raise RowProblem("malformed segments", "segments is not a list")
    parts = []
    for number, segment in enumerate(raw):
        if not isinstance(segment, Mapping) or segment.get("text") is None or segment.get("label") is None:
            raise RowProblem("malformed segments", f"segment {number} is not {{text, label}}")
        text = as_text(segment["text"], f"the text of segment {number}")
        if text:
            parts.append(
                (text, as_flag(segment["label"], "malformed segments", f"label of segment {number}"))
            )
    if not any(label and text.strip() for text, label in parts):
        raise RowProblem("empty answer", "no segment trains")
    return Segments(parts)


def _detect_segments(keys: Collection[str]) -> bool:
    return has(keys, _SEGMENTS, "segments") and not prefers(keys)


ALPACA_FORMAT = Format(
    "alpaca",
    Conversation,
    "an instruction, an optional input and an output",
    ALPACA,
    _detect_alpaca,
    convert_alpaca,
    {"instruction": "Translate into French.", "input": "Good morning", "output": "Bonjour"},
)
PAIR_FORMAT = Format(
    "pair",
    Conversation,
    "a prompt and a response, as texts or as messages of which those of the response train",
    PAIR,
    detect_pair,
    convert_pair,
    {"prompt": "What is 6 times 7?", "response": "42"},
)
JOINED_FORMAT = Format(
    "prompt_completion",
    Segments,
    "a text and its continuation, joined without a chat template; the continuation trains",
    _JOINED,
    never,
    _convert_joined,
    {"prompt": "6 times 7 is", "completion": " 42."},
)
SEGMENTS_FORMAT = Format(
    "segments",
    Segments,
    "texts with a label each, joined without a chat template; those labelled true train",
    _SEGMENTS,
    _detect_segments,
    _convert_segments,
    {"segments": [{"text": "6 times 7 is", "label": False}, {"text": " 42.", "label": True}]},
)
