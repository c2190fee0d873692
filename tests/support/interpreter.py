"""Runs a test file in a process that imports the kernels with Triton's interpreter switched on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_in_interpreter(file: str | Path, *options: str) -> str:
    """pytest's output of a file that has to pass; the interpreter is chosen when the kernel modules are imported.

    Args:
        file: absolute, or relative to the repository.
        options: of pytest.
    """
    command = [sys.executable, "-m", "pytest", str(file), "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    return run.stdout
