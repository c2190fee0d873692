"""Preference data in the shapes of the public sets, labelled answers, steps and prompts."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from tunesmith.contracts.errors import DataError
from tunesmith.data.formats import (
    FORMATS,
    KINDS,
    Conversation,
    Item,
    Labelled,
    Preference,
    Prompt,
    Reading,
    RowProblem,
    Stepwise,
    convert,
    resolve_format,
)

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "Q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def read(record: dict[str, Any], name: str = "auto", reading: Reading | None = None) -> Item:
    kinds = KINDS if name == "auto" else [FORMATS[name].kind]
    found = resolve_format(name, {}, record, reading=reading or Reading(), kinds=kinds)
    return convert(found, record, {})


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        # UltraFeedback: the conversations hold the prompt, which stands beside them as well
        {"prompt": "Q", "prompt_id": "1", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        # HH-RLHF
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        # LLaMA-Factory
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {
            "chosen_messages": [{**USER, "loss_weight": 0.0}, GOOD],
            "rejected_messages": [{**USER, "loss_weight": 0.0}, BAD],
        },
        # OpenAI
        {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        {"question": "Q", "response_j": "good", "response_k": "bad"},
        {"instruction": "Q", "chosen_response": "good", "rejected_response": "bad"},
    ],
)  # fmt: skip
def test_pairs_in_every_shape(record: dict[str, Any]) -> None:
    item = read(record)
    assert isinstance(item, Preference)
    assert [(m["role"], m["content"]) for m in item.prompt] == [("user", "Q")]
    assert (item.chosen, item.rejected, item.tools) == ([GOOD], [BAD], None)


def test_orca_has_a_system_column() -> None:
    item = read({"system": "S", "question": "Q", "chosen": "good", "rejected": "bad"})
    assert item == Preference([SYSTEM, USER], [GOOD], [BAD])


def test_a_prompt_of_several_turns_is_what_both_begin_with() -> None:
    early = {"role": "assistant", "content": "early"}
    head = [SYSTEM, USER, early, USER]
    item = read({"chosen": [*head, GOOD], "rejected": [*head, BAD, USER, GOOD]})
    assert item == Preference(head, [GOOD], [BAD, USER, GOOD])
    hh = "\n\nHuman: Q\n\nAssistant: early\n\nHuman: Q\n\nAssistant: "
    assert read({"chosen": hh + "good", "rejected": hh + "bad"}) == Preference(head[1:], [GOOD], [BAD])


def test_the_same_call_with_other_results_belongs_to_the_answers() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    one, two = ({"role": "tool", "content": text} for text in "12")
    item = read({"chosen": [USER, call, one, GOOD], "rejected": [USER, call, two, BAD]})
    assert item == Preference([USER], [call, one, GOOD], [call, two, BAD])


def test_texts_without_a_prompt_share_their_beginning() -> None:
    item = read({"chosen": "Is it 7?\nYes, it is.", "rejected": "Is it 7?\nYesterday."})
    assert isinstance(item, Preference)
    assert item.prompt == [{"role": "user", "content": "Is it 7?"}]
    assert (item.chosen[0]["content"], item.rejected[0]["content"]) == ("Yes, it is.", "Yesterday.")


def test_the_margin_and_the_tools() -> None:
    record = {"prompt": "Q", "chosen": "good", "rejected": "bad", "score_chosen": 8.5, "score_rejected": 6}
    item = read({**record, "tools": [{"name": "f"}]})
    assert isinstance(item, Preference)
    assert item.margin == 2.5
    assert item.tools == [{"type": "function", "function": {"name": "f"}}]
    inside = {"messages": [USER], "tools": [{"name": "f"}]}
    item = read({"input": inside, "preferred_output": [GOOD], "non_preferred_output": [BAD], "margin": 3})
    assert isinstance(item, Preference)
    assert (item.margin, item.tools) == (3.0, [{"type": "function", "function": {"name": "f"}}])


def test_reasoning_is_taken_out_of_both_answers() -> None:
    item = read({"prompt": "Q", "chosen": "<think>R</think>good", "rejected": "bad"})
    assert item == Preference([USER], [{**GOOD, "reasoning_content": "R"}], [BAD])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Q", "chosen": "same", "rejected": "same"}, "same answers"),
        ({"chosen": [USER, GOOD], "rejected": [USER, {**GOOD, "weight": 0}]}, "same answers"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "R"}, BAD]}, "no common prompt"),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [USER, BAD]}, "no common prompt"),
        ({"chosen": "Yes", "rejected": "No"}, "no common prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "missing column"),
        ({"prompt": "Q", "chosen": "", "rejected": "bad"}, "empty answer"),
        ({"prompt": "Q", "chosen": "good", "rejected": " "}, "empty answer"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "no assistant turn"),
        ({"prompt": "Q", "chosen": "good", "rejected": None}, "missing column"),
        ({"prompt": "Q", "chosen": 7, "rejected": {"a": 1}}, "not text"),
        ({"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": "big"}, "bad margin"),
    ],
)
def test_pairs_that_cannot_be_compared(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read(record, "preference")
    assert caught.value.reason == reason


def test_chosen_trains_the_better_answer_and_nothing_before_it() -> None:
    early = {"role": "assistant", "content": "early"}
    item = read({"chosen": [USER, early, USER, GOOD], "rejected": [USER, early, USER, BAD]}, "chosen")
    assert item == Conversation([USER, {**early, "train": False}, USER, GOOD])


# ---------------------------------------------------------------- labelled


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q", "completion": "good", "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": 1},
        {"messages": [USER, GOOD], "label": True},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}], "kto_tag": "true"},
        {"instruction": "Q", "input": "", "output": "good", "kto_tag": True},
    ],
)  # fmt: skip
def test_labels_in_every_shape(record: dict[str, Any]) -> None:
    assert read(record) == Labelled([USER], [GOOD], label=True)
    assert read(record, "approved") == Conversation([USER, GOOD])
    bad = {key: False if key in ("label", "kto_tag") else value for key, value in record.items()}
    assert read(bad) == Labelled([USER], [GOOD], label=False)
    with pytest.raises(RowProblem, match="labelled bad"):
        read(bad, "approved")


def test_the_last_answer_is_what_the_label_judges() -> None:
    early = {"role": "assistant", "content": "early"}
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "1"}
    messages = [USER, early, USER, call, result, GOOD]
    item = read({"messages": messages, "label": True})
    assert item == Labelled(messages[:3], messages[3:], label=True)
    approved = read({"messages": messages, "label": True}, "approved")
    assert isinstance(approved, Conversation)
    assert approved.messages == [USER, {**early, "train": False}, *messages[2:]]


@pytest.mark.parametrize("label", ["perhaps", 2, 0.5, [], {}])
def test_a_label_is_true_or_false(label: Any) -> None:
    with pytest.raises(RowProblem, match="bad label"):
        read({"messages": [USER, GOOD], "label": label}, "labelled")


# ---------------------------------------------------------------- steps and prompts


def test_steps() -> None:
    record = {"prompt": "Q", "completions": ["one", "two"], "labels": [True, 0]}
    assert read(record) == Stepwise([USER], ["one", "two"], [True, False])
    for completions, labels, reason in (
        (["one"], [True, False], "malformed steps"),
        ("one", [True], "malformed steps"),
        ([], [], "empty answer"),
        (["one"], ["?"], "bad label"),
        ([{}], [True], "not text"),
    ):
        with pytest.raises(RowProblem) as caught:
            read({"prompt": "Q", "completions": completions, "labels": labels}, "stepwise")
        assert caught.value.reason == reason


def test_a_prompt_keeps_the_columns_of_its_reward() -> None:
    record = {"prompt": [SYSTEM, USER], "Answer": 42, "reward_model": {"style": "rule"}}
    item = read(record, "prompt")
    assert item == Prompt([SYSTEM, USER], None, {"Answer": 42, "reward_model": {"style": "rule"}})
    assert read({"prompt": "Q", "answer": "Q"}, "prompt") == Prompt([USER], None, {"answer": "Q"})
    assert read({"question": "Q", "answer": "4"}, "prompt") == Prompt([USER], None, {"answer": "4"})
    with pytest.raises(RowProblem, match="empty prompt"):
        read({"prompt": " ", "answer": "4"}, "prompt")
    with pytest.raises(RowProblem, match="no messages"):
        read({"prompt": [], "answer": "4"}, "prompt")


# ---------------------------------------------------------------- compared and scored answers

SHP = {
    "post_id": "1", "domain": "askculinary_train", "history": "Q", "human_ref_A": "good", "human_ref_B": "bad",
    "labels": 1, "score_A": 9, "score_B": 4, "score_ratio": 2.25,
}  # fmt: skip
ULTRA = {
    "source": "sharegpt", "instruction": "Q", "models": ["m", "n", "o"],
    "completions": [
        {"model": "m", "response": "fair", "overall_score": 10.0, "fine-grained_score": 4.0},
        {"model": "n", "response": "good", "overall_score": 8.0, "fine-grained_score": 4.75},
        {"model": "o", "response": "bad", "overall_score": 3.0, "fine-grained_score": 1.5},
    ],
    "correct_answers": ["None"], "incorrect_answers": ["None"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "name", "margin"),
    [
        (SHP, "compared", 5.0),
        ({**SHP, "human_ref_A": "bad", "human_ref_B": "good", "labels": 0}, "compared", -5.0),
        ({**SHP, "labels": True}, "compared", 5.0),
        ({"prompt": "Q", "first": "good", "second": "bad", "better": 0}, "compared", None),
        ({"prompt": "Q", "first": "bad", "second": "good", "first_is_better": 0}, "compared", None),
        # PKU-SafeRLHF: the number of the better one
        ({"prompt": "Q", "response_0": "good", "response_1": "bad", "better_response_id": 0}, "compared", None),
        ({"prompt": "Q", "response_0": "bad", "response_1": "good", "better_response_id": 1}, "compared", None),
        # the chatbot arena
        ({"conversation_a": [USER, BAD], "conversation_b": [USER, GOOD], "winner": "model_b"}, "compared", None),
        # WebGPT
        (
            {"question": {"full_text": "Q", "id": 1}, "answer_0": "bad", "answer_1": "good", "score_0": -1.0,
             "score_1": 1.0},
            "compared",
            2.0,
        ),
        ({"prompt": "Q", "first": "good", "second": "bad", "better": "first"}, "compared", None),
        (ULTRA, "scored", 3.25),
        ({"prompt": "Q", "completions": ["fair", "good", "bad"], "scores": [2, 3, 1]}, "scored", 2.0),
        ({"query": "Q", "completions": [{"answer": "good", "rank": 1}, {"answer": "bad", "rank": 7}]}, "scored", 6.0),
        ({"query": "Q", "completions": [{"text": "good", "rating": "4"}, {"text": "bad", "rating": 1}]}, "scored", 3),
    ],
)  # fmt: skip
def test_raw_sets_become_pairs(record: dict[str, Any], name: str, margin: float | None) -> None:
    assert resolve_format("auto", {}, record, kinds=KINDS).name == name
    assert read(record) == Preference([USER], [GOOD], [BAD], None, margin)
    imitated = read(record, "chosen")
    assert isinstance(imitated, Conversation)
    assert imitated.messages == [USER, GOOD]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({**SHP, "labels": 7}, "bad label"),
        ({**SHP, "labels": float("nan")}, "bad label"),
        ({**SHP, "labels": "x" * 1000}, "bad label"),
        ({**SHP, "human_ref_B": ""}, "empty answer"),
        ({"prompt": "Q", "first": "good", "second": "bad", "better": "tie"}, "no preference"),
        ({"prompt": "Q", "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": 1}, "no preference"),
        ({"prompt": "Q", "answer_0": "a", "answer_1": "b", "score_0": 1, "score_1": "x"}, "bad label"),
        ({**ULTRA, "completions": []}, "no preference"),
        ({**ULTRA, "completions": ULTRA["completions"][:1]}, "no preference"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1, 1]}, "no preference"),
        ({"prompt": "Q", "completions": ["a", "b"], "scores": [1]}, "malformed answers"),
        ({"prompt": "Q", "completions": ["a", "b"]}, "malformed answers"),
        ({"prompt": "Q", "completions": "ab"}, "malformed answers"),
        (
            {"prompt": "Q", "completions": [{"response": "a", "score": "N/A"}, {"response": "b"}]},
            "malformed answers",
        ),
    ],
)
def test_what_cannot_be_compared_has_a_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read(record)
    assert caught.value.reason == reason
    assert len(caught.value.detail) < 200


def test_chosen_still_names_the_column_that_is_missing() -> None:
    with pytest.raises(DataError, match="The format chosen needs the column 'chosen'"):
        resolve_format("chosen", {}, {"prompt": "Q", "answer": "A"})


@pytest.mark.parametrize(
    "record",
    [
        {"id": 1, "title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}},
        {"prompt": "Q", "completions": ["a"], "labels": [True]},
    ],
)
def test_other_sets_are_not_taken_for_scored_ones(record: dict[str, Any]) -> None:
    with contextlib.suppress(DataError):
        assert resolve_format("auto", {}, record, kinds=KINDS).name not in ("scored", "compared")


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"dialogue": [USER, GOOD]}, "chat"),
        ({"dialogue": ["Q", "good"], "topic": "x"}, "chat"),
        ({"dialogue": "A: hi", "summary": "They greet."}, "pair"),
        ({"dialogue": "A: hi", "messages": [USER, GOOD], "summary": "S"}, "chat"),
    ],
)
def test_a_dialogue_is_a_chat_unless_it_is_summed_up(record: dict[str, Any], name: str) -> None:
    assert resolve_format("auto", {}, record).name == name
    item = read(record, name)
    assert isinstance(item, Conversation)
    if record.get("dialogue") != "A: hi":
        assert [message["content"] for message in item.messages] == ["Q", "good"]
