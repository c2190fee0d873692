"""What is remembered of a card: for whom, and what becomes of files that are damaged or cannot be written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunesmith.kernels import launch, remembered
from tunesmith.kernels.remembered import outcome_file, recall, remember

CPU = torch.device("cpu")


def number(outcome: Any) -> int:
    return int(outcome["number"])


def test_an_outcome_comes_back(tmp_path: Path) -> None:
    file = outcome_file(tmp_path / "made" / "on the way", CPU, size=3)
    assert recall(file, number) is None
    remember(file, {"number": 7})
    assert recall(file, number) == 7
    assert [entry.name for entry in file.parent.iterdir()] == [file.name], "nothing is left beside it"


def test_it_holds_for_one_question_and_one_set_of_versions(tmp_path: Path, monkeypatch) -> None:
    def file() -> Path:
        return outcome_file(tmp_path, CPU, size=3)

    files = {file(), outcome_file(tmp_path, CPU, size=4)}
    for module, name in ((launch, "TRITON_VERSION"), (remembered, "__version__"), (torch, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, "another")
            files.add(file())
    properties = SimpleNamespace(name="H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    files.add(outcome_file(tmp_path, torch.device("cuda"), size=3))
    assert len(files) == 6
    assert file() in files


@pytest.mark.parametrize(
    "damage", [b"{", b"[]", b"{}", b'{"number": "x"}', b'{"number": null}', b"\xff\xfe{"]
)
def test_a_damaged_file_is_no_outcome(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "outcome.json"
    file.write_bytes(damage)
    assert recall(file, number) is None


def test_without_a_folder_and_where_none_can_be_made_nothing_is_remembered(tmp_path: Path) -> None:
    assert outcome_file(None, CPU) is None
    remember(None, {"number": 7})
    assert recall(None, number) is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    file = outcome_file(blocked, CPU)
    remember(file, {"number": 7})
    assert recall(file, number) is None
