"""Runs a row of the catalog and compares its results with the reference in float64: for tests and the canary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.catalog import CATALOG, Inputs, KernelRow, Size


def copied(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A deep copy, its strides kept and pinned where it is; floating tensors are converted to `dtype` where given."""
    if isinstance(value, dict):
        return {key: copied(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [copied(item, dtype) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if not isinstance(value, Tensor):
        return value
    if dtype is not None and value.is_floating_point():
        return value.to(dtype, copy=True)
    pinned = value.device.type == "cpu" and value.is_pinned()
    copy = torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device, pin_memory=pinned
    )
    return copy.copy_(value)


def results(function: Any, row: KernelRow, inputs: Inputs) -> list[Tensor]:
    """What the function returns and then what it has written, tensors only."""
    returned = function(**inputs)
    returned = returned if isinstance(returned, tuple) else (returned,)
    written = [inputs[name] for name in row.mutates]
    return [t for t in (*returned, *written) if t is not None]


def error(ours: Tensor, exact: Tensor) -> float:
    """‖ours − exact‖ / ‖exact‖ in float64; infinite where a value of ours is not finite."""
    ours, exact = ours.detach().double(), exact.detach().double()
    if ours.shape != exact.shape or not bool(ours.isfinite().all()):
        return float("inf")
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-30))


def errors(name: str, size: Size, dtype: torch.dtype, device: torch.device | str) -> list[float]:
    """Error of every result of a catalog row against its reference in float64; leaves the random state as it was."""
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        row = CATALOG[name]
        inputs = row.cases(size, dtype, device)
    exact = results(row.reference, row, copied(inputs, torch.float64))
    ours = results(row.op, row, inputs)
    assert len(ours) == len(exact)
    return [error(*pair) for pair in zip(ours, exact, strict=True)]
