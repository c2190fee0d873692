"""The card that does the work, and processes that are ended when their time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True)
class Card:
    """What runs the work: the name of the first visible GPU and its driver, or the CPU."""

    name: str
    driver: str


def find_card() -> Card:
    """Ask the driver's own tool, so that this process takes no memory of the card."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    which = [f"--id={visible.split(',')[0]}"] if visible else []
    query = ["nvidia-smi", *which, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        answer = ""
    if visible == "" or not answer.strip():
        return Card("CPU", "")
    name, driver = answer.splitlines()[0].rsplit(",", 1)
    return Card(name.strip(), driver.strip())


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_process(
    arguments: Sequence[str], log: Path, limit: float, environment: Mapping[str, str], folder: Path
) -> int | None:
    """Run a Python process with its output in `log`; its exit status, or None where it took longer than `limit`.

    It runs in a folder of its own, since some systems write caches where they stand. The root of the project is on
    its path and not `benchmarks/`, whose `kernels.py` transformers would take for the package of that name.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    path = [ROOT, ROOT / "src", *(Path(entry).resolve() for entry in given)]
    variables = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(map(str, path))}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=variables,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)
