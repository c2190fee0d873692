"""Adds a projection, its LoRA adapter and the residual stream in one pass.

    out = residual + scale · (y + u Bᵀ),    y = x Wᵀ in float32,  u = x Aᵀ        summed in float32 and rounded once

Shape suffixes: T tokens, N columns, R ranks.

y comes as the GEMM accumulated it. With y rounded to 16 bits first, residual + y would often lie exactly halfway
between two numbers, and an adapter a millionth of the weights' size would decide to which of them it is rounded:
measured in bfloat16, it then acted a thousand times stronger than it is. Adding u Bᵀ in a pass of its own instead
rounds such an adapter away. Without a residual, the sum is what a norm behind the projection reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.launch import (
    accumulation_dtype,
    column_splits,
    dot,
    jit,
    launch,
    max_rank,
    multiprocessors,
    rank_block,
    tl,
    use_triton,
)

ROWS, COLUMNS = 64, 64
"""Tokens and columns of a tile."""
WARPS, STAGES, PROGRAMS_PER_SM = 4, 3, 16
"""Warps of a program, tiles on their way from memory at once, programs a multiprocessor."""


# ---------------------------------------------------------------------- kernel


@jit(do_not_specialize=["tokens", "tiles", "splits", "scale"])
def _residual_kernel(  # type: ignore[no-untyped-def]
    y, residual, u, b, out, tokens, columns, tiles, splits, y_row, residual_row, u_row, b_row, out_row, scale,
    RESIDUAL: tl.constexpr, SCALED: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A program walks `tiles` blocks of columns of its tokens
    row = (tl.program_id(0) // splits) * ROWS + tl.arange(0, ROWS)
    row_live = row < tokens
    at = row.to(tl.int64)
    rank = tl.arange(0, RANK_BLOCK)[None, :]
    if RANK > 0:
        u_tile = tl.load(u + (at * u_row)[:, None] + rank, mask=row_live[:, None] & (rank < RANK), other=0.0)
    first = (tl.program_id(0) % splits) * tiles
    for nth in tl.range(0, tl.minimum(tiles, tl.cdiv(columns, COLS) - first), num_stages=STAGES):
        col = (first + nth) * COLS + tl.arange(0, COLS)
        col_live = col < columns
        live = row_live[:, None] & col_live[None, :]
        total = tl.load(y + at[:, None] * y_row + col[None, :], mask=live, other=0.0).to(tl.float32)
        if RESIDUAL:
            stream = tl.load(residual + at[:, None] * residual_row + col[None, :], mask=live, other=0.0)
            if not SCALED:  # before the product, so that the tile is not kept beside it
                total += stream.to(tl.float32)
        if RANK > 0:
            b_tile = tl.load(
                b + (col.to(tl.int64) * b_row)[:, None] + rank,
                mask=col_live[:, None] & (rank < RANK), other=0.0,
            )  # fmt: skip
            total = dot(u_tile, tl.trans(b_tile), total)
        if SCALED:
            total *= scale
            if RESIDUAL:
                total += stream.to(tl.float32)
        tl.store(out + at[:, None] * out_row + col[None, :], total.to(out.dtype.element_ty), mask=live)


def _launch(
    y_TN: Tensor,
    residual_TN: Tensor | None,
    u_TR: Tensor | None,
    b_NR: Tensor | None,
    scale: float,
    out_TN: Tensor,
) -> None:
    tokens, columns = y_TN.shape
    stream = y_TN if residual_TN is None else residual_TN
    u, b = (u_TR, b_NR) if u_TR is not None and b_NR is not None else (y_TN, y_TN)
    rank = 0 if u_TR is None else u.shape[1]
    blocks, rows = -(-columns // COLUMNS), -(-tokens // ROWS)
    splits, tiles = column_splits(rows, blocks, PROGRAMS_PER_SM * multiprocessors(y_TN))
    launch(
        _residual_kernel, (rows * splits,), y_TN, stream, u, b, out_TN, tokens, columns, tiles, splits,
        y_TN.stride(0), stream.stride(0), u.stride(0), b.stride(0), out_TN.stride(0), float(scale),
        RESIDUAL=residual_TN is not None, SCALED=scale != 1.0, RANK=rank,
        RANK_BLOCK=rank_block(rank, out_TN.dtype), ROWS=ROWS, COLS=COLUMNS, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip


# ---------------------------------------------------------------------- operator


@torch.library.custom_op("tunesmith::add_residual", mutates_args=())
def add_residual_op(
    y_TN: Tensor, residual_TN: Tensor, u_TR: Tensor | None = None, b_NR: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """`add_residual` as an operator for torch.compile and autograd, differentiable in everything but the scale."""
    return add_residual(y_TN, residual_TN, u_TR=u_TR, b_NR=b_NR, scale=scale)


@add_residual_op.register_fake
def _(_y_TN: Tensor, residual_TN: Tensor, *_others: Any) -> Tensor:
    return residual_TN.new_empty(residual_TN.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.y_dtype, ctx.scale = inputs[0].dtype, inputs[4]
    ctx.save_for_backward(*inputs[2:4])


def _autograd(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
    u_TR, b_NR = ctx.saved_tensors
    grad_y_TN = (grad_TN * ctx.scale).to(ctx.y_dtype)
    if u_TR is None:
        return grad_y_TN, grad_TN, None, None, None
    # ∂u = scale · ∂out B,  ∂B = scale · ∂outᵀ u
    narrow_TN = (grad_TN * ctx.scale).to(u_TR.dtype)
    return grad_y_TN, grad_TN, narrow_TN @ b_NR.to(u_TR.dtype), (narrow_TN.T @ u_TR).to(b_NR.dtype), None


add_residual_op.register_autograd(_autograd, setup_context=_setup_context)


# ---------------------------------------------------------------------- reference


def add_residual_reference(
    y_TN: Tensor,
    residual_TN: Tensor | None,
    *,
    u_TR: Tensor | None = None,
    b_NR: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`add_residual` in plain torch."""
    target = _target(residual_TN, u_TR)
    dtype = accumulation_dtype(target)
    total_TN = y_TN.to(dtype)
    if u_TR is not None and b_NR is not None:
        total_TN = total_TN + u_TR.to(dtype) @ b_NR.to(dtype).T
    total_TN = total_TN * scale
    return (total_TN if residual_TN is None else residual_TN.to(dtype) + total_TN).to(target)


