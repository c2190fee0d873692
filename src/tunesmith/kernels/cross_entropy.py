"""Rows of logits to log-probabilities of the targets, and in place to the gradient of those.

`linear_logprob` forms logits in chunks; these two kernels read a chunk once or twice where plain torch reads and
writes it six times. With z = cap(scale · logits), cap(y) = c · tanh(y / c) or the identity:

    lse      = logsumexp_v z_v,   logprob = z_target − lse
    ∂logprob/∂logits_v = (onehot(target)_v − exp(z_v − lse)) · scale · (1 − (z_v / c)²)

The first pass keeps a running maximum and sum for each lane, so that no reduction across the row stops the loop:

    e = exp(−|z − m|);   s ← z > m ? s · e + 1 : s + e;   m ← max(m, z)       one exponential an element

Rejected: a maximum for the whole block in each turn, which waits for all warps twice a turn.

Shape suffixes: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.launch import accumulation_dtype, jit, launch, power_of_2, tl, use_triton

MAX_BLOCK = 8192
"""Logits of a turn: 16 for each of 512 threads, two 16-byte loads of a 16-bit type in flight. A chunk of 256 rows
is about two programs on each of 132 multiprocessors, 32 KiB in flight on each, more than what bandwidth times
latency asks for (25 B/ns · 800 ns = 20 KiB)."""


# ---------------------------------------------------------------------- kernel


@jit()
def _capped(x, scale, softcap, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """z. tanh(y) = 1 − 2 / (exp(2y) + 1), exact at both infinities."""
    z = x * scale
    if SOFTCAP:
        z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
    return z


@jit(do_not_specialize=["scale", "softcap"])
def _row_kernel(  # type: ignore[no-untyped-def]
    logits, targets, logprob, lse, vocabulary, row_stride, scale, softcap,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    target = tl.load(targets + row)
    z_target = _capped(tl.load(base + target).to(tl.float32), scale, softcap, SOFTCAP)
    col = tl.arange(0, BLOCK)
    # finite, so that a masked −inf gives exp(−inf) = 0 and no −inf − (−inf)
    top = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        live = first + col < vocabulary
        x = tl.load(base + first + col, mask=live, other=0.0).to(tl.float32)
        z = _capped(x, scale, softcap, SOFTCAP)
        z = tl.where(live, z, float("-inf"))
        e = tl.exp(-tl.abs(z - top))
        total = tl.where(z > top, total * e + 1.0, total + e)
        top = tl.maximum(top, z)
    highest = tl.max(top, axis=0)
    row_lse = highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))
    tl.store(logprob + row, z_target - row_lse)
    tl.store(lse + row, row_lse)
    if GRADIENT:
        # no warp may overwrite the row before all have read it
        tl.debug_barrier()
        for first in range(0, vocabulary, BLOCK):
            live = first + col < vocabulary
            x = tl.load(base + first + col, mask=live, other=0.0).to(tl.float32)
            z = _capped(x, scale, softcap, SOFTCAP)
            grad = (tl.where(first + col == target, 1.0, 0.0) - tl.exp(z - row_lse)) * scale
            if SOFTCAP:
                # ∂cap/∂y = 1 − tanh(y)²
                grad *= 1.0 - (z / softcap) * (z / softcap)
            tl.store(base + first + col, grad.to(logits.dtype.element_ty), mask=live)


# ---------------------------------------------------------------------- launcher


def _rows(
    logits_CV: Tensor, targets_C: Tensor, scale: float, softcap: float | None, gradient: bool
) -> tuple[Tensor, Tensor]:
    assert logits_CV.stride(1) == 1
    rows, vocabulary = logits_CV.shape
    block = min(MAX_BLOCK, power_of_2(vocabulary))
    logprob_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    lse_C = torch.empty_like(logprob_C)
    launch(
        _row_kernel, (rows,), logits_CV, targets_C, logprob_C, lse_C, vocabulary, logits_CV.stride(0),
        float(scale), 1.0 if softcap is None else float(softcap),
        SOFTCAP=softcap is not None, GRADIENT=gradient, BLOCK=block, num_warps=max(4, block // 512),
    )  # fmt: skip
    return logprob_C, lse_C


# ---------------------------------------------------------------------- operators


@torch.library.custom_op("tunesmith::softmax_gradient_", mutates_args={"logits_CV"})
def softmax_gradient_op_(
    logits_CV: Tensor, targets_C: Tensor, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """`softmax_gradient_` as an operator for torch.compile; in place and therefore not differentiable."""
    return softmax_gradient_(logits_CV, targets_C, scale=scale, softcap=softcap)


@softmax_gradient_op_.register_fake
def _(logits_CV: Tensor, *_others: Any) -> Tensor:
    return logits_CV.new_empty(logits_CV.shape[0], dtype=accumulation_dtype(logits_CV.dtype))


@torch.library.custom_op("tunesmith::logprob", mutates_args=())
def logprob_op(
    logits_CV: Tensor, targets_C: Tensor, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Log-probabilities of the targets as an operator for torch.compile and autograd."""
    return logprob_(logits_CV, targets_C, scale=scale, softcap=softcap)[0]


