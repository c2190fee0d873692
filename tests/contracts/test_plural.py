"""Counts in sentences."""

from __future__ import annotations

import pytest

from tunesmith.contracts.plural import counted


@pytest.mark.parametrize(
    ("count", "noun", "plural", "said"),
    [(0, "row", "", "0 rows"), (1, "row", "", "1 row"), (1234, "row", "", "1,234 rows"), (2, "a", "b", "2 b")],
)  # fmt: skip
def test_counts(count: int, noun: str, plural: str, said: str) -> None:
    assert counted(count, noun, plural) == said
