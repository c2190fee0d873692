"""Tools and tool calls in one form: OpenAI's, with arguments as objects.

Data sets hold calls as objects (bare, wrapped, as JSON strings) or write them into the assistant's text in the
notation of some model. `read_calls` reads the first kind, `DIALECTS` the second. Text becomes a call only
where somebody says which notation it is, or where it is certain: the row names its tools, every call can be
parsed, and each calls one of these tools. Rejected: taking whatever looks like a call. An answer may quote one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.reading import RowProblem, ToolNotation, parse_json, without_nulls

Message = dict[str, Any]
Call = dict[str, Any]

_DECODER = json.JSONDecoder()


# ---------------------------------------------------------------- objects


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Tool signatures as `{type: function, function: {...}}`; None where there are none.

    Args:
        value: a list of signatures, bare or wrapped, or a JSON string of one; empty and None mean no tools.

    Raises:
        RowProblem: "bad tools".
    """
    if isinstance(value, str) and not value.strip():
        return None
    # Arrow adds keys to objects and never to strings: the nulls of a JSON string are meant
    tools = parse_json(value, "bad tools", "tools") if isinstance(value, str) else without_nulls(value)
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
    if "function" in tool:
        return tool
    if "input_schema" in tool:  # Anthropic's name of it
        function = {("parameters" if key == "input_schema" else key): value for key, value in tool.items()}
    return {"type": "function", "function": function}


def read_calls(value: Any) -> list[Call]:
    """Tool calls with their arguments as objects, from one call or a list of them, or a JSON string.

    Arguments that come as an object lose the keys that are None, those that come as a JSON string keep them:
    Arrow adds keys to objects and never to strings.

    Raises:
        RowProblem: "bad tool call".
    """
    calls = parse_json(value, "bad tool call", "the call")
    if not isinstance(calls, list):
        calls = [calls]
    return [_read_call(call) for call in calls]


def _read_call(call: Any) -> Call:
    call = parse_json(call, "bad tool call", "the call")
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowProblem("bad tool call", "the call has no name")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = function.get("parameters")
    if arguments is None or arguments == "":
        arguments = {}
    arguments = parse_json(without_nulls(arguments), "bad tool call", "arguments")
    if not isinstance(arguments, dict):
        raise RowProblem("bad tool call", "arguments is not an object")
    clean = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **clean} if isinstance(call.get("id"), str) else clean


# ---------------------------------------------------------------- text


@dataclass(frozen=True)
class Dialect:
    """A notation of tool calls in the assistant's text.

    Attributes:
        mark: what a text that may hold a call contains.
        parse: the text around the calls, and the calls; None where the text holds none; raises `RowProblem`.
        tools: the signatures that a system prompt lists, and what is left of the prompt without them.
    """

    mark: str
    parse: Callable[[str], tuple[str, list[Call]] | None]
    tools: Callable[[str], tuple[str, list[dict[str, Any]] | None]]


_HERMES_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_HERMES_TOOLS = re.compile(r"<tools>\s*([\[{].*?)\s*</tools>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_GLAIVE_CALL = re.compile(
    r'^\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"arguments"\s*:\s*\'(.*)\'\s*\}$',
    re.DOTALL,
)
_LLAMA_TAG = "<|python_tag|>"
_KEPT = ("name", "tool_call_id", "train", "weight")


def _parse_hermes(text: str) -> tuple[str, list[Call]] | None:
    if "<tool_call>" not in text:
        return None
    calls = [call for found in _HERMES_CALL.finditer(text) for call in read_calls(found[1].strip())]
    rest = _HERMES_CALL.sub("", text).strip()
    if "tool_call>" in rest:
        raise RowProblem("bad tool call", "a <tool_call> tag is not closed, or not opened")
    return rest, calls


def _objects(text: str) -> tuple[list[Any], str]:
    """The JSON values one behind the other, between blanks or `;` or `,`, and the text behind the last."""
    values = []
    rest = text.strip(" \t\r\n;,")
    while rest.startswith(("{", "[")):
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            break
        values.append(value)
        rest = rest[end:].strip(" \t\r\n;,")
    return values, rest


def _hermes_tools(system: str) -> tuple[str, list[dict[str, Any]] | None]:
    found = _HERMES_TOOLS.search(system)
    if found is None:
        return system, None
    values, rest = _objects(found[1])
    if rest:
        raise RowProblem("bad tools", "<tools> does not hold JSON")
    listed = [tool for value in values for tool in (value if isinstance(value, list) else [value])]
    before = system[: system.find("<tools>")]
    # the paragraph that introduces the list explains a notation which the template writes itself
    kept = before[: before.rfind("\n\n") + 1].strip() if "\n\n" in before else ""
    lines = kept.splitlines()
    while lines and (not lines[-1].strip() or lines[-1].startswith("#")):
        lines.pop()
    return "\n".join(lines), read_tools(listed)


