"""Run directories are found and read, and what else lies about does no harm."""

from __future__ import annotations

import fcntl
import os
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.fake_runs import events_of, write_events, write_run
from tunesmith.contracts.errors import UserError
from tunesmith.contracts.event_log import read_events
from tunesmith.export.run_files import (
    find_runs,
    is_running,
    open_run,
    read_json,
    read_settings,
    sparse_events,
)


@pytest.fixture
def held():
    """Holds the lock of a run, as a process that trains does."""
    locks = []

    def hold(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        locks.append(os.open(folder / ".lock", os.O_CREAT | os.O_RDWR))
        fcntl.flock(locks[-1], fcntl.LOCK_EX)

    yield hold
    for lock in locks:
        os.close(lock)


def test_runs_are_found_below_and_not_inside_each_other(tmp_path: Path, held) -> None:
    write_run(tmp_path / "runs" / "b")
    write_run(tmp_path / "runs" / "group" / "a")
    write_events(tmp_path / "runs" / "only-events", [])
    write_run(tmp_path / "runs" / "b" / "adapter")  # a result holds a run.yaml, too
    held(tmp_path / "runs" / "starting")
    for name in ("empty", "foreign", ".hidden/run"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "foreign" / "run.yaml").write_text("model: {}")
    (tmp_path / "runs" / "file.txt").write_text("x")
    write_run(tmp_path / "runs" / ".hidden" / "run")
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "zz").symlink_to(tmp_path / "runs" / "b")

    found = find_runs([tmp_path / "runs", tmp_path / "runs" / "b"])

    assert [str(run.relative_to(tmp_path / "runs")) for run in found] == [
        "b",
        "group/a",
        "only-events",
        "starting",
    ]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_runs([tmp_path / "nowhere"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is not a folder"):
        find_runs([tmp_path / "file"])


def test_what_is_no_run_is_told_with_one_that_is_near(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run directory"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run directory"):
        open_run(tmp_path)
    run = write_run(tmp_path / "runs" / "a")
    with pytest.raises(UserError, match=f"Did you mean {run}"):
        open_run(tmp_path / "runs")
    assert open_run(run) == run


def test_a_run_is_running_while_its_lock_is_held(tmp_path: Path, held) -> None:
    assert not is_running(tmp_path)
    (tmp_path / ".lock").touch()
    assert not is_running(tmp_path)
    held(tmp_path)
    assert is_running(tmp_path)
    assert is_running(tmp_path)  # looking does not take it


@pytest.mark.parametrize(
    "content", [b"", b"model: {name: [", b"\xff\xfe\x00", b"- 1\n- 2\n", b"!!python/object:os.system {}"]
)
def test_a_run_file_that_cannot_be_read_is_empty(tmp_path: Path, content: bytes) -> None:
    assert read_settings(tmp_path) == {}
    (tmp_path / "run.yaml").write_bytes(content)
    assert read_settings(tmp_path) == {}


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", model={"name": "org/m", "revision": "1e5"}, train={"learning_rate": 1e-5})

    settings = read_settings(run)
    assert settings["model"]["revision"] == "1e5"
    assert settings["train"]["learning_rate"] == 1e-5


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_json_that_cannot_be_read_is_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.json").write_bytes(content)
    assert read_json(tmp_path / "data.json") == {}
    assert read_json(tmp_path / "none.json") == {}


def test_sparse_events_are_all_but_most_of_the_steps(tmp_path: Path) -> None:
    events = events_of(5000)
    path = write_events(tmp_path, events) / "events.jsonl"
    with path.open("a") as file:
        file.write('{"event": "step", "step": 5001, "lo')

    found = sparse_events(path, 30)

    steps = [event["step"] for event in found if event["event"] == "step"]
    assert [event for event in found if event["event"] != "step"] == [
        e for e in events if e["event"] != "step"
    ]
    assert 30 <= len(steps) <= 41
    assert steps == sorted(steps)
    assert steps[-10:] == list(range(4991, 5001))
    assert max(b - a for a, b in pairwise(steps)) <= 167
    short = write_events(tmp_path / "short", events_of(20)) / "events.jsonl"
    assert sparse_events(short) == read_events(short)
    assert sparse_events(tmp_path / "none") == []
