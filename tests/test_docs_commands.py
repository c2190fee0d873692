"""Every command of README.md and docs/ is executed, or stands in a table with the reason why not."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from tests.cli.command import exit_code, succeed
from tests.docs_commands import (
    LEFT_OUT,
    REFUSED,
    ROOT,
    SAYS,
    Command,
    commands_by_page,
    read_commands,
    substituted,
    typed_words,
)
from tests.support.tiny import save_tiny_model
from tunesmith.cli.demo import MODEL_NAME

PAGES = commands_by_page()
ROWS = 40


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has around them: the run file of the quickstart, data, and runs that are over."""
    folder = tmp_path_factory.mktemp("reader") / "tree"
    save_tiny_model(folder / "model", max_position_embeddings=2048)
    shutil.copytree(
        folder / "model", folder / "cache" / "models" / MODEL_NAME
    )  # where the demo leaves its own
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("*.ipynb"))
    rows = (ROOT / "examples" / "data" / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    short = sorted(rows, key=len)[: ROWS + 4]
    (folder / "examples" / "data" / "gsm8k.jsonl").write_text("".join(short[:ROWS]), encoding="utf-8")
    for name, part in (("train.jsonl", short[:ROWS]), ("test.jsonl", short[ROWS:])):
        (folder / name).write_text("".join(part), encoding="utf-8")
    (folder / "questions.txt").write_text("How many?\nAnd then?\n", encoding="utf-8")
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (folder / "run.yaml").write_text(
        substituted(page.split("```yaml\n")[1].split("```")[0]), encoding="utf-8"
    )
    for example in (folder / "examples").glob("*.yaml"):
        example.write_text(substituted(example.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
        succeed("train", "run.yaml", "--quiet")
    for name in ("rank-16", "rank-64"):
        copy = shutil.copytree(folder / "runs" / "first", folder / "runs" / name) / "run.yaml"
        settings = copy.read_text(encoding="utf-8").replace("rank: 16", name.replace("-", ": "))
        copy.write_text(settings, encoding="utf-8")
    return folder


def typed(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Type a command in a folder: its exit code and what it printed."""
    words = typed_words(command)
    monkeypatch.setattr("sys.stdin", io.StringIO("How many?\n"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
    for sign in ("<", ">"):
        if sign in words:
            place = words.index(sign)
            file, words = folder / words[place + 1], words[:place] + words[place + 2 :]
            if sign == "<":
                monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text(encoding="utf-8")))
    capsys.readouterr()
    code = exit_code(*words[1:])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def said(command: Command) -> str:
    """What a command has to print."""
    if command.text in REFUSED:
        return REFUSED[command.text]
    return SAYS[max((name for name in SAYS if set(name.split()) <= set(command.text.split())), key=len)]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_do_their_work(
    page: str,
    workplace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(workplace, tmp_path / "tree")

    for command in PAGES[page]:
        if command.text in LEFT_OUT:
            continue
        assert command.program == "tunesmith", f"{command.text}: say in LEFT_OUT why it does not run"
        code, printed = typed(command, folder, monkeypatch, capsys)
        assert code == (2 if command.text in REFUSED else 0), f"{command.text}\n{printed}"
        assert said(command) in " ".join(printed.split()), f"{command.text}\n{printed}"


def test_the_tables_are_about_commands_that_are_there() -> None:
    texts = {command.text for commands in PAGES.values() for command in commands}

    assert len(texts - set(LEFT_OUT)) > 20
    assert set(LEFT_OUT) <= texts
    assert set(REFUSED) <= texts
    assert all(len(reason) > 10 for reason in LEFT_OUT.values())


def test_commands_are_found_without_their_comments() -> None:
    page = "```bash\ntunesmith train a.yaml \\\n  x.y=1   # why\n# alone\n```\n```text\nmake this\n```\n"

    assert [command.text for command in read_commands(page, "page")] == ["tunesmith train a.yaml    x.y=1"]
