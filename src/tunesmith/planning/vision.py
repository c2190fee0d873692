"""Parameters that see, beside a language model that trains on text: they lie frozen in memory. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from tunesmith.planning.read_sizes import needed, refuse

_SIGLIP: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "vision_use_head": True,
}
"""What transformers fills in where a SigLIP config leaves it out."""


def vision_parameters(config: Mapping[str, Any], text: Mapping[str, Any], name: str) -> int:
    """Elements of a model's vision tower and of its projector; 0 where it has none.

    Args:
        config: the whole model's.
        text: the language model's part of it.
        name: of the model, for the message.

    Raises:
        UserError: it sees with another kind of tower.
    """
    if config.get("text_config") is None:
        return 0
    vision = config.get("vision_config")
    if config.get("model_type") != "gemma3":
        kind = config.get("model_type")
        raise refuse(name, f"{kind} is a language model inside another, and of these only gemma3 is known")
    given = vision if isinstance(vision, Mapping) else {}
    sizes = SimpleNamespace(**{**_SIGLIP, **given})
    width = needed(sizes, "hidden_size", name)
    projector = width + width * needed(SimpleNamespace(**text), "hidden_size", name)
    return _siglip(sizes, width, name) + projector


def _siglip(sizes: SimpleNamespace, width: int, name: str) -> int:
    """Elements of a SigLIP tower: patches, positions, layers, the last norm, and its pooling head if any."""
    inner, patch = needed(sizes, "intermediate_size", name), needed(sizes, "patch_size", name)
    attention = 4 * (width * width + width)
    mlp = 2 * width * inner + inner + width
    norm = 2 * width
    patches = needed(sizes, "num_channels", name) * patch * patch * width + width
    positions = (needed(sizes, "image_size", name) // patch) ** 2 * width
    layers = needed(sizes, "num_hidden_layers", name) * (attention + mlp + 2 * norm)
    head = (width + attention + norm + mlp) if sizes.vision_use_head else 0
    return patches + positions + layers + norm + head
