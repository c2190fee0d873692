"""Every command's help fits a screen of 24 lines by 80 columns, has an example that is right, and comes at once."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer

from tests.cli.command import exit_code
from tunesmith.cli.main import app

LINES, COLUMNS = 24, 80
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "numpy",
    "rich",
    "pydantic",
    "yaml",
    "jinja2",
    "huggingface_hub",
}


def commands() -> dict[str, Any]:
    """Every command by the words that call it; "" is the program itself."""
    found: dict[str, Any] = {}
    waiting = [("", typer.main.get_command(app))]
    while waiting:
        name, command = waiting.pop()
        found[name] = command
        for word, inside in getattr(command, "commands", {}).items():
            waiting.append((f"{name} {word}".strip(), inside))
    return found


COMMANDS = commands()
LEAVES = [name for name, command in COMMANDS.items() if not hasattr(command, "commands")]


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))

    def print_help(name: str) -> list[str]:
        assert exit_code(*name.split(), "--help") == 0
        return capsys.readouterr().out.splitlines()

    return print_help


def test_the_commands_are_found() -> None:
    assert {"train", "inspect", "demo", "data check", "init", "schema", "doctor"} <= set(LEAVES)


@pytest.mark.parametrize("name", sorted(COMMANDS), ids=lambda name: name or "tunesmith")
def test_help_fits_a_screen(help_of: Any, name: str) -> None:
    lines = help_of(name)

    assert len(lines) <= LINES, "\n".join(lines)
    assert max(map(len, lines)) <= COLUMNS


def examples(name: str) -> list[list[str]]:
    """The calls in a command's epilog, word by word, without what the shell does with their output."""
    epilog = COMMANDS[name].epilog or ""
    calls = re.findall(r"`([^`]+)`", epilog) or epilog.partition(": ")[2].split("; ")
    return [shlex.split(call.partition(">")[0]) for call in calls if call]


def called_by(words: list[str]) -> str:
    """The name of the command that a call reaches, whose options and arguments it takes."""
    command, name, arguments = COMMANDS[""], "", words[1:]
    assert words[0] == "tunesmith"
    while True:
        context = command.make_context(name, list(arguments))  # raises on what the command does not take
        if not hasattr(command, "commands"):
            return name
        word, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        name = f"{name} {word}".strip()


@pytest.mark.parametrize("name", sorted(COMMANDS), ids=lambda name: name or "tunesmith")
def test_help_has_an_example_that_works(help_of: Any, name: str) -> None:
    assert examples(name)
    shown = "".join(help_of(name)).replace(" ", "")

    for words in examples(name):
        assert called_by(words).startswith(name)
        assert "".join(words[:2]) in shown


def test_an_example_that_is_wrong_is_seen() -> None:
    for call in ("tunesmith trian run.yaml", "tunesmith train run.yaml --fast", "tunesmith doctor a b"):
        with pytest.raises(Exception, match=r"(?i)no such (command|option)|unexpected extra argument"):
            called_by(call.split())


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - set(LEAVES)), ids=lambda name: name or "tunesmith")
def test_a_list_of_commands_says_of_each_a_whole_sentence(help_of: Any, name: str) -> None:
    listed = " ".join(help_of(name)).partition("Commands:")[2]

    assert listed
    assert "..." not in listed


def test_help_loads_nothing_heavy() -> None:
    """What keeps it under 0.4 s, on a machine that is busy as well."""
    program = (
        "import sys, tunesmith.cli.main as m\n"
        "try: m.run(['--help'])\n"
        "except SystemExit: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.startswith("Usage: tunesmith ")  # whatever the interpreter was started with
    assert "typer" in done.stderr.split()
    assert set(done.stderr.split()) & HEAVY == set()
