"""Norms on q and k, rotary positions and the adapters of q, k and v, in one pass over the fused buffer, and its
backward.

    y = qkv + scale · u Bᵀ                                    float32, for q, k and v
    n = y · rstd · (offset + weight),  rstd = (mean(y²) + eps)^(-1/2)    for q and k: the mean over a head, or over
                                                              all heads of a token (`full`, as OLMo has it)
    out = n rotated (see `rope`)                              for q and k; out = y for v

and one rounding at the end. The buffer as the GEMM wrote it is what lies between forward and backward: backward reads
it again and computes y and rstd anew, which costs the pass that it makes anyway. Where the weights train, each
program leaves its sums over tokens for every head that it has, `[P, H, K]`; they are added up in a fixed order.

Rejected: keeping the normed buffer and dividing by the weights in backward, which is no buffer less and has no answer
where a weight is 0. Rejected: rstd kept in float32, `[T, H + G]` more for a sum that the pass has in registers.

Shape suffixes: T tokens, N columns of the fused buffer, H heads of q and k, K head size (or all columns of q, of k
where `full`), R rank, P blocks of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tunesmith.kernels.launch import (
    MIN_RANK,
    accumulation_dtype,
    jit,
    launch,
    power_of_2,
    rank_block,
    rank_product,
    tl,
    use_triton,
)
from tunesmith.kernels.rope import RotaryLayout, qkv_adapter, rotate

LARGEST_TILE = 2048
"""Elements of half a head's tile: 32 tokens of 64 columns, 16 of 128. Backward holds y and the gradient of both
halves in float32, cosines and sines: six such tiles, 48 registers of 256 threads each. Compiled for sm_90, rank 16
takes 74 registers forward and 98 backward, and spills none."""
WARPS = 8
HEADS = 4
"""Heads of a program, which read cos, sin and the weights once, unless the norm is over all heads."""


class Norms(NamedTuple):
    """The weights of the norms of q and k, and their constants."""

    q_weight_K: Tensor
    k_weight_K: Tensor
    eps: float
    offset: float = 0.0
    full: bool = False


class Adapter(NamedTuple):
    """x·Aᵀ of q, k and v side by side, or of one adapter for all; B with a row for each column; rank and factor."""

    xa_TR: Tensor
    b_NR: Tensor
    rank: int
    scale: float = 1.0

    @property
    def step(self) -> int:
        """Columns from the x·Aᵀ of one projection to that of the next."""
        return 0 if self.xa_TR.shape[1] == self.rank else self.rank


# ---------------------------------------------------------------------- kernels


@jit()
def _columns(  # type: ignore[no-untyped-def]
    qkv, xa, b, at, row_live, head, projection, col, col_live, qkv_row, xa_row, b_row, scale,
    HEAD_DIM: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, XA_STEP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Some columns of a head with their adapter, float32 `[ROWS, COLS]`."""
    live = row_live[:, None] & col_live[None, :]
    column = head * HEAD_DIM + col
    y = tl.load(qkv + at[:, None] * qkv_row + column[None, :], mask=live, other=0.0).to(tl.float32)
    if RANK > 0:
        y += scale * rank_product(
            xa, b, at * xa_row + projection * XA_STEP, column.to(tl.int64) * b_row, 1, row_live, col_live,
            RANK, RANK_BLOCK, ROWS, COLS,
        )  # fmt: skip
    return y


