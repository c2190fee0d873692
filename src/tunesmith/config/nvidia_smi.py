"""The GPUs of this machine as `nvidia-smi` tells them: also where torch is missing or was built without CUDA."""

from __future__ import annotations

import shutil
import subprocess

SMI_FIELDS = ("name", "memory.total", "memory.free", "driver_version", "compute_cap")
"""What `nvidia-smi` is asked for; memory comes in MiB."""


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
