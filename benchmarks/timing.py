"""How long a call takes on the device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

GPU = torch.device("cuda", 0)
BUFFER_BYTES = 2**30


@functools.cache
def _buffer(device: torch.device) -> torch.Tensor:
    return torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)


def milliseconds(call: Callable[[], object], device: torch.device = GPU, repeats: int = 20) -> float:
    """Median time of a call after a warm-up: by device events on a GPU, by the clock on a CPU.

    On a GPU a gigabyte is written twice before each call. That empties the cache, so that small operands are not
    faster than memory; and it keeps the card busy for 0.7 ms, in which the host enqueues the call, so that what is
    measured is the card's time and not Python's. A call that waits for the card by itself cannot be hidden so.
    """
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        if device.type != "cuda":
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e3)
            continue
        for _ in range(2):
            _buffer(device).zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def copy_bandwidth(device: torch.device = GPU) -> float:
    """Bytes a second that copying moves, reads and writes counted: what shares are shares of."""
    source = torch.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * BUFFER_BYTES / milliseconds(lambda: target.copy_(source), device) * 1e3