@jit()
def _weights(  # type: ignore[no-untyped-def]
    q_weight, k_weight, head, projection, col, col_live, offset,
    Q_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """offset + weight of some columns of a q or k head, float32 `[COLS]`."""
    if FULL:
        col += (head - tl.where(projection == 0, 0, Q_HEADS)) * HEAD_DIM
    if projection == 0:
        w = tl.load(q_weight + col, mask=col_live, other=0.0).to(tl.float32)
    else:
        w = tl.load(k_weight + col, mask=col_live, other=0.0).to(tl.float32)
    return w + offset


@jit()
def _span(  # type: ignore[no-untyped-def]
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, LAST: tl.constexpr, HEADS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """First head of a program, and how many: `HEADS`, or all of a projection."""
    slot = tl.program_id(1)
    if FULL:
        first = tl.where(slot == 0, 0, tl.where(slot == 1, Q_HEADS, Q_HEADS + KV_HEADS))
        count = tl.where(slot == 0, Q_HEADS, KV_HEADS)
    else:
        first = slot * HEADS
        count = tl.minimum(HEADS, LAST - first)
    return first, count


@jit(do_not_specialize=["tokens", "scale"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    qkv, out, q_weight, k_weight, cos, sin, xa, b,
    tokens, qkv_row, out_row, cos_row, sin_row, xa_row, b_row, scale, eps, offset,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    STEP: tl.constexpr, NEXT: tl.constexpr, TABLE_STEP: tl.constexpr, FULL: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, XA_STEP: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_live = row < tokens
    at = row.to(tl.int64)
    j = tl.arange(0, BLOCK)
    j_live = j < HALF
    live = row_live[:, None] & j_live[None, :]
    one, two = j * STEP, j * STEP + NEXT
    c = tl.load(cos + at[:, None] * cos_row + j[None, :] * TABLE_STEP, mask=live, other=0.0).to(tl.float32)
    s = tl.load(sin + at[:, None] * sin_row + j[None, :] * TABLE_STEP, mask=live, other=0.0).to(tl.float32)
    first, count = _span(Q_HEADS, KV_HEADS, Q_HEADS + 2 * KV_HEADS, HEADS, FULL)
    if REST_BLOCK > 0:
        # columns past rotary_dim, which are normed and not rotated
        k = 2 * HALF + tl.arange(0, REST_BLOCK)
        k_live = k < HEAD_DIM
    squares = tl.zeros((ROWS,), tl.float32)
    if FULL:
        for nth in tl.range(0, count, num_stages=1):
            head = first + nth
            projection = tl.program_id(1)
            y1 = _columns(qkv, xa, b, at, row_live, head, projection, one, j_live, qkv_row, xa_row, b_row, scale,
                          HEAD_DIM, RANK, RANK_BLOCK, XA_STEP, ROWS, BLOCK)  # fmt: skip
            y2 = _columns(qkv, xa, b, at, row_live, head, projection, two, j_live, qkv_row, xa_row, b_row, scale,
                          HEAD_DIM, RANK, RANK_BLOCK, XA_STEP, ROWS, BLOCK)  # fmt: skip
            squares += tl.sum(y1 * y1 + y2 * y2, axis=1)
            if REST_BLOCK > 0:
                y = _columns(qkv, xa, b, at, row_live, head, projection, k, k_live, qkv_row, xa_row, b_row, scale,
                             HEAD_DIM, RANK, RANK_BLOCK, XA_STEP, ROWS, REST_BLOCK)  # fmt: skip
                squares += tl.sum(y * y, axis=1)
        squares /= count
    for nth in tl.range(0, count, num_stages=1):
        head = first + nth
        projection = (head >= Q_HEADS).to(tl.int32) + (head >= Q_HEADS + KV_HEADS).to(tl.int32)
        to = out + at[:, None] * out_row + head * HEAD_DIM
        y1 = _columns(qkv, xa, b, at, row_live, head, projection, one, j_live, qkv_row, xa_row, b_row, scale,
                      HEAD_DIM, RANK, RANK_BLOCK, XA_STEP, ROWS, BLOCK)  # fmt: skip
        y2 = _columns(qkv, xa, b, at, row_live, head, projection, two, j_live, qkv_row, xa_row, b_row, scale,
                      HEAD_DIM, RANK, RANK_BLOCK, XA_STEP, ROWS, BLOCK)  # fmt: skip
        if REST_BLOCK > 0:
            y = _columns(qkv, xa, b, at, row_live, head, projection, k, k_live, qkv_row, xa_row, b_row, scale,
                         HEAD_DIM, RANK, RANK_BLOCK, XA_STEP, ROWS, REST_BLOCK)  # fmt: skip
        if projection < 2:
            total = squares
            if not FULL:
                total = tl.sum(y1 * y1 + y2 * y2, axis=1)
                if REST_BLOCK > 0:
                    total += tl.sum(y * y, axis=1)
            r = tl.rsqrt(total / HEAD_DIM + eps)[:, None]
            n1 = y1 * r * _weights(q_weight, k_weight, head, projection, one, j_live, offset,
                                   Q_HEADS, HEAD_DIM, FULL)[None, :]  # fmt: skip
            n2 = y2 * r * _weights(q_weight, k_weight, head, projection, two, j_live, offset,
                                   Q_HEADS, HEAD_DIM, FULL)[None, :]  # fmt: skip
            y1 = n1 * c - n2 * s
            y2 = n2 * c + n1 * s
            if REST_BLOCK > 0:
                y = y * r * _weights(q_weight, k_weight, head, projection, k, k_live, offset,
                                     Q_HEADS, HEAD_DIM, FULL)[None, :]  # fmt: skip
        tl.store(to + one[None, :], y1.to(out.dtype.element_ty), mask=live)
        tl.store(to + two[None, :], y2.to(out.dtype.element_ty), mask=live)
        if REST_BLOCK > 0:
            tl.store(to + k[None, :], y.to(out.dtype.element_ty), mask=row_live[:, None] & k_live[None, :])


@jit(do_not_specialize=["tokens", "scale"])
def _backward_kernel(  # type: ignore[no-untyped-def]
    qkv, grad, q_weight, k_weight, cos, sin, xa, b, partial_PHK,
    tokens, qkv_row, grad_row, cos_row, sin_row, xa_row, b_row, scale, eps, offset,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    STEP: tl.constexpr, NEXT: tl.constexpr, TABLE_STEP: tl.constexpr, FULL: tl.constexpr,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, XA_STEP: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
):  # fmt: skip
    # With g the gradient rotated back, w = offset + weight, d = g · w and x̂ = y · r (see `rms_norm`):
    #     ∂y_j      = r · (d_j − x̂_j · mean_i(d_i · x̂_i)) = r · d_j − y_j · r³ · mean_i(d_i · y_i)
    #     ∂weight_j = Σ g_j · x̂_j over tokens, and over heads unless the norm is over all of them
    # v is as it was and has no program
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_live = row < tokens
    at = row.to(tl.int64)
    j = tl.arange(0, BLOCK)
    j_live = j < HALF
    live = row_live[:, None] & j_live[None, :]
    one, two = j * STEP, j * STEP + NEXT
    c = tl.load(cos + at[:, None] * cos_row + j[None, :] * TABLE_STEP, mask=live, other=0.0).to(tl.float32)
    s = tl.load(sin + at[:, None] * sin_row + j[None, :] * TABLE_STEP, mask=live, other=0.0).to(tl.float32)
    first, count = _span(Q_HEADS, KV_HEADS, Q_HEADS + KV_HEADS, HEADS, FULL)
    if REST_BLOCK > 0:
        k = 2 * HALF + tl.arange(0, REST_BLOCK)
        k_live = k < HEAD_DIM
        rest_live = row_live[:, None] & k_live[None, :]
    squares = tl.zeros((ROWS,), tl.float32)
    products = tl.zeros((ROWS,), tl.float32)
    # the first turn of the sums over all heads writes nothing; without `FULL` there is but one turn
    for nth in tl.range(0, 2 * count if FULL else count, num_stages=1):
        head = first + (nth % count)
        projection = (head >= Q_HEADS).to(tl.int32)
        to = grad + at[:, None] * grad_row + head * HEAD_DIM
        y1 = _columns(qkv, xa, b, at, row_live, head, projection, one, j_live, qkv_row, xa_row, b_row, scale,
                      HEAD_DIM, RANK, RANK_BLOCK, XA_STEP, ROWS, BLOCK)  # fmt: skip
        y2 = _columns(qkv, xa, b, at, row_live, head, projection, two, j_live, qkv_row, xa_row, b_row, scale,
                      HEAD_DIM, RANK, RANK_BLOCK, XA_STEP, ROWS, BLOCK)  # fmt: skip
        g1 = tl.load(to + one[None, :], mask=live, other=0.0).to(tl.float32)
        g2 = tl.load(to + two[None, :], mask=live, other=0.0).to(tl.float32)
        w1 = _weights(q_weight, k_weight, head, projection, one, j_live, offset, Q_HEADS, HEAD_DIM, FULL)
        w2 = _weights(q_weight, k_weight, head, projection, two, j_live, offset, Q_HEADS, HEAD_DIM, FULL)
        back1 = g1 * c + g2 * s
        back2 = g2 * c - g1 * s
        d1 = back1 * w1[None, :]
        d2 = back2 * w2[None, :]
        square = tl.sum(y1 * y1 + y2 * y2, axis=1)
        product = tl.sum(d1 * y1 + d2 * y2, axis=1)
        if REST_BLOCK > 0:
            y = _columns(qkv, xa, b, at, row_live, head, projection, k, k_live, qkv_row, xa_row, b_row, scale,
                         HEAD_DIM, RANK, RANK_BLOCK, XA_STEP, ROWS, REST_BLOCK)  # fmt: skip
            w = _weights(q_weight, k_weight, head, projection, k, k_live, offset, Q_HEADS, HEAD_DIM, FULL)
            back = tl.load(to + k[None, :], mask=rest_live, other=0.0).to(tl.float32)
            d = back * w[None, :]
            square += tl.sum(y * y, axis=1)
            product += tl.sum(d * y, axis=1)
        width = HEAD_DIM
        if FULL:
            squares += tl.where(nth < count, square, 0.0)
            products += tl.where(nth < count, product, 0.0)
            square, product, width = squares, products, HEAD_DIM * count
        r = tl.rsqrt(square / width + eps)
        turn = (r * r * r * product / width)[:, None]
        r = r[:, None]
        if WEIGHT_GRAD:
            sums = partial_PHK + (tl.program_id(0).to(tl.int64) * (Q_HEADS + KV_HEADS) + head) * HEAD_DIM
            last = True
            if FULL:
                last = nth >= count
            tl.store(sums + one, tl.sum(back1 * y1 * r, axis=0), mask=j_live & last)
            tl.store(sums + two, tl.sum(back2 * y2 * r, axis=0), mask=j_live & last)
            if REST_BLOCK > 0:
                tl.store(sums + k, tl.sum(back * y * r, axis=0), mask=k_live & last)
        # products are laid out differently from loads: no thread may store what another has yet to load
        tl.debug_barrier()
        writes = row_live
        if FULL:
            writes = row_live & (nth >= count)
        tl.store(
            to + one[None, :],
            (r * d1 - turn * y1).to(grad.dtype.element_ty),
            mask=writes[:, None] & j_live[None, :],
        )
        tl.store(
            to + two[None, :],
            (r * d2 - turn * y2).to(grad.dtype.element_ty),
            mask=writes[:, None] & j_live[None, :],
        )
        if REST_BLOCK > 0:
            tl.store(
                to + k[None, :],
                (r * d - turn * y).to(grad.dtype.element_ty),
                mask=writes[:, None] & k_live[None, :],
            )


# ---------------------------------------------------------------------- launcher


def _rows(layout: RotaryLayout) -> tuple[int, int, int]:
    """Tokens of a program, and the extents of half a head's rotated columns and of those past them."""
    rest = layout.head_dim - 2 * layout.half
    block = max(MIN_RANK, power_of_2(layout.half))
    rest_block = max(MIN_RANK, power_of_2(rest)) if rest else 0
    return max(16, min(32, LARGEST_TILE // max(block, rest_block // 2))), block, rest_block


def _launch(
    kernel: object, qkv_TN: Tensor, out_TN: Tensor, cos_TK: Tensor, sin_TK: Tensor, layout: RotaryLayout,
    norms: Norms, adapter: Adapter | None, last: int, *partial: Tensor, **options: bool,
) -> None:  # fmt: skip
    tokens, dtype = qkv_TN.shape[0], qkv_TN.dtype
    xa, b = (qkv_TN, qkv_TN) if adapter is None else (adapter.xa_TR, adapter.b_NR)
    rank, xa_step, scale = (0, 0, 1.0) if adapter is None else (adapter.rank, adapter.step, adapter.scale)
    assert qkv_TN.stride(1) == out_TN.stride(1) == xa.stride(1) == b.stride(1) == 1
    assert cos_TK.stride(1) == sin_TK.stride(1)
    step, following = layout.pair
    rows, block, rest_block = _rows(layout)
    heads = layout.heads + layout.kv_heads
    slots = (2 if last == heads else 3) if norms.full else -(-last // HEADS)
    launch(
        kernel, (-(-tokens // rows), slots), qkv_TN, out_TN, norms.q_weight_K, norms.k_weight_K, cos_TK, sin_TK,
        xa, b, *partial, tokens, qkv_TN.stride(0), out_TN.stride(0), cos_TK.stride(0), sin_TK.stride(0), xa.stride(0),
        b.stride(0), float(scale), norms.eps, norms.offset,
        Q_HEADS=layout.heads, KV_HEADS=layout.kv_heads, HEAD_DIM=layout.head_dim, HALF=layout.half,
        STEP=step, NEXT=following, TABLE_STEP=cos_TK.stride(1), FULL=norms.full,
        RANK=rank, RANK_BLOCK=rank_block(rank, dtype), XA_STEP=xa_step, HEADS=HEADS, ROWS=rows, BLOCK=block,
        REST_BLOCK=rest_block, **options, num_warps=WARPS,
    )  # fmt: skip


def _backward_(
    grad_TN: Tensor, qkv_TN: Tensor, cos_TK: Tensor, sin_TK: Tensor, layout: RotaryLayout, norms: Norms,
    adapter: Adapter | None, weight_grad: bool,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    last, partial_PHK = layout.heads + layout.kv_heads, qkv_TN
    if weight_grad:
        blocks = -(-qkv_TN.shape[0] // _rows(layout)[0])
        partial_PHK = qkv_TN.new_empty((blocks, last, layout.head_dim), dtype=torch.float32)
    _launch(
        _backward_kernel, qkv_TN, grad_TN, cos_TK, sin_TK, layout, norms, adapter, last, partial_PHK,
        WEIGHT_GRAD=weight_grad,
    )  # fmt: skip
    return _weight_gradients(partial_PHK, layout, norms) if weight_grad else None


def _weight_gradients(sum_THK: Tensor, layout: RotaryLayout, norms: Norms) -> tuple[Tensor, Tensor]:
    """Gradients of both weights from the products g · x̂ of q's heads and k's, or sums of them over tokens."""
    q_THK, k_THK = sum_THK.split([layout.heads, layout.kv_heads], 1)
    if norms.full:
        return q_THK.sum(0).flatten(), k_THK.sum(0).flatten()
    return q_THK.sum((0, 1)), k_THK.sum((0, 1))


# ---------------------------------------------------------------------- reference


def _normed(part_THK: Tensor, weight_K: Tensor, norms: Norms) -> tuple[Tensor, Tensor, Tensor]:
    """Normed heads, the factor offset + weight and rstd, shaped to the heads."""
    factor = norms.offset + weight_K.to(part_THK.dtype)
    factor = factor.view(part_THK.shape[1:]) if norms.full else factor
    mean = part_THK.square().mean((-2, -1) if norms.full else -1, keepdim=True)
    rstd = torch.rsqrt(mean + norms.eps)
    return part_THK * rstd * factor, factor, rstd


def _heads(
    qkv_TN: Tensor, layout: RotaryLayout, adapter: Adapter | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in `dtype` with their adapters, each `[T, heads, K]`."""
    wide_TN = qkv_TN[:, : sum(layout.sizes)].to(dtype)
    if adapter is not None:
        xa_TR, b_NR = adapter.xa_TR.to(dtype), adapter.b_NR.to(dtype)
        wide_TN = wide_TN + adapter.scale * qkv_adapter(xa_TR, b_NR, adapter.rank, layout)
    q, k, v = (part.unflatten(-1, (-1, layout.head_dim)) for part in wide_TN.split(layout.sizes, -1))
    return q, k, v


def qk_norm_rope_reference(
    qkv_TN: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    layout: RotaryLayout,
    norms: Norms,
    adapter: Adapter | None = None,
) -> Tensor:
    """`qk_norm_rope` in plain torch."""
    dtype = accumulation_dtype(qkv_TN.dtype)
    *qk, v_THK = _heads(qkv_TN, layout, adapter, dtype)
    turned = [
        rotate(_normed(part, weight_K, norms)[0], cos_TK.to(dtype), sin_TK.to(dtype), layout)
        for part, weight_K in zip(qk, norms[:2], strict=True)
    ]
    return torch.cat([part.flatten(1) for part in (*turned, v_THK)], -1).to(qkv_TN.dtype)


def qk_norm_rope_backward_reference_(
    grad_TN: Tensor,
    qkv_TN: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    layout: RotaryLayout,
    norms: Norms,
    adapter: Adapter | None = None,
    *,
    weight_grad: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """`qk_norm_rope_backward_` in plain torch; the derivative is written out in the kernel."""
    dtype = accumulation_dtype(qkv_TN.dtype)
    dims = (-2, -1) if norms.full else -1
    parts, products = _heads(qkv_TN, layout, adapter, dtype)[:2], []
    for part, columns_TN, weight_K in zip(parts, grad_TN.split(layout.sizes, -1)[:2], norms[:2], strict=True):
        g_THK = columns_TN.to(dtype).unflatten(-1, (-1, layout.head_dim))
        back_THK = rotate(g_THK, cos_TK.to(dtype), sin_TK.to(dtype), layout, inverse=True)
        _, factor, rstd = _normed(part, weight_K, norms)
        d, unit = back_THK * factor, part * rstd
        products.append(back_THK * unit)
        columns_TN.copy_((rstd * (d - unit * (d * unit).mean(dims, keepdim=True))).flatten(1))
    return _weight_gradients(torch.cat(products, 1), layout, norms) if weight_grad else None


# ---------------------------------------------------------------------- public


def qk_norm_rope(
    qkv_TN: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    layout: RotaryLayout,
    norms: Norms,
    adapter: Adapter | None = None,
) -> Tensor:
    """Add the adapters of q, k and v where given, norm q and k and rotate them, into a new buffer.

    Args:
        qkv_TN: `[q heads | k heads | v heads]` in its first columns; rows may be strided. Left as it is.
        cos_TK: cosines of every pair in the first rotary_dim / 2 columns; may be strided and broadcast.
        sin_TK: sines, likewise.
        layout: columns of the buffer, and which of them form pairs.
        norms: weights `[K]`, or `[heads · K]` with `full`.

    Returns:
        `[T, N]`, contiguous, in the type of `qkv_TN`. Not recorded by autograd.
    """
    if not use_triton(qkv_TN, "qk_norm_rope"):
        return qk_norm_rope_reference(qkv_TN, cos_TK, sin_TK, layout, norms, adapter)
    out_TN = torch.empty((qkv_TN.shape[0], sum(layout.sizes)), dtype=qkv_TN.dtype, device=qkv_TN.device)
    last = layout.heads + 2 * layout.kv_heads
    _launch(_forward_kernel, qkv_TN, out_TN, cos_TK, sin_TK, layout, norms, adapter, last)
    return out_TN


def qk_norm_rope_backward_(
    grad_TN: Tensor,
    qkv_TN: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    layout: RotaryLayout,
    norms: Norms,
    adapter: Adapter | None = None,
    *,
    weight_grad: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """The gradient of `qk_norm_rope`'s result becomes that of the buffer with its adapters, in place.

    Args:
        grad_TN: `[T, N]` in its first columns; rows may be strided. The columns of v are right as they are.
        qkv_TN: what the forward read, with the same tables, layout, norms and adapter.
        weight_grad: whether the gradients of the norms' weights are wanted; their sums have a fixed order.

    Returns:
        The gradients of the weights of q and of k in float32 (float64 for float64), or None.
    """
    if not use_triton(qkv_TN, "qk_norm_rope_backward_"):
        return qk_norm_rope_backward_reference_(
            grad_TN, qkv_TN, cos_TK, sin_TK, layout, norms, adapter, weight_grad=weight_grad
        )
    return _backward_(grad_TN, qkv_TN, cos_TK, sin_TK, layout, norms, adapter, weight_grad)
