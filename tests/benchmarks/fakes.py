"""A system that measures nothing: gives rows, tells its budget, crashes, runs out of memory or sleeps, as asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from benchmarks.peers.tables import Work


def measured(layout: str, **changes: Any) -> dict[str, Any]:
    """A row as the loop gives it."""
    return {
        "layout": layout, "status": "ok", "tokens_per_second": 1000, "step_seconds": 0.128, "peak_gib": 1.0,
        "reserved_gib": 2.0, "losses": [6.5, 6.4, 6.3, 6.0], "tokens": 128, "positions": 128,
        "supervised": 126, "batch": "abc", "flops": 1.0e9,
    } | changes  # fmt: skip


def measure(work: Work) -> Iterator[dict[str, Any]]:
    """One row for each layout, until what the option `do` says."""
    for number, layout in enumerate(work.layouts):
        if work.options["do"] == "crash" and number == work.options.get("after", 0):
            raise ValueError("no such kernel")
        if work.options["do"] == "exhaust":
            raise MemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if work.options["do"] == "sleep":
            print("compiling", flush=True)
            time.sleep(120)
        yield measured(layout, **({"budget": work.options["budget"]} if work.options["do"] == "tell" else {}))
