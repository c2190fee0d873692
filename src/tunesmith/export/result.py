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

from tunesmith.export.card import Facts, model_card


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
    """
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if hasattr(model, "peft_config"):
            model.save_pretrained(temporary, safe_serialization=True)
            _name_base_model(temporary / "adapter_config.json", facts.base_model, facts.base_revision)
        else:
            state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
            model.save_pretrained(temporary, state_dict=state)
            _set_json(temporary / "config.json", {"dtype": str(dtype).removeprefix("torch.")})
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(facts), encoding="utf-8")
        for name, text in files.items():
            (temporary / name).write_text(text, encoding="utf-8")
        _replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


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


def _replace_folder(new: Path, target: Path) -> None:
    old = target.with_name(f".tmp-old-{target.name}-{os.getpid()}")
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)
