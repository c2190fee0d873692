"""Rotary positions on the fused buffer `[q heads | k heads | v heads]`, in place, adapters of q, k, v included.

The pass over the buffer that rotation needs anyway also adds the LoRA products of the three projections, so the
base GEMM stays plain and no adapter GEMM writes the buffer a second time. For projection p with columns n:

    y_tn  = qkv_tn + scale · Σ_r xa_t,p·R+r · b_nr          in float32, for q, k and v
    y1, y2 = y1 · cos − y2 · sin,  y2 · cos + y1 · sin        halves of the rotated columns, for q and k

and one rounding at the end. Its transpose, the backward, is itself with −sin (`inverse`). The halves are Hugging
Face's (`rotate_half`): columns j and j + rotary_dim / 2 form a pair; 2j and 2j + 1 where they are `interleaved`.

Rejected: one program a token, which would read the adapter's B once a token; with 32 tokens a program B comes
from the L2 cache at a 32nd of the buffer's traffic (rank 16: 32 bytes a column against 128 of reads and writes).

Shape suffixes: T tokens, N columns of the fused buffer, K rotated columns of a head, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

ROWS = 32
"""Tokens of a program: with half a head of 64 columns 16 elements a thread for each half, 128 threads and 68
registers. With an adapter 256 threads: compiled for sm_90, rank 16 takes 58 registers (127 with 128 threads) and rank
64 takes 118 (178), twice the resident warps."""
HEADS = 4
"""Heads of a program, which read cos and sin once: at 128 columns and bfloat16 tables a fourth of 50% extra reads."""


@dataclass(frozen=True, slots=True)
class RotaryLayout:
    """Columns of the fused buffer."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int | None = None
    interleaved: bool = False

    @property
    def half(self) -> int:
        return (self.rotary_dim or self.head_dim) // 2

    @property
    def pair(self) -> tuple[int, int]:
        """Distance from a pair to the next, and between the two columns of a pair."""
        return (2, 1) if self.interleaved else (1, self.half)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class _Adapter:
    """x·Aᵀ of q, k and v side by side or one for all, B with a row for each output column, and the factor."""

    xa_TR: Tensor
    b_NR: Tensor
    rank: int
    scale: float

    @property
    def step(self) -> int:
        """Columns from the x·Aᵀ of one projection to that of the next."""
        return 0 if self.xa_TR.shape[1] == self.rank else self.rank


# ---------------------------------------------------------------------- kernel


