"""Text of data as a person may see it: without characters that steer a terminal or are no text."""

from __future__ import annotations

_PICTURES = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    **dict.fromkeys(range(0x7F, 0xA0), 0xFFFD),
}
"""What is shown for a control character."""


def visible(text: str) -> str:
    """The text with control characters as pictures, one for one: data must not steer the terminal."""
    return text.translate(_PICTURES)


def one_line(text: str, most: int) -> str:
    """The text on one line, without control characters, cut where it has more than `most` characters."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"
