"""Root-mean-square norm with the residual sum in front of it or behind it, forward and backward.

    summed = hidden + residual                       rounded to the type, as the residual stream is
    rstd   = (mean_j summed_j² + eps)^(-1/2)         float32
    normed = summed · rstd · (offset + weight)       offset 1 is Gemma's (1 + weight)
    out    = residual + normed of hidden             instead of the first line, for norms behind a block

A row is read once, kept in registers and written once: a norm costs its memory traffic. The scaled row is
rounded once, at the end; Hugging Face's Llama rounds before the weight too, which loses half a bit. Rejected:
keeping `normed` for backward, because backward recomputes it from `summed` and `rstd` in the pass that it makes
anyway (`recompute`).

Rows wider than 65,536 take the torch reference.

Shape suffixes: T tokens, D hidden size, P partial sums of the weight gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.launch import (
    accumulation_dtype,
    jit,
    launch,
    multiprocessors,
    power_of_2,
    tl,
    use_triton,
)

MAX_WIDTH = 65536
"""Widest row of one program: 64 elements a thread of the largest block of threads."""
TILE = 1024
"""Elements of a program whose rows are narrower: 8 for each of 128 threads, one 16-byte load of a 16-bit type."""
PROGRAMS_PER_SM = 4
"""Programs of the weight gradient. Two of 256 threads are resident on a multiprocessor at D = 4,096, two more
even out the tail. Their partial rows are P · D · 4 bytes: at 132 multiprocessors and 8,192 tokens 3% of the
traffic of the pass."""


# ---------------------------------------------------------------------- kernels


@jit(do_not_specialize=["tokens"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    hidden, residual, weight, normed, rstd, summed, tokens, width, hidden_row, residual_row, eps, offset,
    RESIDUAL: tl.constexpr, BEHIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    live = (row < tokens)[:, None] & (col < width)
    at = row.to(tl.int64)[:, None]
    x = tl.load(hidden + at * hidden_row + col, mask=live, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual + at * residual_row + col, mask=live, other=0.0).to(tl.float32)
        rounded = x.to(summed.dtype.element_ty)
        tl.store(summed + at * width + col, rounded, mask=live)
        x = rounded.to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(rstd + row, r, mask=row < tokens)
    w = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32) + offset
    y = x * r[:, None] * w
    if BEHIND:
        y += tl.load(residual + at * residual_row + col, mask=live, other=0.0).to(tl.float32)
    tl.store(normed + at * width + col, y.to(normed.dtype.element_ty), mask=live)


@jit(do_not_specialize=["tokens"])
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad, summed, weight, rstd, add, grad_hidden, partial_PD, normed,
    tokens, width, grad_row, summed_row, add_row, offset,
    ADD: tl.constexpr, WEIGHT_GRAD: tl.constexpr, RECOMPUTE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # With x̂ = x · r, w = offset + weight and d = grad · w, from ∂r/∂x_j = −r³ · x_j / D:
    #     ∂x_j      = r · (d_j − x̂_j · mean_i(d_i · x̂_i))  (+ add_j, what reaches x past the norm)
    #     ∂weight_j = Σ_t grad_tj · x̂_tj
    col = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        live = (row < tokens)[:, None] & (col < width)
        at = row.to(tl.int64)[:, None]
        r = tl.load(rstd + row, mask=row < tokens, other=0.0)[:, None]
        unit = tl.load(summed + at * summed_row + col, mask=live, other=0.0).to(tl.float32) * r
        g = tl.load(grad + at * grad_row + col, mask=live, other=0.0).to(tl.float32)
        # read again for each row, from the L1 cache: kept, it would cost a register an element
        w = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32) + offset
        d = g * w
        mean = tl.sum(d * unit, axis=1) / width
        dx = r * (d - unit * mean[:, None])
        if ADD:
            dx += tl.load(add + at * add_row + col, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_hidden + at * width + col, dx.to(grad_hidden.dtype.element_ty), mask=live)
        if RECOMPUTE:
            tl.store(normed + at * width + col, (unit * w).to(normed.dtype.element_ty), mask=live)
        if WEIGHT_GRAD:
            total += g * unit
    if WEIGHT_GRAD:
        at = tl.program_id(0) * width + tl.arange(0, BLOCK)
        tl.store(partial_PD + at, tl.sum(total, axis=0), mask=tl.arange(0, BLOCK) < width)


# ---------------------------------------------------------------------- launchers


def tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a program, and its warps.

    8 elements a thread up to 1,024 columns, 16 up to 8,192: backward keeps x̂, grad, w and the sums of the weight
    gradient, four registers an element, and stays below 128 registers with two programs on a multiprocessor.
    Wider rows take the elements that remain.
    """
    block = power_of_2(width)
    rows = max(1, TILE // block)
    warps = 4 if rows * block <= 2048 else min(32, block // 512)
    return rows, block, warps


def contiguous_rows(tensor_TD: Tensor) -> Tensor:
    """The tensor, copied only where its rows are not contiguous."""
    return tensor_TD if tensor_TD.stride(-1) == 1 else tensor_TD.contiguous()


def _forward(
    hidden_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    residual_TD: Tensor | None,
    offset: float,
    *,
    behind: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width = hidden_TD.shape
    rows, block, warps = tile(width)
    normed_TD = torch.empty((tokens, width), dtype=hidden_TD.dtype, device=hidden_TD.device)
    rstd_T = torch.empty(tokens, dtype=torch.float32, device=hidden_TD.device)
    before = residual_TD is not None and not behind
    summed_TD = torch.empty_like(normed_TD) if before else hidden_TD
    x, y = contiguous_rows(hidden_TD), hidden_TD if residual_TD is None else contiguous_rows(residual_TD)
    launch(
        _forward_kernel, (-(-tokens // rows),), x, y, weight_D, normed_TD, rstd_T, summed_TD,
        tokens, width, x.stride(0), y.stride(0), eps, offset,
        RESIDUAL=before, BEHIND=behind, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return normed_TD, rstd_T, summed_TD


def _backward(
    grad_TD: Tensor, summed_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, add_TD: Tensor | None,
    weight_grad: bool, offset: float, recompute: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    tokens, width = summed_TD.shape
    rows, block, warps = tile(width)
    programs = -(-tokens // rows)
    hidden_TD = torch.empty((tokens, width), dtype=summed_TD.dtype, device=summed_TD.device)
    normed_TD = torch.empty_like(hidden_TD) if recompute else hidden_TD
    partial_PD = rstd_T
    if weight_grad:
        programs = min(programs, PROGRAMS_PER_SM * multiprocessors(summed_TD))
        partial_PD = torch.empty((programs, width), dtype=torch.float32, device=summed_TD.device)
    grad, x, add = (
        contiguous_rows(grad_TD),
        contiguous_rows(summed_TD),
        hidden_TD if add_TD is None else contiguous_rows(add_TD),
    )
    launch(
        _backward_kernel, (programs,), grad, x, weight_D, rstd_T, add, hidden_TD, partial_PD, normed_TD,
        tokens, width, grad.stride(0), x.stride(0), add.stride(0), offset,
        ADD=add_TD is not None, WEIGHT_GRAD=weight_grad, RECOMPUTE=recompute,
        ROWS=rows, BLOCK=block, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return hidden_TD, partial_PD.sum(0) if weight_grad else None, normed_TD if recompute else None


# ---------------------------------------------------------------------- operators


@torch.library.custom_op("tunesmith::rms_norm", mutates_args=())
def rms_norm_op(
    hidden_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`rms_norm` without a residual as an operator for torch.compile and autograd: (normed, rstd)."""
    return rms_norm(hidden_TD, weight_D, eps, offset=offset)[:2]


@rms_norm_op.register_fake
def _(hidden_TD: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    rstd_T = hidden_TD.new_empty(hidden_TD.shape[0], dtype=accumulation_dtype(hidden_TD.dtype))
    return hidden_TD.new_empty(hidden_TD.shape), rstd_T


@torch.library.custom_op("tunesmith::rms_norm_backward", mutates_args=())
def rms_norm_backward_op(
    grad_TD: Tensor, hidden_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states (in their type) and weight (in the accumulation type)."""
    hidden, weight, _ = rms_norm_backward(
        grad_TD, hidden_TD, weight_D, rstd_T, weight_grad=True, offset=offset
    )
    assert weight is not None
    return hidden, weight


@rms_norm_backward_op.register_fake
def _(
    _grad_TD: Tensor, hidden_TD: Tensor, _weight_D: Tensor, rstd_T: Tensor, *_others: Any
) -> tuple[Tensor, Tensor]:
    return hidden_TD.new_empty(hidden_TD.shape), rstd_T.new_empty(hidden_TD.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden_TD, weight_D, _, offset = inputs
    ctx.save_for_backward(hidden_TD, weight_D, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.offset = offset


def _autograd(ctx: Any, grad_TD: Tensor, _grad_rstd: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden_TD, weight_D, rstd_T = ctx.saved_tensors
    hidden, weight = rms_norm_backward_op(grad_TD, hidden_TD, weight_D, rstd_T, ctx.offset)
    return hidden, weight.to(weight_D.dtype), None, None


rms_norm_op.register_autograd(_autograd, setup_context=_setup_context)


# ---------------------------------------------------------------------- reference


def rms_norm_reference(
    hidden_TD: Tensor, weight_D: Tensor, eps: float, *, residual_TD: Tensor | None = None, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`rms_norm` in plain torch."""
    dtype = accumulation_dtype(hidden_TD.dtype)
    summed_TD = hidden_TD
    if residual_TD is not None:
        summed_TD = (hidden_TD.to(dtype) + residual_TD.to(dtype)).to(hidden_TD.dtype)
    wide_TD = summed_TD.to(dtype)
    rstd_T = torch.rsqrt(wide_TD.square().mean(-1) + eps)
    normed_TD = wide_TD * rstd_T[:, None] * (offset + weight_D.to(dtype))
    return normed_TD.to(hidden_TD.dtype), rstd_T, summed_TD


def rms_norm_backward_reference(
    grad_TD: Tensor,
    summed_TD: Tensor,
    weight_D: Tensor,
    rstd_T: Tensor,
    *,
    add_TD: Tensor | None = None,
    weight_grad: bool = False,
    offset: float = 0.0,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`rms_norm_backward` in plain torch; the derivative is written out in the kernel."""
    dtype = accumulation_dtype(summed_TD.dtype)
    wide_TD, factor_D = grad_TD.to(dtype), offset + weight_D.to(dtype)
    unit_TD = summed_TD.to(dtype) * rstd_T[:, None]
    scaled_TD = wide_TD * factor_D
    hidden_TD = rstd_T[:, None] * (scaled_TD - unit_TD * (scaled_TD * unit_TD).mean(-1, keepdim=True))
    if add_TD is not None:
        hidden_TD = hidden_TD + add_TD.to(dtype)
    weight = (wide_TD * unit_TD).sum(0) if weight_grad else None
    normed = (unit_TD * factor_D).to(summed_TD.dtype) if recompute else None
    return hidden_TD.to(summed_TD.dtype), weight, normed


def add_normed_reference(
    hidden_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`add_normed` in plain torch."""
    dtype = accumulation_dtype(hidden_TD.dtype)
    wide_TD = hidden_TD.to(dtype)
    rstd_T = torch.rsqrt(wide_TD.square().mean(-1) + eps)
    normed_TD = wide_TD * rstd_T[:, None] * (offset + weight_D.to(dtype))
    return (residual_TD.to(dtype) + normed_TD).to(hidden_TD.dtype), rstd_T


# ---------------------------------------------------------------------- public


def rms_norm(
    hidden_TD: Tensor, weight_D: Tensor, eps: float, *, residual_TD: Tensor | None = None, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the residual and normalise.

    Args:
        hidden_TD: hidden states; rows may be strided.
        weight_D: the norm's weight, in any floating type.
        eps: added to the mean square.
        residual_TD: what is added to `hidden_TD` first.
        offset: added to the weight (1 for Gemma).

    Returns:
        normed_TD, contiguous, in the type of `hidden_TD`; rstd_T in float32 (float64 for float64); summed_TD, the
        sum rounded to the type, which is `hidden_TD` itself without a residual. Not recorded by autograd.
    """
    if use_triton(hidden_TD, "rms_norm") and hidden_TD.shape[1] <= MAX_WIDTH:
        return _forward(hidden_TD, weight_D, eps, residual_TD, offset)
    return rms_norm_reference(hidden_TD, weight_D, eps, residual_TD=residual_TD, offset=offset)


def add_normed(
    hidden_TD: Tensor, weight_D: Tensor, eps: float, residual_TD: Tensor, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """residual + norm(hidden), as norms behind a block want it; rounded once.

    Its gradient reaches the residual as it is and `hidden_TD` through `rms_norm_backward`.

    Returns:
        The sum, contiguous, in the type of `hidden_TD`; rstd_T in float32 (float64 for float64). Not recorded by
        autograd.
    """
    if use_triton(hidden_TD, "add_normed") and hidden_TD.shape[1] <= MAX_WIDTH:
        return _forward(hidden_TD, weight_D, eps, residual_TD, offset, behind=True)[:2]
    return add_normed_reference(hidden_TD, weight_D, eps, residual_TD, offset=offset)


def rms_norm_backward(
    grad_TD: Tensor,
    summed_TD: Tensor,
    weight_D: Tensor,
    rstd_T: Tensor,
    *,
    add_TD: Tensor | None = None,
    weight_grad: bool = False,
    offset: float = 0.0,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of `rms_norm` with respect to the sum and the weight.

    Args:
        grad_TD: gradient of `normed_TD`; rows may be strided.
        summed_TD: the sum that the forward returned; rows may be strided.
        weight_D: the norm's weight.
        rstd_T: what the forward returned.
        add_TD: gradient that reaches the sum past the norm; added in float32.
        weight_grad: whether the weight's gradient is wanted; its sum has a fixed order on a given card.
        offset: that of the forward.
        recompute: whether the forward's `normed_TD` is wanted again.

    Returns:
        The gradient of the sum in its type, that of the weight in float32 or None, `normed_TD` or None.
    """
    if use_triton(summed_TD, "rms_norm_backward") and summed_TD.shape[1] <= MAX_WIDTH:
        return _backward(grad_TD, summed_TD, weight_D, rstd_T, add_TD, weight_grad, offset, recompute)
    return rms_norm_backward_reference(
        grad_TD, summed_TD, weight_D, rstd_T, add_TD=add_TD, weight_grad=weight_grad, offset=offset,
        recompute=recompute,
    )  # fmt: skip
