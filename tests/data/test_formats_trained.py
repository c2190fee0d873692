"""What trains of a row in each format, from the row to the mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import tiny_tokenizer
from tunesmith.data.formats import FORMATS, SUPERVISED, Reading
from tunesmith.data.render import Renderer
from tunesmith.data.sources import open_source
from tunesmith.data.table import TokenTable
from tunesmith.data.template import CHATML
from tunesmith.data.tokenize import tokenize_source

RENDERER = Renderer(tiny_tokenizer(), CHATML)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
EXPECTED = {
    "alpaca": "Bonjour<|im_end|>",
    "chat": "Hello!<|im_end|>",
    "glaive": f"{CALL}<|im_end|>It is 4 °C.<|im_end|>",
    "pair": "42<|im_end|>",
    "segments": " 42.",
    "prompt_completion": " 42.",
    "text": "repes are thin pancakes from Brittany.<|im_end|>",  # nothing predicts the first token
    "custom": "Paris<|im_end|>",
    "chosen": "42<|im_end|>",
    "approved": "42<|im_end|>",
}


def tokenize(tmp_path: Path, record: dict[str, Any], **options: Any) -> TokenTable:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return tokenize_source(
        open_source(path),
        renderer=RENDERER,
        sequence_length=4096,
        cache_dir=tmp_path / "cache",
        **options,
    )


def trained(table: TokenTable) -> str:
    assert len(table) == 1
    text = RENDERER.tokenizer.decode(table.ids(0)[table.trained(0)])
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", [name for name, row in FORMATS.items() if row.kind in SUPERVISED])
def test_the_example_of_a_format_trains_its_answer(tmp_path: Path, name: str) -> None:
    row = FORMATS[name]
    table = tokenize(tmp_path, dict(row.example), format=name, reading=row.reading)
    if row.name == "tokens":
        assert (table.ids(0).tolist(), table.trained(0).tolist()) == (
            [1, 306, 763, 2],
            [False, False, True, True],
        )
    else:
        assert trained(table) == EXPECTED[row.name]


TURNS = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "y"},
    {"role": "assistant", "content": "<think>R</think>B"},
]


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        (TURNS, {}, "A<|im_end|><think>\nR\n</think>\n\nB<|im_end|>"),
        (TURNS, {"reasoning": "keep"}, "A<|im_end|><think>R</think>B<|im_end|>"),
        ([*TURNS[:3], TURNS[1]], {"last_answer_only": True}, "A<|im_end|>"),
        ([TURNS[0], {**TURNS[1], "train": False}, TURNS[2], TURNS[1]], {}, "A<|im_end|>"),
        ([TURNS[0], {**TURNS[1], "weight": 0}, TURNS[2], {**TURNS[1], "content": "C"}], {}, "C<|im_end|>"),
    ],
)
def test_a_source_says_what_trains(
    tmp_path: Path, messages: list[dict[str, Any]], options: dict[str, Any], expected: str
) -> None:
    assert trained(tokenize(tmp_path, {"messages": messages}, reading=Reading(**options))) == expected


def test_a_users_turn_trains_where_the_source_says_so(tmp_path: Path) -> None:
    table = tokenize(tmp_path, {"messages": TURNS[:2]}, reading=Reading(train_roles=("user",)))
    text = trained(table)
    assert text.startswith("x")
    assert "A" not in text


def test_another_template_is_another_table(tmp_path: Path) -> None:
    record = {"q": "Q", "a": "A"}
    for answer, expected in (("{a}", "A<|im_end|>"), ("{a}{a}", "AA<|im_end|>")):
        reading = Reading(template={"user": "{q}", "assistant": answer})
        assert trained(tokenize(tmp_path, record, format="custom", reading=reading)) == expected
