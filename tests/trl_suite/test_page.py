"""The programs of docs/trl.md run as they stand there, on a tiny model and in a folder of their own."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("trl")

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _programs() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


def _run(program: str, folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    assert MODEL in program
    path = folder / "program.py"
    path.write_text(program.replace(MODEL, str(model)), encoding="utf-8")
    monkeypatch.chdir(folder)
    return runpy.run_path(str(path))


def test_preferences_train_behind_the_door(tiny_model_dir, tmp_path, monkeypatch, capsys):
    found = _run(_programs()[0], tmp_path, tiny_model_dir, monkeypatch)
    assert found["trainer"].state.global_step == 5
    assert (tmp_path / "runs" / "dpo" / "adapter" / "adapter_model.safetensors").is_file()
    assert re.search(r"padded batches +packed", capsys.readouterr().out)


def test_a_model_of_ones_own_is_attached(tiny_model_dir, tmp_path, monkeypatch, capsys):
    found = _run(_programs()[1], tmp_path, tiny_model_dir, monkeypatch)
    assert found["attached"].door.shut is None
    assert "padded batches: packed" in capsys.readouterr().out
