"""Tool calls inside the text: what is read, what must stay text, and glaive's chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.chat import finish_messages, read_messages, read_tools
from tunesmith.data.formats import FORMATS, Conversation, Reading, RowProblem, convert, resolve_format
from tunesmith.data.sources import open_source
from tunesmith.data.tool_dialects import DIALECTS, read_dialect

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
USER = {"role": "user", "content": "Weather in Oslo?"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "llama3": '<|python_tag|>{"name": "weather", "parameters": {"city": "Oslo"}}',
    "glaive": '<functioncall> {"name": "weather", "arguments": \'{"city": "Oslo"}\'} <|endoftext|>',
}


def says(text: str) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": text}]


@pytest.mark.parametrize("name", DIALECTS)
def test_calls_of_the_rows_own_tools_are_read(name: str) -> None:
    called = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert read_dialect(says(WRITTEN[name]), TOOLS, "auto") == (called, TOOLS)
    assert read_dialect(says(WRITTEN[name]), None, name) == (called, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "other"}}]])
def test_calls_that_are_not_certain_stay_text(name: str, tools: Any) -> None:
    assert read_dialect(says(WRITTEN[name]), tools, "auto") == (says(WRITTEN[name]), tools)
    assert read_dialect(says(WRITTEN[name]), TOOLS, "text") == (says(WRITTEN[name]), TOOLS)
    for other in DIALECTS:
        if other != name:
            assert read_dialect(says(WRITTEN[name]), None, other) == (says(WRITTEN[name]), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{bad</tool_call>",
        '<tool_call>{"name": "weather"}',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        "<functioncall> {bad",
        "To call a tool write <tool_call> and then JSON.",
    ],
)
def test_broken_calls_stay_text_unless_the_notation_is_named(text: str) -> None:
    assert read_dialect(says(text), TOOLS, "auto")[0] == says(text)
    with pytest.raises(RowProblem, match="bad tool call"):
        read_dialect(says(text), TOOLS, "glaive" if "functioncall" in text else "hermes")


def test_text_around_calls_and_several_calls() -> None:
    text = f"Let me see.\n{WRITTEN['hermes']}\n{WRITTEN['hermes']}"
    read, _ = read_dialect(says(text), TOOLS, "auto")
    assert read[1] == {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL]}
    text = '{"name": "weather", "parameters": {"city": "Oslo"}}; {"name": "weather", "parameters": {}}'
    read, _ = read_dialect(says(text), TOOLS, "llama3")
    assert [call["function"]["arguments"] for call in read[1]["tool_calls"]] == [{"city": "Oslo"}, {}]
    for text in ('{"name": "weather", "parameters": {}} is how', '{"name": "weather"}', "[1]"):
        assert read_dialect(says(text), TOOLS, "llama3")[0] == says(text)


def test_results_between_tags_are_turns_of_the_tool() -> None:
    result = "<tool_response>\n4\n</tool_response>"
    after = [{"role": "assistant", "content": "4 °C"}]
    for role in ("tool", "user"):
        turns = [*says(WRITTEN["hermes"]), {"role": role, "content": f"{result}\n{result}"}, *after]
        read, _ = read_dialect(turns, TOOLS, "auto")
        assert read[2:] == [{"role": "tool", "content": "4"}, {"role": "tool", "content": "4"}, *after]
    quoted = [{"role": "user", "content": result}, *says(WRITTEN["hermes"])[1:]]
    assert read_dialect(quoted, TOOLS, "auto")[0][0] == quoted[0]


SYSTEM = (
    "You are a pirate.\n\n# Tools\n\nYou are provided with signatures within <tools></tools> tags:\n"
    '<tools>\n{"name": "weather", "parameters": {"type": "object"}}\n</tools>\nWrite <tool_call> {} </tool_call>.'
)


def test_a_prompt_that_explains_the_notation_keeps_it_unless_it_is_named() -> None:
    turns = [{"role": "system", "content": SYSTEM}, *says(WRITTEN["hermes"])]
    assert read_dialect(turns, TOOLS, "auto") == (turns, TOOLS)
    read, tools = read_dialect(turns, None, "hermes")
    assert tools == TOOLS
    assert read[0] == {"role": "system", "content": "You are a pirate."}
    assert read[2]["tool_calls"] == [CALL]
    only = [{"role": "system", "content": SYSTEM.split("\n\n")[2]}, *says(WRITTEN["hermes"])]
    assert read_dialect(only, None, "hermes")[0][0] == USER


def test_reasoning_goes_before_calls() -> None:
    messages = read_messages(says(f"<think>R</think>\n\n{WRITTEN['llama3']}"))
    read, _ = finish_messages(messages, read_tools(TOOLS))
    assert read[1] == {"role": "assistant", "content": "", "reasoning_content": "R", "tool_calls": [CALL]}


@given(
    name=st.sampled_from(sorted(DIALECTS)),
    pieces=st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", "<functioncall>", '"parameters"', "{", "}", '"name": "f"', ":", ",", "'"]
        )
        | st.text(max_size=3)
    ),
)  # fmt: skip
def test_no_text_breaks_a_reader(name: Any, pieces: list[str]) -> None:
    turns = says("".join(pieces))
    assert read_dialect(turns, None, "auto") == (turns, None)
    try:
        read, _ = read_dialect([{"role": "system", "content": "".join(pieces)}, *turns], None, name)
    except RowProblem:
        return
    assert read[-1]["content"] == turns[1]["content"] or read[-1]["tool_calls"] is not None


# ---------------------------------------------------------------- glaive


def glaive(record: dict[str, Any]) -> Conversation:
    item = convert(resolve_format("auto", {}, record), record, {})
    assert isinstance(item, Conversation)
    return item


def test_a_chat_of_glaive() -> None:
    record = {
        "system": "SYSTEM: You are a helpful assistant with access to the following functions. "
        "Use them if required -\n"
        '{"name": "weather", "parameters": {"type": "object"}}\n\n{"name": "news", "description": "d"}\n',
        "chat": "USER: Hi\n\n\nASSISTANT: Hello! USER: is not a turn. <|endoftext|>\n\n\nUSER: Weather in Oslo?\n\n\n"
        "ASSISTANT: Let me look. " + WRITTEN["glaive"] + "\n\n\n"
        'FUNCTION RESPONSE: {"celsius": 4}\n\n\nASSISTANT: It is\n4 °C. <|endoftext|>\n\n\nASSISTANT: <|endoftext|>',
    }
    item = glaive(record)
    assert [tool["function"]["name"] for tool in item.tools or []] == ["weather", "news"]
    assert item.messages == [
        {
            "role": "system",
            "content": "You are a helpful assistant with access to the following functions. Use them if required",
        },
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! USER: is not a turn."},
        USER,
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"celsius": 4}'},
        {"role": "assistant", "content": "It is\n4 °C."},
    ]


def test_arguments_with_an_apostrophe() -> None:
    call = '<functioncall> {"name": "say", "arguments": \'{"text": "It\\\'s"}\'}'
    item = glaive({"system": "SYSTEM: x", "chat": f"USER: Q\n\n\nASSISTANT: {call}"})
    assert item.messages[-1]["tool_calls"][0]["function"]["arguments"] == {"text": "It's"}


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ("Hello", "malformed messages"),
        ("Hello\nUSER: Q", "malformed messages"),
        ("USER: Q", "no assistant turn"),
        ("USER: Q\n\n\nASSISTANT: <functioncall> {bad", "bad tool call"),
        ("USER: Q\n\n\nASSISTANT: \n\n\nUSER: R\n\n\nASSISTANT: A", "empty answer"),
        (7, "malformed messages"),
    ],
)
def test_chats_that_cannot_be_read(chat: Any, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        convert(FORMATS["glaive"], {"chat": chat, "system": "SYSTEM: x"}, {})
    assert caught.value.reason == reason


def test_a_chat_may_be_a_list_and_a_sample_brings_its_system() -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert glaive({"chat": turns, "system": ""}).messages == turns
    item = convert(FORMATS["glaive"], {"sample": "SYSTEM: S\nUSER: Q\nASSISTANT: A"}, {})
    assert isinstance(item, Conversation)
    assert item.messages == [{"role": "system", "content": "S"}, *turns]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize("file", ["glaive_toolcall_en_demo.json", "reason_tool_use_demo_50.jsonl"])
def test_structured_calls_of_real_files_are_what_their_text_would_be(file: str) -> None:
    calls = 0
    for row in open_source(SHARED / file).rows():
        assert row.record is not None
        item = convert(FORMATS["chat"], row.record, {})
        plain = convert(
            resolve_format("auto", {}, row.record, reading=Reading(tool_calls="text")), row.record, {}
        )
        assert isinstance(item, Conversation)
        assert item == plain
        for message in item.messages:
            for call in message.get("tool_calls", []):
                assert isinstance(call["function"]["arguments"], dict)
                calls += 1
    assert calls > 50
