"""Gated linear unit on the fused buffer `[gate | up]`, forward and backward, LoRA products included; and the plain
activation of a buffer without gate.

    g = gate + scale · xa_g · B_gᵀ,  u = up + scale · xa_u · B_uᵀ        in float32, where there are adapters
    act = f(g) · u                                                       f(g) where the buffer has no gate
    down_u = act · down_Aᵀ                                               what the down projection's adapter reads

The base GEMM writes `[gate | up]` once, and the pass that the activation needs anyway adds the adapters: an
`addmm_` on that buffer costs as much as the whole pass (514 µs at 8,192 × 28,672 on one H100). Backward works in
place, `[gate | up]` becomes its gradient and the gradient of `act` becomes `act`, so that no third buffer of
that width exists, and in the same pass reduces the gradient to the adapters' rank:

    d       = grad_act + down_dxa · down_A                               the down projection's adapter
    dgate   = d · u · f'(g),  dup = d · f(g)
    grad_xa = scale · [dgate · B_g | dup · B_u]                          from the rounded dgate and dup

Rejected: keeping `act` for backward (another 14,336 columns a layer), as it falls out of the same pass.

Shape suffixes: T tokens, N = 2 · I columns of the fused buffer, I intermediate size, R ranks, S column splits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
    power_of_2,
    rank_block,
    rank_product,
    tl,
    use_triton,
)

TILE = 1024
"""Elements of a program without adapters: 8 for each of 128 threads, one 16-byte access to each 16-bit buffer."""
ADAPTER_ROWS = 64
"""Tokens of a tile with adapters: 16 for each of 4 warps, the rows of one tensor-core instruction."""
NARROW_RANK = 16
ADAPTER_COLUMNS = {True: 64, False: 32}
"""Columns of such a tile, by whether the ranks are at most `NARROW_RANK`: wider ones take the shared memory."""
FORWARD_WARPS, FORWARD_STAGES, FORWARD_PROGRAMS = 4, 3, 32
BACKWARD_WARPS, BACKWARD_STAGES, BACKWARD_PROGRAMS = 4, {True: 2, False: 3}, 3
"""Warps of a program, tiles on their way from memory at once (in backward by whether ranks are narrow), and
programs a multiprocessor.

A program walks its columns, and while it computes on one tile the next ones are copied to shared memory: without
that (one stage) loads and products wait for each other. Measured on one H100 at 8,192 tokens of the 8B shape, rank
16, milliseconds: backward 1.12 with one stage of 64 × 32, 0.78 with four, 0.73 with 64 × 64, 8 warps and three, 0.68
as here, where copying the same bytes takes 0.47; forward 0.45 with one stage of 64 × 32, 0.35 as here against 0.24.
Backward has few programs because each leaves a partial sum of the reduction to the adapters' rank."""
PARTS_SHARE = 1 / 3
"""Of the bytes of act, what the parts of act · down_Aᵀ may take, written and read in float32: the GEMM that they
stand for is one pass over act. On one H100 at 8,192 tokens of the 8B shape the kernel takes 0.023 ms more with them
at rank 16, where the GEMM takes 0.08; fewer programs than `FORWARD_PROGRAMS` keep other sizes within the share."""
SUM_BLOCK = 512
FLOAT = 4
"""Bytes of an element of a partial sum."""
LARGEST_FUSED_RANK = 64
"""Adapters of a larger rank are added by GEMMs in passes of their own: at rank 256 the products cost more than the
pass that fusing saves, and the kernel with their loops read out of bounds on an H100 under Triton 3.6."""

_Pair = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------- kernels


