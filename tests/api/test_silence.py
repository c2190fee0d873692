"""What a script prints while it loads a model: with `quiet` nothing, whatever library wants to speak."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging

from tests.support.tiny import save_tiny_model
from tunesmith.api.silence import without_bars

SCRIPT = """
from tunesmith import FastLanguageModel, SFTTrainer

model, tokenizer = FastLanguageModel.from_pretrained("{folder}", load_in_4bit=True, quiet=True)
model = FastLanguageModel.get_peft_model(model)
model.save_pretrained("{adapter}")
model.save_pretrained_merged("{merged}", tokenizer)
FastLanguageModel.from_pretrained("{adapter}", quiet=True)
"""


def test_a_quiet_script_prints_nothing(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=64)
    places = {"folder": folder, "adapter": tmp_path / "adapter", "merged": tmp_path / "merged"}
    env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SCRIPT.format(**places)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert (run.stdout, run.stderr) == ("", "")


@pytest.mark.parametrize("drawn", [True, False])
def test_bars_are_as_before(drawn: bool) -> None:
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if drawn else logging.disable_progress_bar)()
        with without_bars(quiet=True):
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() == drawn
        with without_bars(quiet=False):
            assert logging.is_progress_bar_enabled() == drawn
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
