"""`events.jsonl`: what a run says about itself while it goes on."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import IO, Any

import psutil
import torch

from tunesmith.contracts.event_log import read_events as read_events
from tunesmith.contracts.events import Event


def peak_memory_gib(device: torch.device) -> float:
    """Peak of allocated GPU memory since start, or the peak resident size of this process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def memory_gib(device: torch.device) -> float:
    """Allocated GPU memory now, or the resident size of this process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they are written as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return value


class EventLog:
    """Observer that appends every event that is kept to `events.jsonl`, one JSON object a line.

    Args:
        path: the file.
        keep_until: on resume, events after this step are dropped, because those steps run again.
    """

    def __init__(self, path: Path, *, keep_until: int | None = None) -> None:
        kept = [
            event for event in read_events(path) if keep_until is not None and event["step"] <= keep_until
        ]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
        temporary.replace(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def on_event(self, event: Event) -> None:
        """Append the event and hand it to the operating system."""
        if not event.kept:
            return
        record = {name: _finite(value) for name, value in event.record().items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
