"""The model of transformers below an adapter."""

from __future__ import annotations

from typing import Any


def base_of(model: Any) -> Any:
    """The model of transformers, with or without a PEFT adapter on it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
