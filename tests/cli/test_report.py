"""`tunesmith report`, called as the entry point calls it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import exit_code, succeed
from tests.support.fake_runs import write_run


def test_a_report_is_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "first")
    succeed("report", run)
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert "run report" in (run / "report.html").read_text(encoding="utf-8")

    succeed("report", run, "--out", tmp_path / "other.html")
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == (run / "report.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "There is no run directory nowhere."),
        (("empty",), "empty is not a run directory: it has no events.jsonl."),
        (("first", "--out", "no/where.html"), "The report cannot be written to no/where.html: No such file"),
        (("first", "--out", "empty"), "The report cannot be written to empty: Is a directory"),
    ],
)
def test_mistakes_get_a_sentence(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "first")
    (tmp_path / "empty").mkdir()

    assert exit_code("report", *words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob(".tmp-*"))
