"""The canary for a model: its kernels against float64 on the card at hand, at its own sizes."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.data.cache import cache_folder
from tunesmith.kernels.canary import check_kernels
from tunesmith.models.install import Installed
from tunesmith.models.kernel_shape import kernel_shape


def check_card(model: Any, installed: Installed, dtype: torch.dtype) -> tuple[str, ...]:
    """Check the kernels of a model's fused layers once for each card; what fails is done without from here on.

    Args:
        model: with its adapter.
        dtype: compute type.

    Returns:
        A sentence for each kernel that failed.
    """
    device = next(model.parameters()).device
    if not installed.fused or device.type != "cuda":
        return ()
    adapters = getattr(model, "peft_config", {}).values()
    ranks = [rank for config in adapters for rank in (config.r, *config.rank_pattern.values())]
    nf4 = bool(getattr(model, "is_loaded_in_4bit", False))
    found = check_kernels(
        kernel_shape(installed, rank=max(ranks, default=0), nf4=nf4), dtype, device, cache_folder("canary")
    )
    return tuple(str(finding) for finding in found)
