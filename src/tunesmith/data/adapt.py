"""What a chat template cannot write, written into what it can.

Many templates ignore `tools`, tool calls or reasoning, or refuse a system turn, without a word: the row would
train on a conversation in which half is missing. `probe` finds out by looking at the template and by
rendering tiny conversations, once; `adapt` then moves what would be lost into the content of turns that the
template does write, in the notation of the Hermes models, and says so in a note.

Rejected: a table of known templates. It is never complete, and people edit templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.data.chat import RowProblem
from tunesmith.data.formats import Conversation
from tunesmith.data.template import ChatTemplate

Message = dict[str, Any]

NOTE_TOOLS = "the template ignores tools: their signatures were written into the system turn"
NOTE_CALLS = "the template ignores tool calls: they were written into the assistant's content"
NOTE_RESULTS = "the template has no tool results: they were written as <tool_response> text"
NOTE_REASONING = "the template ignores reasoning: it was written as <think> text in front of the answer"
NOTE_SYSTEM = "the template has no system turn: its text was put in front of the first user turn"

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which templates look for reasoning, the standard one first."""

_TOOLS_PROMPT = """\
You can call functions to answer the user. Their signatures, one JSON object per line:
<tools>
{signatures}
</tools>
To call a function, write its name and its arguments as one JSON object between tags:
<tool_call>
{{"name": "FUNCTION", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
The result follows between <tool_response> tags."""


@dataclass(frozen=True)
class Abilities:
    """What a template can write.

    Attributes:
        system: a system turn.
        tools: the signatures of tools.
        calls: tool calls with their arguments as an `object` or as a JSON `string`, or not at all.
        call_ids: tool calls need an id.
        results: tool results as such (`native`), a turn of role `tool` like any other, or neither: then
            they become a turn of the `user`.
        reasoning: the key it reads reasoning from.
    """

    system: bool = True
    tools: bool = True
    calls: Literal["object", "string", "none"] = "object"
    call_ids: bool = False
    results: Literal["native", "tool", "user"] = "native"
    reasoning: str | None = "reasoning_content"


_NEEDLE = "tunesmith needle"
_SIGNATURE = {
    "type": "function",
    "function": {"name": "probe", "description": "probe", "parameters": {"type": "object", "properties": {}}},
}
_CALL_STYLES: tuple[tuple[Literal["object", "string"], bool], ...] = (
    ("object", False),
    ("object", True),
    ("string", False),
    ("string", True),
)


class _Probe:
    """Renders tiny conversations with one template."""

    def __init__(self, template: ChatTemplate, variables: Mapping[str, Any]) -> None:
        self._template = template
        self._variables = variables

    def text(self, messages: Sequence[Message]) -> str:
        """The rendering, empty where the template fails."""
        try:
            return self._template.render(messages, tools=[_SIGNATURE], variables=self._variables).text
        except RowProblem:
            return ""

    def shows(self, *messages: Message) -> bool:
        return _NEEDLE in self.text(messages)

    def shows_call(self, arguments: str, ids: bool) -> bool:
        """Whether a call is written, its arguments not as a Python dict."""
        call = {"type": "function", "function": {"name": "probe", "arguments": {"key": _NEEDLE}}}
        message = _style_calls({"role": "assistant", "content": "", "tool_calls": [call]}, arguments, ids, [])
        text = self.text([{"role": "user", "content": "question"}, message])
        return _NEEDLE in text and f"'{_NEEDLE}'" not in text and f'\\"{_NEEDLE}' not in text


def probe(template: ChatTemplate, variables: Mapping[str, Any]) -> Abilities:
    """Find out what a template can write; about ten renderings of two or three short messages.

    Args:
        template: the compiled template.
        variables: what every rendering gets, such as `bos_token`.
    """
    tries = _Probe(template, variables)
    user, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    if not tries.shows({"role": "user", "content": _NEEDLE}):
        return Abilities()  # not even a question: whatever is wrong, moving text about will not mend it
    calls: Literal["object", "string", "none"] = "none"
    ids = False
    if "tool_calls" in template.keys:
        fitting = next((style for style in _CALL_STYLES if tries.shows_call(*style)), None)
        calls, ids = fitting or (calls, ids)
    result: Message = {"role": "tool", "content": _NEEDLE, "tool_call_id": "call00000"}
    request: Message = {"role": "assistant", "content": "call"}
    if calls != "none":
        call = {"type": "function", "function": {"name": "probe", "arguments": {}}}
        request = _style_calls({"role": "assistant", "content": "", "tool_calls": [call]}, calls, ids, [])
    shown = tries.shows(user, request, result, answer)
    return Abilities(
        system=tries.shows({"role": "system", "content": _NEEDLE}, user),
        tools="tools" in template.names,
        calls=calls,
        call_ids=ids,
        results=("native" if calls != "none" else "tool") if shown else "user",
        reasoning=next((key for key in REASONING_KEYS if key in template.keys), None),
    )


