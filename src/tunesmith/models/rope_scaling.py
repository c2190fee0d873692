"""Rotary positions beyond the length that a model was made for: the config, and tables that know documents.

`stretch` writes a scaling into a config, before a model is built from it, so that what is saved of the model says it
too. The tables are then transformers' own, with one exception.

`dynamic` and `longrope` choose frequencies by the length of the input, and transformers takes the longest position
of the whole batch for that. In a packed row a short document would turn with the frequencies of a long neighbour, and
its loss would depend on what it is packed with. `rotate_by_document` gives each document the frequencies of its own
length, those that it gets alone. One table for `train.sequence_length` was the alternative: no short document would
then train with the frequencies that it is read with later on.

Nothing in it asks the device for a value, so it runs inside CUDA graphs.

Shape suffixes: B rows, T tokens of a row, N = B · T, K rotated channels, F = K / 2 frequencies.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.contracts.errors import UserError

_LOG = logging.getLogger(__name__)

BY_LENGTH = ("dynamic", "longrope")
"""Kinds of scaling whose frequencies depend on the length of a document."""

_OF_THE_MODEL = ("rope_theta", "partial_rotary_factor", "mrope_section")
"""Rotary parameters that are no scaling, and stay when one is set."""


# ---------------------------------------------------------------- the config


def made_for(config: Any) -> int | None:
    """Longest row that a model's positions are good for, in tokens; None where its config names none.

    `dynamic` positions follow any length, so they have no bound either.
    """
    text = config.get_text_config()
    own = _of_all_tokens(getattr(text, "rope_parameters", None))
    if own is not None and own.get("rope_type") == "dynamic":
        return None
    length = getattr(text, "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def can_stretch(config: Any) -> bool:
    """Whether a config has rotary positions that a scaling can be written to."""
    own = _of_all_tokens(getattr(config.get_text_config(), "rope_parameters", None))
    return own is not None and "rope_theta" in own


def _of_all_tokens(parameters: Any) -> dict[str, Any] | None:
    """The rotary parameters of layers that see all tokens; a family with windows has others for the layers there."""
    if not parameters:
        return None
    nested: dict[str, Any] | None = parameters.get("full_attention")
    if nested is not None or any(isinstance(value, dict) for value in parameters.values()):
        return nested
    return dict(parameters)


def stretch(config: Any, scaling: Mapping[str, Any]) -> None:
    """Write a scaling into a config that no model has been built from. A scaling that it had is replaced.

    Args:
        scaling: transformers' `rope_parameters`, such as `{"rope_type": "linear", "factor": 2.0}`.

    Raises:
        UserError: the model's positions cannot be scaled, or not so.
    """
    text = config.get_text_config()
    own = _of_all_tokens(getattr(text, "rope_parameters", None))
    if own is None or "rope_theta" not in own:
        raise UserError(
            f"model.rope_scaling: {text.model_type} has no rotary positions that could be scaled.",
            hint="Remove it, and keep rows within the length that the model was made for.",
        )
    kind = str(scaling["rope_type"])
    nested = "full_attention" in text.rope_parameters
    if nested and kind in BY_LENGTH:
        raise UserError(
            f"model.rope_scaling: {kind} has frequencies by the length of a document, and {text.model_type} has "
            "frequencies by the kind of its layers.",
            hint="Use yarn or linear.",
        )
    original = _original_length(text, own, scaling)
    changed = {name: own[name] for name in _OF_THE_MODEL if name in own} | dict(scaling)
    if kind in ("yarn", "llama3", "longrope"):
        changed["original_max_position_embeddings"] = original
        if hasattr(text, "original_max_position_embeddings"):  # transformers prefers it
            text.original_max_position_embeddings = original
    _check_factors(changed, text, own, original)
    text.max_position_embeddings = _stretched_length(text, own, changed, original)
    text.rope_parameters = {**text.rope_parameters, "full_attention": changed} if nested else changed
    text.standardize_rope_params()
    text.validate_rope()


def _original_length(text: Any, own: Mapping[str, Any], scaling: Mapping[str, Any]) -> int:
    """The length that a model was made for before any scaling."""
    said = (
        scaling.get("original_max_position_embeddings")
        or own.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
    )
    if said:
        return int(said)
    length = float(text.max_position_embeddings)
    return int(length / float(own["factor"])) if own.get("rope_type") == "linear" else int(length)


def _stretched_length(text: Any, own: Mapping[str, Any], changed: Mapping[str, Any], original: int) -> int:
    """`max_position_embeddings` with a scaling."""
    if changed["rope_type"] == "dynamic":
        return original  # transformers' formula takes it for the length before scaling
    if "factor" not in changed:
        return int(text.max_position_embeddings)
    length = int(original * float(changed["factor"]))
    # Llama 3.1 is good for 16 times its original length by a factor of 8
    same = own.get("rope_type") == changed["rope_type"] == "llama3"
    return max(length, int(text.max_position_embeddings)) if same else length


def _check_factors(changed: Mapping[str, Any], text: Any, own: Mapping[str, Any], original: int) -> None:
    """Refuse a LongRoPE that does not fit the model's heads, or does not say how far it reaches."""
    if changed["rope_type"] != "longrope":
        return
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pairs = int(width * float(own.get("partial_rotary_factor", 1.0))) // 2
    if len(changed["short_factor"]) != pairs:
        raise UserError(
            f"model.rope_scaling: short_factor and long_factor have {len(changed['short_factor'])} numbers, and this "
            f"model rotates {pairs} pairs of channels.",
            hint="Take the factors that were made for this model.",
        )
    if "factor" not in changed and int(text.max_position_embeddings) <= original:
        raise UserError(
            "model.rope_scaling: longrope does not say how much longer rows may be.",
            hint="Add factor, the new length over the original one.",
        )


