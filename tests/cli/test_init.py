"""`tunesmith init`: flags and questions become a run file that trains; nothing is ever overwritten unasked."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from tests.cli.command import exit_code, succeed
from tests.support.runs import write_rows
from tunesmith.cli import init
from tunesmith.config.load import load_settings
from tunesmith.data.cache import cache_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with one data file."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("COLUMNS", "4000")
    write_rows(here / "rows.jsonl", 40)
    return here


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Be a terminal on which these answers are typed, "" for the default; gives the questions and their defaults."""

    def type_in(*answers: str) -> list[tuple[str, Any]]:
        waiting, asked = list(answers), []

        def prompt(text: str, default: Any = None) -> str:
            asked.append((text, default))
            if not waiting:
                raise typer.Abort
            return waiting.pop(0) or default

        stream = SimpleNamespace(isatty=lambda: True)
        monkeypatch.setattr(init, "sys", SimpleNamespace(stdin=stream, stdout=stream))
        monkeypatch.setattr(typer, "prompt", prompt)
        return asked

    return type_in


# ---------------------------------------------------------------- flags


def test_the_file_trains_as_it_is(folder: Path, tiny_model_dir: Path, capsys: Any) -> None:
    succeed("init", "--model", tiny_model_dir, "--data", "rows.jsonl", "--output", "runs/x")
    out = capsys.readouterr().out.splitlines()

    assert "wrote run.yaml" in out
    shown = [line.removeprefix("next").strip().partition("   ")[0] for line in out[-3:]]
    assert shown == [
        "tunesmith inspect run.yaml",
        "tunesmith data check run.yaml",
        "tunesmith train run.yaml",
    ]
    settings = load_settings("run.yaml")
    assert settings.model.name == str(tiny_model_dir)
    assert settings.train.sequence_length == 512
    assert settings.data.train[0].format == "pair"
    for words in shown[:2]:
        assert exit_code(*words.split()[1:]) == 0
    succeed("train", "run.yaml")
    assert (folder / "runs" / "x" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, False), ((60.0, 599.0), False), ((3600.0, 10800.0), True)]
)
def test_a_long_run_on_a_cpu_is_announced(
    folder: Path,
    tiny_model_dir: Path,
    monkeypatch: Any,
    capsys: Any,
    seconds: tuple[float, float] | None,
    said: bool,
) -> None:
    monkeypatch.setattr(init, "seconds_on_cpu", lambda *_: seconds)
    succeed("init", "--model", tiny_model_dir, "--data", "rows.jsonl")
    note = "on this CPU the run takes 60 minutes to 3 hours; train.steps=20 behind"
    assert (note in capsys.readouterr().out) == said
    text = Path("run.yaml").read_text(encoding="utf-8")
    assert ("in all, 60 minutes to 3 hours on the CPU of the machine that wrote this." in text) == said


