"""Layer norm, forward and backward.

    mean = mean_j x_j,  rstd = (mean_j (x_j − mean)² + eps)^(-1/2)        float32
    normed = (x − mean) · rstd · weight (+ bias)

Like the root-mean-square norm (`rms_norm`), a row is read once, kept in registers and written once, and rounded once,
at the end.

Rows wider than 65,536 take the torch reference.

Shape suffixes: T tokens, D hidden size, P partial sums of the weight gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.launch import (
    accumulation_dtype,
    jit,
    launch,
    multiprocessors,
    tl,
    use_triton,
)
from tunesmith.kernels.rms_norm import MAX_WIDTH, PROGRAMS_PER_SM, contiguous_rows, tile

# ---------------------------------------------------------------------- kernels


@jit(do_not_specialize=["tokens"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, bias, normed, stats, tokens, width, hidden_row, eps,
    BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    live = (row < tokens)[:, None] & (col < width)
    at = row.to(tl.int64)[:, None]
    x = tl.load(hidden + at * hidden_row + col, mask=live, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / width
    x = tl.where(live, x - mean[:, None], 0.0)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(stats + row, mean, mask=row < tokens)
    tl.store(stats + tokens + row, r, mask=row < tokens)
    y = x * r[:, None] * tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias + col, mask=col < width, other=0.0).to(tl.float32)
    tl.store(normed + at * width + col, y.to(normed.dtype.element_ty), mask=live)


@jit(do_not_specialize=["tokens"])
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad, hidden, weight, bias, stats, add, grad_hidden, partial_2PD, normed,
    tokens, width, grad_row, hidden_row, add_row,
    ADD: tl.constexpr, WEIGHT_GRAD: tl.constexpr, RECOMPUTE: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # With x̂ = (x − mean) · r and d = grad · weight, from ∂mean/∂x_j = 1 / D and ∂r/∂x_j = −r² · x̂_j / D:
    #     ∂x_j      = r · (d_j − mean_i(d_i) − x̂_j · mean_i(d_i · x̂_i))  (+ add_j, what reaches x past the norm)
    #     ∂weight_j = Σ_t grad_tj · x̂_tj,  ∂bias_j = Σ_t grad_tj
    col = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        live = (row < tokens)[:, None] & (col < width)
        at = row.to(tl.int64)[:, None]
        mean = tl.load(stats + row, mask=row < tokens, other=0.0)[:, None]
        r = tl.load(stats + tokens + row, mask=row < tokens, other=0.0)[:, None]
        x = tl.load(hidden + at * hidden_row + col, mask=live, other=0.0).to(tl.float32)
        unit = tl.where(live, (x - mean) * r, 0.0)
        g = tl.load(grad + at * grad_row + col, mask=live, other=0.0).to(tl.float32)
        # read again for each row, from the L1 cache: kept, it would cost a register an element
        w = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32)
        d = g * w
        along = tl.sum(d * unit, axis=1) / width
        level = tl.sum(d, axis=1) / width
        dx = r * (d - level[:, None] - unit * along[:, None])
        if ADD:
            dx += tl.load(add + at * add_row + col, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_hidden + at * width + col, dx.to(grad_hidden.dtype.element_ty), mask=live)
        if RECOMPUTE:
            y = unit * w
            if BIAS:
                y += tl.load(bias + col, mask=col < width, other=0.0).to(tl.float32)
            tl.store(normed + at * width + col, y.to(normed.dtype.element_ty), mask=live)
        if WEIGHT_GRAD:
            total += g * unit
            bias_total += g
    if WEIGHT_GRAD:
        at = tl.program_id(0) * width + tl.arange(0, BLOCK)
        live = tl.arange(0, BLOCK) < width
        tl.store(partial_2PD + at, tl.sum(total, axis=0), mask=live)
        tl.store(partial_2PD + tl.num_programs(0) * width + at, tl.sum(bias_total, axis=0), mask=live)


# ---------------------------------------------------------------------- launchers


def _forward(hidden_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    tokens, width = hidden_TD.shape
    rows, block, warps = tile(width)
    normed_TD = torch.empty((tokens, width), dtype=hidden_TD.dtype, device=hidden_TD.device)
    stats_2T = torch.empty((2, tokens), dtype=torch.float32, device=hidden_TD.device)
    x = contiguous_rows(hidden_TD)
    launch(
        _forward_kernel, (-(-tokens // rows),), x, weight_D, weight_D if bias_D is None else bias_D, normed_TD,
        stats_2T, tokens, width, x.stride(0), eps, BIAS=bias_D is not None, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return normed_TD, stats_2T


def _backward(
    grad_TD: Tensor, hidden_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, stats_2T: Tensor,
    add_TD: Tensor | None, weight_grad: bool, recompute: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    tokens, width = hidden_TD.shape
    rows, block, warps = tile(width)
    programs = -(-tokens // rows)
    grad_hidden_TD = torch.empty((tokens, width), dtype=hidden_TD.dtype, device=hidden_TD.device)
    normed_TD = torch.empty_like(grad_hidden_TD) if recompute else grad_hidden_TD
    partial_2PD = stats_2T
    if weight_grad:
        programs = min(programs, PROGRAMS_PER_SM * multiprocessors(hidden_TD))
        partial_2PD = torch.empty((2, programs, width), dtype=torch.float32, device=hidden_TD.device)
    grad, x = contiguous_rows(grad_TD), contiguous_rows(hidden_TD)
    add = grad_hidden_TD if add_TD is None else contiguous_rows(add_TD)
    launch(
        _backward_kernel, (programs,), grad, x, weight_D, weight_D if bias_D is None else bias_D, stats_2T, add,
        grad_hidden_TD, partial_2PD, normed_TD, tokens, width, grad.stride(0), x.stride(0), add.stride(0),
        ADD=add_TD is not None, WEIGHT_GRAD=weight_grad, RECOMPUTE=recompute, BIAS=bias_D is not None,
        ROWS=rows, BLOCK=block, num_warps=warps, num_stages=1,
    )  # fmt: skip
    weight = partial_2PD.sum(1) if weight_grad else None
    return grad_hidden_TD, weight, normed_TD if recompute else None


# ---------------------------------------------------------------------- reference


def layer_norm_reference(
    hidden_TD: Tensor, weight_D: Tensor, eps: float, *, bias_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`layer_norm` in plain torch."""
    dtype = accumulation_dtype(hidden_TD.dtype)
    wide_TD = hidden_TD.to(dtype)
    mean_T = wide_TD.mean(-1)
    centred_TD = wide_TD - mean_T[:, None]
    rstd_T = torch.rsqrt(centred_TD.square().mean(-1) + eps)
    normed_TD = centred_TD * rstd_T[:, None] * weight_D.to(dtype)
    if bias_D is not None:
        normed_TD = normed_TD + bias_D.to(dtype)
    return normed_TD.to(hidden_TD.dtype), torch.stack([mean_T, rstd_T])


