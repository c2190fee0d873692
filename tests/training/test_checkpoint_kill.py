"""A save that is killed, or that meets a full disk, at every place where it touches the file system."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.contracts.errors import StorageError
from tunesmith.training import storage
from tunesmith.training.checkpoint import Checkpoint, CheckpointStore

CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir")
FILLING = ("open", "write", "fsync", "close", "mkdir", "rename")

Hook = Callable[[str, str, tuple[Any, ...]], None]


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: what a kill leaves does not depend on how fast the disk is."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


class WatchedOs:
    """Stands for the module `os` inside `storage`; calls `hook(call, moment, arguments)` around each call."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def watched(*args: Any, **kwargs: Any) -> Any:
            if name == "close":  # a failing close has closed the descriptor all the same
                real(*args)
                self.hook(name, "after", args)
                return None
            self.hook(name, "before", args)
            if name == "write":
                half = len(args[1]) // 2
                written = real(args[0], args[1][:half]) if half else 0
                self.hook(name, "half", args)
                result = written + real(args[0], args[1][half:])
            else:
                result = real(*args, **kwargs)
            self.hook(name, "after", args)
            return result

        return watched


def contents(step: int, generation: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = {
        "model/a": torch.arange(6, dtype=torch.float32) + 100 * step + generation,
        "model/b": torch.full((2, 3), step, dtype=torch.bfloat16),
        "optimizer/c": torch.tensor(generation),
    }
    return tensors, {"step": step, "generation": generation, "nothing": None, "rates": [0.1, float("inf")]}


def save(store: CheckpointStore, step: int, generation: int = 0, metric: float | None = None) -> Checkpoint:
    tensors, state = contents(step, generation)
    return store.save(step, tensors, state, metric=metric)


def make_store(folder: Path, keep: int = 1) -> CheckpointStore:
    return CheckpointStore(folder, keep=keep, shard_bytes=30)  # two files of tensors


def newest(folder: Path) -> tuple[int, int] | None:
    """Step and generation of the newest checkpoint, read bit for bit; no warning may be given on the way."""
    damaged: list[tuple[str, str]] = []
    found = make_store(folder).newest_intact(lambda path, reason: damaged.append((path.name, reason)))
    assert damaged == []
    if found is None:
        return None
    state = found.state()
    tensors, expected = contents(found.step, state["generation"])
    assert state == expected
    loaded = found.tensors()
    assert loaded.keys() == tensors.keys()
    assert all(loaded[name].dtype == t.dtype and torch.equal(loaded[name], t) for name, t in tensors.items())
    return found.step, state["generation"]


def check_after(folder: Path, allowed: set[tuple[int, int] | None], keep: int = 1) -> None:
    """The newest checkpoint is an allowed one, and saving goes on as if nothing had happened."""
    found = newest(folder)
    assert found in allowed
    readable = [checkpoint.step for checkpoint in make_store(folder).all()]
    assert len(readable) == len(set(readable))
    assert not readable or max(readable) == (found and found[0])
    save(make_store(folder, keep), 90, 7)
    assert newest(folder) == (90, 7)
    names = sorted(path.name for path in folder.iterdir())
    assert [name for name in names if name.startswith(".")] == []
    assert "step-00000090" in names
    assert len(names) <= keep + 1


def dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def run_killed_at(boundary: int, steps: list[tuple[int, int]], folder: Path) -> tuple[bool, int]:
    """Save `steps` in a child that gets SIGKILL at a boundary; whether it was killed, and saves completed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            count = 0

            def kill(call: str, moment: str, args: tuple[Any, ...]) -> None:
                nonlocal count
                count += 1
                if count == boundary:
                    os.kill(os.getpid(), signal.SIGKILL)

            torch.set_num_threads(1)
            storage.os = WatchedOs(kill)  # type: ignore[attr-defined]
            store = make_store(folder)
            for step, generation in steps:
                save(store, step, generation)
                os.write(writer, b".")
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as pipe:
        completed = len(pipe.read())
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status), completed


def prepare_nothing(folder: Path) -> None:
    pass


def prepare_old_ones(folder: Path) -> None:
    """Four checkpoints of which the first is the best: a save that keeps one deletes three."""
    store = make_store(folder, keep=4)
    for step in (1, 2, 3, 4):
        save(store, step, metric=float(step))


def prepare_same_step(folder: Path) -> None:
    store = make_store(folder, keep=2)
    save(store, 4)
    save(store, 5)


def prepare_leftovers(folder: Path) -> None:
    """What three earlier kills left: half a save, half a deletion, and a checkpoint set aside."""
    save(make_store(folder, keep=2), 3)
    save(make_store(folder, keep=2), 4)
    pid = dead_pid()
    half = folder / f".tmp-step-00000005-{pid}"
    shutil.copytree(folder / "step-00000003", half)
    (half / "manifest.json").unlink()
    trash = folder / f".trash-step-00000001-{pid}"
    shutil.copytree(folder / "step-00000003", trash)
    (trash / "state.json").unlink()
    (folder / "step-00000004").rename(folder / f".aside-step-00000004-{pid}")


SCENARIOS: dict[str, tuple[Callable[[Path], None], tuple[int, int] | None, list[tuple[int, int]]]] = {
    "first": (prepare_nothing, None, [(1, 0), (2, 0)]),
    "retention": (prepare_old_ones, (4, 0), [(5, 0)]),
    "replace": (prepare_same_step, (5, 0), [(5, 1)]),
    "leftovers": (prepare_leftovers, (4, 0), [(5, 0)]),
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_at_any_boundary_loses_at_most_one_save(memory_path: Path, scenario: str) -> None:
    prepare, before, steps = SCENARIOS[scenario]
    base = memory_path / "base"
    base.mkdir()
    prepare(base / "checkpoints")
    boundary, killed = 0, True
    while killed:
        boundary += 1
        run = memory_path / str(boundary)
        shutil.copytree(base, run)
        killed, completed = run_killed_at(boundary, steps, run / "checkpoints")
        history = [before, *steps]
        allowed = {history[completed], history[min(completed + 1, len(steps))]}
        check_after(run / "checkpoints", allowed)
        shutil.rmtree(run)
    assert completed == len(steps)
    assert boundary > 60, "the hook must see every call"


def test_no_change_to_the_disk_bypasses_the_watched_calls(tmp_path: Path) -> None:
    """Python's audit events count the same opens, renames and removals as the kill test visits."""
    script = f"""
import json, os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_checkpoint_kill as kill
folder = Path({str(tmp_path / "checkpoints")!r})
kill.prepare_leftovers(folder)
seen, audited, on = [], [], False
def audit(event, args):
    if not on: return
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): audited.append("open")
    if event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate"):
        audited.append(event)
def hook(call, moment, args):
    if moment != "before": return
    if call == "open" and args[1] & os.O_WRONLY: seen.append("open")
    if call in ("rename", "mkdir", "rmdir", "unlink"):
        seen.append("os." + call.replace("unlink", "remove"))
kill.storage.os = kill.WatchedOs(hook)
sys.addaudithook(audit)
on = True
kill.save(kill.make_store(folder), 5)
on = False
print(json.dumps([seen, audited]))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seen, audited = json.loads(result.stdout)
    assert seen == audited
    assert {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"} == set(seen)


def test_everything_is_forced_to_the_disk_before_it_is_relied_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    save(make_store(folder), 1)
    events: list[tuple[str, str]] = []

    def record(call: str, moment: str, args: tuple[Any, ...]) -> None:
        if call == "fsync" and moment == "before":
            events.append((call, Path(f"/proc/self/fd/{args[0]}").readlink().name))
        elif call in ("rename", "unlink") and moment == "before":
            events.append((call, Path(args[0]).name))

    monkeypatch.setattr(storage, "os", WatchedOs(record))
    save(make_store(folder), 2)
    pid = os.getpid()
    temporary, trash = f".tmp-step-00000002-{pid}", f".trash-step-00000001-{pid}"
    files = [
        "tensors-00001-of-00002.safetensors",
        "tensors-00002-of-00002.safetensors",
        "index.json",
        "state.json",
        "manifest.json",
    ]
    assert events == [
        *[("fsync", name) for name in files],
        ("fsync", temporary),
        ("rename", temporary),
        ("fsync", "checkpoints"),
        ("rename", "step-00000001"),
        ("fsync", "checkpoints"),
        *[("unlink", name) for name in sorted(files)],
    ]
    assert trash not in [path.name for path in folder.iterdir()]


class FullDisk:
    """Fails the n-th call that takes space, and with `lasting` every later one too."""

    def __init__(self, at: int, code: int, *, lasting: bool) -> None:
        self.at, self.code, self.lasting = at, code, lasting
        self.count = 0

    def __call__(self, call: str, moment: str, args: tuple[Any, ...]) -> None:
        fails_at = {"write": "half", "close": "after"}.get(call, "before")
        reading = call == "open" and not args[1] & os.O_WRONLY
        if call not in FILLING or moment != fails_at or reading:
            return
        self.count += 1
        if self.count == self.at or (self.lasting and self.count > self.at):
            raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("scenario", ["retention", "replace"])
def test_a_full_disk_at_any_call_leaves_the_older_checkpoints(
    memory_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    scenario: str,
    code: int,
    lasting: bool,
) -> None:
    caplog.set_level(logging.CRITICAL)
    prepare, before, [(step, generation)] = SCENARIOS[scenario]
    prepare(memory_path / "base")
    messages: list[str] = []
    at, disk = 0, FullDisk(0, code, lasting=lasting)
    while disk.count >= at:
        at += 1
        folder = memory_path / str(at)
        shutil.copytree(memory_path / "base", folder)
        disk = FullDisk(at, code, lasting=lasting)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "os", WatchedOs(disk))
            try:
                save(make_store(folder), step, generation)
                allowed = {(step, generation)}
            except StorageError as error:
                allowed = {before, (step, generation)}
                messages.append(error.message.replace(str(folder), "FOLDER"))
        assert not list(folder.glob(".tmp-*")), "the partial directory is removed at once"
        check_after(folder, allowed)
        shutil.rmtree(folder)
    assert len(messages) > 15
    full = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}[code]
    expected = rf"{full}: a checkpoint of 44 bytes does not fit into FOLDER, where [\d.]+ GiB are free"
    assert all(re.fullmatch(expected, message) for message in messages)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not permitted here")
    try:
        store = CheckpointStore(mount / "checkpoints", keep=3)
        store.save(1, {"a": torch.ones(1000)}, {}, metric=None)
        with pytest.raises(StorageError, match=r"a checkpoint of 4\.0 MiB does not fit into .*small/checkp"):
            store.save(2, {"a": torch.ones(2**20)}, {}, metric=None)
        assert [path.name for path in (mount / "checkpoints").iterdir()] == ["step-00000001"]
        with pytest.raises(
            StorageError, match=r"checkpoints need 1\.0 GiB in .*, where only 1\.0 MiB are free"
        ):
            store.ensure_space(2**30)
        store.save(3, {"a": torch.ones(1000)}, {}, metric=None)
        assert [checkpoint.step for checkpoint in store.all()] == [1, 3]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
@pytest.mark.parametrize("call", ["mkdir", "open", "rename"])
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    folder = tmp_path / "checkpoints"
    save(make_store(folder, keep=2), 1)

    def deny(name: str, moment: str, args: tuple[Any, ...]) -> None:
        reading = name == "open" and not args[1] & os.O_WRONLY
        if name == call and moment == "before" and not reading:
            raise OSError(code, os.strerror(code), str(args[0]))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "os", WatchedOs(deny))
        with pytest.raises(StorageError) as caught:
            save(make_store(folder, keep=2), 2)
    assert caught.value.message == (
        f"checkpoints cannot be written into the folder {folder}: {os.strerror(code)}"
    )
    assert caught.value.hint is not None
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    check_after(folder, {(1, 0)})


def test_another_error_of_the_disk_is_reported_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, moment: str, args: tuple[Any, ...]) -> None:
        if name == "fsync":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "os", WatchedOs(fail))
        with pytest.raises(StorageError, match=r"writing a checkpoint into .* failed: Input/output error"):
            save(make_store(tmp_path), 1)
    assert list(tmp_path.iterdir()) == []


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(make_store(tmp_path), 1)

    def busy(name: str, moment: str, args: tuple[Any, ...]) -> None:
        if name == "rmdir" and moment == "before":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "os", WatchedOs(busy))
        save(make_store(tmp_path), 2)
        assert "could not delete" in caplog.text
    check_after(tmp_path, {(2, 0)})


def test_an_interrupt_removes_the_partial_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str, moment: str, args: tuple[Any, ...]) -> None:
        if name == "write" and moment == "half":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "os", WatchedOs(interrupt))
        with pytest.raises(KeyboardInterrupt):
            save(make_store(tmp_path), 1)
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may write fewer bytes than it was given."""

    class ShortWrites(WatchedOs):
        def write(self, descriptor: int, data: memoryview) -> int:
            return os.write(descriptor, data[:3])

    with monkeypatch.context() as patch:
        patch.setattr(storage, "os", ShortWrites(lambda *_: None))
        save(make_store(tmp_path), 1)
    assert newest(tmp_path) == (1, 0)
