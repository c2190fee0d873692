"""What columns look like where a table was not split into them. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence


def separator_hint(columns: Sequence[str]) -> str | None:
    """What to do about a table whose whole first line became one column; None where it did not."""
    if len(columns) == 1 and any(separator in str(columns[0]) for separator in ";|\t"):
        return (
            "Fields are separated by commas in a .csv file and by tabs in a .tsv file; this one has others."
        )
    return None
