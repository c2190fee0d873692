"""Formats: detection by columns, renames, and what a row becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.contracts.errors import DataError
from tunesmith.data.formats import FORMATS, Conversation, RowProblem, Text, convert, resolve_format
from tunesmith.data.sources import open_source

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def read(record: dict[str, Any], name: str = "auto", **columns: str) -> Conversation | Text:
    return convert(resolve_format(name, columns, record), record, columns)


def turns(record: dict[str, Any], name: str = "auto", **columns: str) -> list[tuple[str, str]]:
    item = read(record, name, **columns)
    assert isinstance(item, Conversation)
    return [(message["role"], message["content"]) for message in item.messages]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_and_detects_its_example(name: str) -> None:
    row = FORMATS[name]
    found = resolve_format("auto", {}, row.example)
    assert found is row
    assert isinstance(convert(row, row.example, {}), Conversation | Text)
    assert {key for key, column in row.columns.items() if column.required} <= row.example.keys()


def test_alpaca() -> None:
    record = {"instruction": "Add", "input": "1 2", "output": "3", "system": "S", "history": [["a", "b"]]}
    assert turns(record) == [
        ("system", "S"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Add\n\n1 2"),
        ("assistant", "3"),
    ]
    assert turns({"instruction": "Add", "input": "", "output": "3"}) == [("user", "Add"), ("assistant", "3")]
    dolly = {"instruction": "Q", "context": "C", "response": "A", "category": "x"}
    assert turns(dolly) == [("user", "Q\n\nC"), ("assistant", "A")]


def test_chat_takes_system_and_tools_from_columns() -> None:
    record = {
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
        "system": "S",
        "tools": '[{"name": "f"}]',
    }
    item = read(record)
    assert isinstance(item, Conversation)
    assert item.messages[0] == {"role": "system", "content": "S"}
    assert item.tools == [{"type": "function", "function": {"name": "f"}}]
    inside = [{"role": "system", "content": "T"}, {"role": "assistant", "content": "A"}]
    assert turns({"messages": inside, "system": "S"})[0] == ("system", "S\n\nT")
    assert turns({"messages": inside, "system": "T"})[0] == ("system", "T")


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("prompt", "response"),
        ("question", "answer"),
        ("prompt", "completion"),
        ("query", "response"),
        ("instruction", "response"),
        ("input", "output"),
    ],
)
def test_pairs_by_many_names(prompt: str, response: str) -> None:
    record = {prompt: "Q", response: "A", "other": 1}
    assert resolve_format("auto", {}, record).name == "pair"
    assert turns(record) == [("user", "Q"), ("assistant", "A")]


def test_renames_decide_the_format() -> None:
    record = {"question": "Q", "answer": "A", "extra": "E"}
    assert resolve_format("auto", {"prompt": "question", "response": "answer"}, record).name == "pair"
    assert turns(record, prompt="extra", response="answer") == [("user", "E"), ("assistant", "A")]
    assert turns({"prompt": "A", "response": "Q"}, prompt="response", response="prompt")[0] == ("user", "Q")
    moved = {
        "response": "Q",
        "answer": "A",
    }  # a column that was renamed is no longer there under its old name
    assert turns(moved, prompt="response") == [("user", "Q"), ("assistant", "A")]
    assert read({"body": "x"}, text="body") == Text("x")
    assert read({"body": "x"}, "completion", text="body") == Text("x")


def test_a_rename_of_a_column_that_is_not_there() -> None:
    with pytest.raises(DataError) as caught:
        resolve_format("auto", {"prompt": "qestion"}, {"question": "Q", "answer": "A"})
    assert "'qestion'" in caught.value.message
    assert "question, answer" in caught.value.message
    assert caught.value.hint == "Did you mean 'question'?"


def test_a_rename_to_a_name_that_the_format_lacks() -> None:
    with pytest.raises(DataError, match="pair has no column 'promt'") as caught:
        resolve_format("pair", {"promt": "q"}, {"q": "Q", "prompt": "P", "response": "A"})
    assert caught.value.hint == "Did you mean 'prompt'?"


def test_no_match_lists_what_is_there_and_what_is_needed() -> None:
    with pytest.raises(DataError) as caught:
        resolve_format("auto", {}, {"promt": "Q", "respons": "A"})
    assert "promt, respons" in caught.value.message
    assert "alpaca (instruction, output)" in (caught.value.hint or "")
    assert "columns: {prompt: promt}" in (caught.value.hint or "")


def test_a_named_format_needs_its_columns() -> None:
    with pytest.raises(DataError, match="alpaca needs the column 'output'; the data has instruction"):
        resolve_format("alpaca", {}, {"instruction": "x"})
    with pytest.raises(DataError, match="no format 'alpacca'") as caught:
        resolve_format("alpacca", {}, {"instruction": "x"})
    assert caught.value.hint == "Did you mean 'alpaca'?"


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [], "chosen": {}, "rejected": {}},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"messages": [], "label": True},
        {"instruction": "Q", "output": "A", "label": False},
        {"prompt": "Q", "completion": "A", "label": True},
        {"chosen_messages": [], "rejected_messages": []},
    ],
)
def test_preference_data_is_never_taken_for_answers(record: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"No format matches.*preference data"):
        resolve_format("auto", {}, record)


def test_labels_of_a_text_set_do_no_harm() -> None:
    assert resolve_format("auto", {}, {"text": "fine film", "label": 1}).name == "text"


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("alpaca", {"instruction": "Q", "output": ""}, "empty answer"),
        ("alpaca", {"instruction": "Q"}, "missing column"),
        ("alpaca", {"instruction": None, "output": "A"}, "missing column"),
        ("alpaca", {"instruction": "Q", "output": "A", "history": [["one"]]}, "malformed history"),
        ("alpaca", {"instruction": "Q", "output": "A", "history": True}, "malformed history"),
        ("alpaca", {"instruction": "Q", "output": "A", "history": [["u", ""]]}, "empty answer"),
        ("alpaca", {"instruction": ["Q"], "output": "A"}, "not text"),
        ("pair", {"prompt": "Q", "response": " "}, "empty answer"),
        ("pair", {"prompt": "Q", "response": {"a": 1}}, "not text"),
        ("pair", {"prompt": "Q", "response": "A", "system": [1]}, "not text"),
        ("chat", {"messages": None}, "missing column"),
        ("chat", {"messages": [{"role": "assistant", "content": "A"}], "tools": "{"}, "bad tools"),
        ("text", {"text": " \n"}, "empty text"),
        ("text", {"text": True}, "not text"),
        ("text", {}, "missing column"),
    ],
)
def test_malformed_rows_have_a_reason(name: str, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        convert(FORMATS[name], record, {})
    assert caught.value.reason == reason


values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.lists(st.text(max_size=3), max_size=2)
)


@given(name=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_nothing_but_a_row_problem_comes_out(name: str, data: st.DataObject) -> None:
    row = FORMATS[name]
    record = data.draw(st.dictionaries(st.sampled_from(sorted(row.columns)), values))
    try:
        item = convert(row, record, {})
    except RowProblem:
        return
    assert isinstance(item, Conversation | Text)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize(
    ("file", "name", "rows"),
    [
        ("alpaca_en_demo.json", "alpaca", 999),
        ("identity.json", "alpaca", 91),
        ("glaive_toolcall_en_demo.json", "chat", 300),
        ("reason_tool_use_demo_50.jsonl", "chat", 50),
        ("gsm8k/train.jsonl", "pair", 7473),
        ("wiki_demo.txt", "text", 30),
        ("c4_demo.jsonl", "text", 300),
    ],
)
def test_real_files_are_read_without_a_name(file: str, name: str, rows: int) -> None:
    records = [row.record for row in open_source(SHARED / file).rows()]
    assert len(records) == rows
    assert records[0] is not None
    found = resolve_format("auto", {}, records[0])
    assert found.name == name
    for record in records:
        assert record is not None
        convert(found, record, {})


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
@pytest.mark.parametrize("file", ["dpo_en_demo.json", "kto_en_demo.json", "v1_dpo_demo.jsonl"])
def test_real_preference_files_match_no_format(file: str) -> None:
    record = next(open_source(SHARED / file).rows()).record
    assert record is not None
    with pytest.raises(DataError, match="No format matches"):
        resolve_format("auto", {}, record)
