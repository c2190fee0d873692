"""Fixtures of the kernels' tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def _private_triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile anew, whatever other runs have left on this machine."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
