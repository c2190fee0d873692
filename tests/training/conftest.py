"""Shared by the tests of training: run files of small runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import run_settings


@pytest.fixture
def settings(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes run files as dicts, each with these changes to its sections; all in the test's folder."""

    def make(**sections: Any) -> dict[str, Any]:
        return run_settings(tiny_model_dir, tmp_path, **sections)

    return make
