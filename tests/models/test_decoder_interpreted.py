"""Runs `interpreted_decoder.py` in a process that imports the kernels with Triton's interpreter switched on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


def test_the_layer_in_the_interpreter():
    command = [
        sys.executable, "-m", "pytest", "tests/models/interpreted_decoder.py", "-p", "no:cacheprovider",
    ]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
