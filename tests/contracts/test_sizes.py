"""Sizes in the unit in which they can be read."""

from __future__ import annotations

import pytest

from tunesmith.contracts.sizes import file_size, memory_size


@pytest.mark.parametrize(
    ("count", "memory", "file"),
    [
        (0, "0 bytes", "0 bytes"),
        (999, "999 bytes", "999 bytes"),
        (1500, "1500 bytes", "1.5 kB"),
        (119_000, "0.1 MiB", "119 kB"),
        (2**20, "1.0 MiB", "1.0 MB"),
        (2**30 // 10, "0.1 GiB", "107 MB"),
        (3 * 2**30 + 2**29, "3.5 GiB", "3.8 GB"),
        (2 * 10**15, "1862645.1 GiB", "2000 TB"),
    ],
)
def test_sizes(count: int, memory: str, file: str) -> None:
    assert memory_size(count) == memory
    assert file_size(count) == file
