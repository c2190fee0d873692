"""The model of a run with what is trained on it, from the settings of model and adapter."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tunesmith.config.find_result import scaling_of_run
from tunesmith.models.adapter import add_lora, load_lora, train_all
from tunesmith.models.loader import load_model, load_skeleton
from tunesmith.models.loading_progress import Tell
from tunesmith.models.rope_scaling import can_stretch, made_for
from tunesmith.models.vocabulary import resize, trainable_rows
from tunesmith.planning.fit import ROUNDING, fits_in_float32
from tunesmith.settings.run import RunSettings


class NewTokens(NamedTuple):
    """A tokenizer with the ids that `adapter.new_tokens` gave it."""

    tokenizer: Any
    ids: list[int]


def weights_dtype(settings: RunSettings, dtype: torch.dtype, device_bytes: int) -> torch.dtype:
    """Type in which full fine-tuning holds what it trains: float32, or bfloat16 where the optimizer can and it is
    asked for, or float32 would not fit.

    Args:
        dtype: compute type of the run.
        device_bytes: memory of the device, and not what is free of it: a run that goes on finds the same type.
    """
    model, optimizer = settings.model, settings.train.optimizer
    if dtype != torch.bfloat16 or optimizer not in ROUNDING:
        return torch.float32
    if model.dtype == "bfloat16":
        return torch.bfloat16
    skeleton = load_skeleton(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code)
    sizes = {True: 0, False: 0}
    for name, parameter in skeleton.named_parameters():
        sizes[any(fnmatch.fnmatchcase(name, pattern) for pattern in model.freeze)] += parameter.numel()
    fits = fits_in_float32(
        trained=sizes[False],
        frozen_bytes=sizes[True] * dtype.itemsize,
        optimizer=optimizer,
        device_bytes=device_bytes,
    )
    return torch.float32 if fits else torch.bfloat16


def make_model(
    settings: RunSettings,
    device: torch.device,
    dtype: torch.dtype,
    tokens: NewTokens,
    tell: Tell | None = None,
) -> Any:
    """The model with what is trained on it.

    Args:
        tell: gets a line about the weights that are loaded, again and again.
    """
    model_settings, adapter = settings.model, settings.adapter
    scaling = model_settings.rope_scaling
    held = dtype
    if adapter.kind == "none":
        # float32 starts from the checkpoint's own values, not from values rounded to the compute type
        memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        held = weights_dtype(settings, dtype, memory)
    model = load_model(
        model_settings.name,
        device=device,
        dtype=held,
        quantize=model_settings.quantize,
        revision=model_settings.revision,
        trust_remote_code=model_settings.trust_remote_code,
        rope_scaling=scaling.parameters() if scaling is not None else None,
        tell=tell,
    )
    resize(model, tokens.tokenizer, tokens.ids)
    if adapter.kind == "none":
        return train_all(model, model_settings.freeze, dtype, held)
    if adapter.path is not None:
        return load_lora(model, adapter.path)
    layers: Sequence[int] | None = adapter.layers_to_transform
    if adapter.last_layers is not None:
        count = model.config.get_text_config().num_hidden_layers
        layers = range(max(0, count - adapter.last_layers), count)
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
        trainable_token_indices=trainable_rows(model, tokens.ids, adapter.modules_to_save),
    )


def position_warnings(settings: RunSettings, config: Any) -> tuple[str, ...]:
    """What is to be said of rows longer than the model was made for, and of an adapter whose positions were others.

    Args:
        config: the model's, with the scaling of the run.
    """
    found = []
    longest, length = settings.train.sequence_length, made_for(config)
    if length is not None and longest > length:
        scaling = settings.model.rope_scaling
        if scaling is not None:
            enough = math.ceil(10 * (scaling.factor or 1.0) * longest / length) / 10
            mend = f"raise its factor to {enough}" if scaling.factor else "give it a factor"
            reach = f"model.rope_scaling reaches {length:,} positions"
        else:
            factor = math.ceil(longest / length)
            mend = f"set model.rope_scaling, such as {{rope_type: yarn, factor: {factor}.0}}"
            reach = f"the model was made for {length:,} positions"
        if not can_stretch(config):
            mend = "lower train.sequence_length"
        found.append(
            f"train.sequence_length is {longest:,}, and {reach}. For documents longer than that, {mend}."
        )
    if settings.adapter.path is not None:
        own = settings.model.rope_scaling
        before, now = (
            scaling_of_run(Path(settings.adapter.path).expanduser()),
            own.parameters() if own else None,
        )
        if before != now and before is not None:
            found.append(
                f"the adapter in {settings.adapter.path} was trained with model.rope_scaling {before}, and this run "
                f"has {now or 'none'}: its positions change."
            )
    return tuple(found)