def _parse_llama3(text: str) -> tuple[str, list[Call]] | None:
    body = text.strip().removeprefix(_LLAMA_TAG)
    if not body.lstrip().startswith("{"):
        return None
    values, rest = _objects(body)
    calls = [value for value in values if isinstance(value, dict) and {"name", "parameters"} <= value.keys()]
    if rest or len(calls) != len(values) or not calls:
        return None
    return "", read_calls(calls)


def _parse_glaive(text: str) -> tuple[str, list[Call]] | None:
    before, mark, after = text.partition("<functioncall>")
    if not mark:
        return None
    body = after.replace("<|endoftext|>", "").replace("</functioncall>", "").strip()
    quoted = _GLAIVE_CALL.match(body)
    # arguments stand as JSON between single quotes, which JSON does not know
    calls = read_calls({"name": quoted[1], "arguments": quoted[2].replace("\\'", "'")} if quoted else body)
    return before.strip(), calls


def _glaive_tools(system: str) -> tuple[str, list[dict[str, Any]] | None]:
    start = system.find("{")
    if start < 0:
        return system, None
    values, rest = _objects(system[start:])
    if rest or not values:
        return system, None
    return system[:start].rstrip(" -\n\t"), read_tools(values)


def _no_tools(system: str) -> tuple[str, None]:
    return system, None


DIALECTS: dict[str, Dialect] = {
    "hermes": Dialect("<tool_call>", _parse_hermes, _hermes_tools),
    "llama3": Dialect('"parameters"', _parse_llama3, _no_tools),
    "glaive": Dialect("<functioncall>", _parse_glaive, _glaive_tools),
}
"""Notations of tool calls by the name of the setting `tool_calls`."""


def read_dialect(
    messages: Sequence[Message], tools: list[dict[str, Any]] | None, notation: ToolNotation
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Messages whose calls in the text became `tool_calls`, and the tools.

    Args:
        messages: in the common form; they stay as they are.
        tools: signatures that the row names; where it names none a named notation looks in the system turn.
        notation: `auto` for what is certain, `text` for nothing, or a key of `DIALECTS`.

    Raises:
        RowProblem: "bad tool call" or "bad tools", where a notation is named.
    """
    if notation == "text":
        return list(messages), tools
    if notation != "auto":
        dialect = DIALECTS[notation]
        messages, found = _take_tools(messages, dialect)
        return _read_results(_read_with(messages, dialect)), tools or found
    known = {tool["function"]["name"] for tool in tools or ()}
    marked = [
        row for row in DIALECTS.values() if known and any(row.mark in one["content"] for one in messages)
    ]
    for dialect in marked:
        if any(dialect.mark in message["content"] for message in messages if message["role"] == "system"):
            continue  # the prompt itself explains the notation: what it says and what is done must agree
        try:
            read = _read_with(messages, dialect)
        except RowProblem:
            continue
        calls = [call for message in read for call in message.get("tool_calls", ())]
        if read != list(messages) and all(call["function"]["name"] in known for call in calls):
            return _read_results(read), tools
    return list(messages), tools


def _take_tools(
    messages: Sequence[Message], dialect: Dialect
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    if not messages or messages[0]["role"] != "system":
        return list(messages), None
    text, tools = dialect.tools(messages[0]["content"])
    head = [{**messages[0], "content": text}] if text.strip() else []
    return [*head, *messages[1:]], tools


def _read_with(messages: Sequence[Message], dialect: Dialect) -> list[Message]:
    read = []
    for message in messages:
        holds = message["role"] == "assistant" and dialect.mark in message["content"]
        parsed = dialect.parse(message["content"]) if holds and "tool_calls" not in message else None
        if parsed is not None:
            message = {**message, "content": parsed[0], "tool_calls": parsed[1]}
        read.append(message)
    return read


def _read_results(messages: Sequence[Message]) -> list[Message]:
    """Results between <tool_response> tags as turns of the tool, also where the user hands them over."""
    read: list[Message] = []
    for message in messages:
        results = _RESULT.findall(message["content"]) if message["role"] in ("tool", "user") else []
        follows = bool(read) and (bool(read[-1].get("tool_calls")) or read[-1]["role"] == "tool")
        alone = bool(results) and not _RESULT.sub("", message["content"]).strip()
        if alone and (follows or message["role"] == "tool"):
            kept: Message = {key: message[key] for key in _KEPT if key in message}
            read += [{"role": "tool", "content": result, **kept} for result in results]
        else:
            read.append(message)
    return read
