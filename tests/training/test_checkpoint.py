"""The checkpoint store: what it writes, how it finds it again, what it keeps, and what it makes of damage."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file

from tunesmith._version import __version__
from tunesmith.contracts.errors import StorageError
from tunesmith.training import storage, tensors
from tunesmith.training.checkpoint import Checkpoint, CheckpointStore, TensorShard

STATE = {"step": 3, "place": [1, 2], "name": "ü", "deep": {"a": None, "b": [True, 0.1]}}


def sample(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model/weight": torch.randn(4, 3, generator=generator),
        "model/half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "optimizer/state1": torch.randint(0, 256, (7,), generator=generator, dtype=torch.uint8),
        "optimizer/step": torch.tensor(3.0),
        "optimizer/empty": torch.empty(0, 2, dtype=torch.int64),
    }


def put(store: CheckpointStore, step: int, metric: float | None = None) -> Checkpoint:
    return store.save(step, sample(step), {"step": step}, metric=metric)


def steps(store: CheckpointStore) -> list[int]:
    return [checkpoint.step for checkpoint in store.all()]


def newest(store: CheckpointStore) -> tuple[Checkpoint | None, list[tuple[str, str]]]:
    damaged: list[tuple[str, str]] = []
    found = store.newest_intact(lambda path, reason: damaged.append((path.name, reason)))
    return found, damaged


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(a[name], b[name])
        for name in a
    )


# ------------------------------------------------------------------------------------------- what is written


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)
    saved = store.save(200, sample(), STATE, metric=1.25)
    assert saved == Checkpoint(tmp_path / "run" / "checkpoints" / "step-00000200", 200, 1.25)
    found, damaged = newest(CheckpointStore(store.folder, keep=2))
    assert (found, damaged) == (saved, [])
    assert same(saved.tensors(), sample())
    assert saved.state() == STATE
    assert saved.tensor_names() == sorted(sample())
    assert saved.damage() is None


def test_the_files_are_plain_safetensors_and_json(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path, keep=1).save(200, sample(), STATE, metric=None).path
    file = "tensors-00001-of-00001.safetensors"
    assert sorted(p.name for p in path.iterdir()) == ["index.json", "manifest.json", "state.json", file]
    assert same(load_file(path / file), sample())
    with safetensors.safe_open(path / file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert json.loads((path / "state.json").read_text()) == STATE
    index = json.loads((path / "index.json").read_text())
    assert index["tensors"]["model/half"] == {
        "dtype": "BF16",
        "shape": [5],
        "shards": [{"file": file, "key": "model/half", "offset": [0], "shape": [5]}],
    }


def test_the_manifest_names_every_other_file(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path, keep=1, shard_bytes=16).save(200, sample(), STATE, metric=0.5).path
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["tunesmith"]) == (1, __version__)
    assert (manifest["step"], manifest["metric"]) == (200, 0.5)
    others = [p for p in path.iterdir() if p.name != "manifest.json"]
    assert manifest["files"] == {
        p.name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in others
    }


def test_tensors_are_split_over_files_at_the_size_that_was_asked_for(tmp_path: Path) -> None:
    given = {f"t{n}": torch.full((10,), n, dtype=torch.float32) for n in range(5)}  # 40 bytes each
    given["u"] = torch.zeros(100)  # larger than a file should be: a file of its own
    checkpoint = CheckpointStore(tmp_path, keep=1, shard_bytes=80).save(1, given, {}, metric=None)
    files = sorted(checkpoint.path.glob("*.safetensors"))
    assert [path.name for path in files] == [f"tensors-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert [sorted(load_file(path)) for path in files] == [["t0", "t1"], ["t2", "t3"], ["t4"], ["u"]]
    assert same(checkpoint.tensors(), given)


def test_a_checkpoint_without_tensors_or_state(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(0, {}, {}, metric=None)
    found, _ = newest(store)
    assert found is not None
    assert (found.tensors(), found.state(), found.tensor_names()) == ({}, {}, [])


def test_an_empty_or_missing_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "missing" / "deeper"):
        store = CheckpointStore(folder, keep=1)
        assert newest(store) == (None, [])
        assert (store.all(), store.best()) == ([], None)
        store.clean_temporary()
    assert not (tmp_path / "missing").exists(), "looking creates nothing"


@pytest.mark.parametrize("value", [torch.ones(2), {1, 2}, b"x", object()])
def test_a_state_that_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, value: Any
) -> None:
    with pytest.raises(TypeError, match="here"):
        CheckpointStore(tmp_path / "new", keep=1).save(1, {}, {"here": value}, metric=None)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------- keeping


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    kept = []
    for step, metric in enumerate([3.0, 1.0, None, 2.0, float("nan"), 1.5, 0.5, 0.7, 0.6], start=1):
        put(store, step, metric)
        kept.append(steps(store))
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{s:08d}" for s in kept[-1]]
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 5, 6], [6, 7], [7, 8], [7, 8, 9]]
    best = store.best()
    assert best is not None
    assert (best.step, best.metric) == (7, 0.5)


def test_of_equally_good_ones_the_newest_is_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=9)
    for step in (1, 2, 3):
        put(store, step, 1.0 if step < 3 else 2.0)
    best = store.best()
    assert best is not None
    assert best.step == 2


@pytest.mark.parametrize("metric", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path: Path, metric: float) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    assert put(store, 1, metric).metric is None
    assert store.best() is None
    assert json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())["metric"] is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    put(store, 1)
    put(store, 2)
    store.save(2, {"other": torch.ones(1)}, {"second": True}, metric=4.0)
    found, damaged = newest(store)
    assert found is not None
    assert (found.step, found.metric, damaged) == (2, 4.0, [])
    assert found.state() == {"second": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_later_steps_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    put(CheckpointStore(tmp_path, keep=1), 900)
    store = CheckpointStore(tmp_path, keep=1)
    put(store, 5)
    put(store, 6)
    assert steps(store) == [6, 900]


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    foreign = ["notes.txt", "step-1", "step-00000001.bak", ".tmp-other-1", "best"]
    for name in foreign:
        (tmp_path / name).mkdir()
    store = CheckpointStore(tmp_path, keep=1)
    put(store, 1)
    put(store, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*foreign, "step-00000002"])


# ------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_garbage(path: Path) -> None:
    path.write_text('{"half": ')


def swap_step(path: Path) -> None:
    shutil.copy(path.parent.parent / "step-00000001" / path.name, path)


TENSORS = "tensors-00001-of-00001.safetensors"

DAMAGES: list[tuple[Callable[[Path], Any], str, str]] = [
    (flip, TENSORS, f"{TENSORS} does not match its SHA-256"),
    (truncate, TENSORS, rf"{TENSORS} has \d+ bytes, not \d+"),
    (Path.unlink, TENSORS, f"{TENSORS} is missing"),
    (flip, "index.json", "index.json does not match its SHA-256"),
    (Path.unlink, "index.json", "index.json is missing"),
    (flip, "state.json", "state.json does not match its SHA-256"),
    (truncate, "state.json", r"state.json has \d+ bytes, not \d+"),
    (Path.unlink, "manifest.json", "manifest.json is missing"),
    (truncate, "manifest.json", "manifest.json is not valid JSON"),
    (replace_by_garbage, "manifest.json", "manifest.json is not valid JSON"),
    (lambda path: path.write_text("[]"), "manifest.json", "manifest.json is not a manifest"),
    (lambda path: path.write_text("{}"), "manifest.json", "manifest.json does not match its own checksum"),
    (lambda path: path.write_bytes(b"\xff\xfe\x00"), "manifest.json", "manifest.json is not valid JSON"),
    (swap_step, "manifest.json", "manifest.json belongs to step 1"),
    (lambda path: shutil.rmtree(path.parent), "manifest.json", ""),
    (lambda path: [p.unlink() for p in path.parent.iterdir()], "manifest.json", "manifest.json is missing"),
]


@pytest.mark.parametrize(("damage", "file", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(
    tmp_path: Path, damage: Callable[[Path], Any], file: str, reason: str
) -> None:
    store = CheckpointStore(tmp_path, keep=5)
    for step in (1, 2, 3):
        put(store, step)
    damage(tmp_path / "step-00000003" / file)
    found, damaged = newest(store)
    assert found is not None
    assert found.step == 2
    assert same(found.tensors(), sample(2))
    if reason:
        [(name, given)] = damaged
        assert name == "step-00000003"
        assert re.fullmatch(reason, given)
    else:
        assert damaged == []


def test_every_flipped_bit_is_seen(tmp_path: Path) -> None:
    checkpoint = CheckpointStore(tmp_path, keep=1).save(1, sample(), STATE, metric=0.5)
    for path in checkpoint.path.iterdir():
        data = path.read_bytes()
        for place in range(0, len(data), 2):
            changed = bytearray(data)
            changed[place] ^= 1 << (place % 8)
            path.write_bytes(changed)
            try:
                damage = checkpoint.damage()
            except StorageError as error:  # a version of the format that we do not know
                damage = error.message
            # A manifest whose white space changed still says the same.
            same_words = path.name == "manifest.json" and data.split() == bytes(changed).split()
            assert damage is not None or same_words, (path.name, place)
        path.write_bytes(data)
    assert checkpoint.damage() is None


def test_several_damaged_ones_are_reported_newest_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=5)
    for step in (1, 2, 3):
        put(store, step)
        (tmp_path / f"step-{step:08d}" / "state.json").unlink()
    found, damaged = newest(store)
    assert found is None
    assert [name for name, _ in damaged] == ["step-00000003", "step-00000002", "step-00000001"]


def test_a_damaged_one_takes_nobodys_place_and_goes_when_its_step_is_passed(tmp_path: Path) -> None:
    put(CheckpointStore(tmp_path, keep=9), 10, 5.0)
    put(CheckpointStore(tmp_path, keep=9), 20, 1.0)  # the best, if it were intact
    (tmp_path / "step-00000020" / "state.json").unlink()
    store = CheckpointStore(tmp_path, keep=2)
    found, damaged = newest(store)
    assert found is not None
    assert (found.step, len(damaged)) == (10, 1)
    best = store.best()
    assert best is not None
    assert best.step == 10
    put(store, 15)
    assert steps(store) == [10, 15, 20], "kept until training has passed it"
    put(store, 25)
    assert steps(store) == [10, 15, 25]
    assert newest(store)[1] == []


def test_a_damaged_step_that_is_saved_again_is_whole(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    put(store, 1)
    put(store, 2)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    assert len(newest(store)[1]) == 1
    put(store, 2)
    found, damaged = newest(store)
    assert found is not None
    assert (found.step, damaged) == (2, [])


def test_a_checkpoint_that_a_run_deletes_while_it_is_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=5)
    put(store, 1)
    put(store, 2)
    real = storage.hash_file

    def delete_first(path: Path) -> Any:
        if path.parent.name == "step-00000002":
            shutil.rmtree(path.parent)
        return real(path)

    monkeypatch.setattr(storage, "hash_file", delete_first)
    found, damaged = newest(store)
    assert found is not None
    assert (found.step, damaged) == (1, [])


def test_reading_a_damaged_checkpoint_says_so(tmp_path: Path) -> None:
    checkpoint = put(CheckpointStore(tmp_path, keep=1), 1)
    truncate(checkpoint.path / TENSORS)
    (checkpoint.path / "state.json").unlink()
    for read in (checkpoint.tensors, checkpoint.state):
        with pytest.raises(StorageError, match="step-00000001 cannot be read"):
            read()


def test_another_format_is_refused_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=5)
    put(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr("tunesmith.training.manifest.FORMAT", 2)
        put(store, 2)
    with pytest.raises(StorageError, match=r"has format 2 of tunesmith .* reads format 1"):
        newest(store)
    assert steps(store) == [1]


def test_a_checkpoint_that_may_not_be_read_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=5)
    put(store, 1)
    put(store, 2)

    def deny(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "hash_file", deny)
    with pytest.raises(StorageError, match=r"step-00000002 cannot be read: index\.json: Permission denied"):
        newest(store)


# ------------------------------------------------------------------------------------------- leftovers


def dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_leftovers_of_dead_processes_are_removed_and_those_of_live_ones_are_not(tmp_path: Path) -> None:
    dead, live = dead_pid(), os.getppid()
    names = [f".{kind}-step-00000007-{pid}" for kind in ("tmp", "trash") for pid in (dead, live, os.getpid())]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    store = CheckpointStore(tmp_path, keep=1)
    assert newest(store) == (None, [])
    store.clean_temporary()
    kept = [f".tmp-step-00000007-{live}", f".trash-step-00000007-{live}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_a_process_that_only_inherited_the_number_is_not_the_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = tmp_path / f".tmp-step-00000007-{os.getppid()}"
    leftover.mkdir()
    later = leftover.stat().st_ctime + 3600

    class Younger:
        def __init__(self, pid: int) -> None:
            assert pid == os.getppid()

        def create_time(self) -> float:
            return later

    monkeypatch.setattr(storage.psutil, "Process", Younger)
    CheckpointStore(tmp_path, keep=1).clean_temporary()
    assert not leftover.exists()


@pytest.mark.parametrize("owner", ["dead", "live"])
def test_a_checkpoint_that_was_set_aside_is_still_one(tmp_path: Path, owner: str) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    put(store, 1)
    put(store, 2, 0.5)
    pid = dead_pid() if owner == "dead" else os.getppid()
    aside = tmp_path / f".aside-step-00000002-{pid}"
    (tmp_path / "step-00000002").rename(aside)
    found, damaged = newest(store)
    assert found == Checkpoint(aside, 2, 0.5)
    assert damaged == []
    assert same(found.tensors(), sample(2))
    store.clean_temporary()
    found, _ = newest(store)
    assert found is not None
    assert found.path == (tmp_path / "step-00000002" if owner == "dead" else aside)


def test_a_checkpoint_set_aside_yields_to_the_one_that_replaced_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    put(store, 2)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / f".aside-step-00000002-{dead_pid()}")
    store.save(2, {"new": torch.ones(1)}, {}, metric=None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    found, _ = newest(store)
    assert found is not None
    assert found.tensor_names() == ["new"]


# ------------------------------------------------------------------------------------------- space and rights


def test_ensure_space_says_what_is_needed_free_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 3 * 2**30)
    store.ensure_space(3 * 2**30)
    with pytest.raises(StorageError) as caught:
        store.ensure_space(3 * 2**30 + 2**29)
    folder = tmp_path / "checkpoints"
    assert caught.value.message == f"checkpoints need 3.5 GiB in {folder}, where only 3.0 GiB are free"
    assert caught.value.exit_code == 1


def test_free_bytes_looks_at_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    usage = os.statvfs(tmp_path)
    expected = usage.f_bavail * usage.f_frsize
    assert storage.free_bytes(tmp_path / "a" / "b") == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("action", ["save", "ensure_space"])
def test_a_file_in_the_way_is_named(tmp_path: Path, action: str) -> None:
    (tmp_path / "run").write_text("a file")
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=1)
    with pytest.raises(
        StorageError, match=r"cannot be written into the folder .*run/checkpoints: File exists"
    ):
        put(store, 1) if action == "save" else store.ensure_space(1)
    assert (tmp_path / "run").read_text() == "a file"


def test_ensure_space_asks_the_system_for_the_right_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match=r"cannot be written into the folder .*: Permission denied"):
        CheckpointStore(tmp_path, keep=1).ensure_space(1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    put(store, 1)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            put(store, 2)
        with pytest.raises(StorageError, match="Permission denied"):
            store.ensure_space(1)
    finally:
        tmp_path.chmod(0o700)
    assert steps(store) == [1]


# ------------------------------------------------------------------------------------------- shards, memory


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    given = {"embed": weight, "head": weight, "part": weight[:2], "turned": weight.t()}
    checkpoint = CheckpointStore(tmp_path, keep=1).save(1, given, {}, metric=None)
    written = sum(path.stat().st_size for path in checkpoint.path.glob("*.safetensors"))
    assert written < 2.2 * weight.nbytes, "the weight, its transpose and two rows"
    loaded = checkpoint.tensors()
    assert same(loaded, given)
    assert loaded["embed"] is loaded["head"]


def test_loaded_tensors_outlive_the_files(tmp_path: Path) -> None:
    checkpoint = put(CheckpointStore(tmp_path, keep=1), 1)
    loaded = checkpoint.tensors()
    for path in checkpoint.path.iterdir():
        path.write_bytes(b"")
    assert same(loaded, sample(1))
    loaded["model/weight"].zero_()


def test_a_contiguous_tensor_is_written_without_a_copy() -> None:
    weight = torch.randn(100, dtype=torch.float32)
    _, piece = tensors._safetensors({"weight": weight})
    weight[3] = 42.0
    assert memoryview(piece).cast("B").cast("f")[3] == 42.0


def test_shards_are_assembled_at_their_offsets(tmp_path: Path) -> None:
    whole = torch.arange(24).reshape(4, 6)
    shards = [
        TensorShard(whole[:, 4:], (0, 4), (4, 6)),
        TensorShard(whole[:1, :4], (0, 0), (4, 6)),
        TensorShard(whole[1:, :4], (1, 0), (4, 6)),
    ]
    one = TensorShard(torch.ones(2), (0,), (2,))
    store = CheckpointStore(tmp_path, keep=1, shard_bytes=64)
    checkpoint = store.save(1, {"w": shards, "one": one, "w#1": torch.zeros(1)}, {}, metric=None)
    assert same(checkpoint.tensors(), {"w": whole, "one": torch.ones(2), "w#1": torch.zeros(1)})
    index = json.loads((checkpoint.path / "index.json").read_text())["tensors"]["w"]
    assert index["shape"] == [4, 6]
    assert [part["offset"] for part in index["shards"]] == [[0, 4], [0, 0], [1, 0]]
    assert [part["shape"] for part in index["shards"]] == [[4, 2], [1, 4], [3, 4]]
    assert len({part["file"] for part in index["shards"]}) > 1


@pytest.mark.parametrize(
    ("shards", "problem"),
    [
        ([], "one shard at least"),
        ([TensorShard(torch.ones(2), (0,), (4,))], "do not cover"),
        ([TensorShard(torch.ones(3), (0,), (4,)), TensorShard(torch.ones(2), (2,), (4,))], "overlaps"),
        ([TensorShard(torch.ones(2), (3,), (4,))], "does not lie in"),
        ([TensorShard(torch.ones(2), (-1,), (4,))], "does not lie in"),
        ([TensorShard(torch.ones(2), (0, 0), (4,))], "disagree"),
        ([TensorShard(torch.ones(2), (0,), (4,)), TensorShard(torch.ones(2).int(), (2,), (4,))], "dtype"),
        ([TensorShard(torch.ones(2), (0,), (4,)), TensorShard(torch.ones(2), (2,), (5,))], "disagree"),
    ],
)
def test_shards_that_do_not_make_a_tensor_are_refused(
    tmp_path: Path, shards: list[TensorShard], problem: str
) -> None:
    with pytest.raises(ValueError, match=f"w: .*{problem}"):
        CheckpointStore(tmp_path / "new", keep=1).save(1, {"w": shards}, {}, metric=None)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, dtype=torch.complex128),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged),
    ],
)
def test_tensors_that_safetensors_cannot_hold_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="w: "):
        CheckpointStore(tmp_path / "new", keep=1).save(1, {"w": tensor}, {}, metric=None)


def test_names_that_the_format_reserves_or_that_are_odd(tmp_path: Path) -> None:
    given = {
        name: torch.tensor([n]) for n, name in enumerate(["__metadata__", "", "a/b.c", "ü😀", "x'", '"\\'])
    }
    checkpoint = CheckpointStore(tmp_path, keep=1).save(1, given, {}, metric=None)
    assert same(checkpoint.tensors(), given)
