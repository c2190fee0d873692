"""The result of a run: a folder that plain transformers and PEFT load, with a card that says how it was made.

An adapter is PEFT's own format (`adapter_model.safetensors`, `adapter_config.json`); full fine-tuning writes a
whole model. Either way the tokenizer and its chat template lie beside it, and the folder appears by one rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tunesmith.contracts.errors import StorageError
from tunesmith.export.card import Facts, model_card

_HINT = "The last checkpoint is intact: mend this and run the same command again to get the result."


def save_result(
    folder: Path,
    *,
    model: Any,
    tokenizer: Any,
    chat_template: str | None,
    dtype: torch.dtype,
    facts: Facts,
    files: Mapping[str, str],
) -> Path:
    """Write the trained adapter or model with everything needed to use it.

    Args:
        folder: target; an older result there is replaced.
        model: a `PeftModel`, or a `PreTrainedModel` whose float32 parameters are written as `dtype`.
        chat_template: the template that the data was rendered with.
        files: further text files by name, such as the resolved run file.

    Returns:
        `folder`.

    Raises:
        StorageError: the disk is full or the folder cannot be written; an older result is intact.
    """
    try:
        _clean(folder)
        _write(folder, model, tokenizer, chat_template, dtype, facts, files)
    except SafetensorError as error:  # the writer of safetensors reports a full disk as text
        raise StorageError(f"The result {folder} cannot be written: {error}.", hint=_HINT) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"The result {folder} cannot be written: {reason}.", hint=_HINT) from error
    return folder


def _write(
    folder: Path,
    model: Any,
    tokenizer: Any,
    chat_template: str | None,
    dtype: torch.dtype,
    facts: Facts,
    files: Mapping[str, str],
) -> None:
    temporary = folder.with_name(f".tmp-{folder.name}")
    temporary.mkdir(parents=True)
    try:
        if hasattr(model, "peft_config"):
            model.save_pretrained(temporary, safe_serialization=True)
            _name_base_model(temporary / "adapter_config.json", facts.base_model, facts.base_revision)
        else:
            model.save_pretrained(temporary, state_dict=_in_dtype(model.state_dict(), dtype))
            _set_json(temporary / "config.json", {"dtype": str(dtype).removeprefix("torch.")})
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(facts), encoding="utf-8")
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        _share(temporary)
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _in_dtype(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating-point tensors as `dtype`; tied ones stay one tensor, or they would be written twice."""
    cast: dict[tuple[object, ...], torch.Tensor] = {}
    converted = {}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor = cast.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), tensor.to(dtype))
        converted[name] = tensor
    return converted


def _share(folder: Path) -> None:
    """Give every file the mode that the user's mask grants; safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def _set_json(path: Path, changes: Mapping[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | dict(changes), indent=2) + "\n", encoding="utf-8")


def _name_base_model(path: Path, name: str, revision: str | None) -> None:
    """PEFT writes what the model was loaded from; a relative folder would not be found from elsewhere."""
    local = Path(name).expanduser()
    _set_json(
        path,
        {"base_model_name_or_path": str(local.resolve()) if local.is_dir() else name, "revision": revision},
    )


def _aside(target: Path) -> Path:
    return target.with_name(f".tmp-old-{target.name}")


def _clean(target: Path) -> None:
    """Remove what a killed save left; a result that it had set aside gets its name back.

    The run directory is locked, so nobody else is writing here.
    """
    if _aside(target).exists() and not target.exists():
        _aside(target).rename(target)
    for leftover in (_aside(target), target.with_name(f".tmp-{target.name}")):
        shutil.rmtree(leftover, ignore_errors=True)


def _replace_folder(new: Path, target: Path) -> None:
    if target.exists():
        target.rename(_aside(target))
    try:
        new.rename(target)
    except OSError:
        if _aside(target).exists():
            _aside(target).rename(target)
        raise
    shutil.rmtree(_aside(target), ignore_errors=True)
