"""What tells runs apart."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.fake_runs import evaluated, events_of, step, write_run
from tunesmith.export.compare import MISSING, compare, flat
from tunesmith.export.run_summary import read_run


def test_only_settings_that_differ_are_named_dotted(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", train={"learning_rate": 1e-4})
    two = write_run(
        tmp_path / "two",
        train={"learning_rate": 2e-4},
        data={"train": [{"path": "data/rows.jsonl"}, {"path": "more.jsonl"}]},
    )
    (two / "versions.json").write_text(
        json.dumps({**json.loads((two / "versions.json").read_text()), "torch": "9"})
    )

    found = compare([read_run(one), read_run(two)])

    assert found.names == ["one", "two"]
    assert found.settings["train.learning_rate"] == [1e-4, 2e-4]
    assert found.settings["data.train.1.path"] == [MISSING, "more.jsonl"]
    assert {name.rpartition(".")[0] for name in found.settings} == {"train", "data.train.1"}
    assert list(found.versions) == ["torch"]
    assert found.figures["last held-out loss"] == [1.25, 1.25]
    assert found.figures["tokens"] == [2000, 2000]
    assert found.figures["trained parameters"] == [1234, 1234]
    assert found.notes == []


def test_losses_of_different_data_are_not_compared_silently(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", [*events_of(reason="interrupted"), evaluated(20, 1.0, tokens=71)])
    bare = write_run(tmp_path / "bare", [step(1)])

    notes = compare([read_run(one), read_run(two), read_run(bare)]).notes
    assert "different data (70, 71, – tokens)" in notes[0]
    assert "Not all of these runs are finished." in notes[1]
    assert len(compare([read_run(one), read_run(bare)]).notes) == 1


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / group / "run") for group in ("a", "b")]

    assert compare([read_run(run) for run in runs]).names == [str(run) for run in runs]


def test_flat_settings() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [1, 2], "e": [{"f": 1}, {}], "g": []}) == {
        "a.b": 1, "a.c": {}, "d": [1, 2], "e.0.f": 1, "e.1": {}, "g": [],
    }  # fmt: skip
