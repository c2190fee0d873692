"""Masks: whose turns train, with which ends, and what a message says about itself."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data.chat_templates import GENERATION, LLAMA, SMOL, chat_tokenizer
from tests.support.tiny import tiny_tokenizer
from tunesmith.data.formats import Conversation, Segments, Tokens
from tunesmith.data.render import NOTE_WEIGHT, Renderer
from tunesmith.data.template import CHATML

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Ciao!"},
]
E = "<|im_end|>"


def supervised(messages: list[dict[str, Any]], template: str = CHATML, **options: Any) -> list[str]:
    last_only = options.pop("last_only", False)
    renderer = Renderer(chat_tokenizer(template), template, **options)
    row = renderer.render(Conversation(messages, train_last_only=last_only))
    (encoded,) = renderer.encode([row])
    spans = [row.text[start:end] for start, end in row.spans]
    assert renderer.tokenizer.decode(encoded.ids[encoded.trained]) == "".join(spans)
    return spans


@pytest.mark.parametrize(
    ("train_on", "end_of_turn", "expected"),
    [
        ("assistant", "turn", [f"Hello!{E}", f"Ciao!{E}"]),
        ("assistant", "last", ["Hello!", f"Ciao!{E}"]),
        ("assistant", "none", ["Hello!", "Ciao!"]),
        ("assistant", "all", [E, E, f"Hello!{E}", E, f"Ciao!{E}"]),
        ("last", "turn", [f"Ciao!{E}"]),
        ("last", "none", ["Ciao!"]),
        (("user",), "turn", [f"Hi{E}", f"Bye{E}"]),
        (("user", "assistant"), "last", ["Hi", "Hello!", "Bye", f"Ciao!{E}"]),
        (("system",), "turn", [f"Be.{E}"]),
    ],
)
def test_roles_and_ends(train_on: Any, end_of_turn: Any, expected: list[str]) -> None:
    found = supervised(TALK, train_on=train_on, end_of_turn=end_of_turn)
    # an end and the text before it may be two spans that touch
    assert "".join(found) == "".join(expected)
    if end_of_turn != "all":
        assert found == expected


def test_a_generation_block_keeps_its_bounds_under_every_rule() -> None:
    talk = TALK[1:]
    assert supervised(talk, GENERATION, train_on="last") == [f"Ciao!{E}"]
    assert supervised(talk, GENERATION, end_of_turn="none") == ["Hello!", "Ciao!"]
    off = [*talk[:3], talk[3] | {"train": False}]
    assert supervised(off, GENERATION) == [f"Hello!{E}"]


def test_a_message_decides_for_itself() -> None:
    assert supervised([*TALK[:2], TALK[2] | {"train": False}, *TALK[3:]]) == [f"Ciao!{E}"]
    assert supervised([*TALK[:4], TALK[4] | {"weight": 0.0}]) == [f"Hello!{E}"]
    assert supervised([TALK[0], TALK[1] | {"train": True}, TALK[2]]) == [f"Hi{E}", f"Hello!{E}"]
    assert supervised([TALK[0], TALK[1] | {"train": True}, TALK[2]], last_only=True) == [f"Hello!{E}"]
    assert supervised(TALK, last_only=True) == [f"Ciao!{E}"]
    assert supervised([*TALK[:4], TALK[4] | {"train": False}], last_only=True) == [f"Hello!{E}"]
    row = Renderer(tiny_tokenizer(), CHATML, "all").render(
        Conversation([TALK[0], TALK[1] | {"train": False}, TALK[2]])
    )
    whole = [row.text[start:end] for start, end in row.spans]
    assert whole == [f"<|im_start|>system\nBe.{E}\n", f"<|im_start|>assistant\nHello!{E}\n"]


def test_flags_of_tool_results_survive_their_move_and_templates_do_not_see_them() -> None:
    template = "{% for m in messages %}{{ m.keys() | list | join }}{% endfor %}" + SMOL
    talk = [
        {"role": "user", "content": "Hi", "train": False},
        {"role": "assistant", "content": "see"},
        {"role": "tool", "content": "4", "train": True},
        {"role": "assistant", "content": "Four", "weight": 1},
    ]
    renderer = Renderer(chat_tokenizer(SMOL), template, prefix_mismatch="allow")
    row = renderer.render(Conversation(talk))
    assert "train" not in row.text
    assert "weight" not in row.text
    assert [row.text[a:b] for a, b in row.spans] == [
        f"see{E}",
        f"<tool_response>\n4\n</tool_response>{E}",
        f"Four{E}",
    ]
    assert NOTE_WEIGHT not in row.notes
    weighted = Conversation([talk[0], talk[1] | {"weight": 0.5}])
    assert NOTE_WEIGHT in renderer.render(weighted).notes


def test_a_conversation_in_which_nothing_trains_is_all_context() -> None:
    assert supervised([message | {"train": False} for message in TALK], LLAMA) == []


def test_segments_train_as_they_are_labelled() -> None:
    renderer = Renderer(tiny_tokenizer(), None)
    row = renderer.render(
        Segments([("<|im_start|>Q: a\n", False), ("b\ud800", True), ("", True), ("<|im_end|>", True)])
    )
    (encoded,) = renderer.encode([row])
    assert row.text == "<|im_start|>Q: a\nb\ufffd<|im_end|>"
    assert renderer.tokenizer.decode(encoded.ids) == row.text, "nothing is added"
    assert renderer.tokenizer.decode(encoded.ids[encoded.trained]) == "b\ufffd<|im_end|>"


def test_rows_that_are_tokens_pass_as_they_are() -> None:
    renderer = Renderer(tiny_tokenizer(), None, "all")
    rows = [
        renderer.render(Tokens([5, 6, 7], [True, False, True])),
        renderer.render(Segments([("a", False)])),
    ]
    tokens, text = renderer.encode(rows)
    assert tokens.ids.tolist() == [5, 6, 7]
    assert tokens.trained.tolist() == [False, False, True], "nothing predicts the first"
    assert not text.trained.any()
