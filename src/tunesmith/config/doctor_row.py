"""The words of `tunesmith doctor`: a row of its table, what a row found, and the run that it is about. Torch-free.

A GPU is asked for through `nvidia-smi`, which answers where torch is missing or was built without CUDA, the very
cases in which somebody looks here.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tunesmith.settings.run import RunSettings

SMI_FIELDS = ("name", "memory.total", "memory.free", "driver_version", "compute_cap")
"""What `nvidia-smi` is asked for; memory comes in MiB."""

State = Literal["good", "note", "missing", "broken", "unknown"]
"""`note` is worth knowing, `missing` an optional part that is not there, `broken` what makes training impossible,
and `unknown` what could not be found out."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a row found.

    Attributes:
        value: one line.
        advice: what to do about it, or what it would give; empty where there is nothing to say.
    """

    value: str
    state: State = "good"
    advice: str = ""


@dataclass(frozen=True)
class Subject:
    """What is looked at: this machine, for a run where one is named.

    Attributes:
        run_file: the run file; None where none is named.
    """

    run_file: str | None = None

    @cached_property
    def settings(self) -> RunSettings | None:
        """The settings of the run; None where no run is named.

        Raises:
            UserError: the file cannot be read, or is wrong.
        """
        from tunesmith.config.load import load_settings

        return None if self.run_file is None else load_settings(self.run_file)

    @cached_property
    def cards(self) -> list[dict[str, str]]:
        """The GPUs of the machine by `SMI_FIELDS`, whatever torch says of them."""
        return ask_nvidia_smi()


@dataclass(frozen=True, slots=True)
class Check:
    """A row of the table.

    Attributes:
        section: the heading that it stands under.
        name: what is looked at.
        probe: looks at it; None where there is nothing to say. What it raises becomes a finding.
    """

    section: str
    name: str
    probe: Callable[[Subject], Finding | None]


def ask_nvidia_smi() -> list[dict[str, str]]:
    """Name, memory in MiB, driver and compute capability of each GPU; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [
        [field.strip() for field in line.split(",")] for line in asked.stdout.splitlines() if line.strip()
    ]
    return [dict(zip(SMI_FIELDS, row, strict=True)) for row in rows if len(row) == len(SMI_FIELDS)]
