"""Adds a projection, its LoRA adapter and the residual stream in one pass.

    out = residual + y + u Bᵀ,    y = x Wᵀ in float32,  u = x Aᵀ        summed in float32 and rounded once

Shape suffixes: T tokens, N columns, R ranks.

y comes as the GEMM accumulated it. With y rounded to 16 bits first, residual + y would often lie exactly halfway
between two numbers, and an adapter a millionth of the weights' size would decide to which of them it is rounded:
measured in bfloat16, it then acted a thousand times stronger than it is. Adding u Bᵀ in a pass of its own instead
rounds such an adapter away.
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


@jit(do_not_specialize=["tokens", "tiles", "splits"])
def _residual_kernel(  # type: ignore[no-untyped-def]
    y, residual, u, b, out, tokens, columns, tiles, splits, y_row, residual_row, u_row, b_row, out_row,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
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
        total += tl.load(residual + at[:, None] * residual_row + col[None, :], mask=live, other=0.0).to(
            tl.float32
        )
        if RANK > 0:
            b_tile = tl.load(
                b + (col.to(tl.int64) * b_row)[:, None] + rank,
                mask=col_live[:, None] & (rank < RANK), other=0.0,
            )  # fmt: skip
            total = dot(u_tile, tl.trans(b_tile), total)
        tl.store(out + at[:, None] * out_row + col[None, :], total.to(out.dtype.element_ty), mask=live)


def _launch(
    y_TN: Tensor, residual_TN: Tensor, u_TR: Tensor | None, b_NR: Tensor | None, out_TN: Tensor
) -> None:
    tokens, columns = y_TN.shape
    u, b = (u_TR, b_NR) if u_TR is not None and b_NR is not None else (y_TN, y_TN)
    rank = 0 if u_TR is None else u.shape[1]
    blocks, rows = -(-columns // COLUMNS), -(-tokens // ROWS)
    splits, tiles = column_splits(rows, blocks, PROGRAMS_PER_SM * multiprocessors(y_TN))
    launch(
        _residual_kernel, (rows * splits,), y_TN, residual_TN, u, b, out_TN, tokens, columns, tiles, splits,
        y_TN.stride(0), residual_TN.stride(0), u.stride(0), b.stride(0), out_TN.stride(0),
        RANK=rank, RANK_BLOCK=rank_block(rank, out_TN.dtype), ROWS=ROWS, COLS=COLUMNS,
        STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip


# ---------------------------------------------------------------------- operator


@torch.library.custom_op("tunesmith::add_residual", mutates_args=())
def add_residual_op(
    y_TN: Tensor, residual_TN: Tensor, u_TR: Tensor | None = None, b_NR: Tensor | None = None
) -> Tensor:
    """`add_residual` as an operator for torch.compile and autograd, differentiable in everything."""
    return add_residual(y_TN, residual_TN, u_TR=u_TR, b_NR=b_NR)


@add_residual_op.register_fake
def _(_y_TN: Tensor, residual_TN: Tensor, *_others: Any) -> Tensor:
    return residual_TN.new_empty(residual_TN.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.y_dtype = inputs[0].dtype
    ctx.save_for_backward(*inputs[2:])


def _autograd(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
    u_TR, b_NR = ctx.saved_tensors
    grad_y_TN = grad_TN.to(ctx.y_dtype)
    if u_TR is None:
        return grad_y_TN, grad_TN, None, None
    # ∂u = ∂out B,  ∂B = ∂outᵀ u
    narrow_TN = grad_TN.to(u_TR.dtype)
    return grad_y_TN, grad_TN, narrow_TN @ b_NR.to(u_TR.dtype), (narrow_TN.T @ u_TR).to(b_NR.dtype)


add_residual_op.register_autograd(_autograd, setup_context=_setup_context)


# ---------------------------------------------------------------------- reference


def add_residual_reference(
    y_TN: Tensor, residual_TN: Tensor, *, u_TR: Tensor | None = None, b_NR: Tensor | None = None
) -> Tensor:
    """`add_residual` in plain torch."""
    dtype = accumulation_dtype(residual_TN.dtype)
    total_TN = y_TN.to(dtype) + residual_TN.to(dtype)
    if u_TR is not None and b_NR is not None:
        total_TN = total_TN + u_TR.to(dtype) @ b_NR.to(dtype).T
    return total_TN.to(residual_TN.dtype)


# ---------------------------------------------------------------------- public


def add_residual(
    y_TN: Tensor, residual_TN: Tensor, *, u_TR: Tensor | None = None, b_NR: Tensor | None = None
) -> Tensor:
    """residual + y + u Bᵀ.

    Args:
        y_TN: the projection, float32 or in the type of the residual; rows may be strided.
        residual_TN: the stream; rows may be strided.
        u_TR: x·Aᵀ of the adapters side by side.
        b_NR: B of the adapters, their scaling multiplied in.

    Returns:
        The sum in the type of the residual. Not recorded by autograd.
    """
    if not use_triton(residual_TN, "add_residual"):
        return add_residual_reference(y_TN, residual_TN, u_TR=u_TR, b_NR=b_NR)
    assert y_TN.stride(1) == residual_TN.stride(1) == 1
    if u_TR is not None and b_NR is not None and u_TR.shape[1] > max_rank(residual_TN.dtype):
        # more ranks than a program holds at once
        y_TN = y_TN.float() + (u_TR.to(b_NR.dtype) @ b_NR.T).float()
        u_TR = b_NR = None
    assert u_TR is None or b_NR is None or u_TR.stride(1) == b_NR.stride(1) == 1
    out_TN = torch.empty(residual_TN.shape, dtype=residual_TN.dtype, device=residual_TN.device)
    _launch(y_TN, residual_TN, u_TR, b_NR, out_TN)
    return out_TN
