"""What `tunesmith init` sees in data, what it chooses by it, and how it writes it down."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import tiny_tokenizer
from tunesmith.config.load import load_settings
from tunesmith.config.starter import (
    Wishes,
    choose_sequence_length,
    choose_sizes,
    default_output,
    starter_text,
)
from tunesmith.config.starter_data import (
    ROWS,
    Lengths,
    likely_data,
    look_at,
    measure,
    nearest_columns,
)
from tunesmith.config.starter_text import choices, commented_yaml, flow
from tunesmith.config.yaml_source import parse_yaml
from tunesmith.contracts.errors import ConfigError, DataError, UserError
from tunesmith.settings.data import DataSettings
from tunesmith.settings.model import AdapterSettings
from tunesmith.settings.run import RunSettings


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


PAIRS = [{"question": f"how many are {n}", "answer": "four " * n} for n in range(1, 31)]


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write(tmp_path / "pairs.jsonl", *PAIRS)


# ---------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("row", "name", "read"),
    [
        ({"question": "q", "answer": "a"}, "pair", {"prompt": "question", "response": "answer"}),
        ({"Question": "q", "ANSWER": "a"}, "pair", {"prompt": "Question", "response": "ANSWER"}),
        ({"instruction": "q", "output": "a"}, "alpaca", {"instruction": "instruction", "output": "output"}),
        ({"conversations": [], "id": 1}, "chat", {"messages": "conversations"}),
        ({"text": "t"}, "text", {"text": "text"}),
        (
            {"article": "q", "summary": "a"},
            "pair",
            {"prompt": "article", "response": "summary"},
        ),  # not a context
    ],
)
def test_a_format_that_fits_needs_no_columns(tmp_path: Path, row: Any, name: str, read: Any) -> None:
    look = look_at(write(tmp_path / "rows.jsonl", row))

    assert (look.format.name, look.renames, look.read, look.guessed) == (name, {}, read, False)


@pytest.mark.parametrize(
    ("row", "name", "renames"),
    [
        ({"id": 1, "user_question": "q", "gold_answer": "a"}, "pair",
         {"prompt": "user_question", "response": "gold_answer"}),
        ({"questions": "q", "answers": "a"}, "pair", {"prompt": "questions", "response": "answers"}),
        ({"instructions": "q", "outputs": "a", "input": ""}, "alpaca",
         {"instruction": "instructions", "output": "outputs"}),
        ({"text_en": "some text"}, "text", {"text": "text_en"}),
    ],
)  # fmt: skip
def test_columns_of_like_names_are_renamed_and_it_is_said(
    tmp_path: Path, row: Any, name: str, renames: Any
) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    look = look_at(path)

    assert (look.format.name, look.renames, look.guessed) == (name, renames, True)
    text = starter_text(Wishes("m", path, "run"), look, Lengths([9] * 50, 50), file=tmp_path / "run.yaml")
    assert "chosen by the likeness of names" in text
    assert load_settings(parse_yaml(text, "").data).data.train[0].columns == renames


@pytest.mark.parametrize(
    "row",
    [
        {"frage": "q", "antwort": "a"},
        {"questions": 1.5, "answers": [1, 2]},  # named so, and no texts
        {"label_id": 3, "test": "no text"},
        {"chosen_one": "a", "rejected_one": "b", "prompts": "q"},  # answers that must not be imitated
    ],
)
def test_nothing_is_guessed_where_names_or_values_do_not_fit(tmp_path: Path, row: dict[str, Any]) -> None:
    assert nearest_columns(row) is None
    with pytest.raises(DataError, match="No format matches") as caught:
        look_at(write(tmp_path / "rows.jsonl", row))
    assert "--column prompt=" in str(caught.value.hint)


def test_columns_that_are_said_are_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"frage": "q", "antwort": "a"})
    look = look_at(path, columns={"prompt": "frage", "response": "antwort"})

    assert (look.format.name, look.guessed) == ("pair", False)
    assert look.renames == look.read == {"prompt": "frage", "response": "antwort"}


def test_a_table_with_other_separators_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("frage;antwort\nwie viele;vier\n", encoding="utf-8")
    with pytest.raises(DataError, match="No format matches") as caught:
        look_at(str(tmp_path / "rows.csv"))
    assert "separated by commas" in str(caught.value.hint)


def test_a_column_that_no_format_has_is_named(pairs: str) -> None:
    with pytest.raises(
        DataError, match="No format has a column 'prmopt' that could be called 'question'"
    ) as caught:
        look_at(pairs, columns={"prmopt": "question"})
    assert caught.value.hint == "Did you mean 'prompt'?"
    with pytest.raises(DataError) as caught:
        look_at(pairs, columns={"zzz": "question"})
    assert "chosen" in str(caught.value.hint)


def test_a_look_describes_itself(tmp_path: Path, pairs: str) -> None:
    assert look_at(pairs).described.endswith("; columns: prompt from question, response from answer")
    texts = write(tmp_path / "texts.jsonl", {"text": "t"})
    assert look_at(texts).described == "plain text, as in pretraining; columns: text"


def test_preference_data_is_refused_with_what_can_be_done(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(DataError, match="preference") as caught:
        look_at(path)

    assert "chosen" in str(caught.value.hint)
    assert look_at(path, format="chosen").format.name == "chosen"


def test_the_likely_data_of_a_folder(tmp_path: Path) -> None:
    assert likely_data(tmp_path) is None
    for name in ("notes.txt", "constraints.txt", "package.json", "a.csv", "b-train.jsonl", "run.yaml"):
        (tmp_path / name).write_text("x", encoding="utf-8")

    assert likely_data(tmp_path) == tmp_path / "b-train.jsonl"
    (tmp_path / "b-train.jsonl").unlink()
    assert likely_data(tmp_path) == tmp_path / "a.csv"
    (tmp_path / "a.csv").unlink()
    assert likely_data(tmp_path) is None


# ---------------------------------------------------------------- lengths


def test_lengths_are_counted_with_the_tokenizer_and_its_template(pairs: str, tiny_model_dir: Path) -> None:
    tokenizer = tiny_tokenizer()
    expected = sorted(
        len(
            tokenizer.apply_chat_template(
                [
                    {"role": "user", "content": row["question"]},
                    {"role": "assistant", "content": row["answer"]},
                ],
                return_dict=True,
            )["input_ids"]
        )
        for row in PAIRS
    )
    found = measure(look_at(pairs), str(tiny_model_dir))

    assert found.estimated == ""
    assert found.context == 512
    assert (found.rows, found.dropped, found.partial) == (30, 0, False)
    assert len(found.tokens) == 30
    # a newline behind the last turn is no part of a document
    assert all(0 <= theirs - ours <= 1 for ours, theirs in zip(found.tokens, expected, strict=True))


def test_without_a_tokenizer_four_characters_are_a_token(pairs: str, tmp_path: Path) -> None:
    found = measure(look_at(pairs), "org/absent")

    characters = [len("user") + len("assistant") + len(row["question"]) + len(row["answer"]) for row in PAIRS]
    assert found.tokens == sorted(-(-count // 4) for count in characters)
    assert found.context is None
    assert "org/absent" in found.estimated
    text = starter_text(Wishes("org/absent", pairs, "run"), look_at(pairs), found, file=tmp_path / "r.yaml")
    assert "estimated as a quarter of the characters" in " ".join(text.replace("#", " ").split())


def test_rows_that_do_not_train_are_counted(tmp_path: Path, tiny_model_dir: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *PAIRS[:3], {"question": "q", "answer": ""}, {"question": "q"})

    for model in (str(tiny_model_dir), "org/absent"):
        found = measure(look_at(path), model)
        assert (len(found.tokens), found.rows, found.dropped) == (3, 5, 2)
    empty = write(tmp_path / "empty.jsonl", {"question": "q", "answer": ""})
    for model in (str(tiny_model_dir), "org/absent"):
        with pytest.raises(DataError, match=r"No row of .*empty.jsonl would train as pair: empty answer"):
            measure(look_at(empty), model)


def test_only_the_first_rows_are_read(tmp_path: Path) -> None:
    rows = [{"text": "word"}] * ROWS
    at_most = write(tmp_path / "some.jsonl", *rows)
    more = write(tmp_path / "many.jsonl", *rows, {"text": "a far longer row " * 40})

    assert not measure(look_at(at_most), "org/absent").partial
    found = measure(look_at(more), "org/absent")
    assert found.partial
    assert (found.rows, found.tokens[-1]) == (ROWS, 1)


def test_a_folder_that_is_no_model_is_refused_and_not_taken_for_a_hub_id(pairs: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        measure(look_at(pairs), str(tmp_path / "model"))


def test_a_local_model_without_a_tokenizer_is_refused_and_not_estimated(pairs: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(UserError, match="has no tokenizer"):
        measure(look_at(pairs), str(tmp_path / "model"))


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize(
    ("tokens", "context", "plain_text", "chosen"),
    [
        ([100] * 100, None, False, 512),
        ([513] * 100, None, False, 768),
        ([100] * 99 + [5000], None, False, 512),  # one row in a hundred may be longer
        ([100] * 98 + [5000] * 2, None, False, 8192),
        ([100] * 98 + [5000] * 2, 2048, False, 2048),
        ([100_000] * 10, None, False, 8192),
        ([100_000] * 10, 131_072, False, 131_072),
        ([100_000] * 10, 131_072, True, 2048),
        ([10], 512, False, 512),
        ([10], 256, False, 256),
    ],
)
def test_the_sequence_length(tokens: list[int], context: int | None, plain_text: bool, chosen: int) -> None:
    lengths = Lengths(sorted(tokens), len(tokens), context=context)

    assert choose_sequence_length(lengths, plain_text=plain_text) == chosen


@pytest.mark.parametrize(
    ("rows", "each", "batch", "epochs", "steps", "fraction"),
    [
        # packs: rows · each · (1 - fraction) / 512
        (1_000, 256, 16, 3, 89, 0.05),  # 475 packs → 29.7 steps an epoch
        (100, 256, 2, 3, 71, 0.05),  # 47.5 packs: 2 of them a step leave 23.75
        (2, 256, 1, 3, 3, 0.05),  # less than one pack counts as one
        (10_000, 256, 16, 1, 306, 0.02),  # 4,900 packs → 306 steps
    ],
)
def test_sizes_by_hand(rows: int, each: int, batch: int, epochs: int, steps: int, fraction: float) -> None:
    sizes = choose_sizes(Lengths([each] * rows, rows))

    assert (sizes.sequence_length, sizes.global_batch, sizes.epochs) == (512, batch, epochs)
    assert sizes.steps == steps
    assert sizes.held_out == {"fraction": fraction}
    assert sizes.eval_every == min(100, max(1, steps // 10))


def test_a_part_of_the_rows_says_nothing_of_the_number_of_steps() -> None:
    sizes = choose_sizes(Lengths([256] * ROWS, ROWS, partial=True))

    assert (sizes.global_batch, sizes.epochs, sizes.steps, sizes.eval_every) == (16, 1, None, 100)
    assert sizes.held_out == {"fraction": 0.02, "max_rows": 500}


def test_a_run_is_named_after_its_data() -> None:
    for data, name in (
        ("a/b.train.jsonl.gz", "runs/b"),
        ("org/set", "runs/set"),
        ("folder/", "runs/folder"),
        ("d/*.jsonl", "runs/first"),
    ):
        assert default_output(data) == name


# ---------------------------------------------------------------- the text


def text_of(path: str, **wishes: Any) -> tuple[str, RunSettings]:
    lengths = Lengths([40] * 200, 200, context=4096)
    text = starter_text(Wishes("m", path, "run", **wishes), look_at(path), lengths, file=Path("run.yaml"))
    return text, load_settings(parse_yaml(text, "run.yaml").data)


def comments_of(text: str) -> str:
    lines = [line.strip().removeprefix("# ") for line in text.splitlines() if line.strip().startswith("#")]
    return " ".join(lines)


def test_every_line_is_explained_by_its_own_docstring(pairs: str) -> None:
    text, settings = text_of(pairs)
    said = comments_of(text)

    written = parse_yaml(text, "").data
    assert set(written) == {"model", "adapter", "data", "objective", "train", "output"}
    for section, values in written.items():
        inner = RunSettings.model_fields[section].annotation
        assert " ".join(inner.__doc__.split()) in said  # type: ignore[union-attr]
        for name in values:
            description = inner.model_fields[name].description  # type: ignore[union-attr]
            assert " ".join(description.split()) in said, name
    assert settings.data.train[0].format == "pair"
    assert max(map(len, text.splitlines())) <= 110


def test_settings_for_each_kind_of_training(pairs: str) -> None:
    lora, full = text_of(pairs)[1], text_of(pairs, adapter="none")[1]

    assert (lora.adapter.kind, lora.train.learning_rate) == ("lora", 2.0e-4)
    assert (full.adapter.kind, full.train.learning_rate) == ("none", 2.0e-5)
    assert text_of(pairs, quantize="nf4")[1].model.quantize == "nf4"
    assert text_of(pairs, sequence_length=64)[1].train.sequence_length == 64
    held = text_of(pairs, held_out="held.jsonl")[1].data.eval
    assert isinstance(held, tuple)
    assert (held[0].path, held[0].format) == ("held.jsonl", "pair")


def test_plain_text_is_split_and_has_no_turns(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", {"text": "once upon a time"})
    text, settings = text_of(path)

    assert settings.data.overlong == "split"
    assert "train_on" not in text


def test_wishes_that_do_not_go_together_are_refused(pairs: str) -> None:
    with pytest.raises(ConfigError, match="weights in 4 or 8 bits cannot be trained"):
        Wishes("m", pairs, "run", adapter="none", quantize="nf4").check()
    with pytest.raises(ConfigError, match=r"adapter\.kind is 'lroa'.*did you mean 'lora'"):
        Wishes("m", pairs, "run", adapter="lroa").check()
    Wishes("m", pairs, "run").check()


def test_a_file_that_would_not_load_is_never_written(pairs: str) -> None:
    wishes = Wishes("m", pairs, "run", sequence_length=4)
    with pytest.raises(ConfigError, match=r"train\.sequence_length is 4"):
        starter_text(wishes, look_at(pairs), Lengths([40], 1), file=Path("run.yaml"))


def test_rows_that_are_cut_are_said(pairs: str) -> None:
    lengths = Lengths([40] * 199 + [900], 200)
    text = starter_text(Wishes("m", pairs, "run"), look_at(pairs), lengths, file=Path("run.yaml"))

    said = comments_of(text)
    assert "of 200 rows, 99% have at most 40 tokens and the longest has 900" in said
    assert "1 of them is longer: see data.overlong" in said


def test_an_editor_finds_the_schema_that_lies_beside(pairs: str, tmp_path: Path) -> None:
    lengths, look = Lengths([40] * 200, 200), look_at(pairs)
    modeline = "# yaml-language-server: $schema=tunesmith.schema.json"
    before = starter_text(Wishes("m", pairs, "run"), look, lengths, file=tmp_path / "run.yaml")
    (tmp_path / "tunesmith.schema.json").write_text("{}", encoding="utf-8")
    beside = starter_text(Wishes("m", pairs, "run"), look, lengths, file=tmp_path / "run.yaml")

    assert modeline not in before.splitlines()
    assert modeline in before
    assert beside.splitlines()[0] == modeline


HOSTILE = [
    "a: b",
    "# no",
    "yes",
    "1e5",
    "null",
    "",
    " x",
    "[a]",
    "{a}",
    "a\nb",
    "é\x85\u2028",
    "~",
    "-",
    "'",
    '"',
    "010",
]


@pytest.mark.parametrize(
    "value", [*HOSTILE, 1, 1.0, 2.0e-5, 2.5e-4, 3.14159e-3, True, None, {"a": "1"}, ["x, y"]], ids=repr
)
def test_plain_values_come_back(value: Any) -> None:
    back = parse_yaml(f"key: {flow(value)}\n", "").data["key"]

    assert back == value
    assert type(back) is type(value)


@given(st.text())
def test_any_text_comes_back(value: str) -> None:
    if "\ud800" <= max(value, default="") <= "\udfff":
        return
    assert parse_yaml(f"key: {flow({'k': value})}\n", "").data["key"] == {"k": value}


def test_names_of_columns_and_files_cannot_break_out_of_a_comment(tmp_path: Path) -> None:
    name = "answer\u2028\nmodel: x"
    path = write(tmp_path / "rows.jsonl", {"question": "q", name: "a"})
    look = look_at(path, columns={"response": name})
    wishes = Wishes("m", path, "run", columns=look.renames)
    text = starter_text(wishes, look, Lengths([9] * 50, 50), file=tmp_path / "r\n.yaml")

    assert load_settings(parse_yaml(text, "").data).data.train[0].columns == {"response": name}


def test_choices_are_the_words_of_a_setting_and_not_of_its_lists() -> None:
    assert choices(AdapterSettings.model_fields["kind"].annotation) == ["lora", "none"]
    assert choices(DataSettings.model_fields["train_on"].annotation) == ["assistant", "last", "all"]
    assert choices(AdapterSettings.model_fields["rank"].annotation) == []


def test_a_list_of_sections_is_written_as_one() -> None:
    rng = random.Random(0)
    values = {
        "data": {"train": [{"path": f"{rng.random()}.jsonl", "weight": 2.0}, {"path": "b", "format": "chat"}]}
    }

    assert parse_yaml(commented_yaml(values, {}), "").data == values
