"""The model of a run with what is trained on it, from the settings of model and adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tunesmith.models.adapter import add_lora, load_lora, train_all
from tunesmith.models.loader import load_model
from tunesmith.models.vocabulary import resize, trainable_rows
from tunesmith.settings.run import RunSettings


class NewTokens(NamedTuple):
    """A tokenizer with the ids that `adapter.new_tokens` gave it."""

    tokenizer: Any
    ids: list[int]


def make_model(settings: RunSettings, device: torch.device, dtype: torch.dtype, tokens: NewTokens) -> Any:
    """The model with what is trained on it."""
    model_settings, adapter = settings.model, settings.adapter
    model = load_model(
        model_settings.name,
        device=device,
        # what is trained starts from the checkpoint's own values, not from values rounded to the compute type
        dtype=torch.float32 if adapter.kind == "none" else dtype,
        quantize=model_settings.quantize,
        revision=model_settings.revision,
        trust_remote_code=model_settings.trust_remote_code,
    )
    resize(model, tokens.tokenizer, tokens.ids)
    if adapter.kind == "none":
        return train_all(model, model_settings.freeze, dtype)
    if adapter.path is not None:
        return load_lora(model, adapter.path)
    layers: Sequence[int] | None = adapter.layers_to_transform
    if adapter.last_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        layers = range(max(0, count - adapter.last_layers), count)
    whole = bool(adapter.modules_to_save)
    return add_lora(
        model,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        targets=adapter.targets,
        seed=settings.train.seed,
        bias=adapter.bias,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        init_lora_weights=adapter.init_lora_weights,
        modules_to_save=adapter.modules_to_save,
        layers_to_transform=layers,
        rank_pattern=adapter.rank_pattern,
        alpha_pattern=adapter.alpha_pattern,
        trainable_token_indices=None if whole else trainable_rows(model, tokens.ids),
    )