# ---------------------------------------------------------------- the tables


def rotate_by_document(model: nn.Module) -> list[str]:
    """Give each document of a packed row the frequencies of its own length, where they depend on it.

    Returns:
        Paths of the modules whose `forward` is replaced, on this instance; each is logged.
    """
    replaced = []
    for path, module in model.named_modules():
        kind = getattr(module, "rope_type", None)
        tables = inspect.unwrap(type(module).forward)
        if kind not in BY_LENGTH or tables is type(module).forward or not hasattr(module, "inv_freq"):
            continue
        setattr(module, "forward", _ByDocument(module, tables).forward)  # noqa: B010
        _LOG.info("%s: %s positions by the length of each document", path, kind)
        replaced.append(path)
    return replaced


class _ByDocument:
    """Cosines and sines of one module, with the frequencies of each document's length.

    Args:
        module: a rotary embedding of transformers.
        tables: its `forward` without transformers' choice of frequencies.
    """

    def __init__(self, module: Any, tables: Any) -> None:
        self._module = module
        self._tables = tables
        self._parameters: dict[str, Any] = module.config.rope_parameters
        self._longrope: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[B, T, K]` at `position_ids` `[B, T]`, in the type of `x`."""
        lengths_BT, longest_N = document_lengths(position_ids)
        if self._module.rope_type == "longrope":
            original = int(self._parameters["original_max_position_embeddings"])
            short_F, long_F = self._factors(original, x.device)
            return _choose(
                lengths_BT > original,
                self._rotated(long_F, x, position_ids),
                self._rotated(short_F, x, position_ids),
            )
        original = int(self._module.config.max_position_embeddings)
        found = self._rotated(self._module.inv_freq, x, position_ids)
        # no more than these can be longer, but for rows that go on where a cache ends
        most = longest_N.numel() // (original + 1) + lengths_BT.shape[0]
        for length in longest_N.topk(min(most, longest_N.numel())).values.clamp(min=original + 1):
            turned = self._rotated(self._dynamic(original, length), x, position_ids)
            found = _choose(lengths_BT == length, turned, found)
        return found

    def _rotated(self, frequencies_F: Tensor, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        twin = copy.copy(self._module)  # transformers' own computation reads the frequencies from its module
        twin._buffers = {**self._module._buffers, "inv_freq": frequencies_F}
        found: tuple[Tensor, Tensor] = self._tables(twin, x, position_ids)
        return found

    def _dynamic(self, original: int, length: Tensor) -> Tensor:
        """Frequencies at a length L, as transformers computes them: of base · (f · L / M - (f - 1))^(d / (d - 2))."""
        factor, base = float(self._parameters["factor"]), float(self._parameters["rope_theta"])
        dim = 2 * self._module.inv_freq.numel()
        base_1 = base * ((factor * length / original) - (factor - 1)) ** (dim / (dim - 2))
        exponents_F = torch.arange(0, dim, 2, dtype=torch.int64, device=length.device).float() / dim
        frequencies_F: Tensor = 1.0 / (base_1**exponents_F)
        return frequencies_F

    def _factors(self, original: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """LongRoPE's frequencies up to the original length and beyond; copied to the device once."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if self._longrope is None or self._longrope[0].device != device:
            compute = ROPE_INIT_FUNCTIONS["longrope"]
            config = self._module.config
            short_F, long_F = (compute(config, device, seq_len=original + extra)[0] for extra in (0, 1))
            self._longrope = short_F, long_F
        return self._longrope


def document_lengths(position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of the documents of packed rows, found where positions do not go on by one.

    Args:
        position_ids: int64 `[B, T]`.

    Returns:
        The length of its document for every token `[B, T]`, and of all documents `[N]`, with zeros behind them.
    """
    starts_BT = torch.ones_like(position_ids, dtype=torch.bool)
    starts_BT[:, 1:] = position_ids.diff(dim=-1) != 1
    document_N = starts_BT.flatten().cumsum(0) - 1
    ends_N = position_ids.flatten() + 1
    longest_N = torch.zeros_like(ends_N).scatter_reduce_(0, document_N, ends_N, "amax")
    return longest_N[document_N].view_as(position_ids), longest_N


def _choose(
    where_BT: Tensor, chosen: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    cos, sin = (torch.where(where_BT[..., None], a, b) for a, b in zip(chosen, other, strict=True))
    return cos, sin
