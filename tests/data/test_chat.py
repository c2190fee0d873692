"""Messages in one form: roles, parts, tool calls, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.chat import ROLES, RowProblem, read_messages, read_tools

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def test_sharegpt_is_openai_with_other_names() -> None:
    raw = [
        {"from": "system", "value": "S"},
        {"from": "Human", "value": "Q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "A"},
    ]
    assert read_messages(raw) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "A"},
    ]


@pytest.mark.parametrize("name", sorted(ROLES))
def test_every_role_of_the_table_is_read(name: str) -> None:
    value = '{"name": "f"}' if ROLES[name] == "call" else "text"
    first = read_messages([{"role": name.upper(), "content": value}, ANSWER])[0]
    assert first["role"] == {"call": "assistant"}.get(ROLES[name], ROLES[name])


@pytest.mark.parametrize(
    "calls",
    [
        [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        [{"function": {"name": "f", "arguments": {"x": 1}}}],
        [{"name": "f", "arguments": {"x": 1}}],
        [{"name": "f", "parameters": {"x": 1}}],
        {"name": "f", "arguments": '{"x": 1}'},
        '[{"name": "f", "arguments": {"x": 1}}]',
    ],
)
def test_tool_calls_in_every_shape(calls: Any) -> None:
    (message,) = read_messages([{"role": "assistant", "content": None, "tool_calls": calls}])
    assert message == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_ids_and_names_stay_and_nulls_go() -> None:
    call = {"id": "c1", "name": "f", "arguments": None}
    read = read_messages(
        [
            {"role": "user", "content": "Q", "name": "Ann", "tool_calls": None, "weight": 0.5},
            {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
            {"role": "tool", "content": "1", "tool_call_id": "c1"},
            {"role": "assistant", "content": "A", "tool_calls": [], "reasoning_content": "R"},
        ]
    )
    assert read == [
        {"role": "user", "content": "Q", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
    ]


def test_typed_parts() -> None:
    parts = [
        {"type": "reasoning", "value": "think"},
        {"type": "text", "text": "a"},
        {"type": "text", "value": "b"},
        "c",
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"type": "tool_call", "value": {"name": "f", "arguments": {"x": 1}}},
    ]
    (message,) = read_messages([{"role": "assistant", "content": parts}])
    assert message == {
        "role": "assistant",
        "content": "abc",
        "reasoning_content": "think",
        "tool_calls": [CALL, CALL],
    }


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([USER], "no assistant turn"),
        ("[", "malformed messages"),
        ({"role": "user"}, "malformed messages"),
        ([None], "malformed message"),
        ([USER, "text"], "malformed message"),
        ([{"role": "alien", "content": "x"}], "unknown role"),
        ([{"role": None, "content": "x"}], "unknown role"),
        ([{"role": ["user"], "content": "x"}], "unknown role"),
        ([{"content": "x"}], "unknown role"),
        ([{"role": "user", "content": None}, ANSWER], "not text"),
        ([{"role": "user", "content": {"a": 1}}, ANSWER], "not text"),
        ([{"role": "user", "content": True}, ANSWER], "not text"),
        ([USER, {"role": "assistant", "content": " \n"}], "empty answer"),
        ([USER, {"role": "assistant", "content": None}], "empty answer"),
        ([USER, {"role": "assistant"}], "empty answer"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER], "unsupported content"),
        ([{"role": "user", "content": [{"type": []}]}, ANSWER], "unsupported content"),
        ([{"role": "user", "content": [3]}, ANSWER], "unsupported content"),
        ([{"from": "function_call", "value": "{bad"}], "bad tool call"),
        ([{"from": "function_call", "value": None}], "bad tool call"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1"}}]}],
            "bad tool call",
        ),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}], "bad tool call"),
        ([{"role": "assistant", "tool_calls": [{"arguments": {}}]}], "bad tool call"),
        ([{"role": "assistant", "tool_calls": [7]}], "bad tool call"),
    ],
)
def test_malformed_conversations_have_a_reason(messages: Any, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read_messages(messages)
    assert caught.value.reason == reason


def test_numbers_are_text() -> None:
    assert read_messages([{"role": "user", "content": 7}, {"role": "assistant", "content": 0.5}])[1] == {
        "role": "assistant",
        "content": "0.5",
    }


SIGNATURE = {"name": "f", "description": "d", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": SIGNATURE}


@pytest.mark.parametrize(
    "tools",
    [
        [SIGNATURE],
        [WRAPPED],
        SIGNATURE,
        json.dumps([SIGNATURE]),
        json.dumps(WRAPPED),
        [json.dumps(SIGNATURE)],
    ],
)
def test_tools_in_every_shape(tools: Any) -> None:
    assert read_tools(tools) == [WRAPPED]


@pytest.mark.parametrize("tools", [None, "", " ", [], "[]", "null"])
def test_no_tools(tools: Any) -> None:
    assert read_tools(tools) is None


@pytest.mark.parametrize(
    "tools", ["{bad", 7, [7], [{}], [{"function": "f"}], [{"function": {"name": 3}}], "7"]
)
def test_bad_tools(tools: Any) -> None:
    with pytest.raises(RowProblem, match="bad tools"):
        read_tools(tools)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "from", "content", "value", "type", "tool_calls", "function", "name", "arguments"]
            ),
            inner | st.sampled_from(["user", "assistant", "gpt", "tool", "text", "tool_call", "{}"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(messages=anything, tools=anything)
def test_nothing_but_a_row_problem_comes_out(messages: Any, tools: Any) -> None:
    try:
        read = read_messages(messages)
        read_tools(tools)
    except RowProblem:
        return
    assert all(isinstance(message["content"], str) for message in read)