@logprob_op.register_fake
def _(logits_CV: Tensor, *_others: Any) -> Tensor:
    return logits_CV.new_empty(logits_CV.shape[0], dtype=accumulation_dtype(logits_CV.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    logits_CV, targets_C, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(logits_CV, targets_C)


def _autograd(ctx: Any, grad_C: Tensor) -> tuple[Tensor | None, ...]:
    logits_CV, targets_C = ctx.saved_tensors
    # on a copy, so that a second backward sees the logits
    grad_CV = logits_CV.clone(memory_format=torch.contiguous_format)
    softmax_gradient_op_(grad_CV, targets_C, ctx.scale, ctx.softcap)
    return (grad_CV * grad_C[:, None]).to(logits_CV.dtype), None, None, None


logprob_op.register_autograd(_autograd, setup_context=_setup_context)


# ---------------------------------------------------------------------- reference


def _capped_reference(
    logits_CV: Tensor, targets_C: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | float, Tensor, Tensor]:
    """z, ∂z/∂logits, logprob and lse."""
    z_CV = logits_CV.to(accumulation_dtype(logits_CV.dtype)) * scale
    slope_CV: Tensor | float = scale
    if softcap is not None:
        tanh_CV = torch.tanh(z_CV / softcap)
        z_CV, slope_CV = softcap * tanh_CV, scale * (1 - tanh_CV.square())
    lse_C = torch.logsumexp(z_CV, -1)
    return z_CV, slope_CV, z_CV.gather(-1, targets_C[:, None]).squeeze(-1) - lse_C, lse_C


def softmax_gradient_reference_(
    logits_CV: Tensor, targets_C: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """`softmax_gradient_` in plain torch."""
    z_CV, slope_CV, logprob_C, lse_C = _capped_reference(logits_CV, targets_C, scale, softcap)
    grad_CV = -torch.exp(z_CV - lse_C[:, None])
    grad_CV.scatter_add_(-1, targets_C[:, None], torch.ones_like(lse_C)[:, None])
    logits_CV.copy_((grad_CV * slope_CV).to(logits_CV.dtype))
    return logprob_C


def logprob_reference_(
    logits_CV: Tensor, targets_C: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`logprob_` in plain torch."""
    return _capped_reference(logits_CV, targets_C, scale, softcap)[2:]


# ---------------------------------------------------------------------- public


def softmax_gradient_(
    logits_CV: Tensor, targets_C: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Replace logits by ∂logprob/∂logits, before scale and cap, and return the log-probabilities.

    Args:
        logits_CV: raw logits, overwritten in their type; rows may be strided.
        targets_C: int64 token ids, all within the vocabulary.
        scale: factor on the logits.
        softcap: cap c of z ← c · tanh(z / c), applied after the factor.

    Returns:
        float32 `[C]` (float64 for float64).
    """
    if use_triton(logits_CV, "softmax_gradient_"):
        return _rows(logits_CV, targets_C, scale, softcap, gradient=True)[0]
    return softmax_gradient_reference_(logits_CV, targets_C, scale=scale, softcap=softcap)


def logprob_(
    logits_CV: Tensor, targets_C: Tensor, *, scale: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the log-sum-exp of its row, both as `softmax_gradient_` returns them.

    The logits are left as they are; arguments as in `softmax_gradient_`.
    """
    if use_triton(logits_CV, "logprob_"):
        return _rows(logits_CV, targets_C, scale, softcap, gradient=False)
    return logprob_reference_(logits_CV, targets_C, scale=scale, softcap=softcap)
