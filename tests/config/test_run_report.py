"""What a run writes down for its report, and the report that it leaves however it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.html import Page
from tests.support.runs import run_settings, train
from tunesmith.config import run_report
from tunesmith.config.execute import execute
from tunesmith.config.load import load_settings
from tunesmith.config.result import RunResult
from tunesmith.config.run_report import reported
from tunesmith.contracts.errors import UserError


@pytest.fixture(scope="module")
def result(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run of a few steps with a question asked, and a row that is dropped."""
    folder = tmp_path_factory.mktemp("whole")
    settings = run_settings(tiny_model_dir, folder, train={"steps": 3, "sequence_length": 64})
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"question": "empty?", "answer": ""}) + "\n")
    console = Console(quiet=True)
    return execute(load_settings(settings), console, questions=["<b>why</b>?"], answer_tokens=3)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_rows_are_counted_by_source(result: RunResult) -> None:
    found = read(result.dir, "data.json")

    (source,) = found["sources"]
    assert source["role"] == "train"
    assert source["name"].endswith("rows.jsonl")
    assert source["report"]["rows_in"] == 41
    assert source["report"]["dropped"] == {"empty answer": 1}
    assert found["documents"]["train"] + found["documents"]["held_out"] == 40


def test_masks_are_those_of_documents_that_train(result: RunResult) -> None:
    documents = read(result.dir, "masks.json")["documents"]
    rows = [json.loads(line) for line in (result.dir.parent / "rows.jsonl").read_text().splitlines()]

    assert len(documents) == 3
    for document in documents:
        row = rows[int(document["where"].rpartition(":")[2]) - 1]
        supervised = "".join(text for trains, text in document["pieces"] if trains)
        context = "".join(text for trains, text in document["pieces"] if not trains)
        assert row["answer"] in supervised
        assert row["question"] in context
        assert row["question"] not in supervised
        assert 0 < document["trained"] < document["tokens"] == document["shown"]


def test_a_run_leaves_a_report_with_all_of_it(result: RunResult) -> None:
    page = Page((result.dir / "report.html").read_text(encoding="utf-8"))
    text = " ".join(text for _, text in page.texts)

    assert "finished" in page.text("span")
    for said in (
        "dropped: empty answer",
        "<b>why</b>?",
        "after training",
        "adapter/adapter_config.json",
        "transformers",
    ):
        assert said in text
    assert read(result.dir, "answers.json")["questions"] == ["<b>why</b>?"]
    assert page.text("mark").count("<|im_end|>") == 3
    assert not list(result.dir.glob(".tmp-*"))


def test_an_interrupted_and_a_failed_run_leave_a_report_too(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.training.trainer import Trainer

    settings = run_settings(tiny_model_dir, tmp_path, train={"steps": 3})

    def broken(self: Trainer) -> None:
        self._warn("soon")
        raise UserError("The disk is full.")

    monkeypatch.setattr(Trainer, "_save", broken)
    with pytest.raises(UserError, match="disk"):
        train(settings)

    page = Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "failed" in page.text("span")
    assert "soon" in page.text("p")


def test_a_run_that_is_refused_leaves_none(tiny_model_dir: Path, tmp_path: Path) -> None:
    settings = run_settings(
        tiny_model_dir, tmp_path, data={"train": [{"path": str(tmp_path / "none.jsonl")}]}
    )

    with pytest.raises(UserError):
        train(settings)
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_report_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no [bold]luck[/]")

    monkeypatch.setattr(run_report, "write_report", fail)
    with reported(tmp_path, Console()):
        (tmp_path / "events.jsonl").write_text("{}\n")

    assert (
        "warning: the report could not be written: RuntimeError: no [bold]luck[/]" in capsys.readouterr().out
    )


def test_a_stream_is_counted_when_it_was_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = {"streaming": True, "eval": [{"path": str(tmp_path / "rows.jsonl")}]}
    settings = run_settings(tiny_model_dir, tmp_path, train={"steps": 2}, data=data)
    result = train(settings)

    trained, held_out = read(result.dir, "data.json")["sources"]
    assert (trained["role"], held_out["role"]) == ("train", "held out")
    assert trained["report"]["rows_kept"] >= 8
    masks = read(result.dir, "masks.json")["documents"]
    assert [Path(mask["where"]).name for mask in masks] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    assert "streamed" in (result.dir / "report.html").read_text(encoding="utf-8")
