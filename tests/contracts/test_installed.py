"""Modules that are installed, missing, or half removed."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tunesmith.contracts.installed import is_installed


@pytest.mark.parametrize(
    ("module", "installed"), [("json.decoder", True), ("no_such_module", False), ("no_such.inner", False)]
)
def test_what_is_installed(module: str, installed: bool) -> None:
    assert is_installed(module) == installed


def test_a_module_without_a_spec_is_half_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "remains", ModuleType("remains"))
    assert not is_installed("remains")
