"""`tunesmith inspect`: every stop of a row, and colours that mark exactly the tokens that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.segment import Segment

from tests.cli.command import exit_code, succeed
from tests.support.runs import run_settings
from tests.support.tiny import tiny_tokenizer
from tunesmith.cli.inspect_row import inspect_row
from tunesmith.config.load import load_settings
from tunesmith.contracts.errors import DataError

TRAINED, CONTEXT, CUT = "trained", "context", "cut"


class Recorded:
    """What was printed, as text and as pieces with a kind."""

    def __init__(self, console: Console) -> None:
        self.segments: list[Segment] = list(console._record_buffer)
        self.text = console.export_text(clear=False)

    def tokens(self) -> list[tuple[str, str]]:
        """The coloured pieces of the token stop: text and kind."""
        pieces, inside = [], False
        for segment in self.segments:
            if "tokens · " in segment.text:
                inside = True
            elif inside and segment.text.strip() == "trained on":
                break
            elif inside and segment.style is not None and (kind := _kind(segment)) is not None:
                pieces.append((segment.text, kind))
        return pieces

    def of(self, kind: str) -> str:
        return "".join(text for text, found in self.tokens() if found == kind).replace("↵", "\n")


def _kind(segment: Segment) -> str | None:
    style = segment.style
    assert style is not None
    if style.bgcolor is not None:
        return TRAINED
    if style.strike:
        return CUT
    return CONTEXT if style.color is not None and style.color.name.startswith("grey") else None


@pytest.fixture
def look(tiny_model_dir: Path, tmp_path: Path):
    def inspect(rows: list[Any] | str, row: int = 0, *, terminal: bool = True, **sections: Any) -> Recorded:
        settings = run_settings(tiny_model_dir, tmp_path, **sections)
        text = rows if isinstance(rows, str) else "".join(json.dumps(each) + "\n" for each in rows)
        (tmp_path / "rows.jsonl").write_text(text)
        with (tmp_path / "out").open("w") as out:
            console = Console(
                file=out, record=True, width=4000, force_terminal=terminal,
                color_system="truecolor" if terminal else None,
            )  # fmt: skip
            inspect_row(load_settings(settings), console, row=row, source=0)
        return Recorded(console)

    return inspect


def pair(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": answer}


ROWS = [pair(f"how many are {n}", f"there are {n}") for n in range(10)]
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who sold clips?"},
        {"role": "assistant", "content": "Natalia."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "In April\nand May."},
    ]
}


def test_every_stop_is_printed(look, tmp_path: Path) -> None:
    text = look(ROWS, row=3).text
    stops = [
        f"record · {tmp_path / 'rows.jsonl'}:4", "conversation · format pair · 2 messages", "rendered text",
        "tokens · ", "place · pack ", "the whole set ─",
    ]  # fmt: skip
    positions = [text.index(stop) for stop in stops]
    assert positions == sorted(positions)
    assert '"question": "how many are 3"' in text
    assert "user      how many are 3" in text
    assert "<|im_start|>user\nhow many are 3<|im_end|>\n<|im_start|>assistant\nthere are 3<|im_end|>" in text
    assert "10 rows read, 10 kept, 0 cut" in text
    assert "9 documents to train on, 1 held out" in text


def test_colours_mark_exactly_the_tokens_that_train(look) -> None:
    shown = look([CHAT] * 3)
    assert shown.of(TRAINED) == "Natalia.<|im_end|>In April\nand May.<|im_end|>"
    everything = "".join(text for text, _ in shown.tokens()).replace("↵", "\n")
    assert everything.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "Who sold clips?" in shown.of(CONTEXT)
    assert shown.of(CUT) == ""


def test_the_count_beside_the_colours_is_the_tokenizers(look) -> None:
    shown = look([CHAT] * 3)
    tokenizer = tiny_tokenizer()
    trained = sum(
        len(tokenizer(part)["input_ids"]) for part in ("Natalia.<|im_end|>", "In April\nand May.<|im_end|>")
    )
    total = len(tokenizer(tokenizer.apply_chat_template(CHAT["messages"], tokenize=False))["input_ids"])
    assert f"tokens · {total}, of which {trained} are trained on" in shown.text


def test_neighbouring_tokens_differ_in_shade(look) -> None:
    shades = [str(s.style) for s in look([CHAT] * 3).segments if s.style is not None and s.style.bgcolor]
    assert len({*shades}) == 2


def test_train_on_all_colours_all_but_the_first_token(look) -> None:
    shown = look([CHAT] * 3, data={"train_on": "all"})
    assert shown.of(CONTEXT) == "<|im_start|>"


def test_a_character_of_several_tokens_is_shown_once(look) -> None:
    shown = look([pair("hi", "🎉é")] * 3)
    assert shown.of(TRAINED).replace("·", "") == "🎉é<|im_end|>"


def test_markup_in_the_data_is_text(look) -> None:
    shown = look([pair("[red]hi[/red] [/b]", "[bold]ho[/bold]")] * 3)
    assert shown.of(TRAINED) == "[bold]ho[/bold]<|im_end|>"
    assert "[red]hi[/red] [/b]" in shown.of(CONTEXT)


def test_without_colours_the_trained_text_is_spelled_out(look) -> None:
    shown = look([CHAT] * 3, terminal=False)
    assert "trained on:\nNatalia.<|im_end|>\nIn April\nand May.<|im_end|>\n" in shown.text


# ---------------------------------------------------------------- rows that do not train, or not wholly


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{nope", "invalid JSON"),
        (json.dumps(pair("hi", "")), "empty answer"),
        (json.dumps({"question": "hi"}), "missing column: response"),
        (json.dumps([1, 2]), "object"),
    ],
)
def test_a_dropped_row_says_why(look, bad: str, reason: str) -> None:
    lines = "".join(json.dumps(each) + "\n" for each in ROWS[:3])
    text = look(lines + bad + "\n", row=3).text
    (line,) = [line for line in text.splitlines() if line.startswith("This row is dropped: ")]
    assert reason in line
    assert "place · none, the row is dropped" in text
    assert "4 rows read, 3 kept" in text


LONG = pair("how many", "again and " * 100)


def test_a_long_row_shows_where_it_is_cut(look) -> None:
    shown = look([LONG, *ROWS[:3]])
    kept = shown.of(CONTEXT) + shown.of(TRAINED)
    tokenizer = tiny_tokenizer()
    assert len(tokenizer(kept)["input_ids"]) == 128
    assert shown.of(CUT).endswith("again and <|im_end|>\n")
    trained = len(tokenizer(shown.of(TRAINED))["input_ids"])
    assert f"of which {trained} are trained on" in shown.text
    assert "cut to 128 of its " in shown.text
    assert "place · pack" in shown.text


def test_a_long_row_that_is_dropped_says_so(look) -> None:
    text = look([LONG, *ROWS[:3]], data={"overlong": "drop"}).text
    assert "This row is dropped: too long: " in text
    assert "tokens, the longest row may have 128" in text
    assert "place · none, the row is dropped" in text


def test_a_row_whose_answer_lies_behind_the_cut_says_so(look) -> None:
    text = look([pair("again and " * 200, "four"), *ROWS[:3]]).text
    assert "This row is dropped: nothing to train on: within 128 tokens" in text


def test_a_held_out_row_says_so(look, tmp_path: Path) -> None:
    held = look(ROWS, data={"eval": [{"path": str(tmp_path / "rows.jsonl")}]}).text
    assert "10 documents to train on, 10 held out" in held
    places = [look(ROWS, row=n).text.split("place · ")[1] for n in range(10)]
    assert sum(place.startswith("held out") for place in places) == 1


def test_the_pack_is_a_bar_with_this_row_in_green(look) -> None:
    shown = look(ROWS, row=3, data={"eval": {"fraction": 0.0}}, train={"sequence_length": 64})
    cells = [s for s in shown.segments if s.text and set(s.text) <= {"█", "·"} and s.style is not None]
    green = [s for s in cells if s.style and s.style.color and s.style.color.name == "green3"]
    assert len(green) == 1
    assert sum(len(s.text) for s in cells) == pytest.approx(100, abs=3)
    assert "of 64 tokens; this row is the one in green" in shown.text


# ---------------------------------------------------------------- wrong numbers


def test_a_row_out_of_range(look, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no row 10; rows are counted from 0"):
        look(ROWS, row=10)


def test_a_source_out_of_range_and_a_negative_row(tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run_settings(tiny_model_dir, tmp_path)))
    for words, sentence in (
        (["--source", "1"], "There is no source 1"),
        (["--row", "-1"], "greater than or equal to 0"),
    ):
        assert exit_code("inspect", path, *words) == 2
        assert sentence in capsys.readouterr().err


def test_the_command_prints_and_writes_no_run_directory(tiny_model_dir: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(run_settings(tiny_model_dir, tmp_path)))
    succeed("inspect", path, "--row", "2", "train.sequence_length=64")
    out = capsys.readouterr().out
    assert f"record · {tmp_path / 'rows.jsonl'}:3" in out
    assert "of 64 tokens" in out
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- rows that are several documents, or none


def test_tokens_of_another_tokenizer_are_not_shown_as_trained(look) -> None:
    size = len(tiny_tokenizer())
    good = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    seen = look([{"input_ids": [5, 6, size], "labels": [-100, 6, size]}, good])

    assert f"This row is dropped: bad tokens: token {size} is none of the {size}" in seen.text
    assert seen.tokens() == []


def test_a_long_text_says_into_what_it_is_split(look) -> None:
    seen = look([{"text": "again " * 300}, {"text": "short"}], data={"overlong": "split", "overlap": 4})

    assert "split into " in seen.text
    assert "each with the last 4 tokens of the one before" in seen.text
    assert seen.of(CUT) == ""
    assert "place · pack" in seen.text


def test_a_joined_text_has_a_place(look) -> None:
    rows = [{"text": f"text {n}"} for n in range(40)]
    seen = look(rows, row=7, data={"join_texts": True, "eval": {"fraction": 0}})

    assert "joined with the texts beside it" in seen.text
    assert "place · pack 1 of" in seen.text


def test_each_document_of_a_row_is_shown(look, tmp_path: Path) -> None:
    template = tmp_path / "thinks.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = []
    for n in range(2):
        turns.append({"role": "user", "content": f"q{n}"})
        turns.append({"role": "assistant", "content": f"a{n}", "reasoning_content": f"t{n}"})
    seen = look([{"messages": turns}], data={"template": str(template), "prefix_mismatch": "split"})

    assert seen.text.count("rendered text") == 2
    assert "<think>t0</think>a0" in seen.text
    assert "note: split at its turns" in seen.text
