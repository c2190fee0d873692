"""Conversations: lists of messages under any usual names, and glaive's chats in one string."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from tunesmith.data.chat import read_messages, read_tools
from tunesmith.data.formats.contract import Column, Conversation, Format, Message, has, need, prefers, take
from tunesmith.data.formats.instruction import SYSTEM, detect_pair, system_message
from tunesmith.data.reading import AS_USUAL, Reading, RowProblem
from tunesmith.data.tool_dialects import read_dialect

CHAT = {
    "messages": Column(
        True,
        "list of {role, content}, or ShareGPT's {from, value}",
        ("conversations", "conversation", "dialog", "dialogue", "turns"),
    ),
    "tools": Column(False, "signatures of the tools, a list or a JSON string", ("functions",)),
    "system": Column(False, "the system prompt, where it is not the first message", SYSTEM.aliases),
}
_GLAIVE = {
    "chat": Column(True, "turns in one text, behind USER:, ASSISTANT: and FUNCTION RESPONSE:", ("sample",)),
    "system": Column(
        False, "the system prompt behind SYSTEM:, with the signatures of the tools", SYSTEM.aliases
    ),
}


def _detect_chat(keys: Collection[str]) -> bool:
    if detect_pair(keys):  # a dialogue that is the prompt of its summary
        keys = [key for key in keys if key != "dialogue"]
    return has(keys, CHAT, "messages") and not prefers(keys)


def with_system(system: list[Message], messages: list[Message]) -> list[Message]:
    """The messages behind a system turn, which is joined with their own."""
    if not system or not messages or messages[0]["role"] != "system":
        return system + messages
    text, own = system[0]["content"], messages[0]["content"]
    joined = own if own == text else f"{text}\n\n{own}"
    return [{**messages[0], "content": joined}, *messages[1:]]


def convert_chat(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Conversation:
    """A list of messages, with the system prompt and the tools of their columns."""
    messages = read_messages(need(record, CHAT, "messages"), reading)
    messages = with_system(system_message(record, CHAT), messages)
    return Conversation(messages, read_tools(take(record, CHAT, "tools")))


# ---------------------------------------------------------------- glaive

_TURN = re.compile(r"(?:^|\n)[ \t]*(SYSTEM|USER|ASSISTANT|A|FUNCTION RESPONSE):[ \t]?")
_TURN_ROLES = {
    "SYSTEM": "system",
    "USER": "user",
    "ASSISTANT": "assistant",
    "A": "assistant",
    "FUNCTION RESPONSE": "tool",
}
_END = "<|endoftext|>"


def _detect_glaive(keys: Collection[str]) -> bool:
    return "chat" in keys and not has(keys, CHAT, "messages") and not prefers(keys)


def _split_turns(text: str) -> list[Message]:
    """Turns of a chat in one text; two of a role in a row, as glaive has them around calls, stay two."""
    pieces = _TURN.split(text)
    if pieces[0].strip() or len(pieces) < 3:
        raise RowProblem("malformed messages", "the chat does not begin with USER: or SYSTEM:")
    return [
        {"role": _TURN_ROLES[name], "content": body.replace(_END, "").strip()}
        for name, body in zip(pieces[1::2], pieces[2::2], strict=True)
    ]


def _convert_glaive(record: Mapping[str, Any], reading: Reading = AS_USUAL, /) -> Conversation:
    raw = need(record, _GLAIVE, "chat")
    system = system_message(record, _GLAIVE)
    if not isinstance(raw, str) or raw.lstrip().startswith("["):
        return Conversation(with_system(system, read_messages(raw, reading)))
    messages = _split_turns(raw)
    if system:
        text = system[0]["content"].strip().removeprefix("SYSTEM:").strip()
        messages = with_system([{"role": "system", "content": text}], messages)
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"]:
        messages.pop()
    if all(message["role"] != "assistant" for message in messages):
        raise RowProblem("no assistant turn")
    if any(not message["content"] for message in messages if message["role"] == "assistant"):
        raise RowProblem("empty answer")
    return Conversation(*read_dialect(messages, None, "glaive"))


CHAT_FORMAT = Format(
    "chat",
    Conversation,
    "a list of messages, OpenAI's or ShareGPT's, with or without tools",
    CHAT,
    _detect_chat,
    convert_chat,
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
)
GLAIVE_FORMAT = Format(
    "glaive",
    Conversation,
    "glaive's chats in one text, with function calls",
    _GLAIVE,
    _detect_glaive,
    _convert_glaive,
    {
        "system": 'SYSTEM: You can call functions.\n{"name": "weather", "parameters": {"type": "object"}}',
        "chat": "USER: Weather in Oslo?\n\n\nASSISTANT: <functioncall> "
        '{"name": "weather", "arguments": \'{"city": "Oslo"}\'} <|endoftext|>\n\n\n'
        'FUNCTION RESPONSE: {"celsius": 4}\n\n\nASSISTANT: It is 4 °C. <|endoftext|>',
    },
)
