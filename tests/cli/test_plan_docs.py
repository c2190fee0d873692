"""docs/plan.md prints what the program prints, and names the cards that it knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.command import exit_code
from tunesmith.planning.cards import CARDS

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"


def _block(language: str) -> str:
    """The one fenced block of the page in a language."""
    (found,) = re.findall(
        rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return str(found)


def test_the_example_is_what_is_printed_for_its_run_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they differ, what is printed goes into the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    Path("run.yaml").write_text(_block("yaml"), encoding="utf-8")

    assert exit_code("plan", "run.yaml", "--gpu", "RTX-4090") == 0
    assert capsys.readouterr().out == _block("text")


def test_every_card_is_named_once() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("\n## Cards\n")[2]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]

    assert sorted(named) == sorted(CARDS)
