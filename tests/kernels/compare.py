"""The cases of the catalog as test parameters, and how their errors are measured."""

from __future__ import annotations

import pytest
import torch

from tunesmith.kernels import (
    adamw,
    adamw_8bit,
    attention_triton,
    cross_entropy,
    gather_rows,
    glu,
    launch,
    layer_norm,
    nf4,
    qk_norm,
    residual,
    rms_norm,
    rope,
)
from tunesmith.kernels.catalog import CATALOG
from tunesmith.kernels.measure import copied, error, errors, results

__all__ = ["DTYPES", "LARGE", "SMALL", "copied", "count_launches", "error", "errors", "label", "results"]

SMALL = [(name, size) for name, row in CATALOG.items() for size in row.small]
LARGE = [(name, size) for name, row in CATALOG.items() for size in row.large]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def label(value: object) -> str | None:
    """Test id of a size: its numbers and options."""
    return "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that run from now on: an empty list means that the reference was compared to itself."""
    seen: list[str] = []

    def counted(kernel, *args, **options):
        seen.append(kernel.fn.__name__)
        launch.launch(kernel, *args, **options)

    for module in (
        adamw,
        adamw_8bit,
        attention_triton,
        cross_entropy,
        gather_rows,
        glu,
        layer_norm,
        nf4,
        qk_norm,
        residual,
        rms_norm,
        rope,
    ):
        monkeypatch.setattr(module, "launch", counted)
    return seen
