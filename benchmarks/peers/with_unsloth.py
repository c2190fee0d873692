"""Unsloth through its public interface, with its checkpointing or none.

A packed row carries what Unsloth's own collator adds to it, the lengths of the documents (`packed_seq_lengths`):
its attention then keeps documents apart without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import unsloth  # noqa: F401  # first: it patches what is imported after it
from unsloth import FastLanguageModel

# isort: split
import torch

from benchmarks.batches import Documents
from benchmarks.peers.measure import measure_layouts
from benchmarks.peers.tables import RANK, Work
from benchmarks.shapes import device_and_dtype, projections


def load(work: Work, dtype: torch.dtype) -> Any:
    """The model with a fresh adapter, in training mode."""
    longest = work.rows * work.length if "packed" in work.layouts else work.length
    model, _ = FastLanguageModel.from_pretrained(
        model_name=work.checkpoint, max_seq_length=longest, dtype=dtype, load_in_4bit=work.adapter == "qlora"
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        target_modules=list(projections(work.config)),
        lora_alpha=RANK,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=work.options["checkpointing"],
        random_state=3407,
    )
    FastLanguageModel.for_training(model)
    return model


def with_lengths(layout: str, row: Documents, inputs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a forward, with the lengths of the documents where they share a row."""
    if layout != "packed":
        return inputs
    return inputs | {"packed_seq_lengths": torch.tensor(row.lengths, dtype=torch.int32)}


def measure(work: Work) -> Iterator[dict[str, Any]]:
    """Rows of results, one for each layout."""
    device, dtype = device_and_dtype()
    yield from measure_layouts(load(work, dtype), work, device, with_lengths)
