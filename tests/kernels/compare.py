"""The cases of the catalog as test parameters, and how their errors are measured."""

from __future__ import annotations

import torch

from tunesmith.kernels.catalog import CATALOG
from tunesmith.kernels.measure import copied, error, errors, results

__all__ = ["DTYPES", "LARGE", "SMALL", "copied", "error", "errors", "label", "results"]

SMALL = [(name, size) for name, row in CATALOG.items() for size in row.small]
LARGE = [(name, size) for name, row in CATALOG.items() for size in row.large]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def label(value: object) -> str | None:
    """Test id of a size: its numbers and options."""
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None
