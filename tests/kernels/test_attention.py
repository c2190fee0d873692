"""Packed attention on the fused buffer: every backend against plain attention in float64, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tunesmith.kernels import attention, attention_cudnn
from tunesmith.kernels.attention import (
    BACKENDS,
    Documents,
    Heads,
    attention_backward,
    attention_forward,
    choose_backend,
)

ODD = (5, 1, 64, 130, 1, 257)
EQUAL = (128, 128, 128)
LAYOUTS = [Heads(8, 2, 64), Heads(4, 4, 128), Heads(6, 2, 32, scale=0.3)]


def _documents(lengths: tuple[int, ...], device: str) -> Documents:
    return Documents(lengths, torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32))


def _plain(fused: torch.Tensor, heads: Heads, lengths: tuple[int, ...]) -> torch.Tensor:
    """Softmax attention written out, document by document."""
    groups = heads.query // heads.key_value
    outputs = []
    for part in fused.split(list(lengths)):
        q, k, v = heads.split(part)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("thk,shk->hts", q, k) * heads.factor
        hidden = torch.ones(part.shape[0], part.shape[0], dtype=torch.bool, device=fused.device).triu(1)
        probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hts,shk->thk", probabilities, v).flatten(1))
    return torch.cat(outputs)


def _check(name, dtype, lengths: tuple[int, ...], heads: Heads, device: str, tolerance: float, pad: int = 0):
    torch.manual_seed(0)
    total = sum(lengths)
    buffer = torch.randn(total, heads.columns + pad, dtype=torch.float64, device=device).to(dtype)
    fused = buffer[:, : heads.columns]
    grad = torch.randn(total, heads.query * heads.size, dtype=torch.float64, device=device).to(dtype)
    exact = fused.double().requires_grad_()
    want = _plain(exact, heads, lengths)
    want.backward(grad.double())
    documents = _documents(lengths, device)
    output, used, saved = attention_forward(fused, heads, documents, backend=name)
    got = attention_backward(grad, fused, output, saved, used, heads, documents)
    assert used == name
    assert output.shape == want.shape
    assert got.shape == exact.shape
    assert float((output.double() - want).norm() / want.norm()) < tolerance
    assert float((got.double() - exact.grad).norm() / exact.grad.norm()) < tolerance


@pytest.mark.parametrize("heads", LAYOUTS, ids=str)
@pytest.mark.parametrize("lengths", [ODD, EQUAL, (1,), (40,)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_reference(dtype, tolerance, lengths, heads):
    _check("sdpa", dtype, lengths, heads, "cpu", tolerance, pad=16)


def test_cpu_takes_the_reference():
    assert choose_backend(torch.zeros(4, 12 * 64), LAYOUTS[0], _documents((4,), "cpu")) == "sdpa"


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_is_not_chosen_where_runs_must_repeat(deterministic, monkeypatch):
    tensor = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    monkeypatch.setattr(attention_cudnn, "_compute_capability", lambda: (9, 0))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert attention_cudnn.cudnn_computes(tensor, LAYOUTS[0]) is not deterministic
    assert attention._flash_fits(tensor, LAYOUTS[0], _documents((4,), "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(9, 3, 64), Heads(6, 2, 64, scale=0.3)], ids=str)
@pytest.mark.parametrize("lengths", [ODD, EQUAL, (1,), (700,), (16,) * 40], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(BACKENDS))
def test_backends_on_the_gpu(name, dtype, lengths, heads):
    probe = torch.empty(sum(lengths), heads.columns, dtype=dtype, device="cuda")
    if not BACKENDS[name].fits(probe, heads, _documents(lengths, "cuda")):
        pytest.skip("this backend does not compute this")
    # inputs and outputs carry 8 (bfloat16) or 11 (float16) bits
    _check(name, dtype, lengths, heads, "cuda", 1.5e-2 if dtype == torch.bfloat16 else 2e-3)