def _target(residual_TN: Tensor | None, u_TR: Tensor | None) -> torch.dtype:
    """Type of the result."""
    like = u_TR if residual_TN is None else residual_TN
    assert like is not None, "there is nothing to add"
    return like.dtype


# ---------------------------------------------------------------------- public


def add_residual(
    y_TN: Tensor,
    residual_TN: Tensor | None,
    *,
    u_TR: Tensor | None = None,
    b_NR: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """residual + scale · (y + u Bᵀ).

    Args:
        y_TN: the projection, float32 or in the type of the residual; rows may be strided.
        residual_TN: the stream; rows may be strided. None adds the adapter alone.
        u_TR: x·Aᵀ of the adapters side by side.
        b_NR: B of the adapters, their scaling multiplied in.
        scale: factor on what is added to the stream.

    Returns:
        The sum in the type of the residual, of u where there is none. Not recorded by autograd.
    """
    target = _target(residual_TN, u_TR)
    like = y_TN if residual_TN is None else residual_TN
    if not use_triton(like, "add_residual"):
        return add_residual_reference(y_TN, residual_TN, u_TR=u_TR, b_NR=b_NR, scale=scale)
    assert y_TN.stride(1) == like.stride(1) == 1
    if u_TR is not None and b_NR is not None and u_TR.shape[1] > max_rank(target):
        # more ranks than a program holds at once
        y_TN = y_TN.float() + (u_TR.to(b_NR.dtype) @ b_NR.T).float()
        u_TR = b_NR = None
    assert u_TR is None or b_NR is None or u_TR.stride(1) == b_NR.stride(1) == 1
    out_TN = torch.empty(y_TN.shape, dtype=target, device=y_TN.device)
    _launch(y_TN, residual_TN, u_TR, b_NR, scale, out_TN)
    return out_TN
