"""Linear layers of a tiny model held in 4 bits by bitsandbytes, on a CPU."""

from __future__ import annotations

from typing import Any

import torch


def in_nf4(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model with every linear layer of its decoder in NF4 with nested scales, computing in `dtype`."""
    import bitsandbytes as bnb

    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                held = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=dtype,
                    quant_type="nf4", compress_statistics=True,
                )  # fmt: skip
                held.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4").to(
                    child.weight.device
                )
                held.support_avx512bf16_for_cpu = False
                setattr(parent, name, held)
    return model.requires_grad_(False)