@jit(do_not_specialize=["tokens", "scale"])
def _rope_kernel(  # type: ignore[no-untyped-def]
    qkv, cos, sin, xa, b, tokens, qkv_row, cos_row, sin_row, xa_row, b_row, scale,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
    STEP: tl.constexpr, NEXT: tl.constexpr, TABLE_STEP: tl.constexpr,
    INVERSE: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, XA_STEP: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_live = row < tokens
    at = row.to(tl.int64)
    j = tl.arange(0, BLOCK)
    j_live = j < HALF
    live = row_live[:, None] & j_live[None, :]
    angle = j[None, :] * TABLE_STEP
    c = tl.load(cos + at[:, None] * cos_row + angle, mask=live, other=0.0).to(tl.float32)
    s = tl.load(sin + at[:, None] * sin_row + angle, mask=live, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    # v heads have nothing to rotate and are visited only for their adapter
    last = Q_HEADS + KV_HEADS
    if RANK > 0:
        last += KV_HEADS
    first = tl.program_id(1) * HEADS
    for nth in tl.range(0, tl.minimum(HEADS, last - first), num_stages=1):
        head = first + nth
        base = qkv + at[:, None] * qkv_row + head * HEAD_DIM
        first_at = base + j[None, :] * STEP
        y1 = tl.load(first_at, mask=live, other=0.0).to(tl.float32)
        y2 = tl.load(first_at + NEXT, mask=live, other=0.0).to(tl.float32)
        turn_c = c
        turn_s = s
        if RANK > 0:
            projection = (head >= Q_HEADS).to(tl.int32) + (head >= Q_HEADS + KV_HEADS).to(tl.int32)
            xa_at = at * xa_row + projection * XA_STEP
            b_at = (head * HEAD_DIM + j * STEP).to(tl.int64) * b_row
            y1 += scale * rank_product(xa, b, xa_at, b_at, 1, row_live, j_live, RANK, RANK_BLOCK, ROWS, BLOCK)
            y2 += scale * rank_product(
                xa, b, xa_at, b_at + NEXT * b_row, 1, row_live, j_live, RANK, RANK_BLOCK, ROWS, BLOCK
            )
            turn_c = tl.where(projection == 2, 1.0, c)
            turn_s = tl.where(projection == 2, 0.0, s)
            if REST_BLOCK > 0:
                # columns past rotary_dim, which only the adapter changes
                k = 2 * HALF + tl.arange(0, REST_BLOCK)
                k_live = k < HEAD_DIM
                rest_live = row_live[:, None] & k_live[None, :]
                y = tl.load(base + k[None, :], mask=rest_live, other=0.0).to(tl.float32)
                b_at = (head * HEAD_DIM + k).to(tl.int64) * b_row
                y += scale * rank_product(
                    xa, b, xa_at, b_at, 1, row_live, k_live, RANK, RANK_BLOCK, ROWS, REST_BLOCK
                )
                tl.debug_barrier()
                tl.store(base + k[None, :], y.to(qkv.dtype.element_ty), mask=rest_live)
        if RANK > 0:
            # products are laid out differently from loads: no thread may store what another has yet to load
            tl.debug_barrier()
        tl.store(first_at, (y1 * turn_c - y2 * turn_s).to(qkv.dtype.element_ty), mask=live)
        tl.store(first_at + NEXT, (y2 * turn_c + y1 * turn_s).to(qkv.dtype.element_ty), mask=live)


# ---------------------------------------------------------------------- launcher


def _rope(
    qkv_TN: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    layout: RotaryLayout,
    inverse: bool,
    adapter: _Adapter | None,
) -> None:
    tokens = qkv_TN.shape[0]
    heads = layout.heads + layout.kv_heads * (1 if adapter is None else 2)
    xa, b = (qkv_TN, qkv_TN) if adapter is None else (adapter.xa_TR, adapter.b_NR)
    rank, xa_step = (0, 0) if adapter is None else (adapter.rank, adapter.step)
    rest, (step, following) = layout.head_dim - 2 * layout.half, layout.pair
    assert cos_TK.stride(1) == sin_TK.stride(1)
    launch(
        _rope_kernel, (-(-tokens // ROWS), -(-heads // HEADS)), qkv_TN, cos_TK, sin_TK, xa, b,
        tokens, qkv_TN.stride(0), cos_TK.stride(0), sin_TK.stride(0), xa.stride(0), b.stride(0),
        1.0 if adapter is None else float(adapter.scale),
        Q_HEADS=layout.heads, KV_HEADS=layout.kv_heads, HEAD_DIM=layout.head_dim, HALF=layout.half,
        STEP=step, NEXT=following, TABLE_STEP=cos_TK.stride(1), INVERSE=inverse, RANK=rank,
        RANK_BLOCK=rank_block(rank, qkv_TN.dtype), XA_STEP=xa_step, HEADS=HEADS, ROWS=ROWS,
        BLOCK=max(MIN_RANK, power_of_2(layout.half)),
        REST_BLOCK=max(MIN_RANK, power_of_2(rest)) if rest and rank else 0,
        num_warps=8 if rank else 4,
    )  # fmt: skip


# ---------------------------------------------------------------------- operators


@torch.library.custom_op("tunesmith::rope_qkv_", mutates_args={"qkv_TN"})
def rope_qkv_op_(
    qkv_TN: Tensor, cos_TK: Tensor, sin_TK: Tensor, heads: int, kv_heads: int, head_dim: int,
    rotary_dim: int | None = None, inverse: bool = False, xa_TR: Tensor | None = None,
    b_NR: Tensor | None = None, rank: int = 0, scale: float = 1.0, interleaved: bool = False,
) -> None:  # fmt: skip
    """`rope_qkv_` as an operator for torch.compile; in place and therefore not differentiable."""
    rope_qkv_(
        qkv_TN, cos_TK, sin_TK, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim,
        inverse=inverse, xa_TR=xa_TR, b_NR=b_NR, rank=rank, scale=scale, interleaved=interleaved,
    )  # fmt: skip


@torch.library.custom_op("tunesmith::rope_qkv", mutates_args=())
def rope_qkv_op(
    qkv_TN: Tensor, cos_TK: Tensor, sin_TK: Tensor, heads: int, kv_heads: int, head_dim: int,
    rotary_dim: int | None = None, inverse: bool = False, interleaved: bool = False,
) -> Tensor:  # fmt: skip
    """A rotated copy of the fused buffer, differentiable in it."""
    result_TN = qkv_TN.contiguous() if not qkv_TN.is_contiguous() else qkv_TN.clone()
    rope_qkv_(
        result_TN, cos_TK, sin_TK, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim,
        inverse=inverse, interleaved=interleaved,
    )  # fmt: skip
    return result_TN


@rope_qkv_op.register_fake
def _(qkv_TN: Tensor, *_others: Any) -> Tensor:
    return qkv_TN.new_empty(qkv_TN.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    _, cos_TK, sin_TK, *ctx.layout, ctx.inverse, ctx.interleaved = inputs
    ctx.save_for_backward(cos_TK, sin_TK)


def _autograd(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, ...]:
    cos_TK, sin_TK = ctx.saved_tensors
    grad_qkv_TN = rope_qkv_op(grad_TN, cos_TK, sin_TK, *ctx.layout, not ctx.inverse, ctx.interleaved)
    return grad_qkv_TN, *[None] * 8


rope_qkv_op.register_autograd(_autograd, setup_context=_setup_context)


# ---------------------------------------------------------------------- reference


def rope_qkv_reference_(
    qkv_TN: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int | None = None,
    inverse: bool = False,
    xa_TR: Tensor | None = None,
    b_NR: Tensor | None = None,
    rank: int = 0,
    scale: float = 1.0,
    interleaved: bool = False,
) -> None:
    """`rope_qkv_` in plain torch."""
    dtype = accumulation_dtype(qkv_TN.dtype)
    layout = RotaryLayout(heads, kv_heads, head_dim, rotary_dim, interleaved)
    fused_TN = qkv_TN[:, : sum(layout.sizes)]
    wide_TN = fused_TN.to(dtype)
    if xa_TR is not None and b_NR is not None:
        wide_TN = wide_TN + scale * qkv_adapter(xa_TR.to(dtype), b_NR.to(dtype), rank, layout)
    rotated = layout.sizes[0] + layout.sizes[1]
    qk_THK = wide_TN[:, :rotated].unflatten(-1, (-1, head_dim))
    turned_THK = rotate(qk_THK, cos_TK.to(dtype), sin_TK.to(dtype), layout, inverse=inverse)
    fused_TN[:, :rotated] = turned_THK.flatten(1).to(qkv_TN.dtype)
    if xa_TR is not None:
        fused_TN[:, rotated:] = wide_TN[:, rotated:].to(qkv_TN.dtype)


def qkv_adapter(xa_TR: Tensor, b_NR: Tensor, rank: int, layout: RotaryLayout) -> Tensor:
    """The adapters' products of q, k and v side by side `[T, N]`."""
    if xa_TR.shape[1] == rank:
        return xa_TR @ b_NR.T
    parts = zip(xa_TR.split(rank, -1), b_NR.split(layout.sizes), strict=True)
    return torch.cat([xa @ b.T for xa, b in parts], -1)


def rotate(
    heads_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor, layout: RotaryLayout, *, inverse: bool = False
) -> Tensor:
    """Heads with their first columns turned, in the type of the tables."""
    half = layout.half
    turned, rest = heads_THK[..., : 2 * half], heads_THK[..., 2 * half :]
    cos, sin = (table[:, None, :half] for table in (cos_TK, sin_TK))
    sin = -sin if inverse else sin
    if layout.interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack(pair, -1).flatten(-2) if layout.interleaved else torch.cat(pair, -1)
    return torch.cat([joined, rest], -1)


# ---------------------------------------------------------------------- public


def rope_qkv_(
    qkv_TN: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int | None = None,
    inverse: bool = False,
    xa_TR: Tensor | None = None,
    b_NR: Tensor | None = None,
    rank: int = 0,
    scale: float = 1.0,
    interleaved: bool = False,
) -> None:
    """Add the adapters of q, k and v where given, then rotate q and k; in place.

    Args:
        qkv_TN: `[q heads | k heads | v heads]` in its first columns; the row stride may exceed N.
        cos_TK: cosines of every pair in the first rotary_dim / 2 columns; further ones are not read. May be strided
            and broadcast.
        sin_TK: sines, likewise.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: columns of a head.
        rotary_dim: rotated columns of a head, the first ones; None is all.
        inverse: rotate back, which is the backward of the rotation; takes no adapter.
        xa_TR: `[T, 3 · rank]`, x·Aᵀ of q, k and v side by side, or `[T, rank]` of one adapter for all three.
        b_NR: `[N, rank]`, B of q, k and v below each other.
        rank: rank of each of the three adapters.
        scale: factor on the adapters' products.
        interleaved: whether columns 2j and 2j + 1 form a pair, instead of j and j + rotary_dim / 2.
    """
    assert not (inverse and xa_TR is not None), "the backward of the adapter is not a rotation"
    if not use_triton(qkv_TN, "rope_qkv_"):
        rope_qkv_reference_(
            qkv_TN, cos_TK, sin_TK, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim,
            inverse=inverse, xa_TR=xa_TR, b_NR=b_NR, rank=rank, scale=scale, interleaved=interleaved,
        )  # fmt: skip
        return
    adapter = None
    if xa_TR is not None:
        assert b_NR is not None
        assert qkv_TN.stride(1) == xa_TR.stride(1) == b_NR.stride(1) == 1
        adapter = _Adapter(xa_TR, b_NR, rank, scale)
    layout = RotaryLayout(heads, kv_heads, head_dim, rotary_dim, interleaved)
    _rope(qkv_TN, cos_TK, sin_TK, layout, inverse, adapter)
