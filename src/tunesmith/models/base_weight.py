"""The weight of a linear layer as its layer uses it, whatever it is held in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.models.projections import write_weight


def base_weight(module: Any) -> Tensor:
    """The weight of a linear layer `[N, K]` in float32, dequantised where it is held in 4 or 8 bits."""
    kind = type(module).__name__
    if kind == "Linear8bitLt":
        scales_N = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        # an outlier-free row of integers: value · absmax / 127
        values: Tensor = module.weight.data.float() * (scales_N.float()[:, None] / 127.0)
        return values
    if kind == "Linear4bit":
        out_NK = torch.empty(
            module.out_features, module.in_features, dtype=torch.float32, device=module.weight.device
        )
        write_weight(module, out_NK)
        return out_NK
    weight: Tensor = module.weight.detach().float()
    return weight
