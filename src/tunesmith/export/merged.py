"""Base and adapter as one model that plain transformers loads.

Weights are put together one layer at a time in float32, from the base as it is held (dequantised where it is in 4
or 8 bits) and rounded once, to the type of the file. Rejected: PEFT's `merge_and_unload`, which rounds a quantised
base a second time. The result is built in host memory, so it takes as much as the model has in 16 bits.

    plain LoRA   W' = W + s·B·A
    DoRA         W' = m · (W + s·B·A) / ‖W + s·B·A‖, norms over the inputs of each output
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.contracts.errors import StorageError, UserError
from tunesmith.models.projections import write_weight


def save_merged(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a model with its active adapters merged, as safetensors with a config.

    Args:
        model: a `PeftModel` or a model of transformers; it stays as it is.
        dtype: floating-point type of the files.

    Raises:
        UserError: an adapter is of a kind that has no exact merged form here.
        StorageError: the folder cannot be written.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        state = {name: _on_host(tensor, dtype) for name, tensor in _merged(base, "")}
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = True
    _tie(base, config, state)
    with torch.device("meta"):
        shell = type(base)(config).to(dtype)
    shell.generation_config = base.generation_config
    try:
        shell.save_pretrained(folder, state_dict=state)
    except OSError as error:
        raise StorageError(
            f"The merged model {folder} cannot be written: {error.strerror or error}."
        ) from error


def _on_host(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def _tie(base: Any, config: Any, state: dict[str, Tensor]) -> None:
    """Leave a tied head out of the files, or say in the config that it is tied no longer."""
    text = config.get_text_config()
    head, embeddings = (
        next((name for name, module in base.named_modules() if module is wanted), None)
        for wanted in (base.get_output_embeddings(), base.get_input_embeddings())
    )
    names = [f"{name}.weight" for name in (head, embeddings)]
    if not text.tie_word_embeddings or any(name not in state for name in names):
        return
    if torch.equal(state[names[0]], state[names[1]]):
        del state[names[0]]
        return
    config.tie_word_embeddings = text.tie_word_embeddings = False


def _merged(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a module's parameters and saved buffers, as a model without adapters has them."""
    if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        yield f"{prefix}weight", _merged_weight(module, prefix)
        if module.base_layer.bias is not None:
            yield f"{prefix}bias", _merged_bias(module)
        elif any(module.lora_B[name].bias is not None for name in _active(module)):
            raise UserError(
                f"The adapter of {prefix[:-1]} has a bias, and the base has none to add it to.",
                hint='Save the adapter alone with save_method="lora".',
            )
        return
    if hasattr(module, "modules_to_save"):  # PEFT keeps a trained copy beside the original
        active = module.active_adapters
        yield from _merged(module.modules_to_save[active[0]] if active else module.original_module, prefix)
        return
    if hasattr(module, "token_adapter"):
        yield f"{prefix}weight", module.token_adapter.get_merged_weights(module.token_adapter.active_adapters)
        return
    for name, parameter in module.named_parameters(recurse=False):
        quantised = name == "weight" and type(module).__name__ in ("Linear4bit", "Linear8bitLt")
        yield prefix + name, base_weight(module) if quantised else parameter
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in module.named_children():
        yield from _merged(child, f"{prefix}{name}.")


def base_weight(module: Any) -> Tensor:
    """The weight of a linear layer `[N, K]` in float32, dequantised where it is held in 4 or 8 bits."""
    kind = type(module).__name__
    if kind == "Linear8bitLt":
        scales_N = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        # an outlier-free row of integers: value · absmax / 127
        values: Tensor = module.weight.data.float() * (scales_N.float()[:, None] / 127.0)
        return values
    if kind == "Linear4bit":
        out_NK = torch.empty(
            module.out_features, module.in_features, dtype=torch.float32, device=module.weight.device
        )
        write_weight(module, out_NK)
        return out_NK
    weight: Tensor = module.weight.detach().float()
    return weight


def _active(module: Any) -> list[str]:
    """Adapters that act on a layer now, and are not in its weight already."""
    if module.disable_adapters:
        return []
    return [
        name
        for name in module.active_adapters
        if name in module.lora_A and name not in module.merged_adapters
    ]


def _merged_weight(module: Any, prefix: str) -> Tensor:
    weight_NK = base_weight(module.base_layer)
    for name in _active(module):
        a, b = module.lora_A[name], module.lora_B[name]
        if not isinstance(a, nn.Linear):
            raise UserError(f"{prefix[:-1]} carries an adapter, is no linear layer, and is not merged here.")
        merged_NK = weight_NK + module.scaling[name] * (b.weight.float() @ a.weight.float())
        variant = module.lora_variant.get(name)
        if variant is not None:
            if type(variant).__name__ != "DoraLinearVariant":
                raise UserError(
                    f"{prefix[:-1]} carries a {type(variant).__name__}, which has no exact merged form here.",
                    hint='Save the adapter alone with save_method="lora".',
                )
            magnitude_N = module.lora_magnitude_vector[name].weight.float()
            merged_NK = merged_NK * (magnitude_N / torch.linalg.norm(merged_NK, dim=1))[:, None]
        weight_NK = merged_NK
    return weight_NK


def _merged_bias(module: Any) -> Tensor:
    bias_N: Tensor = module.base_layer.bias.detach().float()
    for name in _active(module):
        extra = module.lora_B[name].bias
        if extra is not None:
            bias_N = bias_N + module.scaling[name] * extra.float()
    return bias_N
