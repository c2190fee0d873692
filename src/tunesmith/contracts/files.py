"""Text files that are written whole or not at all. Torch-free."""

from __future__ import annotations

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; it takes the place of an older one in one step.

    Raises:
        OSError: it cannot be written. What stood there stays, and nothing is left beside it.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
