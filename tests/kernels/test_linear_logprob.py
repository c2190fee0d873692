"""The head without logits against the plain float64 computation, value and every gradient."""

from __future__ import annotations

import pytest
import torch

from tunesmith.kernels import linear_logprob as module
from tunesmith.kernels.linear_logprob import linear_cross_entropy, linear_logprob

# A GEMM over D = 48 rounds to about half an ulp of its type; softmax and the chunk sums add a little.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
RULES = [(1.0, None), (0.25, None), (1.0, 4.0), (2.0, 30.0)]


def _inputs(rows: int, dtype: torch.dtype, *, bias: bool) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 48, dtype=torch.float64).to(dtype)
    weight = (torch.randn(101, 48, dtype=torch.float64) * 0.3).to(dtype)
    bias_V = torch.randn(101, dtype=torch.float64).to(dtype) if bias else None
    targets = torch.randint(0, 101, (rows,))
    return hidden, weight, bias_V, targets, torch.rand(rows, dtype=torch.float64)


def _plain(hidden, weight, bias, targets, scale, softcap):
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]


def _relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float(
        (ours.detach().double() - exact.detach().double()).norm()
        / exact.detach().double().norm().clamp_min(1e-30)
    )


@pytest.fixture(params=[1, 16, 17, 50], ids=lambda rows: f"{rows}rows")
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Row counts around the chunk of 16 rows, so that whole, partial and single chunks occur."""
    monkeypatch.setattr(module, "CHUNK_BYTES_CPU", 4 * 101 * 16)  # chunks of 16 rows, 8 in float64
    return request.param


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("scale", "softcap"), RULES)
@pytest.mark.parametrize("form", ["logprob", "cross_entropy"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_value_and_gradients_match_float64(rows, dtype, scale, softcap, form, bias):
    hidden, weight, bias_V, targets, weights = _inputs(rows, dtype, bias=bias)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias_V) if t is not None]
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact_bias = exact_leaves[2] if bias else None
    exact = -(weights * _plain(exact_leaves[0], exact_leaves[1], exact_bias, targets, scale, softcap)).sum()
    exact.backward()

    options = {"bias_V": bias_V, "scale": scale, "softcap": softcap}
    if form == "logprob":
        logprob = linear_logprob(hidden, weight, targets, **options)
        loss = -(weights.to(logprob.dtype) * logprob).sum()
    else:
        loss = linear_cross_entropy(hidden, weight, targets, weights, **options)
    loss.backward()

    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert _relative(loss, exact) < TOLERANCE[dtype]
    for ours, reference in zip(leaves, exact_leaves, strict=True):
        assert ours.grad.dtype == dtype
        assert _relative(ours.grad, reference.grad) < TOLERANCE[dtype]


def test_tiny_weights_survive_float16():
    """A weight of 1e-6 a token, as in a step of a million tokens, must not vanish in float16 gradients."""
    hidden, weight, _, targets, _ = _inputs(40, torch.float16, bias=False)
    hidden.requires_grad_()
    weights = torch.full((40,), 1e-6)
    (linear_cross_entropy(hidden, weight, targets, weights) * 65536).backward()
    exact = hidden.detach().double().requires_grad_()
    (-(weights * _plain(exact, weight, None, targets, 1.0, None)).sum() * 65536).backward()
    assert _relative(hidden.grad, exact.grad) < 4e-3


def test_frozen_head_gets_no_gradient_and_no_grad_mode_works():
    hidden, weight, _, targets, weights = _inputs(5, torch.float32, bias=False)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets, weights).backward()
    assert weight.grad is None
    assert hidden.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets, weights).requires_grad


def test_no_rows_give_zero_loss_and_zero_gradients():
    hidden = torch.zeros(0, 48, requires_grad=True)
    loss = linear_cross_entropy(
        hidden, torch.randn(101, 48), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    )
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == (0, 48)


def test_logits_never_exist_in_full(monkeypatch: pytest.MonkeyPatch):
    """The largest chunk that is ever computed is the budgeted one."""
    monkeypatch.setattr(module, "CHUNK_BYTES_CPU", 4 * 101 * 16)
    seen = []
    original = module._logits
    monkeypatch.setattr(module, "_logits", lambda h, head: seen.append(h.shape[0]) or original(h, head))
    hidden, weight, _, targets, weights = _inputs(50, torch.float32, bias=False)
    linear_cross_entropy(hidden, weight, targets, weights)
    assert max(seen) == 16
    assert sum(seen) == 50


def test_the_sums_of_a_loss_are_given_back_once_they_are_read():
    """A float32 gradient of the head would otherwise stay as long as the loss does."""
    hidden, weight, _, targets, weights = _inputs(20, torch.float32, bias=False)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets, weights)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["logprob", "cross_entropy"])
def test_a_trained_heads_gradient_is_rounded_once_on_the_gpu(monkeypatch, form, dtype):
    """Summed over many chunks in float32: as exact as one GEMM with one rounding, wherever rows are cut."""
    hidden, weight, _, targets, weights = (
        None if t is None else t.cuda() for t in _inputs(2000, dtype, bias=False)
    )
    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    (weights * _plain(exact[0], exact[1], None, targets, 1.0, None)).sum().backward()
    errors = []
    for rows in (2000, 128):
        monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 101 * rows)
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        if form == "logprob":
            (weights.float() * linear_logprob(leaves[0], leaves[1], targets)).sum().backward()
        else:
            (-linear_cross_entropy(leaves[0], leaves[1], targets, weights)).backward()
        errors.append(_relative(leaves[1].grad, exact[1].grad))
    assert errors[1] < 1.3 * errors[0]
    assert errors[0] < TOLERANCE[dtype] / 3
