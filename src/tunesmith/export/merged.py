"""Base and adapter as one model that plain transformers loads, written tensor by tensor.

`merged_weights` has the arithmetic, `merged_files` the files; here a model is walked from one to the other. What is
in host memory at a time is one shard, one decoder layer, and the embeddings where a head is tied to them.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.contracts.errors import UserError
from tunesmith.export.merged_files import SHARD_SIZE, ShardWriter, bytes_of, on_host, share, writing
from tunesmith.export.merged_weights import Read, from_memory, merged_tensors
from tunesmith.models.base_of import base_of

_LAYER = re.compile(r".*?\.\d+\.")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def save_merged(model: Any, folder: Path, dtype: torch.dtype, max_shard_size: str = SHARD_SIZE) -> None:
    """Write a loaded model with its active adapters merged, as safetensors with a config.

    Args:
        model: a `PeftModel` or a model of transformers; it stays as it is.
        folder: files of the same names, and weights of an older model, are replaced once all is written.
        dtype: floating-point type of the files.
        max_shard_size: largest file, such as `5GB`.

    Raises:
        UserError: an adapter is of a kind that has no exact merged form here, or one lies in the folder already.
        StorageError: the folder cannot be written.
    """
    if (folder / "adapter_config.json").is_file():  # transformers would load that one, and its base
        raise UserError(
            f"{folder} holds an adapter, and what loads the folder would take that and not the merged model.",
            hint="Save the merged model into a folder of its own.",
        )
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
        write_merged(model, temporary, dtype, most=bytes_of(max_shard_size))
        with writing(folder):
            folder.mkdir(exist_ok=True)
            for file in list(folder.iterdir()):
                if _WEIGHTS.fullmatch(file.name):
                    file.unlink()
            for file in list(temporary.iterdir()):
                file.replace(folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_merged(
    model: Any,
    folder: Path,
    dtype: torch.dtype,
    *,
    most: int,
    read: Read = from_memory,
    generation_config: Any = None,
) -> None:
    """Write weights, config and generation config into a folder that is there.

    Args:
        model: a `PeftModel` or a model of transformers.
        most: bytes of one file.
        read: gives the values of the base's parameters.
        generation_config: written instead of the model's own.

    Raises:
        UserError: an adapter has no exact merged form, or a weight does not fit into the type.
        StorageError: the folder cannot be written.
    """
    base = base_of(model)
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = True
    config.architectures = [type(base).__name__]
    config.dtype = dtype
    writer = ShardWriter(folder, most)
    with torch.no_grad(), writing(folder):
        for name, tensor in _in_checkpoint_form(_untied(base, config, dtype, read), base, config):
            writer.add(name, on_host(name, tensor, dtype))
        writer.finish()
        config.save_pretrained(folder)
        generation = generation_config or base.generation_config
        if generation is not None:
            generation.to_json_file(folder / "generation_config.json")  # as it is, checked or not
        share(folder)


def _untied(base: Any, config: Any, dtype: torch.dtype, read: Read) -> Iterator[tuple[str, Tensor]]:
    """The merged tensors as they go into files, without a head that is its embeddings.

    Where a head is tied no longer, because it was trained apart, the config is told so.
    """
    text = config.get_text_config()
    head, embeddings = (
        next((f"{name}.weight" for name, module in base.named_modules() if module is wanted), "")
        for wanted in (base.get_output_embeddings(), base.get_input_embeddings())
    )
    tied = bool(text.tie_word_embeddings and head and embeddings)
    kept: dict[str, Tensor] = {}
    for name, tensor in merged_tensors(base, read):
        tensor = on_host(name, tensor, dtype)
        if tied and name in (head, embeddings):
            kept[name] = tensor
        if not tied or name != head:
            yield name, tensor
    if head not in kept:
        return
    if embeddings in kept and torch.equal(kept[head], kept[embeddings]):
        return
    config.tie_word_embeddings = text.tie_word_embeddings = False
    yield head, kept[head]


def _in_checkpoint_form(
    tensors: Iterator[tuple[str, Tensor]], base: Any, config: Any
) -> Iterator[tuple[str, Tensor]]:
    """The tensors under the names, and in the parts, that the model's family has in its files.

    transformers holds some weights in another form than the files do, such as all experts of a layer in one tensor.
    It can turn them back, a layer at a time as well as all at once.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        shell = type(base)(config)
    for _, group in groupby(tensors, key=lambda named: _layer(named[0])):
        yield from revert_weight_conversion(shell, dict(group)).items()


def _layer(name: str) -> str:
    """What the tensors of one decoder layer have in common; the name itself outside of layers."""
    match = _LAYER.match(name)
    return match[0] if match else name
