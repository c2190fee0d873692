"""The cache: complete entries or none, whatever happens meanwhile."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from tunesmith.contracts.errors import StorageError
from tunesmith.data.cache import DamagedEntryError, content_key, obtain


def load(folder: Path) -> str:
    text = (folder / "x").read_text()
    if text == "damaged":
        raise DamagedEntryError("damaged")
    return text


def build(folder: Path) -> None:
    (folder / "x").write_text("built")


def never(folder: Path) -> None:
    raise AssertionError("built again")


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_an_entry_is_built_once(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    assert obtain(root, "key", build, load) == "built"
    assert obtain(root, "key", never, load) == "built"
    assert names(root) == ["key"]


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        obtain(tmp_path, "key", fail, load)
    assert names(tmp_path) == []


@pytest.mark.parametrize("damage", ["damaged entry", "missing file", "a file in its place", "empty folder"])
def test_a_damaged_entry_is_replaced(tmp_path: Path, damage: str) -> None:
    entry = tmp_path / "key"
    if damage == "a file in its place":
        entry.write_text("x")
    else:
        entry.mkdir()
        if damage == "damaged entry":
            (entry / "x").write_text("damaged")
        elif damage == "missing file":
            (entry / "other").write_text("x")
    assert obtain(tmp_path, "key", build, load) == "built"
    assert names(tmp_path) == ["key"]
    assert names(entry) == ["x"]


def test_the_entry_of_a_quicker_process_is_used(tmp_path: Path) -> None:
    def slow(folder: Path) -> None:
        (folder / "x").write_text("ours")
        (tmp_path / "key").mkdir()
        (tmp_path / "key" / "x").write_text("theirs")

    assert obtain(tmp_path, "key", slow, load) == "theirs"
    assert names(tmp_path) == ["key"]


def _race(root: Path, barrier: object, results: object) -> None:
    def meet(folder: Path) -> None:
        (folder / "x").write_text(str(os.getpid()))
        barrier.wait(30)  # type: ignore[attr-defined] both have built before either installs

    results.put(obtain(root, "key", meet, load))  # type: ignore[attr-defined]


def test_two_processes_that_build_at_once_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_race, args=(tmp_path, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(found) == 1
    assert names(tmp_path) == ["key"]


def test_a_folder_that_cannot_be_written_warns_and_goes_elsewhere(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert obtain(blocked / "cache", "key", build, load) == "built"
    assert blocked.read_text() == "in the way"


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="is full"):
        obtain(tmp_path, "key", full, load)
    assert names(tmp_path) == []


def test_leftovers_of_killed_processes_go_after_a_day(tmp_path: Path) -> None:
    old, new = tmp_path / ".unfinished-old", tmp_path / ".unfinished-new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (time.time() - 90_000, time.time() - 90_000))
    obtain(tmp_path, "key", build, load)
    assert names(tmp_path) == [".unfinished-new", "key"]


def test_a_key_follows_every_part() -> None:
    base = content_key({"a": 1, "b": "x"})
    assert base == content_key({"b": "x", "a": 1})
    assert (
        len({base, content_key({"a": 2, "b": "x"}), content_key({"a": 1, "b": "y"}), content_key({"a": 1})})
        == 4
    )
