"""Formats: detection by columns, renames, and what a row becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.contracts.errors import DataError
from tunesmith.data.formats import (
    FORMATS,
    KINDS,
    Conversation,
    Item,
    Labelled,
    Preference,
    Reading,
    RowProblem,
    Text,
    convert,
    resolve_format,
)
from tunesmith.data.sources import open_source
from tunesmith.settings.data import FormatName

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def read(record: dict[str, Any], name: str = "auto", **columns: str) -> Item:
    return convert(resolve_format(name, columns, record), record, columns)


def turns(record: dict[str, Any], name: str = "auto", **columns: str) -> list[tuple[str, str]]:
    item = read(record, name, **columns)
    assert isinstance(item, Conversation)
    return [(message["role"], message["content"]) for message in item.messages]


NAMED_ONLY = {"prompt_completion", "custom", "chosen", "approved"}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_and_detects_its_example(name: str) -> None:
    row = FORMATS[name]
    found = resolve_format(
        "auto" if name not in NAMED_ONLY else name, {}, row.example, reading=row.reading, kinds=KINDS
    )
    assert found.name == row.name
    assert found.kind is row.kind
    assert type(convert(found, row.example, {})) is row.kind
    assert {key for key, column in found.columns.items() if column.required} <= row.example.keys() or any(
        alias in row.example for column in found.columns.values() for alias in column.aliases
    )


@pytest.mark.parametrize("name", sorted({row.name for row in FORMATS.values()} - NAMED_ONLY))
def test_no_example_is_taken_by_another_format_before(name: str) -> None:
    fitting = [row.name for row in FORMATS.values() if row.detect(FORMATS[name].example.keys())]
    assert fitting[0] == name


def test_every_format_can_be_named_in_the_settings() -> None:
    assert {*get_args(FormatName)} == {"auto", *FORMATS}


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
    ("record", "name"),
    [
        ({"conversations": [], "chosen": {}, "rejected": {}}, "preference"),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference"),
        ({"question": "Q", "response_j": "A", "response_k": "B"}, "preference"),
        ({"chosen_messages": [], "rejected_messages": []}, "preference"),
        ({"messages": [], "label": True}, "labelled"),
        ({"instruction": "Q", "output": "A", "label": False}, "labelled"),
        ({"prompt": "Q", "completion": "A", "label": True}, "labelled"),
        ({"prompt": "Q", "completions": [], "labels": []}, "stepwise"),
        ({"prompt": "Q", "ground_truth": "A"}, "prompt"),
    ],
)
def test_rows_that_must_not_be_imitated_are_refused_in_one_sentence(
    record: dict[str, Any], name: str
) -> None:
    with pytest.raises(DataError, match=f"are of the format {name}: .*this run trains on conv"):
        resolve_format("auto", {}, record)
    with pytest.raises(DataError, match=f"The format {name} gives .*, and this run trains on conv"):
        resolve_format(name, {}, record)
    assert resolve_format("auto", {}, record, kinds=KINDS).name == name


def test_a_refusal_says_which_format_trains_on_the_good_answers() -> None:
    with pytest.raises(DataError) as caught:
        resolve_format("auto", {}, {"prompt": "Q", "chosen": "A", "rejected": "B"})
    assert caught.value.hint == "`format: chosen` trains on the better answer of each row."


def test_a_lone_mark_of_preference_matches_nothing() -> None:
    with pytest.raises(DataError, match=r"No format matches.*preference data"):
        resolve_format("auto", {}, {"prompt": "Q", "chosen": "A"})


def test_columns_in_capitals() -> None:
    assert turns({"INSTRUCTION": "Q", "RESPONSE": "A"}) == [("user", "Q"), ("assistant", "A")]
    assert turns({"Question": "Q", "Answer": "A"}) == [("user", "Q"), ("assistant", "A")]
    # a column in capitals is not taken where the format's own name is there
    assert turns({"question": "Q", "QUESTION": "no", "answer": "A"})[0] == ("user", "Q")


def test_kinds_decide_what_auto_looks_for() -> None:
    record = {"prompt": "Q", "completion": "A", "chosen": "A", "rejected": "B"}
    assert resolve_format("auto", {}, record, kinds=[Preference]).name == "preference"
    with pytest.raises(DataError, match="of the format preference: pairs"):
        resolve_format("auto", {}, record, kinds=[Labelled])


def test_roles_that_train_and_the_last_answer() -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q", "train": False},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
        {"role": "assistant", "content": "B", "train": True},
    ]
    reading = Reading(train_roles=("user",), last_answer_only=True)
    row = {"messages": messages}
    item = convert(resolve_format("auto", {}, row, reading=reading), row, {})
    assert isinstance(item, Conversation)
    # what a message says itself stands
    assert [message.get("train") for message in item.messages] == [None, False, False, True, True]
    assert item.train_last_only
    plain = read(row)
    assert isinstance(plain, Conversation)
    assert [message.get("train") for message in plain.messages] == [None, False, None, None, True]
    assert not plain.train_last_only


def test_deep_nesting_is_a_problem_of_the_row() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    call = {"name": "f", "arguments": deep}
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(RowProblem, match="nested too deeply"):
        read(row)


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


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
words = st.sampled_from(
    ["user", "assistant", "gpt", "human", "\n\nHuman: Q\n\nAssistant: A", "USER: Q\nASSISTANT: A", "[{", "{}"]
)
keys = st.sampled_from(
    ["role", "from", "content", "value", "type", "messages", "text", "label", "tool_calls", "name", "arguments",
     "train", "weight", "loss_weight", "input", "output", "tools"]
)  # fmt: skip
values = st.recursive(
    scalars | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=10,
)
answered = st.fixed_dictionaries(
    {"role": words, "content": values}, optional={"tool_calls": values, "train": values, "weight": values}
)
EVERY_COLUMN = sorted({name for row in FORMATS.values() for name in row.names})


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_nothing_but_a_row_problem_comes_out(name: str, data: st.DataObject) -> None:
    row = FORMATS[name]
    columns = st.sampled_from(sorted(row.names) or ["country", "capital"])
    record = data.draw(st.dictionaries(columns, values | st.lists(answered, max_size=3), max_size=5))
    try:
        item = convert(row, record, {})
    except RowProblem:
        return
    assert type(item) is row.kind


@settings(max_examples=300, deadline=None)
@given(
    record=st.dictionaries(st.sampled_from(EVERY_COLUMN) | st.text(max_size=6), values, max_size=6),
    notation=st.sampled_from(["auto", "text", "hermes", "llama3", "glaive"]),
)
def test_any_row_is_read_or_refused(record: dict[str, Any], notation: Any) -> None:
    reading = Reading(tool_calls=notation, train_roles=("user", "tool"))
    try:
        found = resolve_format("auto", {}, record, reading=reading, kinds=KINDS)
        item = convert(found, record, {})
    except (RowProblem, DataError):
        return
    assert type(item) is found.kind


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
@pytest.mark.parametrize(
    ("file", "name", "rows", "trained"),
    [
        ("dpo_en_demo.json", "preference", 300, "chosen"),
        ("v1_dpo_demo.jsonl", "preference", 10, "chosen"),
        ("kto_en_demo.json", "labelled", 300, "approved"),
    ],
)
def test_real_preference_files_are_recognised(file: str, name: str, rows: int, trained: str) -> None:
    records = [row.record for row in open_source(SHARED / file).rows()]
    assert records[0] is not None
    found = resolve_format("auto", {}, records[0], kinds=KINDS)
    good = resolve_format(trained, {}, records[0])
    assert found.name == name
    read_rows = 0
    for record in records:
        assert record is not None
        item = convert(found, record, {})
        assert isinstance(item, Preference | Labelled)
        assert item.prompt[-1]["role"] == "user"
        read_rows += 1
        if isinstance(item, Preference) or item.label:
            answer = item.chosen if isinstance(item, Preference) else item.answer
            conversation = convert(good, record, {})
            assert isinstance(conversation, Conversation)
            assert conversation.messages[-len(answer) :] == answer
            assert all(
                m.get("train") is False
                for m in conversation.messages[: -len(answer)]
                if m["role"] == "assistant"
            )
    assert read_rows == rows