def layer_norm_backward_reference(
    grad_TD: Tensor,
    hidden_TD: Tensor,
    weight_D: Tensor,
    stats_2T: Tensor,
    *,
    bias_D: Tensor | None = None,
    add_TD: Tensor | None = None,
    weight_grad: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`layer_norm_backward` in plain torch; the derivative is written out in the kernel."""
    dtype = accumulation_dtype(hidden_TD.dtype)
    wide_TD, factor_D = grad_TD.to(dtype), weight_D.to(dtype)
    mean_T, rstd_T = stats_2T
    unit_TD = (hidden_TD.to(dtype) - mean_T[:, None]) * rstd_T[:, None]
    scaled_TD = wide_TD * factor_D
    along_TD = unit_TD * (scaled_TD * unit_TD).mean(-1, keepdim=True)
    grad_hidden_TD = rstd_T[:, None] * (scaled_TD - scaled_TD.mean(-1, keepdim=True) - along_TD)
    if add_TD is not None:
        grad_hidden_TD = grad_hidden_TD + add_TD.to(dtype)
    weight = torch.stack([(wide_TD * unit_TD).sum(0), wide_TD.sum(0)]) if weight_grad else None
    normed = None
    if recompute:
        normed = unit_TD * factor_D + (0.0 if bias_D is None else bias_D.to(dtype))
        normed = normed.to(hidden_TD.dtype)
    return grad_hidden_TD.to(hidden_TD.dtype), weight, normed


# ---------------------------------------------------------------------- public


def layer_norm(
    hidden_TD: Tensor, weight_D: Tensor, eps: float, *, bias_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normalise rows to mean 0 and variance 1, then scale and shift.

    Args:
        hidden_TD: hidden states; rows may be strided.
        weight_D: the norm's weight, in any floating type; bias_D likewise, where there is one.
        eps: added to the variance.

    Returns:
        normed_TD, contiguous, in the type of `hidden_TD`; means and reciprocal deviations `[2, T]` in float32
        (float64 for float64). Not recorded by autograd.
    """
    if use_triton(hidden_TD, "layer_norm") and hidden_TD.shape[1] <= MAX_WIDTH:
        return _forward(hidden_TD, weight_D, bias_D, eps)
    return layer_norm_reference(hidden_TD, weight_D, eps, bias_D=bias_D)


def layer_norm_backward(
    grad_TD: Tensor,
    hidden_TD: Tensor,
    weight_D: Tensor,
    stats_2T: Tensor,
    *,
    bias_D: Tensor | None = None,
    add_TD: Tensor | None = None,
    weight_grad: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of `layer_norm` with respect to the hidden states, the weight and the bias.

    Args:
        grad_TD: gradient of `normed_TD`; rows may be strided.
        stats_2T: what the forward returned.
        bias_D: that of the forward; only `recompute` reads it.
        add_TD: gradient that reaches the hidden states past the norm; added in float32.
        weight_grad: whether the gradients of weight and bias are wanted, summed in a fixed order on a given card.
        recompute: whether the forward's `normed_TD` is wanted again.

    Returns:
        The gradient of the hidden states in their type, those of weight and bias `[2, D]` in float32 or None,
        `normed_TD` or None.
    """
    if use_triton(hidden_TD, "layer_norm_backward") and hidden_TD.shape[1] <= MAX_WIDTH:
        return _backward(grad_TD, hidden_TD, weight_D, bias_D, stats_2T, add_TD, weight_grad, recompute)
    return layer_norm_backward_reference(
        grad_TD, hidden_TD, weight_D, stats_2T, bias_D=bias_D, add_TD=add_TD, weight_grad=weight_grad,
        recompute=recompute,
    )  # fmt: skip
