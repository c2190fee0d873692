"""Packed attention on the fused buffer: every backend against plain attention in float64, forward and backward."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.attention_plain import plain_attention
from tunesmith.kernels import attention, attention_cudnn
from tunesmith.kernels.attention import (
    BACKENDS,
    Documents,
    Heads,
    Scores,
    attention_backward,
    attention_forward,
    choose_backend,
)

ODD = (5, 1, 64, 130, 1, 257)
EQUAL = (128, 128, 128)
LAYOUTS = [Heads(8, 2, 64), Heads(4, 4, 128), Heads(6, 2, 32)]
KINDS = [
    Scores(),
    Scores(scale=0.3),
    Scores(window=1),
    Scores(window=50),
    Scores(scale=0.05, window=100),
    Scores(window=4096),
    Scores(softcap=2.0),
    Scores(scale=0.2, window=70, softcap=3.0),
]


def _documents(lengths: tuple[int, ...], device: str) -> Documents:
    return Documents(lengths, torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32))


def _check(
    name, dtype, lengths: tuple[int, ...], heads: Heads, scores: Scores, device: str, tolerance: float, pad=0
):
    torch.manual_seed(0)
    total, width = sum(lengths), heads.query * heads.size
    buffer = torch.randn(total, heads.columns + pad, dtype=torch.float64, device=device).to(dtype)
    fused = buffer[:, : heads.columns]
    grad = torch.randn(total, width, dtype=torch.float64, device=device).to(dtype)
    exact = fused.double().clone().requires_grad_()
    want, _ = plain_attention(exact, heads, lengths, scores)
    want.backward(grad.double())
    want = want.detach()
    documents = _documents(lengths, device)
    output, used, saved = attention_forward(fused, heads, documents, scores=scores, backend=name, room=pad)
    got = attention_backward(grad, fused, output, saved, used, heads, documents, scores=scores, room=pad)
    assert used == name
    assert output.shape == want.shape
    assert got.shape == exact.shape
    assert got.stride(0) == heads.columns + pad
    assert float((output.double() - want).norm() / want.norm()) < tolerance
    assert float((got.double() - exact.grad).norm() / exact.grad.norm()) < tolerance


@pytest.mark.parametrize("scores", KINDS, ids=str)
@pytest.mark.parametrize("heads", LAYOUTS, ids=str)
@pytest.mark.parametrize("lengths", [ODD, (128, 128), (1,)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_reference(dtype, tolerance, lengths, heads, scores):
    _check("sdpa", dtype, lengths, heads, scores, "cpu", tolerance, pad=16)


def test_a_window_of_two_averages_two_values():
    """With queries of zero all visible keys weigh the same: each output is the mean of what the query sees."""
    heads = Heads(1, 1, 8)
    fused = torch.zeros(4, heads.columns, dtype=torch.float64)
    fused[:, -8:] = torch.tensor([1.0, 3.0, 5.0, 11.0])[:, None]
    output, _, _ = attention_forward(fused, heads, _documents((3, 1), "cpu"), scores=Scores(window=2))
    assert output[:, 0].tolist() == [1.0, 2.0, 4.0, 11.0]


def test_a_cap_bounds_scores():
    """Two keys at scores of 0 and 1000, capped at ln 2 · tanh: weights 1 and 2."""
    heads = Heads(1, 1, 8)
    fused = torch.zeros(2, heads.columns, dtype=torch.float64)
    fused[1, 0] = fused[1, 8] = 1.0
    fused[:, -8:] = torch.tensor([0.0, 3.0])[:, None]
    scores = Scores(scale=1000.0, softcap=math.log(2))
    output, _, _ = attention_forward(fused, heads, _documents((2,), "cpu"), scores=scores)
    assert output[1].tolist() == pytest.approx([2.0] * 8)


def test_cpu_takes_the_reference():
    assert choose_backend(torch.zeros(4, 12 * 64), LAYOUTS[0], _documents((4,), "cpu")) == "sdpa"


# ---------------------------------------------------------------------- which backend


def _chosen(monkeypatch, scores: Scores, *, size=128, dtype=torch.bfloat16, card=(9, 0), lengths=ODD) -> str:
    """The backend on a card that is not here, where everything is installed."""
    tensor = SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))
    monkeypatch.setattr(attention_cudnn, "compute_capability", lambda: card)
    monkeypatch.setattr(attention, "compute_capability", lambda: card)
    monkeypatch.setattr(attention_cudnn, "cudnn_frontend", lambda: object())
    monkeypatch.setattr(attention, "triton_fits", lambda *_: True)
    table = {**BACKENDS, "triton": attention.Backend(lambda *_: True, *[None] * 2)}
    monkeypatch.setattr(attention, "BACKENDS", table)
    return choose_backend(tensor, Heads(8, 4, size), _documents(lengths, "cpu"), scores)


@pytest.mark.parametrize(
    ("backend", "scores", "options"),
    [
        ("cudnn_ragged", Scores(), {}),
        ("cudnn_equal", Scores(scale=0.1), {"lengths": EQUAL}),
        ("cudnn_equal", Scores(window=100), {"lengths": EQUAL}),
        ("cudnn_ragged", Scores(window=100), {"size": 256}),
        ("flash", Scores(window=100), {"size": 256, "card": (10, 0)}),
        ("flash", Scores(scale=0.1, window=100), {"card": (8, 6), "size": 96}),
        ("triton", Scores(), {"card": (8, 6), "size": 224}),
        ("triton", Scores(), {"dtype": torch.float32}),
        ("triton", Scores(softcap=50.0), {}),
        ("triton", Scores(softcap=50.0, window=100), {"size": 256, "lengths": EQUAL}),
    ],
    ids=str,
)
def test_the_fastest_that_fits_is_chosen(backend, scores, options, monkeypatch):
    assert _chosen(monkeypatch, scores, **options) == backend


def test_a_window_that_hides_nothing_is_none():
    documents = _documents(ODD, "cpu")
    assert Scores(window=257).within(documents) == Scores()
    assert Scores(scale=0.1, window=256).within(documents) == Scores(scale=0.1, window=256)
    bounded = Documents((4, 4), documents.cu_seqlens, bound=8)
    assert Scores(window=8).within(bounded) == Scores()
    assert Scores(window=7).within(bounded).window == 7


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_is_not_chosen_where_runs_must_repeat(deterministic, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert _chosen(monkeypatch, Scores()) == ("flash" if deterministic else "cudnn_ragged")


# ---------------------------------------------------------------------- on a GPU

# inputs and outputs carry 8 (bfloat16) or 11 (float16) bits, products of float32 22
GPU_TOLERANCES = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def _check_on_the_gpu(name, dtype, lengths, heads, scores, pad=0):
    probe = torch.empty(sum(lengths), heads.columns, dtype=dtype, device="cuda")
    documents = _documents(lengths, "cuda")
    if not BACKENDS[name].fits(probe, heads, documents, scores.within(documents)):
        pytest.skip("this backend does not compute this")
    _check(name, dtype, lengths, heads, scores, "cuda", GPU_TOLERANCES[dtype], pad)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [Heads(32, 8, 128), Heads(9, 3, 64)], ids=str)
@pytest.mark.parametrize("lengths", [ODD, EQUAL, (1,), (700,), (16,) * 40], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", list(BACKENDS))
def test_backends_on_the_gpu(name, dtype, lengths, heads):
    _check_on_the_gpu(name, dtype, lengths, heads, Scores())


@pytest.mark.gpu
@pytest.mark.parametrize("scores", KINDS[1:], ids=str)
@pytest.mark.parametrize(
    "heads", [Heads(8, 2, 64), Heads(4, 2, 96), Heads(8, 1, 128), Heads(4, 4, 256)], ids=str
)
@pytest.mark.parametrize("lengths", [ODD, EQUAL], ids=str)
@pytest.mark.parametrize("name", list(BACKENDS))
def test_scores_on_the_gpu(name, lengths, heads, scores):
    _check_on_the_gpu(name, torch.bfloat16, lengths, heads, scores)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [16, 40, 64, 72, 80, 96, 112, 160, 192, 224, 256])
@pytest.mark.parametrize("dtype", list(GPU_TOLERANCES), ids=str)
def test_head_sizes_of_the_kernels_on_the_gpu(dtype, size):
    """Every row of their table of blocks, in buffers whose rows are 8 columns apart."""
    _check_on_the_gpu("triton", dtype, (300, 1, 77), Heads(4, 2, size), Scores(window=90, softcap=5.0), pad=8)
