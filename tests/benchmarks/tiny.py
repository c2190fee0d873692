"""A shape that a CPU trains in milliseconds, and the work on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.tables import Work

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 640, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def tiny_work(checkpoint: Path, layouts: list[str], **changes: Any) -> Work:
    """Three steps of 2 · 48 tokens."""
    values: dict[str, Any] = {
        "config": SHAPE, "checkpoint": str(checkpoint), "adapter": "lora", "rows": 2, "length": 48,
        "mean": None, "supervised": 1.0, "steps": 2, "warm": 1, "layouts": layouts, "options": {},
    }  # fmt: skip
    return Work(**(values | changes))
