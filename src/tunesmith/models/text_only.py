"""Models that see pictures too, called with text alone, as Gemma 3 from 4B on is.

Such a model hands its decoder ready-made masks, from which nobody can tell documents and padding. Without a picture
these say what the decoder makes of the caller's mask by itself, so that mask is remembered for the door before it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.models.override import override, stock_forward

_TEXT = frozenset(
    {
        "input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache_position", "labels",
        "token_type_ids",
    }
)  # fmt: skip
"""Tensors of a call that has text only."""

_PADDING: ContextVar[tuple[Any] | None] = ContextVar("padding", default=None)
"""The mask of the call under way, where it has text only."""


def _owner(base: nn.Module, decoder: nn.Module) -> PreTrainedModel | None:
    """The model inside `base` that calls the decoder, where another one does than the one with the head."""
    for module in base.modules():
        if module is not base and any(child is decoder for child in module.children()):
            return module if isinstance(module, PreTrainedModel) else None
    return None


def _has_text_only(given: Mapping[str, Any]) -> bool:
    if any(isinstance(value, Tensor | list | tuple) and name not in _TEXT for name, value in given.items()):
        return False
    kinds = given.get("token_type_ids")  # 1 is a picture's
    return kinds is None or not bool(kinds.any())


def remember_masks(base: Any, decoder: Any, undo: list[Callable[[], None]]) -> None:
    """Remember the caller's mask while a model that is more than its decoder runs on text; `undo` takes that away."""
    owner = _owner(base, decoder)
    if owner is None:
        return
    stock = stock_forward(owner)
    names = tuple(inspect.signature(owner.forward).parameters)

    @functools.wraps(stock)
    def enter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        before = _PADDING.set((given.get("attention_mask"),) if _has_text_only(given) else None)
        try:
            return stock(self, *args, **kwargs)
        finally:
            _PADDING.reset(before)

    override(owner, "forward", enter, undo)


def callers_mask(mask: Any) -> Any:
    """The mask of a decoder's call as its caller gave it: in place of ready-made ones the one they were made of."""
    if not isinstance(mask, Mapping):
        return mask
    remembered = _PADDING.get()
    return mask if remembered is None else remembered[0]
