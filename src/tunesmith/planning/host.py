"""Free memory of the host. Torch-free."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where the control group of this process stands, as a container sees it."""

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

LIMITS = tuple(CGROUP / group[0] for group in _GROUPS)
"""Files that may say how much memory the container of this process may use; the first that is there does."""


def free_host_memory(groups: Path = CGROUP) -> int:
    """What the system has free, or what the container may still take where that is less.

    Args:
        groups: in place of `CGROUP`.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, use, stat, files in _GROUPS:
        most, taken = number_in(groups / limit), number_in(groups / use)
        if most is not None and taken is not None:
            return max(0, min(free, most - taken + _dropped(groups / stat, files)))
    return free


def number_in(*files: Path) -> int | None:
    """What the first of the files says that is there; None where none is, or where that says `max`, no limit."""
    for file in files:
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() else None
    return None


def _dropped(file: Path, name: str) -> int:
    try:
        words = file.read_text(encoding="ascii").split()
    except OSError:
        return 0
    return next((int(size) for key, size in pairwise(words) if key == name), 0)
