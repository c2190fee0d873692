"""Messages in one form: OpenAI's keys, whatever a data set calls its roles, parts and tool calls.

After `read_messages` a message has `role` (system, user, assistant or tool) and a string `content`, and where
the data has them `reasoning_content`, `tool_calls` (`{type: function, function: {name, arguments: dict}}`),
`tool_call_id` and `name`. This is what chat templates are written for. Every other key is left behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


class RowProblem(Exception):  # noqa: N818 it is a finding about the data, not a failure
    """A row that cannot train.

    Args:
        reason: a short stable category under which such rows are counted, such as "empty answer".
        detail: what exactly, for the person who looks at the row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


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
    "chatgpt": "assistant",
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


def as_text(value: Any, what: str) -> str:
    """A string as it is, a number as JSON writes it.

    Raises:
        RowProblem: "not text" for anything else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    raise RowProblem("not text", f"{what} is {type(value).__name__}")


def parse_json(value: Any, reason: str, what: str) -> Any:
    """`value`, parsed where it is a string that holds JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowProblem(reason, f"{what} is not valid JSON") from error


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Tool signatures as `{type: function, function: {...}}`; None where there are none.

    Args:
        value: a list of signatures, bare or wrapped, or a JSON string of one; empty and None mean no tools.
    """
    if isinstance(value, str) and not value.strip():
        return None
    tools = parse_json(value, "bad tools", "tools")
    if not tools:
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise RowProblem("bad tools", "tools is not a list")
    return [_wrap_tool(tool) for tool in tools]


def _wrap_tool(tool: Any) -> dict[str, Any]:
    tool = parse_json(tool, "bad tools", "a tool")
    if not isinstance(tool, dict):
        raise RowProblem("bad tools", "a tool is not an object")
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem("bad tools", "a tool has no name")
    return tool if "function" in tool else {"type": "function", "function": tool}


def read_calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, from one call or a list of them, or a JSON string."""
    calls = parse_json(value, "bad tool call", "the call")
    if not isinstance(calls, list):
        calls = [calls]
    return [_read_call(call) for call in calls]


def _read_call(call: Any) -> dict[str, Any]:
    call = parse_json(call, "bad tool call", "the call")
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem("bad tool call", "the call has no name")
    arguments = function.get("arguments", function.get("parameters"))
    if arguments is None or arguments == "":
        arguments = {}
    arguments = parse_json(arguments, "bad tool call", "arguments")
    if not isinstance(arguments, dict):
        raise RowProblem("bad tool call", "arguments is not an object")
    clean = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **clean} if isinstance(call.get("id"), str) else clean


def _add_text(message: dict[str, Any], value: Any) -> None:
    message["content"] += as_text(value, "a text part")


def _add_reasoning(message: dict[str, Any], value: Any) -> None:
    message["reasoning_content"] = message.get("reasoning_content", "") + as_text(value, "a reasoning part")


def _add_calls(message: dict[str, Any], value: Any) -> None:
    message["tool_calls"] = [*message.get("tool_calls", []), *read_calls(value)]


PARTS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "text": _add_text,
    "input_text": _add_text,
    "output_text": _add_text,
    "reasoning": _add_reasoning,
    "thinking": _add_reasoning,
    "tool_call": _add_calls,
    "tool_calls": _add_calls,
    "function_call": _add_calls,
}
"""Types of content parts and what they add to the message."""


def _read_content(message: dict[str, Any], content: Any, what: str) -> None:
    """Add content to the message: a string, or a list of typed parts."""
    if content is None:
        return
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
            raise RowProblem("unsupported content", f"{what} has a part of type {kind!r}")
        add(message, next((part[key] for key in ("value", "text", kind) if part.get(key) is not None), ""))


def read_message(raw: Any, number: int) -> dict[str, Any]:
    """One message in the common form.

    Args:
        raw: an object with `role` and `content`, or `from` and `value`.
        number: its number in the conversation from 0, for reports.

    Raises:
        RowProblem: where it is malformed.
    """
    what = f"message {number}"
    if not isinstance(raw, dict):
        raise RowProblem("malformed message", f"{what} is not an object")
    name = raw.get("role", raw.get("from"))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise RowProblem("unknown role", f"{what} has the role {name!r}")
    content = raw.get("content", raw.get("value"))
    message: dict[str, Any] = {"role": "assistant" if role == _CALL else role, "content": ""}
    if role == _CALL:
        _add_calls(message, content)
        return message
    _read_content(message, content, what)
    if role == "assistant":
        _read_assistant(message, raw, what)
    elif content is None:
        raise RowProblem("not text", f"{what} has no content")
    for key in ("name", "tool_call_id"):
        if isinstance(raw.get(key), str):
            message[key] = raw[key]
    return message


def _read_assistant(message: dict[str, Any], raw: dict[str, Any], what: str) -> None:
    reasoning = next(
        (raw[key] for key in ("reasoning_content", "reasoning", "thinking") if raw.get(key)), None
    )
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


def read_messages(raw: Any) -> list[dict[str, Any]]:
    """All messages of a conversation, in their order.

    Raises:
        RowProblem: where there is none, none is the assistant's, or one is malformed.
    """
    messages = parse_json(raw, "malformed messages", "the list of messages")
    if not isinstance(messages, list):
        raise RowProblem("malformed messages", "the messages are not a list")
    if not messages:
        raise RowProblem("no messages")
    read = [read_message(message, number) for number, message in enumerate(messages)]
    if all(message["role"] != "assistant" for message in read):
        raise RowProblem("no assistant turn")
    return read
