"""Messages in one form: OpenAI's keys, whatever a data set calls its roles, parts and tool calls.

After `read_messages` a message has `role` (system, user, assistant or tool) and a string `content`, and where
the data has them `reasoning_content`, `tool_calls` (`{type: function, function: {name, arguments: dict}}`),
`tool_call_id` and `name`. This is what chat templates are written for. Two more keys are for the loss and no
template reads them: `train` (whether the message trains; without it, an assistant's does and others do not)
and `weight` (how much; 0 is not at all). Every other key is left behind.

`finish_messages` then takes out of the text what a template wants to write itself: reasoning and tool calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from tunesmith.data.reading import (
    AS_USUAL,
    Reading,
    as_flag,
    as_number,
    as_text,
    first_of,
    parse_json,
    without_nulls,
)
from tunesmith.data.reading import RowProblem as RowProblem
from tunesmith.data.tool_dialects import read_calls, read_dialect
from tunesmith.data.tool_dialects import read_tools as read_tools

Message = dict[str, Any]

_CALL = "call"
ROLES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": _CALL,
    "tool_call": _CALL,
}
"""Names of roles in the wild, in lower case, and the role they mean; `call` is an assistant's tool call."""

ROLE_KEYS = ("role", "from", "sender", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
TRAIN_KEYS = {"train": True, "training": True, "loss": True, "mask": False}
"""Keys that say whether a message trains, and the value that means it does."""
_DETAIL_KEYS = ("train_detail", "training_detail")
_MARKS = frozenset({*TRAIN_KEYS, *_DETAIL_KEYS, "weight", "loss_weight"})

EXCHANGES = (
    ("input", "output"),
    ("user", "assistant"),
    ("human", "assistant"),
    ("human", "bot"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
)
"""Keys of objects that hold a question and its answer at once, in place of two messages."""

_THINK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def _part_value(part: dict[str, Any]) -> Any:
    """What a content part holds: under `value`, `text`, or the name of its type."""
    value = first_of(part, ("value", "text", part["type"]))
    return "" if value is None else value


def _add_text(message: Message, part: dict[str, Any]) -> None:
    message["content"] += as_text(_part_value(part), "a text part")


def _add_reasoning(message: Message, part: dict[str, Any]) -> None:
    text = as_text(_part_value(part), "a reasoning part")
    message["reasoning_content"] = message.get("reasoning_content", "") + text


def _add_calls(message: Message, value: Any) -> None:
    message["tool_calls"] = [*message.get("tool_calls", []), *read_calls(value)]


def _add_call_part(message: Message, part: dict[str, Any]) -> None:
    _add_calls(message, _part_value(part))


def _add_tool_use(message: Message, part: dict[str, Any]) -> None:
    call = {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}
    _add_calls(message, call)


PARTS: dict[str, Callable[[Message, dict[str, Any]], None]] = {
    "text": _add_text,
    "input_text": _add_text,
    "output_text": _add_text,
    "reasoning": _add_reasoning,
    "thinking": _add_reasoning,
    "tool_call": _add_call_part,
    "tool_calls": _add_call_part,
    "function_call": _add_call_part,
    "tool_use": _add_tool_use,
}
"""Types of content parts and what they add to the message."""


def _read_content(message: Message, content: Any, what: str) -> None:
    """Add content to the message: a string, or a typed part, or a list of them."""
    if content is None:
        return
    if isinstance(content, dict) and isinstance(content.get("type"), str):
        content = [content]
    if isinstance(content, dict) and message["role"] == "tool":
        content = json.dumps(without_nulls(content), ensure_ascii=False)
    if not isinstance(content, list):
        message["content"] += as_text(content, what)
        return
    for part in content:
        if isinstance(part, str):
            message["content"] += part
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        add = PARTS.get(kind) if isinstance(kind, str) else None
        if add is None:
            raise RowProblem("unsupported content", f"{what} has a part of type {kind!r}; only text trains")
        add(message, part)


def _read_role(raw: dict[str, Any], reading: Reading, what: str) -> str:
    name = first_of(raw, (reading.role_key,) if reading.role_key else ROLE_KEYS)
    key = name.strip().lower() if isinstance(name, str) else ""
    role = ROLES.get(key)
    if reading.roles:
        role = next((means for own, means in reading.roles.items() if own.strip().lower() == key), role)
    if role is None:
        raise RowProblem(
            "unknown role", f"{what} has the role {name!r}; say what it is with `roles: {{{name}: user}}`"
        )
    return role


def read_message(raw: Any, number: int, reading: Reading = AS_USUAL) -> Message:
    """One message in the common form.

    Args:
        raw: an object with `role` and `content`, or `from` and `value`, or the keys of `reading`.
        number: its number in the conversation from 0, for reports.
        reading: names of keys and roles.

    Raises:
        RowProblem: where it is malformed.
    """
    what = f"message {number}"
    if not isinstance(raw, dict):
        raise RowProblem("malformed message", f"{what} is not an object")
    role = _read_role(raw, reading, what)
    content = first_of(raw, (reading.content_key,) if reading.content_key else CONTENT_KEYS)
    message: Message = {"role": "assistant" if role == _CALL else role, "content": ""}
    if role == _CALL:
        _add_calls(message, content)
    else:
        _read_content(message, content, what)
        if role == "assistant":
            _read_assistant(message, raw, what)
        elif content is None:
            raise RowProblem("not text", f"{what} has no content")
        for key in ("name", "tool_call_id"):
            if isinstance(raw.get(key), str):
                message[key] = raw[key]
    _read_training(message, raw, reading, what)
    return message


def _read_assistant(message: Message, raw: dict[str, Any], what: str) -> None:
    reasoning = next((raw[key] for key in REASONING_KEYS if raw.get(key)), None)
    if reasoning is not None:
        message["reasoning_content"] = as_text(reasoning, f"the reasoning of {what}")
    calls = raw.get("tool_calls") or raw.get("function_call")
    if calls:
        _add_calls(message, calls)
    if (
        not any(message.get(key) for key in ("tool_calls", "reasoning_content"))
        and not message["content"].strip()
    ):
        raise RowProblem("empty answer", what)


def _read_training(message: Message, raw: dict[str, Any], reading: Reading, what: str) -> None:
    """Whether the message trains and how much, where it says so itself."""
    if reading.train_key is None and _MARKS.isdisjoint(raw):
        return
    if any(raw.get(key) for key in _DETAIL_KEYS):
        raise RowProblem("unsupported content", f"{what} trains in parts; write it as segments")
    for key, trains in {reading.train_key: True}.items() if reading.train_key else TRAIN_KEYS.items():
        if raw.get(key) is not None:
            message["train"] = as_flag(raw[key], "bad train mark", f"`{key}` of {what}") == trains
            break
    # `weight` is OpenAI's and theirs for assistants only; `loss_weight` makes any message train
    for key in ("loss_weight", "weight") if message["role"] == "assistant" else ("loss_weight",):
        if raw.get(key) is not None:
            weight = as_number(raw[key], "bad weight", f"`{key}` of {what}")
            if weight < 0:
                raise RowProblem("bad weight", f"`{key}` of {what} is negative")
            message["weight"] = weight
            if message["role"] != "assistant" and weight > 0:
                message.setdefault("train", True)
            break


def _pair_up(turns: list[Any]) -> list[Any]:
    """Turns that alternate without roles (strings, or objects of a question and its answer) as messages."""
    if isinstance(turns[0], dict) and (turns[0].get("role") is not None or turns[0].get("from") is not None):
        return turns
    if len(turns) > 1 and all(isinstance(turn, str) for turn in turns):
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    messages: list[Any] = []
    for turn in turns:
        keys = None
        if isinstance(turn, dict) and first_of(turn, ROLE_KEYS) is None:
            keys = next((pair for pair in EXCHANGES if all(turn.get(key) is not None for key in pair)), None)
        if keys is None:
            messages.append(turn)
            continue
        if turn.get("system"):
            messages.append({"role": "system", "content": turn["system"]})
        messages.append({"role": "user", "content": turn[keys[0]]})
        messages.append({"role": "assistant", "content": turn[keys[1]]})
    return messages


_RESULT = "tool_result"


def _results_apart(raw: Any, reading: Reading) -> list[Any]:
    """A message whose content parts are results of tools, as Anthropic has it, as a message of the tool for each.

    What the user says beside them stays his own, before or behind them as it stands.
    """
    key = reading.content_key or "content"
    parts = raw.get(key) if isinstance(raw, dict) else None
    if isinstance(parts, dict):
        parts = [parts]
    if not isinstance(parts, list) or not any(map(_is_result, parts)):
        return [raw]
    messages: list[Any] = []
    for is_result, group in groupby(parts, key=_is_result):
        if not is_result:
            messages.append({**raw, key: list(group)})
            continue
        for part in group:
            result = {"role": "tool", "content": part.get("content") or ""}
            messages.append({**result, "tool_call_id": part.get("tool_use_id")})
    return messages


def _is_result(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == _RESULT


def read_messages(raw: Any, reading: Reading = AS_USUAL, *, need_answer: bool = True) -> list[Message]:
    """All messages of a conversation, in their order.

    Args:
        raw: a list of messages, or a JSON string of one.
        reading: names of keys and roles.
        need_answer: whether a conversation without an assistant's turn is refused.

    Raises:
        RowProblem: where there is none, none is the assistant's, or one is malformed.
    """
    messages = parse_json(raw, "malformed messages", "the list of messages")
    if not isinstance(messages, list):
        raise RowProblem("malformed messages", "the messages are not a list")
    if not messages:
        raise RowProblem("no messages")
    if reading.role_key is None:
        messages = _pair_up(messages)
    messages = [message for raw in messages for message in _results_apart(raw, reading)]
    read = [read_message(message, number, reading) for number, message in enumerate(messages)]
    if need_answer and all(message["role"] != "assistant" for message in read):
        raise RowProblem("no assistant turn")
    return read


def finish_messages(
    messages: Sequence[Message], tools: list[dict[str, Any]] | None, reading: Reading = AS_USUAL
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Messages with reasoning and tool calls taken out of the text, and marked by the roles that train.

    Args:
        messages: in the common form; they stay as they are.
        tools: signatures that the row names.
        reading: what is taken out and which roles train.

    Raises:
        RowProblem: where a named notation of tool calls cannot be read.
    """
    if reading.reasoning == "split":
        messages = [split_reasoning(message) for message in messages]
    read, tools = read_dialect(messages, tools, reading.tool_calls)
    if reading.train_roles != ("assistant",):
        read = [_mark(message, reading.train_roles) for message in read]
    return read, tools


def split_reasoning(message: Message) -> Message:
    """The message with `<think>` text in front of its answer as `reasoning_content`."""
    if message["role"] != "assistant" or "<think>" not in message["content"]:
        return message
    found = _THINK.match(message["content"])
    if found is None:
        return message
    text, answer = found[1].strip(), message["content"][found.end() :]
    own = message.get("reasoning_content")
    if not text or (own is not None and own.strip() != text):
        return message  # an empty thought says "do not think", and of two thoughts neither may be lost
    return {**message, "content": answer, "reasoning_content": text if own is None else own}


def _mark(message: Message, train_roles: Sequence[str]) -> Message:
    if "train" in message:
        return message
    wanted = message["role"] in train_roles
    return message if wanted == (message["role"] == "assistant") else {**message, "train": wanted}
