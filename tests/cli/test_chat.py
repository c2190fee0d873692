"""`tunesmith chat`: on a terminal and with lines of standard input."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.cli.command import exit_code
from tests.support.results import save_run
from tunesmith.cli import chat as module
from tunesmith.cli.chat import ChatOptions, chat
from tunesmith.config.chat_session import ChatSession


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("chat") / "run")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def options(run: Path, **changes: Any) -> ChatOptions:
    values: dict[str, Any] = {
        "output": str(run), "system": None, "base": False, "temperature": 0.0, "top_p": 1.0,
        "max_tokens": 8, "seed": 0, "trust_remote_code": False,
    }  # fmt: skip
    return ChatOptions(**(values | changes))


def on_terminal(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str | type[BaseException]],
    width: int = 80,
    **changes: Any,
) -> str:
    """What a terminal shows after these lines, some of which are keys."""
    lines: Iterator[str | type[BaseException]] = iter(said)

    def typed(_: str) -> str:
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system=None, width=width)
    assert chat(options(run, **changes), console, Terminal())
    return shown.getvalue()


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Have the model answer what a function of the conversation and `base` says."""

    def say(self: ChatSession, prompted: Any, hand_on: Any, *, base: bool = False) -> str:
        text = ""
        for piece in answer(self, base):
            if piece is KeyboardInterrupt:
                raise KeyboardInterrupt
            hand_on(piece)
            text += piece
        return text.strip()

    monkeypatch.setattr(ChatSession, "answer", say)


def test_lines_of_a_pipe(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    answering(monkeypatch, lambda self, _: [f"{len(self.messages)}:", self.messages[-1]["content"]])
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n/reset\nthree\r\n/quit\nfour\n"))
    assert exit_code("chat", run) == 0
    captured = capsys.readouterr()
    assert captured.out == "1:one\n3:two\n1:three\n"
    assert "begins anew" in captured.err


def test_an_answer_of_the_model_itself(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n"))
    assert exit_code("chat", run, "--max-tokens", "6", "--base") == 0
    lines = capsys.readouterr().out
    assert "adapter: " in lines
    assert "base: " in lines


def test_what_goes_wrong_in_a_pipe_is_the_exit_code(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    answering(monkeypatch, lambda *_: ["yes"])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/sing\n{'8 ' * 2000}\n/path/like this\nlast\n"))
    assert exit_code("chat", run) == 1
    captured = capsys.readouterr()
    assert "error: There is no command /sing.\n/help lists them." in captured.err
    assert "the model takes 512" in captured.err
    assert captured.out == "yes\nyes\n"


def test_control_c_stops_an_answer_and_not_the_chat(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[dict[str, Any]]] = []

    def answer(self: ChatSession, _: bool) -> list[Any]:
        seen.append([dict(message) for message in self.messages])
        return ["half an ", KeyboardInterrupt] if len(seen) == 1 else ["whole"]

    answering(monkeypatch, answer)
    shown = on_terminal(run, monkeypatch, ["one", KeyboardInterrupt, "two"])
    assert "half an  (stopped)" in shown
    assert "Ctrl-D or /quit ends." in shown
    assert "whole" in shown
    assert [message["content"] for message in seen[1]] == ["one", "half an", "two"]


def test_commands(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    systems: list[Any] = []

    def answer(self: ChatSession, _: bool) -> list[str]:
        systems.append((self.system, len(self.messages)))
        return ["yes"]

    answering(monkeypatch, answer)
    path = tmp_path / "rows.jsonl"
    said = [
        "/help",
        "one",
        "/system Be brief.",
        "two",
        f"/save {path}",
        "/system",
        "three",
        "/save",
        "/quit",
        "no",
    ]
    shown = on_terminal(run, monkeypatch, said, system="First.")
    for word in module._HELP.splitlines():
        assert word in shown
    assert systems == [("First.", 1), ("Be brief.", 1), (None, 1)]
    assert "/save needs the name of a file." in shown
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    assert [m["content"] for m in row["messages"]] == ["Be brief.", "two", "yes"]


def test_two_columns_on_a_wide_terminal(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda _, base: ["the base says"] if base else ["the adapter says"])
    wide = on_terminal(run, monkeypatch, ["one"], width=140, base=True)
    assert any("the adapter says" in line and "the base says" in line for line in wide.splitlines())
    narrow = on_terminal(run, monkeypatch, ["one"], width=80, base=True)
    assert "adapter: the adapter says\nbase: the base says\n" in narrow


def test_text_of_a_model_does_not_steer_the_terminal(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda *_: ["\x1b[2J[bold]"])
    assert "␛[2J[bold]" in on_terminal(run, monkeypatch, ["one"])


def test_turns_that_do_not_fit_are_told_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda *_: ["yes"])
    shown = on_terminal(run, monkeypatch, ["8 " * 150, "8 " * 90, "short"], max_tokens=100)
    assert shown.count("The first 2 messages no longer fit into the model's 512 tokens") == 1


@pytest.mark.parametrize("kind", ["a whole model", "pissa"])
def test_a_base_that_cannot_be_shown(tmp_path: Path, capsys: Any, kind: str) -> None:
    run = save_run(tmp_path / "run", **({"init_lora_weights": "pissa"} if kind == "pissa" else {}))
    output = run if kind == "pissa" else tmp_path / "run-base"
    assert exit_code("chat", output, "--base") == 2
    error = capsys.readouterr().err
    assert ("whole model" if kind == "a whole model" else "act together only") in error


def test_a_base_that_is_gone(tmp_path: Path, capsys: Any) -> None:
    run = save_run(tmp_path / "run")
    (tmp_path / "run-base").rename(tmp_path / "moved")
    assert exit_code("chat", run) == 2
    error = capsys.readouterr().err
    assert f"The base model of {run}: there is no folder" in error
    assert "model.name" not in error
