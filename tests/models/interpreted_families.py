"""Families of layers with their Triton kernels, on CPU tensors in Triton's interpreter.

Not collected by itself: the interpreter is chosen when the kernel modules are imported, so
`test_families_interpreted.py` runs this file in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

from tests.models.test_families import CASES, computed, fused, tiny, worst
from tests.support.documents import random_corpus
from tunesmith.data.batches import collate
from tunesmith.kernels import glu, launch, layer_norm, qk_norm, residual, rms_norm, rope
from tunesmith.models.attention import document_kwargs
from tunesmith.planning.architectures import ARCHITECTURES

MODULES = (glu, layer_norm, qk_norm, residual, rms_norm, rope)
"""Where the kernels of a layer over weights in 16 or 32 bits are."""


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Modules whose kernels ran."""
    assert launch.INTERPRETED
    seen: set[str] = set()

    def counted(module, kernel, *args, **options):
        seen.add(module.__name__.rpartition(".")[2])
        launch.launch(kernel, *args, **options)

    for module in MODULES:
        monkeypatch.setattr(module, "launch", partial(counted, module))
    return seen


def row() -> dict[str, Any]:
    lengths = [5, 1, 9]
    batch = collate(random_corpus(lengths), range(len(lengths)))
    return {
        "input_ids": batch.ids_T[None],
        "position_ids": batch.position_ids_T[None],
        **document_kwargs(batch),
    }


def kernels_of(family: str, rank: int) -> set[str]:
    entry = ARCHITECTURES[family]
    turned = {"qk_norm"} if entry.qk_norms else {"rope"}
    added = {"residual"} if rank else set()
    return {"glu", "layer_norm" if entry.norm == "layer" else "rms_norm"} | turned | added


@pytest.mark.parametrize("rank", [0, 3, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [name for name in ARCHITECTURES if name != "llama"])
def test_layers_equal_stock(family, rank, launches):
    """With rank 0 all weights train."""
    model = tiny(family, CASES[family][0], torch.float32, adapter=rank > 0, rank=rank)
    stock = computed(model, row())
    ours = fused(model, row(), "keep" if rank == 3 else "recompute")
    assert launches == kernels_of(family, rank)
    error, name = worst(ours, stock)
    if error >= 1e-5:  # gradients that cancel: ours err no more than stock's
        exact = computed(copy.deepcopy(model).double(), row())
        assert worst(ours, exact)[0] < 1.5 * worst(stock, exact)[0], name


@pytest.mark.parametrize("mode", ["adapter", "full"])
@pytest.mark.parametrize("family", ["gemma3_text", "olmo2", "phi3", "cohere2", "starcoder2", "granite"])
def test_policies_agree_bit_for_bit(family, mode):
    model = tiny(family, CASES[family][0], torch.float16, adapter=mode == "adapter", rank=8)
    with torch.autocast("cpu", torch.float16):
        logits, grads = fused(model, row(), "keep")
        for policy in ("keep_all", "recompute_gate_up", "recompute"):
            other, other_grads = fused(model, row(), policy)
            assert torch.equal(other, logits), policy
            assert [name for name in grads if not torch.equal(other_grads[name], grads[name])] == [], policy
