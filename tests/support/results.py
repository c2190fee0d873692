"""Results of runs, made in milliseconds: a run directory with an adapter on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.tiny import CHATML, save_tiny_model, tiny_tokenizer
from tunesmith.models.adapter import add_lora
from tunesmith.models.loader import load_model

CPU = torch.device("cpu")


def disturbed(model: Any, amount: float = 0.05) -> Any:
    """The model as if it had been trained, as far as its numbers go."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += amount * torch.randn_like(parameter)
    return model.eval()


def adapted(folder: Path, quantize: str = "none", **options: Any) -> Any:
    """A model with an adapter that has been trained."""
    model = load_model(str(folder), device=CPU, dtype=torch.float32, quantize=quantize)
    values = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "seed": 1}
    return disturbed(add_lora(model, **(values | options)))


def save_run(
    folder: Path, *, quantize: str = "none", template: str | None = CHATML, base: Any = None, **options: Any
) -> Path:
    """A run directory as a run leaves it: an adapter with tokenizer, template and run file.

    Args:
        base: changes of the tiny model's config.
        options: of the adapter.
    """
    size = {"hidden_size": 64, "intermediate_size": 128} | (base or {})
    model = adapted(save_tiny_model(folder.with_name(f"{folder.name}-base"), **size), quantize, **options)
    adapter = folder / "adapter"
    model.save_pretrained(adapter)
    tiny_tokenizer(template).save_pretrained(adapter)
    run_file = f"model:\n  name: base\n  quantize: {quantize}\ndata:\n  date: '2025-01-01'\n"
    for place in (folder, adapter):
        (place / "run.yaml").write_text(run_file, encoding="utf-8")
    return folder
