"""Instructions and their variants, labelled segments, format strings, and rows that are tokens already."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.contracts.errors import DataError
from tunesmith.data.formats import (
    FORMATS,
    KINDS,
    Conversation,
    Item,
    Reading,
    RowProblem,
    Segments,
    Text,
    Tokens,
    convert,
    resolve_format,
)


def read(record: dict[str, Any], name: str = "auto", reading: Reading | None = None) -> Item:
    found = resolve_format(name, {}, record, reading=reading or Reading(), kinds=KINDS)
    return convert(found, record, {})


def turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    item = read(record)
    assert isinstance(item, Conversation)
    return [(message["role"], message["content"]) for message in item.messages]


QA = [("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "Q", "input": "I", "response": "A"}, [("user", "Q\n\nI"), ("assistant", "A")]),
        ({"article": "Q", "summary": "A"}, QA),
        ({"document": "Q", "summary": "A", "id": 1}, QA),
        ({"dialogue": "Q", "summary": "A"}, QA),
        ({"article": "Q", "highlights": "A"}, QA),
        ({"context": "C", "question": "Q", "answer": "A"}, [("user", "Q\n\nC"), ("assistant", "A")]),
        ({"article": "C", "question": "Q", "answer": "A"}, [("user", "Q\n\nC"), ("assistant", "A")]),
        ({"system_prompt": "S", "question": "Q", "response": "A"}, [("system", "S"), *QA]),
        ({"problem": "Q", "solution": "A"}, QA),
        ({"problem": "Q", "solution": "A", "answer": "short"}, QA),
        ({"prompt": "Q", "generation": "A"}, QA),
    ],
)
def test_variants_by_their_columns(record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert turns(record) == expected


def test_a_question_about_choices_is_not_read_without_them() -> None:
    with pytest.raises(DataError, match="No format matches"):
        read({"question": "Q", "choices": ["x", "y"], "answer": 1})


def test_reasoning_in_its_own_column() -> None:
    expected = {"role": "assistant", "content": "A", "reasoning_content": "R"}
    for record in (
        {"Question": "Q", "Complex_CoT": "R", "Response": "A"},
        {"instruction": "Q", "output": "A", "reasoning": "R"},
        {"question": "Q", "answer": "<think>\nR\n</think>\n\nA"},
    ):
        item = read(record)
        assert isinstance(item, Conversation)
        assert item.messages[1] == expected


def test_prompt_and_completion_as_messages_train_the_completion_only() -> None:
    before = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    item = read({"prompt": before, "completion": [{"role": "assistant", "content": "d"}]})
    assert isinstance(item, Conversation)
    assert [message.get("train") for message in item.messages] == [None, False, None, None]
    assert [message["content"] for message in item.messages] == list("abcd")
    with pytest.raises(RowProblem, match="no assistant turn"):
        read({"prompt": before, "completion": [{"role": "user", "content": "d"}]})


def test_prompt_completion_joins_texts_as_they_are() -> None:
    assert read({"prompt": "6 * 7 =", "completion": " 42"}, "prompt_completion") == Segments(
        [("6 * 7 =", False), (" 42", True)]
    )
    assert read({"prompt": "", "completion": "x"}, "prompt_completion") == Segments([("x", True)])


def test_segments() -> None:
    rows = [{"text": "<s>Q", "label": False}, {"text": "", "label": True}, {"text": "A</s>", "label": 1}]
    assert read({"segments": rows}) == Segments([("<s>Q", False), ("A</s>", True)])
    assert read({"segments": rows}, "input_output") == read({"input_output": rows})


@pytest.mark.parametrize(
    ("segments", "reason"),
    [
        ("x", "malformed segments"),
        ([1], "malformed segments"),
        ([{"text": "a"}], "malformed segments"),
        ([{"text": "a", "label": "perhaps"}], "malformed segments"),
        ([{"text": ["a"], "label": True}], "not text"),
        ([{"text": "a", "label": False}], "empty answer"),
        ([{"text": "a", "label": False}, {"text": " ", "label": True}], "empty answer"),
    ],
)
def test_malformed_segments(segments: Any, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        convert(FORMATS["segments"], {"segments": segments}, {})
    assert caught.value.reason == reason


# ---------------------------------------------------------------- custom


def custom(**template: str) -> Reading:
    return Reading(template=template)


def test_custom_puts_columns_together() -> None:
    record = {"country name": "France", "n": 2, "x": "Paris"}
    reading = custom(system="Be brief.", user="{country name} {{{n}}}?", assistant="{x}")
    item = read(record, "custom", reading)
    assert isinstance(item, Conversation)
    assert [message["content"] for message in item.messages] == ["Be brief.", "France {2}?", "Paris"]
    assert read(record, "custom", custom(text="{x}, {x}")) == Text("Paris, Paris")
    assert read(record, "custom", custom(prompt="{n}:", completion="{x}")) == Segments(
        [("2:", False), ("Paris", True)]
    )


def test_what_a_value_holds_is_never_a_field() -> None:
    item = read({"q": "{a} {0.__class__}", "a": "{q}"}, "custom", custom(user="{q}", assistant="{a}"))
    assert isinstance(item, Conversation)
    assert [message["content"] for message in item.messages] == ["{a} {0.__class__}", "{q}"]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ({}, "cannot read rows by a template of nothing"),
        ({"user": "{q}"}, "cannot read rows by a template of user"),
        ({"user": "{q}", "assistant": "{a}", "tool": "{q}"}, "cannot read rows by a template of user, assi"),
        ({"text": "{q.__class__}"}, "field {q.__class__}, which is not just the name"),
        ({"text": "{q[0]}"}, r"field {q\[0\]}, which is not just the name"),
        ({"text": "{q!r}"}, "field {q}, which is not just the name"),
        ({"text": "{q:>10}"}, "field {q}, which is not just the name"),
        ({"text": "{}"}, "field {}, which is not just the name"),
        ({"text": "{q"}, "is malformed"),
        ({"text": "{missing}"}, "needs the column 'missing'; the data has q, a"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_before_any_row(
    template: dict[str, str], problem: str
) -> None:
    with pytest.raises(DataError, match=problem):
        read({"q": "Q", "a": "A"}, "custom", Reading(template=template))


def test_a_template_belongs_to_custom() -> None:
    with pytest.raises(DataError, match="The format pair has no template"):
        read({"question": "Q", "answer": "A"}, "auto", custom(text="{question}"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"q": "Q"}, "missing column"),
        ({"q": "Q", "a": None}, "missing column"),
        ({"q": "Q", "a": ["A"]}, "not text"),
        ({"q": "Q", "a": ""}, "empty answer"),
    ],
)
def test_rows_that_a_template_cannot_read(record: dict[str, Any], reason: str) -> None:
    found = resolve_format("custom", {}, {"q": "", "a": ""}, reading=custom(user="{q}", assistant="{a}"))
    with pytest.raises(RowProblem) as caught:
        convert(found, record, {})
    assert caught.value.reason == reason


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"input_ids": [5, 6]}, Tokens([5, 6], [True, True])),
        ({"input_ids": [5, 6], "labels": [-100, 6]}, Tokens([5, 6], [False, True])),
        ({"input_ids": [5, 6], "labels": None, "mask": [0, 1]}, Tokens([5, 6], [False, True])),
        ({"input_ids": [5, 6], "completion_mask": [False, True]}, Tokens([5, 6], [False, True])),
        ({"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]}, Tokens([5, 6], [True, True])),
        (
            {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": [-100, 6, -100]},
            Tokens([5, 6], [False, True]),
        ),
        ({"input_ids": "[5, 6]", "text": "kept from before"}, Tokens([5, 6], [True, True])),
    ],
)
def test_tokens(record: dict[str, Any], expected: Tokens) -> None:
    assert read(record) == expected


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        ({"input_ids": 5}, "not a list of integers"),
        ({"input_ids": [5.0]}, "not a list of integers"),
        ({"input_ids": [True]}, "cannot be a token id"),
        ({"input_ids": [-1]}, "cannot be a token id"),
        ({"input_ids": [2**31]}, "cannot be a token id"),
        ({"input_ids": [5, 6], "labels": [5]}, "labels has 1 entries for 2 tokens"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "may be shifted"),
        ({"input_ids": [5, 6], "mask": [0, 2]}, "mask holds more than 0 and 1"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "hole between tokens"),
    ],
)
def test_bad_tokens(record: dict[str, Any], detail: str) -> None:
    with pytest.raises(RowProblem, match=f"bad tokens: .*{detail}"):
        read(record)


@pytest.mark.parametrize(
    "record",
    [
        {"input_ids": []},
        {"input_ids": [5], "labels": [-100]},
        {"input_ids": [5], "attention_mask": [0]},
    ],
)
def test_tokens_of_which_none_trains(record: dict[str, Any]) -> None:
    with pytest.raises(RowProblem, match="empty answer"):
        read(record)
