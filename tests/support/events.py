"""Events of a run without a run."""

from __future__ import annotations

from typing import Any

from tunesmith.contracts.events import Stepped


def stepped(number: int, **changes: Any) -> Stepped:
    """The event of a step in which nothing happened that matters; keyword arguments replace its values."""
    values: dict[str, Any] = {
        "epoch": 0.5, "loss": 1.0, "grad_norm": 0.5, "learning_rate": 1e-3, "tokens": 100, "supervised_tokens": 50,
        "tokens_per_second": 20.0, "supervised_tokens_per_second": 10.0, "seconds": 1.0, "memory_gib": 0.25,
        "loss_scale": 1.0, "applied": True,
    }  # fmt: skip
    return Stepped(step=number, **values | changes)
