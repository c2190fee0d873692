"""What is foreseen of a step's memory against what a GPU says, over shapes, what trains, policies and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from benchmarks.batches import random_documents, token_batch
from benchmarks.loop import Timing, release, time_steps
from benchmarks.peers.with_tunesmith import training_step
from benchmarks.planned import facts_of, work_of
from benchmarks.shapes import SHAPES, random_model

from tunesmith.models.host_memory import GROWTH, LARGEST_PIECE, SMALLEST_PIECE
from tunesmith.planning.bytes import host_bytes, peak_bytes

pytestmark = pytest.mark.gpu

GIB = 2**30
LAYERS = 4
WITHIN = 0.05

LENGTHS = {"equal": (2048, 2048), "packed": (1900, 700, 3, 1493), "long": (24_576,)}

LAYOUTS: dict[str, Sequence[str]] = {
    **{name: (name,) * LAYERS for name in ("keep_all", "keep", "recompute_gate_up", "recompute", "offload")},
    "offload_attention": ("offload_attention",) * LAYERS,
    "mixed": ("offload_attention", "recompute", "keep", "keep_all"),
    "moved first": ("offload", "keep_offload_attention", "recompute_projections", "keep"),
    "unpacked last": ("keep", "keep_all", "keep_unpacked", "keep_all_unpacked"),
}


def measured(model: Any, policies: Sequence[str], adapter: str, batch: Any) -> tuple[Timing, int]:
    """Two steps, and the pinned bytes that they took; the model is left without gradients."""
    device = torch.device("cuda", 0)
    with training_step(
        model, policies, device, torch.bfloat16, tokens=batch.tokens, adapter=adapter, graphs=False
    ) as (step, installed):
        assert installed is not None
        timing = time_steps(lambda number: step(batch), steps=1, warm=1, device=device)
        assert not installed.fallbacks
        host = installed.offloader.host_bytes
        installed.undo()
    model.zero_grad(set_to_none=True)
    return timing, host


def spare(moved: int) -> int:
    """Bytes that may be pinned beyond those that move: a piece that nothing is cut from yet."""
    return min(LARGEST_PIECE, max(SMALLEST_PIECE, moved // GROWTH)) if moved else 0


@pytest.mark.parametrize(
    ("shape", "adapter"),
    [
        ("8b", "qlora"), ("8b", "lora"), ("8b", "full"), ("qwen3-8b", "qlora"), ("gemma2-9b", "lora"),
        ("gemma3-12b", "qlora"), ("phi-4", "qlora"), ("qwen2.5-7b", "lora"),
    ],
)  # fmt: skip
def test_peaks(shape: str, adapter: str) -> None:
    model = random_model(shape, adapter, layers=LAYERS)
    facts = facts_of(SHAPES[shape] | {"num_hidden_layers": LAYERS})
    missed = []
    for name, lengths in LENGTHS.items():
        documents = random_documents(list(lengths), 1.0, 0)
        batch, work = token_batch(documents), work_of(adapter, lengths, documents.supervised)
        for layout, policies in LAYOUTS.items():
            timing, host = measured(model, policies, adapter, batch)
            release(torch.device("cuda", 0))
            foreseen = peak_bytes(facts, work, policies, accumulates=False)
            off = foreseen / timing.peak - 1
            figures = (
                f"{shape} {adapter} {name} {layout}: {foreseen / GIB:.2f} GiB foreseen, "
                f"{timing.peak / GIB:.2f} measured ({off:+.1%}), {timing.reserved / GIB:.2f} reserved"
            )
            print(figures, flush=True)
            moved = host_bytes(facts, work, policies)
            if abs(off) > WITHIN or not moved <= host <= moved + spare(moved):
                missed.append(f"{figures}; {moved / GIB:.2f} of the host foreseen, {host / GIB:.2f} pinned")
    assert not missed, "\n".join(missed)
