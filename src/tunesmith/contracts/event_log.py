"""Reading `events.jsonl`, which a kill may have cut short and a newer version may have written. Torch-free.

What is not an event (a line cut in the middle, a foreign file) is left out; an event of an unknown kind is kept, and
readers pass over what they do not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
"""The name of the file in a run directory."""


def parse_events(lines: Iterable[bytes | str]) -> Iterator[dict[str, Any]]:
    """The events of those lines that hold one: an object with a kind and the number of complete steps."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str) and _is_count(event.get("step")):
            yield event


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_events(path: Path) -> list[dict[str, Any]]:
    """All complete events of a file, in order; none where there is no file."""
    if not path.is_file():
        return []
    return list(parse_events(path.read_bytes().splitlines()))
