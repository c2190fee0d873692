"""The hand-written layer with its Triton kernels, on CPU tensors in Triton's interpreter.

Not collected by itself: the interpreter is chosen when the kernel modules are imported, so
`test_decoder_interpreted.py` runs this file in a process of its own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.test_decoder import TOLERANCE, error, run
from tests.models.test_decoder_truths import batch_of, computed, fused, rounded, squared
from tunesmith.kernels import glu, launch, residual, rms_norm, rope
from tunesmith.models.install import install

SHORT = [5, 1, 9, 1]
SHAPE = {"hidden_size": 48, "intermediate_size": 208, "num_attention_heads": 6, "num_key_value_heads": 2}
MODULES = (glu, residual, rms_norm, rope)
"""Where the kernels of a layer over weights in 16 or 32 bits are."""


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Module and name of every kernel that ran, in order."""
    assert launch.INTERPRETED
    seen: list[tuple[str, str]] = []

    def counted(module, kernel, *args, **options):
        seen.append((module.__name__.rpartition(".")[2], kernel.fn.__name__))
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


FORWARD = [
    ("rms_norm", "_forward_kernel"),
    ("rope", "_rope_kernel"),
    ("residual", "_residual_kernel"),
    ("rms_norm", "_forward_kernel"),
    ("glu", "_forward_kernel"),
    ("glu", "_sum_splits_kernel"),
    ("residual", "_residual_kernel"),
]
BACKWARD = [
    ("glu", "_adapter_backward_kernel"),
    ("glu", "_sum_splits_kernel"),
    ("rms_norm", "_backward_kernel"),
    ("rope", "_rope_kernel"),
    ("rms_norm", "_backward_kernel"),
]


class Gemms(TorchDispatchMode):
    """Counts matrix products; the interpreter makes its own elsewhere."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("policy", "again", "gemms"),
    [
        # products with weights: 4 forward, 4 backward; with ranks: u of output (the activation's kernel makes that of
        # down), ∂u of q, k, v and of output and down (it makes that of gate and up), ∂A of four groups, ∂B of seven
        # projections, and ∂u A of the output
        ("keep", [], 4 + 4 + 1 + 3 + 2 + 4 + 7 + 1),
        ("recompute_gate_up", FORWARD[3:4], 1 + 4 + 4 + 1 + 3 + 2 + 4 + 7 + 1),
        ("recompute_projections", FORWARD[:2] + FORWARD[3:4], 2 + 4 + 4 + 1 + 3 + 2 + 4 + 7 + 1),
        ("recompute", FORWARD[:4], 3 + 4 + 4 + 1 + 3 + 2 + 4 + 7 + 1),
    ],
)
def test_a_llama_layer_launches_no_more_than_this(policy, again, gemms, launches):
    """The figures of `benchmarks/RESULTS.md` stand for these launches; other families may not add to them."""
    model = rounded(torch.float32, layers=1, rank=8, **SHAPE)
    installed = install(model, policy=policy)
    hidden = torch.randn(1, 16, SHAPE["hidden_size"], requires_grad=True)
    angle = torch.randn(1, 16, 4).repeat(1, 1, 2)
    with Gemms() as counted:
        installed.layers[0](hidden, position_embeddings=(angle.cos(), angle.sin())).sum().backward()
    assert launches == FORWARD + again + BACKWARD
    assert counted.count == gemms


def test_policies_agree_bit_for_bit():
    model = rounded(torch.float16, rank=8, **SHAPE)
    hidden, grads = fused(model, torch.float16, batch_of(lengths=SHORT))
    for policy in ("recompute_gate_up", "recompute_projections", "recompute", "offload"):
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
