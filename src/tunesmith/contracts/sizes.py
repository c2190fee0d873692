"""Bytes as people read them: memory and the room on a disk in powers of 1,024, files in powers of 1,000."""

from __future__ import annotations


def memory_size(count: int) -> str:
    """An amount of memory or of a disk: GiB, or MiB and bytes where GiB would read as zero."""
    if count >= 2**30 // 10:
        return f"{count / 2**30:.1f} GiB"
    if count >= 2**20 // 10:
        return f"{count / 2**20:.1f} MiB"
    return f"{count} bytes"


def file_size(count: int) -> str:
    """The size of files, as file managers and hubs say it: `1.5 MB`, `269 MB`, `12 bytes`."""
    value, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 100 else f"{value:.1f} {unit}"
