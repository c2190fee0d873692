"""The hand-written layer with its Triton kernels, on CPU tensors in Triton's interpreter.

Not collected by itself: the interpreter is chosen when the kernel modules are imported, so
`test_decoder_interpreted.py` runs this file in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.models.test_decoder import TOLERANCE, error, run
from tests.models.test_decoder_truths import batch_of, computed, fused, rounded, squared
from tunesmith.kernels import glu, launch, residual, rms_norm, rope
from tunesmith.models.install import install

SHORT = [5, 1, 9, 1]
SHAPE = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2}
MODULES = (glu, residual, rms_norm, rope)
"""Where the kernels of a layer over weights in 16 or 32 bits are."""


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Module and name of every kernel that ran."""
    assert launch.INTERPRETED
    seen: set[tuple[str, str]] = set()

    def counted(module, kernel, *args, **options):
        seen.add((module.__name__.rpartition(".")[2], kernel.fn.__name__))
        launch.launch(kernel, *args, **options)

    for module in MODULES:
        monkeypatch.setattr(module, "launch", partial(counted, module))
    return seen


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("rank", [3, 8])
def test_layers_equal_stock(rank, policy, launches):
    model = rounded(torch.float32, layers=2, rank=rank, **SHAPE)
    hidden, grads = run(model, batch_of(lengths=SHORT))
    installed = install(model, policy=policy)
    ours, our_grads = run(model, batch_of(lengths=SHORT))
    assert installed.fallbacks == {}
    assert {module for module, _ in launches} == {"glu", "residual", "rms_norm", "rope"}
    assert {module for module, name in launches if "backward" in name} == {"glu", "rms_norm"}
    assert (ours - hidden).norm() / hidden.norm() < TOLERANCE[torch.float32]
    assert error(our_grads, grads) < TOLERANCE[torch.float32]


def test_policies_agree_bit_for_bit():
    model = rounded(torch.float16, rank=8, **SHAPE)
    hidden, grads = fused(model, torch.float16, batch_of(lengths=SHORT))
    for policy in ("recompute_gate_up", "recompute", "offload"):
        other, other_grads = fused(model, torch.float16, batch_of(lengths=SHORT), policy)
        assert torch.equal(other, hidden)
        assert [name for name in grads if not torch.equal(other_grads[name], grads[name])] == []


@pytest.mark.parametrize("rank", [3, 8])
def test_float16_errs_as_the_references_do(rank, monkeypatch):
    """Rounding is where the kernels and their plain forms could differ and float32 would not show it."""
    model = rounded(torch.float16, rank=rank, **SHAPE)
    exact = computed(model.double(), torch.float64, batch_of(lengths=SHORT))
    model = rounded(torch.float16, rank=rank, **SHAPE)
    kernels = squared(fused(model, torch.float16, batch_of(lengths=SHORT)), exact)
    monkeypatch.setattr(launch, "switched_off", SwitchedOff())
    references = squared(fused(model, torch.float16, batch_of(lengths=SHORT)), exact)
    assert sum(kernels.values()) < 1.5 * sum(references.values())


class SwitchedOff:
    """Every kernel."""

    def __contains__(self, name: object) -> bool:
        return True