@jit()
def _activate(x, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """f(x) and f'(x). With f(x) = x · σ(y(x)), f' = σ + x · σ · (1 − σ) · y'."""
    if ACT == "silu":
        # y = x
        gate = tl.sigmoid(x)
        value = x * gate
        slope = gate + value * (1.0 - gate)
    elif ACT == "gelu_tanh":
        # (1 + tanh(z)) / 2 = σ(2z), so y = 2 · sqrt(2/π) · (x + 0.044715 · x³): no tanh, which the interpreter lacks
        gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * gate
        slope = gate + value * (1.0 - gate) * (1.5957691216057308 + 0.2140644488 * x * x)
    else:
        # f = x · Φ(x), f' = Φ + x · φ
        tl.static_assert(ACT == "gelu", "an activation that the kernel does not know")
        gate = 0.5 * (1.0 + tl.erf(0.7071067811865476 * x))
        value = x * gate
        slope = gate + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    return value, slope


@jit(do_not_specialize=["tokens", "scale", "tiles", "splits"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    gate_up, out, xa, b, down_a, down_u,
    tokens, inner, tiles, splits, gate_up_row, out_row, xa_row, b_row, down_a_row, scale,
    ACT: tl.constexpr, GATED: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, XA_STEP: tl.constexpr,
    DOWN_RANK: tl.constexpr, DOWN_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A program walks `tiles` blocks of columns of its tokens; down_u is [S, T, DOWN_RANK]
    row = (tl.program_id(0) // splits) * ROWS + tl.arange(0, ROWS)
    row_live = row < tokens
    at = row.to(tl.int64)
    xa_at = at * xa_row
    if RANK > 0 and RANK <= RANK_BLOCK:
        rank = tl.arange(0, RANK_BLOCK)[None, :]
        rank_live = row_live[:, None] & (rank < RANK)
        xa_g = tl.load(xa + xa_at[:, None] + rank, mask=rank_live, other=0.0)
        if GATED:
            xa_u = tl.load(xa + xa_at[:, None] + XA_STEP + rank, mask=rank_live, other=0.0)
    down_rank = tl.arange(0, DOWN_BLOCK)
    sums = tl.zeros((ROWS, DOWN_BLOCK), tl.float32)
    first = (tl.program_id(0) % splits) * tiles
    for nth in tl.range(0, tl.minimum(tiles, tl.cdiv(inner, COLS) - first), num_stages=STAGES):
        col = (first + nth) * COLS + tl.arange(0, COLS)
        col_live = col < inner
        live = row_live[:, None] & col_live[None, :]
        gate_at = gate_up + at[:, None] * gate_up_row + col[None, :]
        g = tl.load(gate_at, mask=live, other=0.0).to(tl.float32)
        if GATED:
            u = tl.load(gate_at + inner, mask=live, other=0.0).to(tl.float32)
        b_at, up_at = col.to(tl.int64) * b_row, (inner + col).to(tl.int64) * b_row
        if RANK > 0 and RANK <= RANK_BLOCK:
            b_live = col_live[:, None] & (rank < RANK)
            b_g = tl.load(b + b_at[:, None] + rank, mask=b_live, other=0.0)
            if GATED:
                b_u = tl.load(b + up_at[:, None] + rank, mask=b_live, other=0.0)
            g += scale * dot(xa_g, tl.trans(b_g), tl.zeros((ROWS, COLS), tl.float32))
            if GATED:
                u += scale * dot(xa_u, tl.trans(b_u), tl.zeros((ROWS, COLS), tl.float32))
        elif RANK > 0:
            g += scale * rank_product(xa, b, xa_at, b_at, 1, row_live, col_live, RANK, RANK_BLOCK, ROWS, COLS)
            if GATED:
                u += scale * rank_product(
                    xa, b, xa_at + XA_STEP, up_at, 1, row_live, col_live, RANK, RANK_BLOCK, ROWS, COLS
                )
        value, _ = _activate(g, ACT)
        if GATED:
            value *= u
        act = value.to(out.dtype.element_ty)
        tl.store(out + at[:, None] * out_row + col[None, :], act, mask=live)
        if DOWN_RANK > 0:
            a_live = (down_rank < DOWN_RANK)[:, None] & col_live[None, :]
            a = tl.load(down_a + down_rank[:, None] * down_a_row + col[None, :], mask=a_live, other=0.0)
            sums = dot(act, tl.trans(a), sums)
    if DOWN_RANK > 0:
        sum_row = (tl.program_id(0) % splits).to(tl.int64) * tokens + at
        sum_at = sum_row[:, None] * DOWN_RANK + down_rank[None, :]
        sum_live = row_live[:, None] & (down_rank < DOWN_RANK)[None, :]
        tl.store(down_u + sum_at, sums.to(down_u.dtype.element_ty), mask=sum_live)


@jit(do_not_specialize=["tokens"])
def _backward_kernel(  # type: ignore[no-untyped-def]
    gate_up, grad_act, tokens, inner, gate_up_row, grad_row,
    ACT: tl.constexpr, GATED: tl.constexpr, RECOMPUTE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    col_blocks = tl.cdiv(inner, COLS)
    row = (tl.program_id(0) // col_blocks) * ROWS + tl.arange(0, ROWS)
    col = ((tl.program_id(0) % col_blocks) * COLS + tl.arange(0, COLS))[None, :]
    live = (row < tokens)[:, None] & (col < inner)
    gate_at = gate_up + row.to(tl.int64)[:, None] * gate_up_row + col
    grad_at = grad_act + row.to(tl.int64)[:, None] * grad_row + col
    g = tl.load(gate_at, mask=live, other=0.0).to(tl.float32)
    d = tl.load(grad_at, mask=live, other=0.0).to(tl.float32)
    value, slope = _activate(g, ACT)
    if GATED:
        u = tl.load(gate_at + inner, mask=live, other=0.0).to(tl.float32)
        tl.store(gate_at + inner, (d * value).to(gate_up.dtype.element_ty), mask=live)
        d *= u
        value *= u
    tl.store(gate_at, (d * slope).to(gate_up.dtype.element_ty), mask=live)
    if RECOMPUTE:
        tl.store(grad_at, value.to(grad_act.dtype.element_ty), mask=live)


@jit(do_not_specialize=["tokens", "scale", "tiles"])
def _adapter_backward_kernel(  # type: ignore[no-untyped-def]
    gate_up, grad_act, xa, b, down_dxa, down_a, grad_xa,
    tokens, inner, tiles, gate_up_row, grad_row, xa_row, b_row, down_dxa_row, down_a_row, scale,
    ACT: tl.constexpr, GATED: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, XA_STEP: tl.constexpr,
    DOWN_RANK: tl.constexpr, DOWN_BLOCK: tl.constexpr, REDUCE: tl.constexpr, RECOMPUTE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A program walks `tiles` blocks of columns of its tokens; grad_xa is [S, T, XA_STEP + RANK]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_live = row < tokens
    at = row.to(tl.int64)
    xa_at = at * xa_row
    rank = tl.arange(0, RANK_BLOCK)[None, :]
    rank_live = row_live[:, None] & (rank < RANK)
    grad_xa_g = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    grad_xa_u = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    if REDUCE:
        xa_g = tl.load(xa + xa_at[:, None] + rank, mask=rank_live, other=0.0)
        if GATED:
            xa_u = tl.load(xa + xa_at[:, None] + XA_STEP + rank, mask=rank_live, other=0.0)
    if DOWN_RANK > 0 and DOWN_RANK <= DOWN_BLOCK:
        down_rank = tl.arange(0, DOWN_BLOCK)[:, None]
        u_rank = tl.arange(0, DOWN_BLOCK)[None, :]
        down_u = tl.load(
            down_dxa + (at * down_dxa_row)[:, None] + u_rank,
            mask=row_live[:, None] & (u_rank < DOWN_RANK), other=0.0,
        )  # fmt: skip
    first = tl.program_id(1) * tiles
    for nth in tl.range(0, tl.minimum(tiles, tl.cdiv(inner, COLS) - first), num_stages=STAGES):
        col = (first + nth) * COLS + tl.arange(0, COLS)
        col_live = col < inner
        live = row_live[:, None] & col_live[None, :]
        gate_at = gate_up + at[:, None] * gate_up_row + col[None, :]
        grad_at = grad_act + at[:, None] * grad_row + col[None, :]
        g = tl.load(gate_at, mask=live, other=0.0).to(tl.float32)
        if GATED:
            u = tl.load(gate_at + inner, mask=live, other=0.0).to(tl.float32)
        d = tl.load(grad_at, mask=live, other=0.0).to(tl.float32)
        b_at = col.to(tl.int64) * b_row
        up_at = (inner + col).to(tl.int64) * b_row
        if REDUCE:
            # B is read once for both of its products
            b_live = col_live[:, None] & (rank < RANK)
            b_g = tl.load(b + b_at[:, None] + rank, mask=b_live, other=0.0)
            if GATED:
                b_u = tl.load(b + up_at[:, None] + rank, mask=b_live, other=0.0)
            g += scale * dot(xa_g, tl.trans(b_g), tl.zeros((ROWS, COLS), tl.float32))
            if GATED:
                u += scale * dot(xa_u, tl.trans(b_u), tl.zeros((ROWS, COLS), tl.float32))
        elif RANK > 0:
            g += scale * rank_product(xa, b, xa_at, b_at, 1, row_live, col_live, RANK, RANK_BLOCK, ROWS, COLS)
            if GATED:
                u += scale * rank_product(
                    xa, b, xa_at + XA_STEP, up_at, 1, row_live, col_live, RANK, RANK_BLOCK, ROWS, COLS
                )
        if DOWN_RANK > 0 and DOWN_RANK <= DOWN_BLOCK:
            a_live = (down_rank < DOWN_RANK) & col_live[None, :]
            d = dot(
                down_u, tl.load(down_a + down_rank * down_a_row + col[None, :], mask=a_live, other=0.0), d
            )
        elif DOWN_RANK > 0:
            d += rank_product(
                down_dxa, down_a, at * down_dxa_row, col, down_a_row, row_live, col_live,
                DOWN_RANK, DOWN_BLOCK, ROWS, COLS,
            )  # fmt: skip
        value, slope = _activate(g, ACT)
        if GATED:
            d_up = (d * value).to(gate_up.dtype.element_ty)
            d *= u
            value *= u
        d_gate = (d * slope).to(gate_up.dtype.element_ty)
        # `act` does not depend on `d`, nor `d_up` on `u`: with loads and stores laid out differently a thread could
        # overwrite what its neighbour has yet to read
        if STAGES == 1:
            tl.debug_barrier()
        tl.store(gate_at, d_gate, mask=live)
        if GATED:
            tl.store(gate_at + inner, d_up, mask=live)
        if RECOMPUTE:
            tl.store(grad_at, value.to(grad_act.dtype.element_ty), mask=live)
        if REDUCE:
            grad_xa_g = dot(d_gate, b_g, grad_xa_g)
            if GATED and XA_STEP > 0:
                grad_xa_u = dot(d_up, b_u, grad_xa_u)
            elif GATED:
                grad_xa_g = dot(d_up, b_u, grad_xa_g)
    if REDUCE:
        sum_at = grad_xa + (tl.program_id(1).to(tl.int64) * tokens + at)[:, None] * (XA_STEP + RANK) + rank
        tl.store(sum_at, (scale * grad_xa_g).to(grad_xa.dtype.element_ty), mask=rank_live)
        if XA_STEP > 0:
            tl.store(sum_at + XA_STEP, (scale * grad_xa_u).to(grad_xa.dtype.element_ty), mask=rank_live)


@jit(do_not_specialize=["count", "splits"])
def _sum_splits_kernel(partial, out, count, splits, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, splits):
        total += tl.load(partial + at, mask=at < count, other=0.0)
        partial += count
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


# ---------------------------------------------------------------------- launchers


class _Adapter(NamedTuple):
    """x·Aᵀ of gate and up side by side or one for both, B with a row for each column, the rank, and the factor."""

    xa_TR: Tensor
    b_NR: Tensor
    rank: int
    scale: float

    @property
    def step(self) -> int:
        """Columns from the gate's x·Aᵀ to that of up: none where they share it, or where there is no gate."""
        return self.rank if self.rank and self.xa_TR.shape[1] > self.rank else 0


def _adapter(xa_TR: Tensor | None, b_NR: Tensor | None, rank: int, scale: float) -> _Adapter | None:
    if xa_TR is None or b_NR is None:
        return None
    assert xa_TR.stride(1) == b_NR.stride(1) == 1
    return _Adapter(xa_TR, b_NR, rank, float(scale))


def _tile(inner: int) -> tuple[int, int]:
    """Rows and columns of a program without adapters."""
    cols = min(TILE, power_of_2(inner))
    return TILE // cols, cols


def _forward_splits(gate_up_TN: Tensor, inner: int, rank: int, down_rank: int) -> tuple[int, int]:
    """Parts of the columns, and tiles of each."""
    rows, blocks = _blocks(gate_up_TN, inner, max(rank, down_rank))
    programs = FORWARD_PROGRAMS * multiprocessors(gate_up_TN)
    if down_rank:
        parts = int(PARTS_SHARE * inner * gate_up_TN.element_size()) // (2 * FLOAT * down_rank)
        programs = min(programs, max(1, parts) * rows)
    return column_splits(rows, blocks, programs)


def _backward_splits(gate_up_TN: Tensor, inner: int, widest: int) -> tuple[int, int]:
    return column_splits(*_blocks(gate_up_TN, inner, widest), BACKWARD_PROGRAMS * multiprocessors(gate_up_TN))


def _blocks(gate_up_TN: Tensor, inner: int, widest: int) -> tuple[int, int]:
    """Tiles down and across, where the largest rank is so wide."""
    return -(-gate_up_TN.shape[0] // ADAPTER_ROWS), -(-inner // ADAPTER_COLUMNS[widest <= NARROW_RANK])


def _forward(
    gate_up_TN: Tensor,
    activation: str,
    gated: bool,
    adapter: _Adapter | None,
    out_TI: Tensor,
    down: _Pair | None,
) -> None:
    """The kernel that fits; `down` is A of the down projection and where act · Aᵀ goes."""
    tokens, inner = out_TI.shape
    used = adapter or _Adapter(gate_up_TN, gate_up_TN, 0, 1.0)
    xa, b, rank, scale = used
    down_a, down_u = down or (gate_up_TN, gate_up_TN)
    down_rank = 0 if down is None else down_a.shape[0]
    if adapter is None and down is None:
        rows, cols = _tile(inner)
        splits, tiles, stages, warps = -(-inner // cols), 1, 1, 4
    else:
        widest = max(rank, down_rank)
        rows, cols, warps = ADAPTER_ROWS, ADAPTER_COLUMNS[widest <= NARROW_RANK], FORWARD_WARPS
        splits, tiles = _forward_splits(gate_up_TN, inner, rank, down_rank)
        stages = _stages(gate_up_TN.dtype, widest, FORWARD_STAGES)
    sums = down_u
    if down is not None and splits > 1:
        sums = torch.empty((splits, tokens, down_rank), dtype=torch.float32, device=gate_up_TN.device)
    launch(
        _forward_kernel, (-(-tokens // rows) * splits,), gate_up_TN, out_TI, xa, b, down_a, sums,
        tokens, inner, tiles, splits, gate_up_TN.stride(0), out_TI.stride(0), xa.stride(0), b.stride(0),
        down_a.stride(0), scale,
        ACT=activation, GATED=gated, RANK=rank, RANK_BLOCK=rank_block(rank, gate_up_TN.dtype), XA_STEP=used.step,
        DOWN_RANK=down_rank, DOWN_BLOCK=rank_block(down_rank, gate_up_TN.dtype),
        ROWS=rows, COLS=cols, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    if down is not None and splits > 1:
        _sum_splits(sums, down_u)


def _sum_splits(sums_STR: Tensor, out_TR: Tensor) -> None:
    """The sum over splits, rounded once."""
    count = out_TR.numel()
    launch(
        _sum_splits_kernel, (-(-count // SUM_BLOCK),), sums_STR, out_TR, count, sums_STR.shape[0],
        BLOCK=SUM_BLOCK, num_warps=4,
    )  # fmt: skip


def _backward(gate_up_TN: Tensor, grad_act_TI: Tensor, activation: str, gated: bool, recompute: bool) -> None:
    tokens, inner = grad_act_TI.shape
    rows, cols = _tile(inner)
    launch(
        _backward_kernel, (-(-tokens // rows) * -(-inner // cols),), gate_up_TN, grad_act_TI,
        tokens, inner, gate_up_TN.stride(0), grad_act_TI.stride(0),
        ACT=activation, GATED=gated, RECOMPUTE=recompute, ROWS=rows, COLS=cols, num_warps=4,
    )  # fmt: skip


def _stages(dtype: torch.dtype, rank: int, stages: int) -> int:
    """Tiles on their way at once; 1 where the loop over them holds loops over the ranks."""
    return stages if dtype != torch.float32 and rank <= max_rank(dtype) else 1


def _adapter_backward(
    gate_up_TN: Tensor,
    grad_act_TI: Tensor,
    activation: str,
    gated: bool,
    adapter: _Adapter | None,
    down: _Pair | None,
    recompute: bool,
) -> Tensor | None:
    tokens, inner = grad_act_TI.shape
    used = adapter or _Adapter(gate_up_TN, gate_up_TN, 0, 1.0)
    xa, b, rank, scale = used
    down_dxa, down_a = down or (gate_up_TN, gate_up_TN)
    down_rank = 0 if down is None else down_a.shape[0]
    widest = max(rank, down_rank)
    narrow = widest <= NARROW_RANK
    splits, tiles = _backward_splits(gate_up_TN, inner, widest)
    grad_xa_TR = gate_up_TN.new_empty((tokens, used.step + rank))
    # sums of more columns do not fit the registers beside the rest: two GEMMs form them below
    reduce = 0 < rank <= max_rank(gate_up_TN.dtype)
    sums = grad_xa_TR
    if reduce and splits > 1:
        sums = torch.empty((splits, *grad_xa_TR.shape), dtype=torch.float32, device=gate_up_TN.device)
    launch(
        _adapter_backward_kernel, (-(-tokens // ADAPTER_ROWS), splits),
        gate_up_TN, grad_act_TI, xa, b, down_dxa, down_a, sums,
        tokens, inner, tiles, gate_up_TN.stride(0), grad_act_TI.stride(0), xa.stride(0), b.stride(0),
        down_dxa.stride(0), down_a.stride(0), scale,
        ACT=activation, GATED=gated, RANK=rank, RANK_BLOCK=rank_block(rank, gate_up_TN.dtype), XA_STEP=used.step,
        DOWN_RANK=down_rank, DOWN_BLOCK=rank_block(down_rank, gate_up_TN.dtype), REDUCE=reduce, RECOMPUTE=recompute,
        ROWS=ADAPTER_ROWS, COLS=ADAPTER_COLUMNS[narrow],
        STAGES=_stages(gate_up_TN.dtype, widest, BACKWARD_STAGES[narrow]), num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    if reduce and splits > 1:
        _sum_splits(sums, grad_xa_TR)
    if adapter is None:
        return None
    return grad_xa_TR if reduce else _grad_xa(gate_up_TN, adapter, gated)


def _parts(gate_up_TN: Tensor, adapter: _Adapter, gated: bool) -> list[tuple[Tensor, Tensor, slice]]:
    """Columns of gate and up, or of the one buffer, with their rows of B and the columns of x·Aᵀ that they read."""
    inner, rank = gate_up_TN.shape[1] // (1 + gated), adapter.rank
    parts = []
    for number in range(1 + gated):
        columns, first = slice(number * inner, (number + 1) * inner), number * adapter.step
        parts.append((gate_up_TN[:, columns], adapter.b_NR[columns], slice(first, first + rank)))
    return parts


def _add_adapter_(gate_up_TN: Tensor, adapter: _Adapter, gated: bool) -> None:
    """gate and up += scale · xa · Bᵀ, in place."""
    xa_TR = adapter.xa_TR.to(gate_up_TN.dtype)
    for part_TI, b_IR, ranks in _parts(gate_up_TN, adapter, gated):
        part_TI.addmm_(xa_TR[:, ranks], b_IR.to(gate_up_TN.dtype).T, alpha=adapter.scale)


def _grad_xa(grad_TN: Tensor, adapter: _Adapter, gated: bool) -> Tensor:
    """scale · [dgate · B_g | dup · B_u] by GEMMs; their sum where both share x·Aᵀ."""
    if gated and not adapter.step:
        return (grad_TN @ adapter.b_NR.to(grad_TN.dtype)).mul_(adapter.scale)
    parts = [part_TI @ b_IR.to(grad_TN.dtype) for part_TI, b_IR, _ in _parts(grad_TN, adapter, gated)]
    return torch.cat(parts, -1).mul_(adapter.scale)


# ---------------------------------------------------------------------- operators


@torch.library.custom_op("tunesmith::glu", mutates_args=())
def glu_op(
    gate_up_TN: Tensor, activation: str = "silu", xa_TR: Tensor | None = None, b_NR: Tensor | None = None,
    rank: int = 0, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """`glu` as an operator for torch.compile and autograd, differentiable in gate_up, xa and b."""
    return glu(gate_up_TN, activation=activation, xa_TR=xa_TR, b_NR=b_NR, rank=rank, scale=scale)


@glu_op.register_fake
def _(gate_up_TN: Tensor, *_others: Any) -> Tensor:
    return gate_up_TN.new_empty((gate_up_TN.shape[0], gate_up_TN.shape[1] // 2))


@torch.library.custom_op("tunesmith::glu_backward", mutates_args=())
def glu_backward_op(
    gate_up_TN: Tensor, grad_act_TI: Tensor, activation: str = "silu", xa_TR: Tensor | None = None,
    b_NR: Tensor | None = None, rank: int = 0, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`glu_backward_` on copies: gradients of gate_up and of xa (no columns without an adapter)."""
    grad_TN = gate_up_TN.clone(memory_format=torch.contiguous_format)
    grad_act_TI = grad_act_TI.clone(memory_format=torch.contiguous_format)
    grad_xa_TR = glu_backward_(
        grad_TN, grad_act_TI, activation=activation, xa_TR=xa_TR, b_NR=b_NR, rank=rank, scale=scale
    )
    return grad_TN, gate_up_TN.new_empty((gate_up_TN.shape[0], 0)) if grad_xa_TR is None else grad_xa_TR


@glu_backward_op.register_fake
def _(
    gate_up_TN: Tensor, _grad_TI: Tensor, _activation: str = "", xa_TR: Tensor | None = None, *_others: Any
) -> tuple[Tensor, Tensor]:
    ranks = 0 if xa_TR is None else xa_TR.shape[1]
    return gate_up_TN.new_empty(gate_up_TN.shape), gate_up_TN.new_empty((gate_up_TN.shape[0], ranks))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    gate_up_TN, ctx.activation, xa_TR, b_NR, ctx.rank, ctx.scale = inputs
    ctx.save_for_backward(gate_up_TN, xa_TR, b_NR)


def _autograd(ctx: Any, grad_act_TI: Tensor) -> tuple[Tensor | None, ...]:
    gate_up_TN, xa_TR, b_NR = ctx.saved_tensors
    grad_TN, grad_xa_TR = glu_backward_op(
        gate_up_TN, grad_act_TI, ctx.activation, xa_TR, b_NR, ctx.rank, ctx.scale
    )
    if xa_TR is None:
        return grad_TN, None, None, None, None, None
    # ∂B_p = scale · dᵀ · xa_p
    parts = zip(grad_TN.chunk(2, -1), xa_TR.to(grad_TN.dtype).split(ctx.rank, -1), strict=True)
    grad_b_NR = torch.cat([d.T @ xa for d, xa in parts]) * ctx.scale
    return grad_TN, None, grad_xa_TR.to(xa_TR.dtype), grad_b_NR.to(b_NR.dtype), None, None


glu_op.register_autograd(_autograd, setup_context=_setup_context)


# ---------------------------------------------------------------------- reference


def _silu(x: Tensor) -> _Pair:
    sigma = torch.sigmoid(x)
    return x * sigma, sigma * (1 + x * (1 - sigma))


def _gelu_tanh(x: Tensor) -> _Pair:
    k = 2 * math.sqrt(2 / math.pi)
    sigma = torch.sigmoid(k * (x + 0.044715 * x**3))
    return x * sigma, sigma + x * sigma * (1 - sigma) * k * (1 + 3 * 0.044715 * x**2)


def _gelu(x: Tensor) -> _Pair:
    phi = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * phi, phi + x * torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)


ACTIVATIONS: dict[str, Callable[[Tensor], _Pair]] = {"silu": _silu, "gelu_tanh": _gelu_tanh, "gelu": _gelu}
"""Value and slope of every activation; a new row needs its branch in `_activate`."""


def _gate_and_up(gate_up_TN: Tensor, adapter: _Adapter | None, gated: bool) -> tuple[Tensor, Tensor | None]:
    wide_TN = gate_up_TN.to(accumulation_dtype(gate_up_TN.dtype))
    if adapter is not None:
        wide_TN = wide_TN.clone() if wide_TN is gate_up_TN else wide_TN
        _add_adapter_(wide_TN, adapter, gated)
    if not gated:
        return wide_TN, None
    gate_TI, up_TI = wide_TN.chunk(2, -1)
    return gate_TI, up_TI


def glu_reference(
    gate_up_TN: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    xa_TR: Tensor | None = None,
    b_NR: Tensor | None = None,
    rank: int = 0,
    scale: float = 1.0,
    out_TI: Tensor | None = None,
    down_a_RI: Tensor | None = None,
    down_u_TR: Tensor | None = None,
) -> Tensor:
    """`glu` in plain torch."""
    gate_TI, up_TI = _gate_and_up(gate_up_TN, _adapter(xa_TR, b_NR, rank, scale), gated)
    value_TI = ACTIVATIONS[activation](gate_TI)[0]
    act_TI = (value_TI if up_TI is None else value_TI * up_TI).to(gate_up_TN.dtype)
    if down_a_RI is not None and down_u_TR is not None:
        down_u_TR.copy_(act_TI @ down_a_RI.to(act_TI.dtype).T)
    return act_TI if out_TI is None else out_TI.copy_(act_TI)


def glu_backward_reference_(
    gate_up_TN: Tensor,
    grad_act_TI: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    xa_TR: Tensor | None = None,
    b_NR: Tensor | None = None,
    rank: int = 0,
    scale: float = 1.0,
    down_dxa_TR: Tensor | None = None,
    down_a_RI: Tensor | None = None,
    recompute: bool = True,
) -> Tensor | None:
    """`glu_backward_` in plain torch."""
    adapter = _adapter(xa_TR, b_NR, rank, scale)
    gate_TI, up_TI = _gate_and_up(gate_up_TN, adapter, gated)
    dtype, inner = gate_TI.dtype, gate_TI.shape[1]
    grad_TI = grad_act_TI.to(dtype)
    if down_dxa_TR is not None and down_a_RI is not None:
        grad_TI = grad_TI + down_dxa_TR.to(dtype) @ down_a_RI.to(dtype)
    value_TI, slope_TI = ACTIVATIONS[activation](gate_TI)
    # all before the first is written: in float32 and float64 the operands are views of the buffers
    d_gate_TI, d_up_TI, act_TI = grad_TI * slope_TI, None, value_TI
    if up_TI is not None:
        d_gate_TI, d_up_TI, act_TI = d_gate_TI * up_TI, grad_TI * value_TI, value_TI * up_TI
    gate_up_TN[:, :inner] = d_gate_TI.to(gate_up_TN.dtype)
    if d_up_TI is not None:
        gate_up_TN[:, inner:] = d_up_TI.to(gate_up_TN.dtype)
    if recompute:
        grad_act_TI.copy_(act_TI.to(grad_act_TI.dtype))
    return None if adapter is None else _grad_xa(gate_up_TN.to(dtype), adapter, gated).to(gate_up_TN.dtype)


# ---------------------------------------------------------------------- public


def glu(
    gate_up_TN: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    xa_TR: Tensor | None = None,
    b_NR: Tensor | None = None,
    rank: int = 0,
    scale: float = 1.0,
    out_TI: Tensor | None = None,
    down_a_RI: Tensor | None = None,
    down_u_TR: Tensor | None = None,
) -> Tensor:
    """f(gate) · up, the adapters of both added first where given.

    Args:
        gate_up_TN: `[gate | up]`, or what f is taken of where there is no gate; rows may be strided.
        activation: a row of `ACTIVATIONS`.
        gated: whether the buffer has a gate.
        xa_TR: `[T, 2 · rank]`, x·Aᵀ of gate and up side by side; `[T, rank]` where one adapter serves both, or
            without gate.
        b_NR: `[N, rank]`, B of gate and up below each other.
        rank: rank of each of the two adapters.
        scale: factor on the adapters' products.
        out_TI: where the result goes; rows may be strided.
        down_a_RI: `[r, I]`, A of the down projection; with it comes
        down_u_TR: `[T, r]`, contiguous: where the result times down_Aᵀ goes, summed in float32.

    Returns:
        `act_TI` in the type of `gate_up_TN`, which is `out_TI` where given. Not recorded by autograd.
    """
    if not use_triton(gate_up_TN, "glu"):
        return glu_reference(
            gate_up_TN, activation=activation, gated=gated, xa_TR=xa_TR, b_NR=b_NR, rank=rank, scale=scale,
            out_TI=out_TI, down_a_RI=down_a_RI, down_u_TR=down_u_TR,
        )  # fmt: skip
    assert activation in ACTIVATIONS
    assert (down_a_RI is None) == (down_u_TR is None)
    tokens, columns = gate_up_TN.shape
    act_TI = out_TI
    if act_TI is None:
        act_TI = torch.empty(
            (tokens, columns // (1 + gated)), dtype=gate_up_TN.dtype, device=gate_up_TN.device
        )
    assert gate_up_TN.stride(1) == act_TI.stride(1) == 1
    adapter = _adapter(xa_TR, b_NR, rank, scale)
    if adapter is not None and rank > LARGEST_FUSED_RANK:
        gate_up_TN = gate_up_TN.clone()
        _add_adapter_(gate_up_TN, adapter, gated)
        adapter = None
    down = None
    if down_a_RI is not None and down_u_TR is not None:
        assert down_a_RI.stride(1) == 1
        assert down_u_TR.is_contiguous()
        if down_a_RI.shape[0] <= max_rank(gate_up_TN.dtype):
            down = (down_a_RI, down_u_TR)
    _forward(gate_up_TN, activation, gated, adapter, act_TI, down)
    if down is None and down_a_RI is not None and down_u_TR is not None:
        torch.mm(act_TI, down_a_RI.to(act_TI.dtype).T, out=down_u_TR)
    return act_TI


def glu_backward_(
    gate_up_TN: Tensor,
    grad_act_TI: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    xa_TR: Tensor | None = None,
    b_NR: Tensor | None = None,
    rank: int = 0,
    scale: float = 1.0,
    down_dxa_TR: Tensor | None = None,
    down_a_RI: Tensor | None = None,
    recompute: bool = True,
) -> Tensor | None:
    """Gradient of `glu`, in place: `gate_up_TN` becomes `[dgate | dup]`, and `grad_act_TI` becomes `act_TI`.

    Args:
        gate_up_TN: what the forward read; rows may be strided.
        grad_act_TI: gradient of the forward's result; rows may be strided.
        activation: that of the forward, as `gated`, `xa_TR`, `b_NR`, `rank` and `scale` are.
        down_dxa_TR: `[T, r]`, gradient of the down projection's x·Aᵀ, its scale included.
        down_a_RI: `[r, I]`, A of the down projection; the product of the two is added to `grad_act_TI` first.
        recompute: whether `act_TI` is wanted; without, the content of `grad_act_TI` is undefined afterwards.

    Returns:
        The gradient of `xa_TR` in the type of `gate_up_TN`, None without an adapter.
    """
    if not use_triton(gate_up_TN, "glu_backward_"):
        return glu_backward_reference_(
            gate_up_TN, grad_act_TI, activation=activation, gated=gated, xa_TR=xa_TR, b_NR=b_NR, rank=rank,
            scale=scale, down_dxa_TR=down_dxa_TR, down_a_RI=down_a_RI, recompute=recompute,
        )  # fmt: skip
    assert activation in ACTIVATIONS
    assert gate_up_TN.stride(1) == grad_act_TI.stride(1) == 1
    adapter = _adapter(xa_TR, b_NR, rank, scale)
    down = None
    if down_dxa_TR is not None:
        assert down_a_RI is not None
        assert down_dxa_TR.stride(1) == down_a_RI.stride(1) == 1
        down = (down_dxa_TR, down_a_RI)
    if down is not None and down[1].shape[0] > LARGEST_FUSED_RANK:
        grad_act_TI.addmm_(down[0].to(grad_act_TI.dtype), down[1].to(grad_act_TI.dtype))
        down = None
    if adapter is not None and rank > LARGEST_FUSED_RANK:
        _add_adapter_(gate_up_TN, adapter, gated)
        glu_backward_(
            gate_up_TN,
            grad_act_TI,
            activation=activation,
            gated=gated,
            down_dxa_TR=down_dxa_TR if down else None,
            down_a_RI=down_a_RI if down else None,
            recompute=recompute,
        )
        return _grad_xa(gate_up_TN, adapter, gated)
    if adapter is None and down is None:
        _backward(gate_up_TN, grad_act_TI, activation, gated, recompute)
        return None
    return _adapter_backward(gate_up_TN, grad_act_TI, activation, gated, adapter, down, recompute)
