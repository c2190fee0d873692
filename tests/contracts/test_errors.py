"""What a library's error says, in one line."""

from __future__ import annotations

import pytest

from tunesmith.contracts.errors import first_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("no such key.", "no such key"),
        ("\n first \nsecond.", "first"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
    ],
)
def test_the_first_line(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line
