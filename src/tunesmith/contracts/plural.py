"""`1 row`, `2 rows`: counts in sentences."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun, such as `1 row` or `1,000 rows`; `plural` where it is not formed by an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
