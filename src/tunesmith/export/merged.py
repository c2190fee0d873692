"""Base and adapter as one model that plain transformers loads.

Weights are put together one layer at a time in float32, from the base as it is held (dequantised where it is in 4
or 8 bits) and rounded once, to the type of the file. Rejected: PEFT's `merge_and_unload`, which rounds a quantised
base a second time. The result is built in host memory, so it takes as much as the model has in 16 bits.

    plain LoRA   W' = W + s·B·A
    DoRA         W' = m · (W + s·B·A) / ‖W + s·B·A‖, norms over the inputs of each output

Of several active adapters each takes what the ones before it made of W, but for the norms of DoRA, which are those
of W itself: that is how PEFT computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tunesmith.contracts.errors import StorageError, UserError
from tunesmith.models.base_weight import base_weight


def save_merged(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a model with its active adapters merged, as safetensors with a config.

    Args:
        model: a `PeftModel` or a model of transformers; it stays as it is.
        dtype: floating-point type of the files.

    Raises:
        UserError: an adapter is of a kind that has no exact merged form here, or one lies in the folder already.
        StorageError: the folder cannot be written.
    """
    if (folder / "adapter_config.json").is_file():  # transformers would load that one, and its base
        raise UserError(
            f"{folder} holds an adapter, and what loads the folder would take that and not the merged model.",
            hint="Save the merged model into a folder of its own.",
        )
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
    except (OSError, SafetensorError) as error:  # the writer of safetensors reports a full disk as text
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"The merged model {folder} cannot be written: {reason}.") from error


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
        yield from _merged_layer(module, prefix).items()
        return
    if hasattr(module, "modules_to_save"):  # PEFT keeps a trained copy beside the original
        active = module.active_adapters
        trained = not module.disable_adapters and active and active[0] in module.modules_to_save
        yield from _merged(module.modules_to_save[active[0]] if trained else module.original_module, prefix)
        return
    if hasattr(module, "token_adapter"):
        rows = module.token_adapter
        if rows.disable_adapters:
            yield from _merged(rows.base_layer, prefix)
        else:
            yield f"{prefix}weight", rows.get_merged_weights(rows.active_adapters)
        return
    for name, parameter in module.named_parameters(recurse=False):
        quantised = name == "weight" and type(module).__name__ in ("Linear4bit", "Linear8bitLt")
        yield prefix + name, base_weight(module) if quantised else parameter
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in module.named_children():
        yield from _merged(child, f"{prefix}{name}.")


def _active(module: Any) -> list[str]:
    """Adapters that act on a layer now, and are not in its weight already."""
    if module.disable_adapters:
        return []
    own = {*module.lora_A, *module.lora_embedding_A}
    return [name for name in module.active_adapters if name in own and name not in module.merged_adapters]


def _merged_layer(module: Any, prefix: str) -> dict[str, Tensor]:
    """What `_merged` gives of the layer below an adapter, with the adapter in it."""
    tensors = dict(_merged(module.base_layer, prefix))
    active = _active(module)
    if not active:
        return tensors
    weight, bias = prefix + getattr(module, "parameter_name", "weight"), f"{prefix}bias"
    if weight not in tensors:
        raise _inexact(module, prefix)
    base = tensors[weight] = tensors[weight].float()
    for name in active:
        change = _change(module, name, prefix)
        tensors[weight] = tensors[weight] + change
        if name in module.lora_variant:
            tensors[weight] *= _dora_factor(module, name, base + change)
    extra = [
        module.scaling[name] * module.lora_B[name].bias.float()
        for name in active
        if name in module.lora_B and getattr(module.lora_B[name], "bias", None) is not None
    ]
    if extra and bias not in tensors:
        raise UserError(
            f"The adapter of {prefix[:-1]} has a bias, and the base has none to add it to.",
            hint='Save the adapter alone with save_method="lora".',
        )
    if extra:
        tensors[bias] = tensors[bias].float() + sum(extra)
    return tensors


def _change(module: Any, name: str, prefix: str) -> Tensor:
    """s·B·A of an adapter in float32, laid out as the weight below it is."""
    scale, variant = module.scaling[name], module.lora_variant.get(name)
    if variant is not None and type(variant).__name__ != "DoraLinearVariant":
        raise _inexact(module, prefix, type(variant).__name__)
    if hasattr(module, "parameter_name"):  # experts, all in one parameter
        change: Tensor = module.get_delta_weight(name).float()
        return change
    if name in module.lora_embedding_A:  # rows are tokens: A is [R, V], B is [D, R]
        change = scale * (module.lora_embedding_B[name].float() @ module.lora_embedding_A[name].float())
        return change.T
    a, b = module.lora_A[name], module.lora_B[name]
    if not isinstance(a, nn.Linear):
        raise _inexact(module, prefix)
    change = scale * (b.weight.float() @ a.weight.float())
    return change.T if module.fan_in_fan_out else change  # GPT-2 holds its weights transposed


def _dora_factor(module: Any, name: str, weight: Tensor) -> Tensor:
    """m / ‖W + s·B·A‖ in a form that multiplies the weight."""
    inputs = 0 if module.fan_in_fan_out else 1
    magnitude_N: Tensor = module.lora_magnitude_vector[name].weight.float()
    factor_N: Tensor = magnitude_N / torch.linalg.norm(weight, dim=inputs)
    return factor_N.unsqueeze(inputs)


def _inexact(module: Any, prefix: str, variant: str = "") -> UserError:
    kind = variant or f"{type(module).__name__} adapter"
    return UserError(
        f"{prefix[:-1]} carries a {kind}, which has no exact merged form here.",
        hint='Save the adapter alone with save_method="lora".',
    )
