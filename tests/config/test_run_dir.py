"""The run directory: the lock, the settings that repeat the run, and folders that cannot be used."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.config import run_dir
from tunesmith.config.load import load_settings
from tunesmith.config.run_dir import claimed_run_dir, resolved_yaml, versions, write_run_files
from tunesmith.config.yaml_source import parse_yaml
from tunesmith.contracts.errors import StorageError, UserError

RUN: dict[str, Any] = {"model": {"name": "x"}, "data": {"train": [{"path": "a"}]}}


def test_the_folder_is_made_with_its_parents_and_held(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with claimed_run_dir(folder) as claimed:
        assert claimed == folder
        assert folder.is_dir()
        with pytest.raises(UserError, match="another process is training in"), claimed_run_dir(folder):
            pass
    with claimed_run_dir(folder):
        pass  # released


def test_a_lock_ends_with_its_process_even_when_it_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, os, signal; from pathlib import Path; from tunesmith.config.run_dir import claimed_run_dir\n"
        "with claimed_run_dir(Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process"), claimed_run_dir(tmp_path):
            pass
        process.kill()
        process.wait()
    with claimed_run_dir(tmp_path):
        pass


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is not a folder"), claimed_run_dir(folder):
            pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(errno.EROFS, "cannot be written (Read-only"), (errno.EACCES, "cannot be written (Permission"),
     (errno.ENOSPC, "the disk of")],
)  # fmt: skip
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch, number: int, sentence: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_dir.os, "open", refuse)
    with pytest.raises(StorageError) as caught, claimed_run_dir(tmp_path / "run"):
        pass
    assert sentence in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("size", ["2", "8", "x"])
def test_several_processes_are_refused(monkeypatch, size: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match="trains on one device"):
        run_dir.refuse_several_processes()


@pytest.mark.parametrize("size", ["1", "", " 1 "])
def test_one_process_is_not(monkeypatch, size: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    run_dir.refuse_several_processes()


def test_versions_name_what_decides_the_result(monkeypatch) -> None:
    found = versions()
    assert {"tunesmith", "python", "torch", "transformers", "peft", "tokenizers"} <= set(found)
    assert all(found.values())
    monkeypatch.setattr(run_dir, "_PACKAGES", ("no-such-package-anywhere",))
    assert versions()["no-such-package-anywhere"] == "not installed"


def test_run_files_are_written_and_replaced_whole(tmp_path: Path, monkeypatch) -> None:
    write_run_files(tmp_path, load_settings(RUN))
    assert load_settings(tmp_path / "run.yaml") == load_settings(RUN)
    assert json.loads((tmp_path / "versions.json").read_text()) == versions()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml", "versions.json"]
    before = (tmp_path / "run.yaml").read_text()

    def half(self: Path, text: str, **_: object) -> int:
        self.write_bytes(text[: len(text) // 2].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_run_files(tmp_path, load_settings(RUN, ["train.steps=5"]))
    assert (tmp_path / "run.yaml").read_text() == before


def test_the_resolved_file_loads_back_to_equal_settings(tmp_path: Path) -> None:
    changes = [
        "model.freeze=[]", "train.learning_rate=1.0e-5", "train.global_batch=32768 tokens",
        "train.max_grad_norm=null", "data.eval=[{path: 'b: #c', columns: {prompt: 'no'}}]",
        "data.train.0.path='[weird] {path}, ü'", "adapter.targets=[q_proj]", "train.betas=[0.5, 0.9]",
        "output.save_every=null",
    ]  # fmt: skip
    settings = load_settings(RUN, changes)
    text = resolved_yaml(settings)
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert load_settings(tmp_path / "run.yaml") == settings
    assert text.startswith("# tunesmith ")
    assert set(yaml.safe_load(text)) == set(type(settings).model_fields)
    assert yaml.safe_load(text)["train"].keys() == type(settings.train).model_fields.keys()


@given(st.text(min_size=1, max_size=30).filter(lambda text: text.isprintable()))
def test_any_text_survives(text: str) -> None:
    settings = load_settings({"model": {"name": text, "revision": text}, "data": {"train": [{"path": text}]}})
    document = parse_yaml(resolved_yaml(settings), "run.yaml")
    assert load_settings(document.data) == settings


@pytest.mark.parametrize(
    "text", ["1e5", "12345e6", "08", "no", "null", "~", "true", "0x1F", "1_0", ".5", "<<"]
)
def test_text_that_looks_like_something_else_survives(text: str) -> None:
    settings = load_settings({**RUN, "model": {"name": "x", "revision": text}})
    assert load_settings(parse_yaml(resolved_yaml(settings), "run.yaml").data) == settings
