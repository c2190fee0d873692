"""Messages in one form: roles, parts, tool calls, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.data.chat import ROLES, RowProblem, finish_messages, read_messages, read_tools
from tunesmith.data.formats import Conversation, convert, resolve_format
from tunesmith.data.reading import Reading

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


def test_reasoning_in_front_of_an_answer_is_split_off() -> None:
    def finished(answer: dict[str, Any], **options: Any) -> dict[str, Any]:
        messages, _ = finish_messages(read_messages([USER, answer]), None, Reading(**options))
        return messages[1]

    thought = {"role": "assistant", "content": " <think>\nR </think>\n\n A\n"}
    assert finished(thought) == {"role": "assistant", "content": "A\n", "reasoning_content": "R"}
    assert finished(thought, reasoning="keep") == thought
    # the same thought twice is one; two different ones both stay
    twice = {**thought, "reasoning_content": "R"}
    assert finished(twice) == {"role": "assistant", "content": "A\n", "reasoning_content": "R"}
    assert finished({**thought, "thinking": "other"})["content"] == thought["content"]
    for text in ("<think>\n\n</think>\n\nA", "A <think>R</think>", "<think>cut off", "R</think>A"):
        assert finished({"role": "assistant", "content": text}) == {"role": "assistant", "content": text}
    quoted = read_messages([{"role": "user", "content": "<think>Q</think>R"}, ANSWER])
    assert finish_messages(quoted, None)[0][0]["content"] == "<think>Q</think>R"


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ({"train": True}, {"train": True}),
        ({"training": "false"}, {"train": False}),
        ({"loss": 0}, {"train": False}),
        ({"mask": True}, {"train": False}),
        ({"train": None, "mask": 0}, {"train": True}),
        ({"weight": 0}, {"weight": 0.0}),
        ({"weight": 0.5, "train": True}, {"weight": 0.5, "train": True}),
        ({"loss_weight": 1.0}, {"weight": 1.0}),
        ({"train": None, "weight": None, "loss_weight": None}, {}),
    ],
)
def test_whether_a_message_trains(marks: dict[str, Any], expected: dict[str, Any]) -> None:
    (message,) = read_messages([{**ANSWER, **marks}])
    assert message == {**ANSWER, **expected}


def test_a_loss_weight_makes_a_question_train_and_a_weight_does_not() -> None:
    read = read_messages(
        [{**USER, "loss_weight": 0.5}, {**USER, "loss_weight": 0}, {**USER, "weight": 1}, ANSWER]
    )
    assert read[:3] == [{**USER, "weight": 0.5, "train": True}, {**USER, "weight": 0.0}, USER]


@pytest.mark.parametrize(
    ("marks", "reason"),
    [
        ({"train": "perhaps"}, "bad train mark"),
        ({"train": []}, "bad train mark"),
        ({"mask": 2}, "bad train mark"),
        ({"weight": -1}, "bad weight"),
        ({"weight": True}, "bad weight"),
        ({"weight": "1"}, "bad weight"),
        ({"weight": float("nan")}, "bad weight"),
        ({"loss_weight": 10**400}, "bad weight"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": True}]}, "unsupported content"),
    ],
)
def test_marks_that_mean_nothing(marks: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read_messages([{**ANSWER, **marks}])
    assert caught.value.reason == reason


def test_unusual_keys_and_roles() -> None:
    raw = [
        {"who": "Patient", "says": "Q", "learn": 1},
        {"who": "DOCTOR", "says": "A", "learn": 0, "train": True},
        {"who": "gpt", "says": "B"},
    ]
    reading = Reading(
        role_key="who",
        content_key="says",
        train_key="learn",
        roles={"patient": "user", "Doctor": "assistant"},
    )
    assert read_messages(raw, reading) == [
        {"role": "user", "content": "Q", "train": True},
        {"role": "assistant", "content": "A", "train": False},
        {"role": "assistant", "content": "B"},
    ]
    with pytest.raises(RowProblem, match="unknown role"):
        read_messages(raw)
    for role, content in (("sender", "text"), ("speaker", "utterance"), ("author", "message")):
        assert read_messages([{role: "human", content: "Hi"}, ANSWER]) == [USER, ANSWER]


@pytest.mark.parametrize(
    "turns",
    [
        ["Hi", "Hello"],
        [{"input": "Hi", "output": "Hello"}],
        [{"user": "Hi", "assistant": "Hello", "system": None}],
        [{"human": "Hi", "bot": "Hello"}],
        [{"question": "Hi", "answer": "Hello", "role": None}],
        '[{"prompt": "Hi", "response": "Hello"}]',
    ],
)
def test_turns_without_roles_alternate(turns: Any) -> None:
    assert read_messages(turns) == [USER, ANSWER]


def test_an_exchange_may_bring_its_system_prompt() -> None:
    read = read_messages([{"system": "S", "input": "Hi", "output": "Hello"}])
    assert read == [{"role": "system", "content": "S"}, USER, ANSWER]


def test_keys_that_arrow_added_are_gone() -> None:
    part = {"type": "text", "text": "Hi", "image_url": None, "value": None}
    arguments = {"city": "Oslo", "days": None, "where": {"x": 1, "y": None}, "list": [None, {"a": None}]}
    call = {"id": None, "type": "function", "function": {"name": "f", "arguments": arguments}}
    read = read_messages(
        [
            {"role": None, "from": "human", "content": [part], "value": None, "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": None},
            {"role": "tool", "content": {"celsius": 4, "error": None}},
        ]
    )
    assert read[0] == USER
    assert read[1]["tool_calls"][0] == {
        "type": "function",
        "function": {
            "name": "f",
            "arguments": {"city": "Oslo", "where": {"x": 1}, "list": [None, {}]},
        },
    }
    assert read[2]["content"] == '{"celsius": 4}'
    # a JSON string is what somebody wrote: its nulls are meant
    written = {"name": "f", "arguments": '{"city": null}'}
    (message,) = read_messages([{"role": "assistant", "tool_calls": [written]}])
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": None}
    meant = '[{"name": "f", "parameters": {"default": null}}]'
    assert read_tools(meant) == [
        {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    ]
    properties = {"city": {"type": "string", "enum": None}, "other": None}
    assert read_tools([{"name": "f", "parameters": {"properties": properties}}]) == [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}},
        }
    ]


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
            inner
            | st.sampled_from(
                ["user", "assistant", "gpt", "tool", "text", "tool_call", "tool_use", "tool_result", "{}"]
            ),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    messages=anything,
    tools=anything,
    notation=st.sampled_from(["auto", "text", "hermes", "llama3", "glaive"]),
)
def test_nothing_but_a_row_problem_comes_out(messages: Any, tools: Any, notation: Any) -> None:
    try:
        read, _ = finish_messages(
            read_messages(messages), read_tools(tools), Reading(tool_calls=notation, train_roles=("tool",))
        )
    except RowProblem:
        return
    assert all(isinstance(message["content"], str) for message in read)


# ---------------------------------------------------------------- Anthropic's content parts


def test_uses_and_results_of_tools_are_calls_and_turns_of_the_tool() -> None:
    raw = [
        {"role": "user", "content": "Weather in Oslo and Rome?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Two calls.", "signature": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}},
                {"type": "tool_use", "id": "t2", "name": "weather", "input": {"city": "Rome"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "4"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "20"}]},
                {"type": "text", "text": "And in Lima?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "Ask there."}]},
    ]
    call = [
        {"id": f"t{n}", "type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        for n, city in ((1, "Oslo"), (2, "Rome"))
    ]
    assert read_messages(raw) == [
        {"role": "user", "content": "Weather in Oslo and Rome?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Two calls.", "tool_calls": call},
        {"role": "tool", "content": "4", "tool_call_id": "t1"},
        {"role": "tool", "content": "20", "tool_call_id": "t2"},
        {"role": "user", "content": "And in Lima?"},
        {"role": "assistant", "content": "Ask there."},
    ]


def test_a_result_without_content_is_an_empty_one() -> None:
    raw = [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1"}]}]
    assert read_messages(raw, need_answer=False) == [{"role": "tool", "content": "", "tool_call_id": "t1"}]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "tool_use", "id": "t1"}, "bad tool call"),
        ({"type": "tool_use", "name": "f", "input": "{"}, "bad tool call"),
        ({"type": "image", "source": {}}, "unsupported content"),
        ({"type": "redacted_thinking", "data": "x"}, "unsupported content"),
    ],
)
def test_parts_that_cannot_train_are_refused(part: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read_messages([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [part]}])
    assert caught.value.reason == reason


def test_a_picture_as_a_result_is_refused() -> None:
    picture = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image", "source": {}}]}
    with pytest.raises(RowProblem, match="unsupported content"):
        read_messages([{"role": "user", "content": [picture]}], need_answer=False)


def test_signatures_and_system_prompts_in_anthropics_form() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    record = {
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
        "tools": [{"name": "weather", "description": "d", "input_schema": schema}],
    }
    item = convert(resolve_format("auto", {}, record), record, {})
    assert isinstance(item, Conversation)
    assert item.messages[0] == {"role": "system", "content": "Be brief."}
    assert item.tools == [
        {"type": "function", "function": {"name": "weather", "description": "d", "parameters": schema}}
    ]
