"""A base that stays in its files: its parameters take no memory, and are read where merging asks for them.

PEFT puts the adapter on a model whose parameters have their shapes and nothing else (one zero, repeated). Where a run
held the base in 4 or 8 bits, each weight is rounded so when it is read, and comes back in float32: what the adapter
was trained on, one weight at a time. Some bases cannot be read so; `streamed` says why, and the caller loads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tunesmith.contracts.hub import offline_if_unreachable
from tunesmith.export.merged_weights import Read
from tunesmith.models.adapter import load_lora
from tunesmith.models.adapter_checks import rewrites_base
from tunesmith.models.base_weight import base_weight
from tunesmith.models.loader import load_skeleton


class NotStreamableError(Exception):
    """A base that has to be loaded whole; the text is the reason."""


class WeightFiles:
    """The tensors of a folder of safetensors by name.

    Raises:
        NotStreamableError: there are none, or some are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        try:
            names = (
                set(json.loads(index.read_bytes())["weight_map"].values())
                if index.is_file()
                else {"model.safetensors"}
            )
            files: list[Any] = [safe_open(folder / name, "pt") for name in sorted(names)]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise NotStreamableError(f"its files cannot be read one by one ({error})") from error
        self._where: dict[str, Any] = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None where there is none of that name."""
        file = self._where.get(name)
        return None if file is None else tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor, out of its file."""
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor


def weights_folder(name: str, revision: str | None) -> Path:
    """The folder with the files of a model, which are fetched where they are on the hub.

    Raises:
        NotStreamableError: they cannot be had.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline_if_unreachable()
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=["model*.safetensors*", "*.json"])
        )
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise NotStreamableError("its files cannot be fetched one by one") from error


def streamed(
    base: str,
    revision: str | None,
    adapter: Path,
    *,
    quantize: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    rope_scaling: Mapping[str, Any] | None = None,
) -> tuple[Any, Read]:
    """A `PeftModel` whose base lies in files, and what reads a value of it.

    Args:
        base: folder or hub id of the model.
        adapter: folder of the adapter.
        quantize: how the run held the base.
        dtype: type from which its weights were rounded, where it was held in 4 or 8 bits.
        device: where they are rounded again.
        rope_scaling: how the run stretched the base's positions, for the config.

    Raises:
        NotStreamableError: this base has to be loaded.
        UserError: adapter and base do not fit.
    """
    _check_start(adapter)
    files = WeightFiles(weights_folder(base, revision))
    model = load_skeleton(
        base, revision=revision, trust_remote_code=trust_remote_code, rope_scaling=rope_scaling
    )
    if getattr(model.config, "quantization_config", None) is not None:
        raise NotStreamableError("its files are quantised")
    rounded = _rounded_layers(model, quantize)
    empty = _emptied(model, files)
    rows = model.get_input_embeddings().weight.shape[0]
    adapted = load_lora(model, str(adapter), assign=True).requires_grad_(False)
    if adapted.get_base_model().get_input_embeddings().weight.shape[0] != rows:
        raise NotStreamableError("the adapter has more tokens than it")

    def read(_: Any, __: str, tensor: Tensor) -> Tensor:
        if id(tensor) not in empty:  # of the adapter: it trained whole
            return tensor
        name = empty[id(tensor)].name
        value = files.read(name)
        if name.removesuffix(".weight") in rounded:
            return _round(value.to(device, dtype), quantize).cpu()
        return value

    return adapted, read


def _check_start(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    start = config.get("init_lora_weights")
    if rewrites_base(start):
        raise NotStreamableError(f"the adapter changes it as a whole when it is loaded ({start})")


class _Empty(NamedTuple):
    """A tensor without memory, held so that nothing else gets its identity, and its name in the files."""

    tensor: Tensor
    name: str


def _emptied(model: nn.Module, files: WeightFiles) -> dict[int, _Empty]:
    """Give every parameter and saved buffer of a model on the meta device a place that takes no memory.

    Returns:
        Each by the identity of the tensor in the model.

    Raises:
        NotStreamableError: the files have other names or shapes.
    """
    found: dict[int, _Empty] = {}
    replaced: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if name in module._non_persistent_buffers_set:
                continue
            full = f"{path}.{name}" if path else name
            if id(tensor) in replaced:  # tied
                setattr(module, name, replaced[id(tensor)])
                continue
            if files.shape(full) != tuple(tensor.shape):
                raise NotStreamableError(f"its files hold {full} in another form")
            empty = torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape)
            value = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
            setattr(module, name, value)
            replaced[id(tensor)] = value
            found[id(value)] = _Empty(value, full)
    return found


def _rounded_layers(model: Any, quantize: str) -> set[str]:
    """Names of the layers that a run holds in 4 or 8 bits, as transformers chooses them.

    Raises:
        NotStreamableError: they are not all plain linear layers.
    """
    if quantize == "none":
        return set()
    from transformers.quantizers.base import HfQuantizer

    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    from transformers.quantizers.quantizers_utils import should_convert_module

    chosen = {
        name: type(module)
        for name, module in model.named_modules()
        if name and type(module).__name__ in ("Linear", "Conv1D") and should_convert_module(name, skipped)
    }
    if any(kind is not nn.Linear for kind in chosen.values()):
        raise NotStreamableError("it has quantised layers of another kind")
    return set(chosen)


def _round(weight_NK: Tensor, quantize: str) -> Tensor:
    """A weight as a layer in 4 or 8 bits holds it, in float32."""
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    outputs, inputs = weight_NK.shape
    with torch.device("meta"):
        if quantize == "nf4":
            layer = layers.Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compress_statistics=True)
        else:
            layer = layers.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
    if quantize == "nf4":
        weight = layers.Params4bit(
            weight_NK.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
    else:
        weight = layers.Int8Params(weight_NK.cpu(), requires_grad=False, has_fp16_weights=False)
    layer.weight = weight.to(weight_NK.device)
    return base_weight(layer)
