"""Free memory of the host: the system's, or the container's where that is less."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tunesmith.planning.host import free_host_memory

SECOND = {
    "memory.max": "700",
    "memory.current": "600",
    "memory.stat": "anon 300\ninactive_file 250\nfile 290\n",
}
FIRST = {
    "memory/memory.limit_in_bytes": "900",
    "memory/memory.usage_in_bytes": "500",
    "memory/memory.stat": "cache 90\ntotal_inactive_file 40\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 400),
        (SECOND, 350),
        (SECOND | {"memory.max": "max"}, 400),
        (SECOND | {"memory.max": "5000"}, 400),
        (SECOND | {"memory.current": "1200"}, 0),
        ({name: SECOND[name] for name in ("memory.max", "memory.current")}, 100),
        (FIRST | {"memory/memory.usage_in_bytes": "600"}, 340),
        (FIRST | {"memory/memory.limit_in_bytes": "9223372036854771712"}, 400),
    ],
    ids=str,
)
def test_what_may_be_taken(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=400))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    assert free_host_memory(tmp_path) == expected
