"""The arithmetic of merging: what each parameter of a base becomes with the adapters that act on it.

Weights are put together one at a time in float32, from the base as it is held (dequantised where it is in 4 or 8
bits), so that they are rounded once, to the type of the file. Rejected: PEFT's `merge_and_unload`, which rounds a
quantised base a second time.

    plain LoRA   W' = W + s·B·A
    DoRA         W' = m · (W + s·B·A) / ‖W + s·B·A‖, norms over the inputs of each output

Of several active adapters each takes what the ones before it made of W, but for the norms of DoRA, which are those
of W itself: that is how PEFT computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.contracts.errors import UserError
from tunesmith.models.base_weight import base_weight

Read = Callable[[Any, str, Tensor], Tensor]
"""Gives the value of a parameter or buffer: from its module, its name there, and itself."""


def from_memory(module: Any, name: str, tensor: Tensor) -> Tensor:
    """The value of a parameter of a loaded model, dequantised where it is held in 4 or 8 bits."""
    quantised = name == "weight" and type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    return base_weight(module) if quantised else tensor


def merged_tensors(module: Any, read: Read, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and values of a module's parameters and saved buffers, as a model without adapters has them.

    Nothing is held behind a value that was handed out.

    Raises:
        UserError: an adapter has no exact merged form.
    """
    if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
        yield from _merged_layer(module, read, prefix).items()
        return
    if hasattr(module, "modules_to_save"):  # PEFT keeps a trained copy beside the original
        active = module.active_adapters
        trained = not module.disable_adapters and active and active[0] in module.modules_to_save
        inner = module.modules_to_save[active[0]] if trained else module.original_module
        yield from merged_tensors(inner, read, prefix)
        return
    if hasattr(module, "token_adapter"):
        for name, value in merged_tensors(module.token_adapter.base_layer, read, prefix):
            yield name, _with_rows(module.token_adapter, value) if name == f"{prefix}weight" else value
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, read(module, name, parameter)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, read(module, name, buffer)
    for name, child in module.named_children():
        yield from merged_tensors(child, read, f"{prefix}{name}.")


def _with_rows(rows: Any, weight_VD: Tensor) -> Tensor:
    """Embeddings or a head with the rows that were trained alone."""
    for name in () if rows.disable_adapters else rows.active_adapters:
        index = torch.tensor(rows.token_indices[name], device=weight_VD.device)
        weight_VD = weight_VD.index_copy(0, index, rows.trainable_tokens_delta[name].to(weight_VD))
    return weight_VD


def _active(module: Any) -> list[str]:
    """Adapters that act on a layer now, and are not in its weight already."""
    if module.disable_adapters:
        return []
    own = {*module.lora_A, *module.lora_embedding_A}
    return [name for name in module.active_adapters if name in own and name not in module.merged_adapters]


def _merged_layer(module: Any, read: Read, prefix: str) -> dict[str, Tensor]:
    """What `merged_tensors` gives of the layer below an adapter, with the adapter in it."""
    tensors = dict(merged_tensors(module.base_layer, read, prefix))
    active = _active(module)
    if not active:
        return tensors
    weight, bias = prefix + getattr(module, "parameter_name", "weight"), f"{prefix}bias"
    if weight not in tensors:
        raise _inexact(module, prefix)
    base = tensors[weight] = tensors[weight].float()
    for name in active:
        change = _change(module, name, prefix).to(base.device)
        tensors[weight] = tensors[weight] + change
        if name in module.lora_variant:
            tensors[weight] *= _dora_factor(module, name, base + change)
    extra = [
        module.scaling[name] * module.lora_B[name].bias.float().to(base.device)
        for name in active
        if name in module.lora_B and getattr(module.lora_B[name], "bias", None) is not None
    ]
    if extra and bias not in tensors:
        raise UserError(
            f"The adapter of {prefix[:-1]} has a bias, and the base has none to add it to.",
            hint="It cannot be merged; use base and adapter side by side.",
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
    magnitude_N: Tensor = module.lora_magnitude_vector[name].weight.float().to(weight.device)
    factor_N: Tensor = magnitude_N / torch.linalg.norm(weight, dim=inputs)
    return factor_N.unsqueeze(inputs)


def _inexact(module: Any, prefix: str, variant: str = "") -> UserError:
    kind = variant or f"{type(module).__name__} adapter"
    return UserError(
        f"{prefix[:-1]} carries a {kind}, which has no exact merged form here.",
        hint="It cannot be merged; use base and adapter side by side.",
    )