def adapt(
    conversation: Conversation, can: Abilities
) -> tuple[list[Message], list[dict[str, Any]] | None, tuple[str, ...]]:
    """The conversation as the template can write it.

    Returns:
        Messages (new dict objects, the given ones stay as they are), tools for the template, and notes that
        say what was moved.
    """
    notes: list[str] = []
    messages = [dict(message) for message in conversation.messages]
    tools = conversation.tools
    open_ids: list[str] = []
    for message in messages:
        if message.get("tool_calls"):
            if can.calls == "none":
                _note(notes, NOTE_CALLS)
                _write_calls(message)
            else:
                message.update(_style_calls(message, can.calls, can.call_ids, open_ids))
        elif can.call_ids and message["role"] == "tool" and open_ids:
            message.setdefault("tool_call_id", open_ids.pop(0))
        _move_reasoning(message, can, notes)  # last: it stands in front of calls in the content
    messages = _move_results(messages, can, notes)
    if tools and not can.tools:
        _note(notes, NOTE_TOOLS)
        _write_tools(messages, tools)
        tools = None
    if messages and messages[0]["role"] == "system" and not can.system:
        _note(notes, NOTE_SYSTEM)
        _merge_system(messages)
    return messages, tools, tuple(notes)


def _note(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)


def _move_reasoning(message: Message, can: Abilities, notes: list[str]) -> None:
    if "reasoning_content" not in message or can.reasoning == "reasoning_content":
        return
    reasoning = message.pop("reasoning_content")
    if can.reasoning is not None:
        message[can.reasoning] = reasoning
        return
    _note(notes, NOTE_REASONING)
    message["content"] = f"<think>\n{reasoning.strip()}\n</think>\n\n{message['content']}"


def _write_calls(message: Message) -> None:
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.pop("tool_calls")
    ]
    message["content"] = "\n".join([*([message["content"]] if message["content"] else []), *calls])


def _style_calls(message: Message, arguments: str, ids: bool, open_ids: list[str]) -> Message:
    """The message with its calls in the template's style; new ids are also added to `open_ids`."""
    calls = []
    for number, call in enumerate(message["tool_calls"]):
        function = dict(call["function"])
        if arguments == "string":
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        call = {**call, "function": function}
        if ids and "id" not in call:
            call["id"] = f"call{len(open_ids) + number:05d}"  # nine letters and digits, as Mistral demands
        calls.append(call)
    if ids:
        open_ids.extend(call["id"] for call in calls)
    return {**message, "tool_calls": calls}


def _move_results(messages: list[Message], can: Abilities, notes: list[str]) -> list[Message]:
    """Tool results as text where the template has none; those in a row share one user turn."""
    if can.results == "native" or all(message["role"] != "tool" for message in messages):
        return messages
    _note(notes, NOTE_RESULTS)
    moved: list[Message] = []
    previous = ""
    for message in messages:
        role, previous = previous, message["role"]
        if message["role"] != "tool":
            moved.append(message)
            continue
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        if can.results == "user" and role == "tool":
            moved[-1]["content"] += f"\n{text}"
        else:
            flags: Message = {key: message[key] for key in ("train", "weight") if key in message}
            moved.append({"role": can.results, "content": text, **flags})
    return moved


def _write_tools(messages: list[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    signatures = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    prompt = _TOOLS_PROMPT.format(signatures=signatures)
    if messages[0]["role"] == "system":
        messages[0]["content"] = f"{messages[0]['content']}\n\n{prompt}"
    else:
        messages.insert(0, {"role": "system", "content": prompt})


def _merge_system(messages: list[Message]) -> None:
    system = messages.pop(0)["content"]
    if messages and messages[0]["role"] == "user":
        messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
    else:
        messages.insert(0, {"role": "user", "content": system})
