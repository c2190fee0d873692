"""Free memory of the host. Torch-free."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
"""Limit, use, and what of it are files that may be dropped: of a control group, in its second and its first form."""


def free_host_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """What the system has free, or what the container may still take where that is less.

    Args:
        groups: where the control group of this process stands, as a container sees it.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, use, stat, files in _GROUPS:
        most, taken = _number(groups / limit), _number(groups / use)
        if most is not None and taken is not None:
            return max(0, min(free, most - taken + _dropped(groups / stat, files)))
    return free


def _number(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # `max` is no limit


def _dropped(file: Path, name: str) -> int:
    try:
        words = file.read_text(encoding="ascii").split()
    except OSError:
        return 0
    return next((int(size) for key, size in pairwise(words) if key == name), 0)
