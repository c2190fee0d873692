"""`is_bfloat16_supported`: what scripts ask before they choose between bf16 and fp16."""

from __future__ import annotations

import torch


def is_bfloat16_supported() -> bool:
    """Whether the first CUDA device computes in bfloat16; False on a CPU, where float32 is faster."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(0) >= (8, 0)
