"""The data of a run, checked with its settings, and what its sources have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.cli.command import exit_code
from tests.support.tiny import tiny_tokenizer
from tunesmith.config.check_run import check_run
from tunesmith.config.load import load_settings
from tunesmith.config.prepare_data import names_of, prepare_data
from tunesmith.settings.data import SourceSettings


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(n: int, answer: str = "") -> dict[str, Any]:
    return {"prompt": f"why {n}?", "response": answer or f"so {n}"}


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path):
    def make(train: list[Any], **data: Any) -> Any:
        values = {"cache_dir": str(tmp_path / "cache"), "train": train, "eval": {"fraction": 0}, **data}
        return load_settings(
            {"model": {"name": str(tiny_model_dir)}, "data": values, "train": {"sequence_length": 128}}
        )

    return make


def check(found: Any) -> Any:
    return check_run(found, tiny_tokenizer(), "run.yaml")


def test_sources_are_read_as_the_run_reads_them(settings, tmp_path: Path) -> None:
    clinic = write(
        tmp_path / "clinic.jsonl",
        [{"talk": [{"who": "patient", "says": "Hi"}, {"who": "doctor", "says": "Yes"}]}],
    )
    roles = {"patient": "user", "doctor": "assistant"}
    source = {
        "path": clinic,
        "columns": {"messages": "talk"},
        "role_key": "who",
        "content_key": "says",
        "roles": roles,
    }
    custom = {"path": write(tmp_path / "c.jsonl", [{"x": "1", "y": "2"}]), "format": "custom",
              "template": {"user": "{x}?", "assistant": "{y}"}}  # fmt: skip
    run = check(settings([source, custom], train_on="last"))

    assert [each.rows_kept for each in run.train] == [1, 1]
    assert run.train[0].columns == ("talk",)
    assert run.clean


def test_its_counts_are_those_of_the_run(settings, tmp_path: Path) -> None:
    rows = [pair(n, "so " * (n * 7 % 80 + 1)) for n in range(60)] + [{"prompt": "q", "response": ""}]
    path = write(tmp_path / "rows.jsonl", rows)
    texts = write(tmp_path / "texts.jsonl", [{"text": "again " * n} for n in range(1, 120, 9)])
    for data in ({}, {"overlong": "drop"}, {"overlong": "split", "overlap": 3}, {"join_texts": True},
                 {"join_texts": True, "overlap": 0}):  # fmt: skip
        chosen = settings([{"path": path}, {"path": texts}], **data)
        run = check(chosen)
        for found, (_, report) in zip(run.train, prepare_data(chosen, tiny_tokenizer()).reports, strict=True):
            assert (found.rows_in, found.rows_kept) == (report.rows_in, report.rows_kept)
            assert (found.tokens, found.trained_tokens) == (report.tokens, report.trained_tokens)
            assert {reason: one.count for reason, one in found.dropped.items()} == report.dropped
            cut = found.changed.get("truncated")
            assert (cut.count if cut else 0) == report.truncated


@pytest.mark.parametrize(
    ("data", "whole"),
    [({}, False), ({"overlong": "split", "overlap": 3}, True), ({"join_texts": True}, True)],
)
def test_a_text_that_is_split_is_shown_whole(settings, tmp_path: Path, data: dict, whole: bool) -> None:
    path = write(tmp_path / "texts.jsonl", [{"text": "again " * 150}])
    (shown,) = check(settings([{"path": path}], **data)).train[0].examples

    assert (shown.limit == len(shown.encoded.ids)) == whole


def test_held_out_rows_that_train_are_found(settings, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [pair(n) for n in range(9)])
    held = write(tmp_path / "held.jsonl", [pair(3), pair(30), pair(4, "otherwise"), pair(3)])
    overlap = check(settings([{"path": train}], eval=[{"path": held}])).overlap

    assert overlap is not None
    assert (overlap.held_out, overlap.same.count, overlap.same_prompt.count) == (4, 2, 1)
    assert overlap.same.examples == [f"row {n} of {held}: as row 3 of {train}" for n in (0, 3)]
    assert overlap.same_prompt.examples == [f"row 2 of {held}: as row 4 of {train}"]


@pytest.mark.parametrize("fraction", [0.1, 0.4])
def test_a_share_that_is_held_out_is_compared_as_the_run_divides_it(
    settings, tmp_path: Path, fraction: float
) -> None:
    rows = [pair(n % 25) for n in range(60)]
    paths = [write(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:40]), ("b", rows[40:]))]
    chosen = settings([{"path": path} for path in paths], eval={"fraction": fraction})
    data = prepare_data(chosen, tiny_tokenizer())

    def texts(documents: Any) -> list[bytes]:
        return [source.ids(index).tobytes() for source, index in map(data.corpus.locate, documents.tolist())]

    trained = set(texts(data.train_N))
    expected = sum(text in trained for text in texts(data.held_out_N))
    overlap = check(chosen).overlap
    assert overlap is not None
    assert 0 < expected == overlap.same.count
    assert overlap.held_out == len(data.held_out_N)


def test_documents_of_one_row_are_held_out_together(settings, tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", [{"text": f"{n} " * 300} for n in range(20)])
    data = prepare_data(
        settings([{"path": path}], overlong="split", eval={"fraction": 0.3}), tiny_tokenizer()
    )
    rows = [
        [data.corpus.locate(int(n))[0].row(int(n)) for n in part] for part in (data.train_N, data.held_out_N)
    ]

    assert len(data.corpus) > 40
    assert set(rows[0]).isdisjoint(rows[1])
    assert len(set(rows[1])) == 6


def test_rows_of_two_sources_are_found(settings, tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", [pair(n) for n in range(9)])
    two = write(tmp_path / "b.jsonl", [pair(n) for n in range(6, 15)])
    assert check(settings([{"path": one}, {"path": two}])).repeated.count == 3


def test_sources_of_one_file_have_names_of_their_own(settings, tmp_path: Path) -> None:
    one = SourceSettings(path="a", split="train[:3]")
    assert names_of([one, SourceSettings(path="a"), SourceSettings(path="b"), SourceSettings(path="a")]) == [
        "a (train[:3])", "a", "b", "a #2",
    ]  # fmt: skip
    assert names_of([one]) == ["a"]
    path = write(tmp_path / "a.jsonl", [pair(n) for n in range(9)])
    found = settings(
        [{"path": path, "split": "[:5]"}, {"path": path, "split": "[5:]"}], eval={"fraction": 0.3}
    )
    assert len(set(prepare_data(found, tiny_tokenizer()).corpus.names)) == 2


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(settings, tmp_path: Path, tiny_model_dir: Path, capsys):
    def run(*words: object, **data: Any) -> tuple[int, str, str]:
        path = tmp_path / "run.yaml"
        values = {"model": {"name": str(tiny_model_dir)}, "data": data, "train": {"sequence_length": 128}}
        path.write_text(yaml.safe_dump(values))
        code = exit_code("data", "check", path, *words)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_run_file_is_checked_and_nothing_is_written(command, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = write(tmp_path / "rows.jsonl", [pair(n) for n in range(50)])
    held = write(tmp_path / "held.jsonl", [pair(70)])
    code, out, err = command(train=[{"path": rows}], eval=[{"path": held}])

    assert (code, err) == (0, "")
    assert "Every row would train as it stands.\nOf 1 held-out row none is in the training data.\n" in out
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "runs").exists()


def test_settings_can_be_replaced(command, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [pair(n, "so " * 90) for n in range(3)])
    code, out, _ = command("data.overlong=error", "--json", train=[{"path": rows}])
    found = json.loads(out)

    assert code == 1
    assert found["train"][0]["dropped"]["too long"]["rows"] == 3
    assert "ends a run at such rows" in command("data.overlong=error", train=[{"path": rows}])[1]


def test_one_source_of_a_run_is_named_by_its_file(command, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [pair(n) for n in range(9)])
    _, out, _ = command("--json", train=[{"path": rows}], eval={"fraction": 0})
    found = json.loads(out)

    assert found["path"].endswith("run.yaml")
    assert [one["path"] for one in found["train"]] == [rows]
    assert found["overlap"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "x"], "--model is for data on its own"),
        (["--held-out", "x"], "Set data.eval in it"),
        (["--sequence-length", "64"], "train.sequence_length"),
        (["data.trian=1"], "data.trian"),
    ],
)
def test_what_a_run_file_says_itself_is_refused(command, tmp_path: Path, words: list[str], said: str) -> None:
    code, out, err = command(*words, train=[{"path": write(tmp_path / "rows.jsonl", [pair(1)])}])

    assert (code, out) == (2, "")
    assert said in err


def test_several_files_are_told_how(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(1)])

    assert exit_code("data", "check", path, path) == 2
    assert "Quote a pattern" in capsys.readouterr().err


def test_digests_of_arrays_are_of_all_tokens(settings, tmp_path: Path) -> None:
    """Rows that begin alike are no duplicates."""
    path = write(tmp_path / "rows.jsonl", [pair(1, "so one"), pair(1, "so two"), pair(1, "so one")])
    (found,) = check(settings([{"path": path}])).train

    assert found.findings()["exact duplicates"] == 1
    assert len(np.unique(found.marks.digests)) == 2
    assert len(np.unique(found.marks.prompts)) == 1


def test_documents_are_told_from_rows(settings, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(1)])
    assert prepare_data(settings([{"path": path}]), tiny_tokenizer()).documents_are_rows
    long = write(tmp_path / "texts.jsonl", [{"text": "again " * 300}])
    assert not prepare_data(settings([{"path": long}], overlong="split"), tiny_tokenizer()).documents_are_rows


def test_tokens_that_the_run_adds_are_tokens(command, settings, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [pair(1, "<tool> now")])
    plain = json.loads(command("--json", train=[{"path": rows}], eval={"fraction": 0})[1])
    words = "--json", "adapter.new_tokens=['<tool>']"
    added = json.loads(command(*words, train=[{"path": rows}], eval={"fraction": 0})[1])

    assert added["train"][0]["tokens"]["trained"] < plain["train"][0]["tokens"]["trained"]
