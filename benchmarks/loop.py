"""The timed loop that every system goes through, and the measured row that comes of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

GIB = 2**30


@dataclass(frozen=True)
class Timing:
    """What the loop measured.

    Attributes:
        seconds: of each timed step.
        losses: of every step, the warm-up's included.
        peak: the most bytes of device memory that were allocated, 0 on a CPU.
        reserved: the most bytes that torch's allocator held, 0 on a CPU.
    """

    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    peak: int
    reserved: int

    def row(self, tokens: int) -> dict[str, Any]:
        """The figures as a row of results.

        Args:
            tokens: of a step, padding not counted.
        """
        median = sorted(self.seconds)[len(self.seconds) // 2]
        losses = [round(loss, 4) for loss in self.losses]
        return {
            "tokens_per_second": round(tokens / median),
            "step_seconds": round(median, 4),
            "peak_gib": round(self.peak / GIB, 2),
            "reserved_gib": round(self.reserved / GIB, 2),
            "losses": losses[:3] + losses[-1:],
        }


def release(device: torch.device) -> None:
    """Give back what is no longer used, so that one measurement does not weigh on the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_steps(
    step: Callable[[int], torch.Tensor | float], *, steps: int, warm: int, device: torch.device
) -> Timing:
    """Run a whole training step `warm` + `steps` times, each waited for, and time the latter.

    Args:
        step: takes the number of the step and returns its loss; what it leaves on the device is waited for.
    """
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    release(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for number in range(warm + steps):
        wait()
        started = time.perf_counter()
        loss = step(number)
        wait()
        if number >= warm:
            seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
    return Timing(
        tuple(seconds),
        tuple(losses),
        torch.cuda.max_memory_allocated() if on_gpu else 0,
        torch.cuda.max_memory_reserved() if on_gpu else 0,
    )