def test_every_flag_is_in_the_file(folder: Path, tiny_model_dir: Path) -> None:
    rows = [{"frage": "wie viele", "antwort": "vier"}] * 30
    for name in ("train.jsonl", "held.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    succeed(
        "init", "new.yml", "--model", tiny_model_dir, "--data", "train.jsonl", "--output", "out",
        "--objective", "sft", "--adapter", "lora", "--quantize", "nf4", "--format", "pair",
        "--column", "prompt=frage", "--column", "response=antwort", "--held-out", "held.jsonl",
        "--sequence-length", "64",
    )  # fmt: skip
    settings = load_settings("new.yml")

    assert settings.output.dir == "out"
    assert settings.model.quantize == "nf4"
    assert settings.train.sequence_length == 64
    columns = {"prompt": "frage", "response": "antwort"}
    assert settings.data.train[0].columns == columns
    assert isinstance(settings.data.eval, tuple)
    assert (settings.data.eval[0].path, settings.data.eval[0].columns) == ("held.jsonl", columns)
    succeed("init", "full.yaml", "--model", tiny_model_dir, "--data", "rows.jsonl", "--adapter", "none")
    assert load_settings("full.yaml").adapter.kind == "none"
    assert load_settings("full.yaml").output.dir == "runs/rows"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "Without a terminal to ask on, --model and --data must be given."),
        (("--model", "m"), "Without a terminal to ask on, --data must be given."),
        (("--data", "rows.jsonl"), "Without a terminal to ask on, --model must be given."),
    ],
)
def test_without_a_terminal_the_missing_flags_are_named(
    folder: Path, capsys: Any, given: tuple[str, ...], said: str
) -> None:
    assert exit_code("init", *given) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}\nFor example: tunesmith init run.yaml --model ")
    assert not (folder / "run.yaml").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("init", "run.json"), "run.json does not end in .yaml."),
        (("init", "absent/run.yaml"), "there is no folder absent"),
        (("init", "a.yaml", "--model", "./absent", "--data", "rows.jsonl"), "there is no folder absent"),
        (("init", "a.yaml", "--model", "m", "--data", "rows.json"), "There is no file"),
        (("init", "a.yaml", "--model", "m", "--data", "rows.jsonl", "--adapter", "lroa"), "did you mean 'lora'"),
        (("init", "a.yaml", "--model", "m", "--data", "rows.jsonl", "--column", "x"), "NAME=COLUMN"),
        (("init", "a.yaml", "--model", "m", "--data", "rows.jsonl", "--held-out", "h.jsonl"), "There is no file"),
        (("init", "a.yaml", "--model", "m", "--data", "rows.jsonl", "--format", "pari"), "did you mean 'pair'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_no_file(folder: Path, capsys: Any, words: Any, said: str) -> None:
    before = sorted(folder.iterdir())

    assert exit_code(*words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert sorted(folder.iterdir()) == before


def test_a_file_that_is_there_is_replaced_by_force_alone(
    folder: Path, tiny_model_dir: Path, capsys: Any
) -> None:
    words = ("init", "mine.yaml", "--model", tiny_model_dir, "--data", "rows.jsonl")
    (folder / "mine.yaml").write_text("my own work", encoding="utf-8")

    assert exit_code(*words) == 2
    assert "mine.yaml exists already, and is left as it is." in capsys.readouterr().err
    assert (folder / "mine.yaml").read_text(encoding="utf-8") == "my own work"
    succeed(*words, "--force")
    assert load_settings("mine.yaml").model.name == str(tiny_model_dir)
    assert sorted(path.name for path in folder.iterdir()) == ["mine.yaml", "rows.jsonl"]


def test_a_file_that_appears_meanwhile_is_left(folder: Path, tiny_model_dir: Path, monkeypatch: Any) -> None:
    measure = init.measure

    def meanwhile(*arguments: Any) -> Any:
        (folder / "run.yaml").write_text("somebody else's", encoding="utf-8")
        return measure(*arguments)

    monkeypatch.setattr(init, "measure", meanwhile)
    monkeypatch.setattr("tunesmith.config.starter.refuse_file", lambda *_, **__: None)
    assert exit_code("init", "--model", tiny_model_dir, "--data", "rows.jsonl") == 2
    assert (folder / "run.yaml").read_text(encoding="utf-8") == "somebody else's"


def test_what_was_guessed_is_said(folder: Path, capsys: Any) -> None:
    rows = [{"my_question": "how many", "my_answer": "four"}] * 30 + [{"my_question": "how many"}]
    (folder / "like.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    succeed("init", "--model", "org/absent", "--data", "like.jsonl")
    out = capsys.readouterr().out

    assert "warning: columns were chosen by the likeness of their names (prompt from my_question, " in out
    assert "warning: lengths were estimated from characters, because model.name: org/absent" in out
    assert "warning: 1 row of 31 would not train" in out
    assert load_settings("run.yaml").data.train[0].columns == {
        "prompt": "my_question",
        "response": "my_answer",
    }


def test_the_commands_of_the_page_run(folder: Path, tiny_model_dir: Path, capsys: Any) -> None:
    page = Path(__file__).parent.parent.parent / "docs" / "start-a-run-file.md"
    lines = [
        shlex.split(line, comments=True)
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
        for line in block.splitlines()
    ]
    assert len(lines) >= 6
    (folder / "rows.jsonl").rename(folder / "train.jsonl")

    for words in lines:
        assert words[0] == "tunesmith"
        if words == ["tunesmith", "init"]:
            continue  # asks
        words, target = words[1:], ""
        if ">" in words:
            words, target = words[: words.index(">")], words[-1]
        assert exit_code(*words) == 0
        out = capsys.readouterr().out
        if target:
            assert json.loads(out)["type"] == "object"


# ---------------------------------------------------------------- questions


def test_on_a_terminal_it_asks_with_defaults(
    folder: Path, tiny_model_dir: Path, answer: Any, capsys: Any
) -> None:
    asked = answer(str(tiny_model_dir), "", "", "", "")
    succeed("init")

    assert [default for _, default in asked] == [
        "HuggingFaceTB/SmolLM2-135M-Instruct", "rows.jsonl", "lora", "none", "runs/rows"
    ]  # fmt: skip
    assert asked[2][0] == "Train (lora, none)"
    settings = load_settings("run.yaml")
    assert settings.model.name == str(tiny_model_dir)
    assert settings.data.train[0].path == "rows.jsonl"
    assert (settings.adapter.kind, settings.model.quantize) == ("lora", "none")
    assert "low-rank adapters" in capsys.readouterr().out  # what the words mean


def test_only_what_no_flag_says_is_asked(folder: Path, tiny_model_dir: Path, answer: Any) -> None:
    asked = answer("rows.jsonl")
    succeed("init", "--model", tiny_model_dir, "--adapter", "none", "--output", "o")

    assert len(asked) == 1
    asked = answer()
    succeed("init", "b.yaml", "--model", tiny_model_dir, "--data", "rows.jsonl")
    assert asked == []


def test_the_model_of_the_demo_is_the_default_where_it_is(folder: Path, answer: Any) -> None:
    demo = cache_folder("models") / "SmolLM2-135M-Instruct"
    demo.mkdir(parents=True)
    (demo / "config.json").write_text("{}", encoding="utf-8")
    asked = answer()

    assert exit_code("init") == 130
    assert asked == [("Model (a folder, or a Hugging Face id)", str(demo))]


def test_wrong_answers_are_asked_again(folder: Path, tiny_model_dir: Path, answer: Any, capsys: Any) -> None:
    (folder / "odd.jsonl").write_text('{"frage": "wie viele", "antwort": "vier"}\n' * 30, encoding="utf-8")
    asked = answer(
        "./absent", "od.jsonl", "odd.jsonl", "farge", "antwort", "frage", "antwort", "lroa", "lora", "nf4", "",
        str(tiny_model_dir),
    )  # fmt: skip
    succeed("init")
    out = capsys.readouterr().out

    assert len(asked) == 12
    said = [
        "There is no file",
        "The nearest name there is odd.jsonl.",
        "No format matches",
        "takes 'prompt' from 'farge'",
        "'lroa' is none of",
        "there is no folder absent",
    ]
    assert [words for words in said if words not in out] == []
    settings = load_settings("run.yaml")
    assert settings.model.name == str(tiny_model_dir)
    assert settings.model.quantize == "nf4"
    assert settings.data.train[0].columns == {"prompt": "frage", "response": "antwort"}


def test_leaving_in_the_middle_writes_nothing(folder: Path, answer: Any, capsys: Any) -> None:
    answer("org/absent", "rows.jsonl")

    assert exit_code("init") == 130
    assert capsys.readouterr().err.endswith("error: interrupted\n")
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]
