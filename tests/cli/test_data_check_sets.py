"""`tunesmith data check` reads public data sets of every shape without being told their format.

They are not ours to carry, so these tests run where they lie beside the project and skip elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import exit_code

DATA_SETS = Path(__file__).parents[3] / "shared" / "data"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SETS = {
    "alpaca_en_demo.json": (999, "alpaca"),
    "c4_demo.jsonl": (300, "text"),
    "dpo_en_demo.json": (300, "preference"),
    "glaive_toolcall_en_demo.json": (300, "chat"),
    "gsm8k/train.jsonl": (7473, "pair"),
    "identity.json": (91, "alpaca"),
    "kto_en_demo.json": (300, "labelled"),
    "reason_tool_use_demo_50.jsonl": (50, "chat"),
    "v1_dpo_demo.jsonl": (10, "preference"),
    "wiki_demo.txt": (30, "text"),
}


@pytest.fixture
def report(tiny_model_dir: Path, capsys):
    def check(name: str) -> tuple[int, dict[str, Any]]:
        path = DATA_SETS / name
        if not path.is_file():
            pytest.skip(f"{path} is not there")
        words = ("--model", tiny_model_dir, "--sequence-length", 1 << 17, "--json")
        code = exit_code("data", "check", path, *words)
        return code, json.loads(capsys.readouterr().out)

    return check


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_without_naming_its_format(report, name: str) -> None:
    rows, format_name = SETS[name]
    code, found = report(name)

    assert code in (0, 1)
    assert found["format"]["name"] == format_name
    assert found["rows"]["in"] == rows
    assert found["rows"]["kept"] == rows
    assert found["dropped"] == {}
    assert 0 < found["tokens"]["trained"] < found["tokens"]["total"]
    assert code == int(bool(found["changed"]) or format_name in ("preference", "labelled"))


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("alpaca_en_demo.json", lambda row: [row["output"]]),
        ("identity.json", lambda row: [row["output"]]),
        ("dpo_en_demo.json", lambda row: [row["chosen"]["value"]]),
        ("v1_dpo_demo.jsonl", lambda row: [row["chosen_messages"][-1]["content"][0]["value"]]),
        ("kto_en_demo.json", lambda row: [row["messages"][-1]["content"]]),
        (
            "reason_tool_use_demo_50.jsonl",
            lambda row: [
                "<think>\n{}\n</think>\n\n{}".format(*(part["value"] for part in turn["content"]))
                for turn in row["messages"]
                if turn["role"] == "assistant"
            ],
        ),
        ("gsm8k/train.jsonl", lambda row: [row["answer"]]),
        (
            "glaive_toolcall_en_demo.json",
            lambda row: [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"],
        ),
    ],
)
def test_the_row_that_is_shown_trains_on_its_answers(report, name: str, trained) -> None:
    """By the data itself: each answer is at the end of a piece that trains, and no other text is."""
    _, found = report(name)
    place, text = found["example"]["where"], (DATA_SETS / name).read_text(encoding="utf-8")
    line = int(place.rpartition(":")[2])
    start = "\n".join(text.split("\n")[line - 1 :]).lstrip()
    row, _ = json.JSONDecoder().raw_decode(start[start.index("{") :])

    pieces = [piece["text"] for piece in found["example"]["pieces"] if piece["trained"]]
    answers = [f"{answer}<|im_end|>" for answer in trained(row)]
    assert [piece for piece in pieces if not piece.startswith("<tool_call>")] == answers


@pytest.mark.parametrize("name", ["c4_demo.jsonl", "wiki_demo.txt"])
def test_of_plain_text_all_but_the_first_token_trains(report, name: str) -> None:
    _, found = report(name)
    place, lines = found["example"]["where"], (DATA_SETS / name).read_text(encoding="utf-8").split("\n")
    line = lines[int(place.rpartition(":")[2]) - 1]
    text = json.loads(line)["text"] if name.endswith(".jsonl") else line

    first, *others = found["example"]["pieces"]
    assert (first["trained"], [piece["trained"] for piece in others]) == (False, [True])
    assert 0 < len(first["text"]) < 20
    assert first["text"] + others[0]["text"] == text
