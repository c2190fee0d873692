"""A call of a backbone over a padded batch as a call over one packed row: which calls, with what, and back.

Shape suffixes: B rows, T columns, N real tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.models.attention import attending, boundary_kwargs
from tunesmith.models.unpad import (
    Layout,
    NotPackableError,
    from_boundaries,
    from_mask,
    from_positions,
    full_rows,
)

Arguments = dict[str, Any]
"""The arguments of one call of a backbone, by name."""


def _inputs(given: Arguments) -> Tensor | None:
    ids: Tensor | None = given.get("input_ids")
    return ids if ids is not None else given.get("inputs_embeds")


# ---------------------------------------------------------------------- which calls


def _asks(backbone: Any, given: Arguments, name: str) -> bool:
    """Whether an option is on in this call, or, where the call does not say, in the config."""
    value = given.get(name)
    return bool(getattr(backbone.config, name, False) if value is None else value)


def _wants_cache(backbone: Any, given: Arguments) -> bool:
    """In training the cache that transformers returns by default is of no use to anybody."""
    if given.get("use_cache") is None and backbone.training:
        return False
    return _asks(backbone, given, "use_cache")


def _is_padding_mask(given: Arguments) -> bool:
    mask, inputs = given.get("attention_mask"), _inputs(given)
    return mask is None or (
        isinstance(mask, Tensor) and inputs is not None and mask.shape == inputs.shape[:2]
    )


_STOCK: tuple[tuple[Callable[[Any, Arguments], bool], str], ...] = (
    (lambda *_: torch.compiler.is_compiling(), "the model is being compiled"),
    (lambda _, given: _inputs(given) is None, "no tokens"),
    (lambda _, given: given.get("cache", given.get("past_key_values")) is not None, "a KV cache"),
    (_wants_cache, "a KV cache is asked for"),
    (lambda module, given: _asks(module, given, "output_attentions"), "attention weights are asked for"),
    (lambda module, given: _asks(module, given, "output_hidden_states"), "all hidden states are asked for"),
    (lambda _, given: given.get("return_dict") is False, "a tuple is asked for"),
    (lambda _, given: given.get("is_causal") is False, "attention in both directions is asked for"),
    (lambda _, given: not _is_padding_mask(given), "a mask that is not one of padding"),
)
"""Conditions on the backbone and the arguments of a call under which it is not packed, and the reason."""

_REPLACED = frozenset(
    {
        "input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "cache", "past_key_values",
        "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
    }
)  # fmt: skip
"""Arguments that the packed call has instead of those that came, or does without."""


def _passed_on(given: Arguments) -> Arguments:
    rest = {name: value for name, value in given.items() if name not in _REPLACED}
    for name, value in rest.items():
        if isinstance(value, Tensor) and value.ndim > 0:  # it may belong to tokens, and nobody says how
            raise NotPackableError(f"the argument {name}")
    return rest


def _expand(positions: Tensor, batch: int, columns: int) -> Tensor:
    if positions.ndim > 2 or positions.shape[-1] != columns:
        raise NotPackableError("position ids that are not one number for each token")
    return positions.expand(batch, columns)


def layout_of(backbone: Any, given: Arguments) -> Layout:
    """Where the documents of a call stand. Waits for the device once at most.

    Raises:
        NotPackableError: the call is for the stock way, with the reason.
    """
    for applies, reason in _STOCK:
        if applies(backbone, given):
            raise NotPackableError(reason)
    _passed_on(given)
    inputs = _inputs(given)
    assert inputs is not None
    batch, columns = inputs.shape[:2]
    mask, positions, boundaries = (given.get(n) for n in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    if positions is not None:
        positions = _expand(positions, batch, columns)
    if mask is not None and boundaries is not None:
        raise NotPackableError("a mask and document boundaries at once")
    if boundaries is not None:
        return from_boundaries(boundaries, batch, columns, inputs.device)
    if mask is not None:
        return from_mask(mask, inputs.device)
    if positions is not None:
        return from_positions(positions, inputs.device)
    return full_rows(batch, columns, inputs.device)


# ---------------------------------------------------------------------- the packed call


def _draws_noise(backbone: Any) -> bool:
    """NEFTune scales its noise by the shape of what the embedding returns, so it has to see the padded batch."""
    return backbone.training and hasattr(backbone.get_input_embeddings(), "neftune_noise_alpha")


def _pack(backbone: Any, given: Arguments, layout: Layout, *, restart: bool) -> Arguments:
    packed = _passed_on(given) | boundary_kwargs(layout.documents) | {"use_cache": False}
    ids, embeds, positions = (given.get(name) for name in ("input_ids", "inputs_embeds", "position_ids"))
    if embeds is None and _draws_noise(backbone):
        embeds = backbone.get_input_embeddings()(ids)
    if embeds is not None:
        packed["inputs_embeds"] = layout.pack(embeds)
    else:
        assert ids is not None
        packed["input_ids"] = layout.pack(ids)
    if positions is None:
        packed["position_ids"] = layout.positions(restart=restart)
    else:
        packed["position_ids"] = layout.pack(_expand(positions, *layout.shape))
    return packed


def _unpack(output: Any, layout: Layout) -> Any:
    output.last_hidden_state = layout.spread(output.last_hidden_state[0]).view(*layout.shape, -1)
    routed = getattr(output, "router_logits", None)
    if routed is not None:  # the balancing loss of a mixture of experts weighs them by the padding mask
        output.router_logits = tuple(layout.spread(logits.reshape(layout.tokens, -1)) for logits in routed)
    return output


def run_packed(
    stock: Callable[..., Any],
    backbone: Any,
    given: Arguments,
    layout: Layout,
    *,
    attention: str,
    restart: bool,
) -> Any:
    """One forward pass over the packed row, its results in the shapes of the padded batch, zeros at padding.

    Args:
        stock: the backbone's forward as a function of the backbone.
        given: the arguments of the call over the padded batch.
        attention: name in transformers' interface of the function by which the row attends.
        restart: count positions anew in each document where the call has none; else they are columns of the batch.
    """
    packed = _pack(backbone, given, layout, restart=restart)
    with attending(backbone.config, attention):
        return _unpack(stock(backbone, **packed), layout)
