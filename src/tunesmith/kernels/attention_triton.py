"""Packed attention in Triton: any scale, sliding windows, soft caps, heads of 16 to 256, in 16 bits and in float32.

With s = scale · q·k, capped by s ← c · tanh(s / c) where there is a cap, and a query i seeing the keys j of its
document with 0 ≤ i − j < window:

    p_ij = exp(s_ij − lse_i)        out_i = Σ_j p_ij v_j
    ∂v_j = Σ_i p_ij ∂out_i          ∂s_ij = p_ij (∂out_i · v_j − δ_i),  δ_i = ∂out_i · out_i
    ∂q_i = scale Σ_j ∂s_ij k_j      ∂k_j = scale Σ_i ∂s_ij q_i          (∂s · (1 − tanh²) through the cap)

Blocks of scores never leave the chip (FlashAttention-2, arXiv:2307.08691). Exponentials are powers of two, with
log2(e) folded into the scale, and the log-sum-exp is one of base two. Blocks of keys that a query block cannot see
are not visited, and only those at the diagonal and at the window's edge are masked. The gradient of q is one kernel,
that of k and v another, which walks the query heads of its group: every sum has one owner and one order, so runs
repeat bit for bit. It costs seven products of blocks instead of five. Rejected: adding ∂q up with atomics
from the second kernel, which is five and differs between runs.

tanh(y) is 1 − 2 / (1 + exp(2y)), within 1e-7. The card's own approximation errs by 5e-4: 0.02 of a score at the cap
of Gemma 2, which is 2% of a probability.

The blocks of all documents stand in one list (`attention_blocks.block_list`), the most work first, so that the card
is evenly loaded by documents of any lengths; it is computed on the device, without waiting for it.

Shape suffixes: T tokens, N columns of the fused buffer, H query heads, G key/value heads, K head size, L blocks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.attention_blocks import KERNELS, Blocks, block_list, blocks_for
from tunesmith.kernels.launch import INTERPRETED, accumulation_dtype, jit, launch, power_of_2, tl, use_triton
from tunesmith.kernels.packed import Documents, Heads, Saved, Scores

LOG2E = 1.4426950408889634

# ---------------------------------------------------------------------- kernels

# globals that a kernel reads have to be constexpr
_LOG2E = tl.constexpr(LOG2E) if tl is not None else LOG2E
_WIDEN = tl.constexpr(INTERPRETED) if tl is not None else INTERPRETED


@jit()
def _dot(left, right, total):  # type: ignore[no-untyped-def]
    """total + left · right in float32; operands of float32 as three products of tf32, which loses 2^-22.

    `launch.dot` multiplies float32 without tensor cores: a block of 32 × 256 would not fit the registers.
    """
    if _WIDEN:  # the interpreter multiplies bfloat16 operands as integers
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="tf32x3")


@jit()
def _load(at, offsets, live, d, MASKED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of rows; 0 beyond the head's end and, with MASKED, in rows that are not live."""
    if MASKED and SIZE == WIDTH:
        return tl.load(at + offsets, mask=live[:, None], other=0.0)
    if MASKED:
        return tl.load(at + offsets, mask=live[:, None] & (d < SIZE)[None, :], other=0.0)
    if SIZE == WIDTH:
        return tl.load(at + offsets)
    return tl.load(at + offsets, mask=(d < SIZE)[None, :], other=0.0)


@jit()
def _store(at, offsets, live, d, values, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    mask = live[:, None] & (d < SIZE)[None, :]
    tl.store(at + offsets, values.to(at.dtype.element_ty), mask=mask)


@jit()
def _tanh(products, factor, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """tanh(scale · products / CAP), where `factor` is scale · log2(e)."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(products * (factor * (2.0 / CAP))))


@jit()
def _visible(query, key, window, WINDOWED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether queries at these places see keys at those; one is a row and the other a column."""
    if WINDOWED:
        return (query >= key) & (query - key < window)
    return query >= key


@jit()
def _tile(tiles, tile):  # type: ignore[no-untyped-def]
    """First row of the document, its length, and where in it the block begins."""
    at = tiles + 3 * tile
    return tl.load(at).to(tl.int64), tl.load(at + 1), tl.load(at + 2)


@jit()
def _key_ranges(first, length, window, WINDOWED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bounds of what a block of queries sees: keys at the window's edge, keys seen by all, keys at the diagonal.

    COLS divides ROWS, so the diagonal begins at `first` itself.
    """
    low, whole = first * 0, first * 0
    if WINDOWED:
        low = tl.maximum(first - window + 1, 0) // COLS * COLS
        whole = tl.minimum((tl.maximum(first + ROWS - window, 0) + COLS - 1) // COLS * COLS, first)
    return low, whole, tl.minimum(first + ROWS, length)


@jit()
def _forward_blocks(  # type: ignore[no-untyped-def]
    acc, total, top, q, k_at, v_at, stride, offsets, rows, d, low, high, length, factor, window,
    MASKED: tl.constexpr, CAP: tl.constexpr, WINDOWED: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax over keys from `low` to `high`."""
    for begin in tl.range(low, high, COLS):
        cols = begin + tl.arange(0, COLS)
        live = cols < length
        k = _load(k_at + begin * stride, offsets, live, d, MASKED, SIZE, WIDTH)
        s = _dot(q, tl.trans(k), tl.zeros((ROWS, COLS), tl.float32))
        if CAP > 0:
            s = _tanh(s, factor, CAP) * (CAP * _LOG2E)
        if MASKED:
            s = tl.where(_visible(rows[:, None], cols[None, :], window, WINDOWED), s, float("-inf"))
        if CAP > 0:
            higher = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - higher[:, None])
        else:
            higher = tl.maximum(top, tl.max(s, 1) * factor)
            p = tl.exp2(s * factor - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = _load(v_at + begin * stride, offsets, live, d, MASKED, SIZE, WIDTH)
        acc = _dot(p.to(v.dtype), v, acc)
        top = higher
    return acc, total, top


@jit(do_not_specialize=["stride", "out_stride", "tokens", "window"])
def _forward_kernel(  # type: ignore[no-untyped-def]
    fused, out, lse, tiles, stride, out_stride, tokens, factor, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    CAP: tl.constexpr, WINDOWED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head; strides are in UNITs, which tells the compiler how they are aligned."""
    start, length, first = _tile(tiles, tl.program_id(0))
    if first >= length:
        return
    head = tl.program_id(1)
    kv_head = HEADS + head // (HEADS // KV_HEADS)
    stride = stride.to(tl.int64) * UNIT
    d = tl.arange(0, WIDTH)
    rows = first + tl.arange(0, ROWS)
    live = rows < length
    q_offsets = tl.arange(0, ROWS)[:, None] * stride.to(tl.int32) + d[None, :]
    offsets = tl.arange(0, COLS)[:, None] * stride.to(tl.int32) + d[None, :]
    document = fused + start * stride
    q = _load(document + first * stride + head * SIZE, q_offsets, live, d, True, SIZE, WIDTH)
    k_at = document + kv_head * SIZE
    v_at = k_at + KV_HEADS * SIZE
    low, whole, high = _key_ranges(first, length, window, WINDOWED, ROWS, COLS)

    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    # finite, so that rows which see none of the first keys do not subtract infinity from infinity
    top = tl.full((ROWS,), -1e30, tl.float32)
    if WINDOWED:
        acc, total, top = _forward_blocks(
            acc, total, top, q, k_at, v_at, stride, offsets, rows, d, low, whole, length, factor, window,
            True, CAP, WINDOWED, SIZE, WIDTH, ROWS, COLS,
        )  # fmt: skip
    acc, total, top = _forward_blocks(
        acc, total, top, q, k_at, v_at, stride, offsets, rows, d, whole, first, length, factor, window,
        False, CAP, WINDOWED, SIZE, WIDTH, ROWS, COLS,
    )  # fmt: skip
    acc, total, top = _forward_blocks(
        acc, total, top, q, k_at, v_at, stride, offsets, rows, d, first, high, length, factor, window,
        True, CAP, WINDOWED, SIZE, WIDTH, ROWS, COLS,
    )  # fmt: skip

    total = tl.where(live, total, 1.0)  # rows beyond the end may have seen nothing
    out_stride = out_stride.to(tl.int64) * UNIT
    out_offsets = tl.arange(0, ROWS)[:, None] * out_stride.to(tl.int32) + d[None, :]
    _store(out + (start + first) * out_stride + head * SIZE, out_offsets, live, d, acc / total[:, None], SIZE)
    tl.store(lse + head.to(tl.int64) * tokens + start + rows, top + tl.log2(total), mask=live)


@jit()
def _query_gradient_blocks(  # type: ignore[no-untyped-def]
    dq, q, grad, lse, delta, k_at, v_at, stride, offsets, rows, d, low, high, length, factor, window,
    MASKED: tl.constexpr, CAP: tl.constexpr, WINDOWED: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `low` to `high` contribute."""
    for begin in tl.range(low, high, COLS):
        cols = begin + tl.arange(0, COLS)
        live = cols < length
        k = _load(k_at + begin * stride, offsets, live, d, MASKED, SIZE, WIDTH)
        v = _load(v_at + begin * stride, offsets, live, d, MASKED, SIZE, WIDTH)
        s = _dot(q, tl.trans(k), tl.zeros((ROWS, COLS), tl.float32))
        dp = _dot(grad, tl.trans(v), tl.zeros((ROWS, COLS), tl.float32))
        if CAP > 0:
            tanh = _tanh(s, factor, CAP)
            p = tl.exp2(tanh * (CAP * _LOG2E) - lse[:, None])
            ds = p * (dp - delta[:, None]) * (1.0 - tanh * tanh)
        else:
            p = tl.exp2(s * factor - lse[:, None])
            ds = p * (dp - delta[:, None])
        if MASKED:
            ds = tl.where(_visible(rows[:, None], cols[None, :], window, WINDOWED), ds, 0.0)
        dq = _dot(ds.to(k.dtype), k, dq)
    return dq


@jit(do_not_specialize=["stride", "out_stride", "grad_stride", "fused_stride", "tokens", "window"])
def _query_gradient_kernel(  # type: ignore[no-untyped-def]
    grad, fused, out, lse, delta, grad_fused, tiles, grad_stride, stride, out_stride, fused_stride, tokens,
    factor, scale, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    CAP: tl.constexpr, WINDOWED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """∂q of a block of queries of one head, and δ on the way."""
    start, length, first = _tile(tiles, tl.program_id(0))
    if first >= length:
        return
    head = tl.program_id(1)
    kv_head = HEADS + head // (HEADS // KV_HEADS)
    stride = stride.to(tl.int64) * UNIT
    grad_stride = grad_stride.to(tl.int64) * UNIT
    out_stride = out_stride.to(tl.int64) * UNIT
    d = tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)
    rows = first + row
    live = rows < length
    begin = start + first
    offsets = tl.arange(0, COLS)[:, None] * stride.to(tl.int32) + d[None, :]
    q_offsets = row[:, None] * stride.to(tl.int32) + d[None, :]
    grad_offsets = row[:, None] * grad_stride.to(tl.int32) + d[None, :]
    out_offsets = row[:, None] * out_stride.to(tl.int32) + d[None, :]
    do = _load(grad + begin * grad_stride + head * SIZE, grad_offsets, live, d, True, SIZE, WIDTH)
    o = _load(out + begin * out_stride + head * SIZE, out_offsets, live, d, True, SIZE, WIDTH)
    delta_rows = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    row_at = head.to(tl.int64) * tokens + start + rows
    tl.store(delta + row_at, delta_rows, mask=live)
    lse_rows = tl.load(lse + row_at, mask=live, other=0.0)
    q = _load(fused + begin * stride + head * SIZE, q_offsets, live, d, True, SIZE, WIDTH)
    k_at = fused + start * stride + kv_head * SIZE
    v_at = k_at + KV_HEADS * SIZE
    low, whole, high = _key_ranges(first, length, window, WINDOWED, ROWS, COLS)

    dq = tl.zeros((ROWS, WIDTH), tl.float32)
    if WINDOWED:
        dq = _query_gradient_blocks(
            dq, q, do, lse_rows, delta_rows, k_at, v_at, stride, offsets, rows, d, low, whole, length, factor,
            window, True, CAP, WINDOWED, SIZE, WIDTH, ROWS, COLS,
        )  # fmt: skip
    dq = _query_gradient_blocks(
        dq, q, do, lse_rows, delta_rows, k_at, v_at, stride, offsets, rows, d, whole, first, length, factor,
        window, False, CAP, WINDOWED, SIZE, WIDTH, ROWS, COLS,
    )  # fmt: skip
    dq = _query_gradient_blocks(
        dq, q, do, lse_rows, delta_rows, k_at, v_at, stride, offsets, rows, d, first, high, length, factor,
        window, True, CAP, WINDOWED, SIZE, WIDTH, ROWS, COLS,
    )  # fmt: skip
    fused_stride = fused_stride.to(tl.int64) * UNIT
    dq_offsets = row[:, None] * fused_stride.to(tl.int32) + d[None, :]
    _store(grad_fused + begin * fused_stride + head * SIZE, dq_offsets, live, d, dq * scale, SIZE)


@jit()
def _key_gradient_blocks(  # type: ignore[no-untyped-def]
    dk, dv, k, v, q_at, grad_at, lse_at, delta_at, stride, grad_stride, offsets, grad_offsets, cols, d, low, high,
    length, factor, window,
    MASKED: tl.constexpr, CAP: tl.constexpr, WINDOWED: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Add what the queries from `low` to `high` contribute; scores stand here as [keys, queries].

    Queries beyond the document's end are loaded as zeros with a gradient of zero, and contribute nothing.
    """
    for begin in tl.range(low, high, ROWS):
        rows = begin + tl.arange(0, ROWS)
        live = rows < length
        q = _load(q_at + begin * stride, offsets, live, d, MASKED, SIZE, WIDTH)
        if MASKED:
            lse = tl.load(lse_at + rows, mask=live, other=0.0)
            delta = tl.load(delta_at + rows, mask=live, other=0.0)
        else:
            lse = tl.load(lse_at + rows)
            delta = tl.load(delta_at + rows)
        s = _dot(k, tl.trans(q), tl.zeros((COLS, ROWS), tl.float32))
        do = _load(grad_at + begin * grad_stride, grad_offsets, live, d, MASKED, SIZE, WIDTH)
        if CAP > 0:
            tanh = _tanh(s, factor, CAP)
            p = tl.exp2(tanh * (CAP * _LOG2E) - lse[None, :])
        else:
            p = tl.exp2(s * factor - lse[None, :])
        if MASKED:
            p = tl.where(_visible(rows[None, :], cols[:, None], window, WINDOWED), p, 0.0)
        dv = _dot(p.to(do.dtype), do, dv)
        dp = _dot(v, tl.trans(do), tl.zeros((COLS, ROWS), tl.float32))
        ds = p * (dp - delta[None, :])
        if CAP > 0:
            ds = ds * (1.0 - tanh * tanh)
        dk = _dot(ds.to(q.dtype), q, dk)
    return dk, dv


@jit(do_not_specialize=["stride", "grad_stride", "fused_stride", "tokens", "window"])
def _key_gradient_kernel(  # type: ignore[no-untyped-def]
    grad, fused, lse, delta, grad_fused, tiles, grad_stride, stride, fused_stride, tokens, factor, scale, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    CAP: tl.constexpr, WINDOWED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """∂k and ∂v of a block of keys of one key/value head, over the query heads that read it."""
    start, length, first = _tile(tiles, tl.program_id(0))
    if first >= length:
        return
    kv_head = tl.program_id(1)
    stride = stride.to(tl.int64) * UNIT
    grad_stride = grad_stride.to(tl.int64) * UNIT
    d = tl.arange(0, WIDTH)
    col = tl.arange(0, COLS)
    cols = first + col
    live = cols < length
    offsets = tl.arange(0, ROWS)[:, None] * stride.to(tl.int32) + d[None, :]
    grad_offsets = tl.arange(0, ROWS)[:, None] * grad_stride.to(tl.int32) + d[None, :]
    k_offsets = col[:, None] * stride.to(tl.int32) + d[None, :]
    k_at = fused + (start + first) * stride + (HEADS + kv_head) * SIZE
    k = _load(k_at, k_offsets, live, d, True, SIZE, WIDTH)
    v = _load(k_at + KV_HEADS * SIZE, k_offsets, live, d, True, SIZE, WIDTH)

    # queries up to `middle` lie at the diagonal, those up to `whole` see all keys; ROWS divides COLS
    middle = first + COLS
    high = length
    seen_by_all = length
    if WINDOWED:
        high = tl.minimum(length, middle - 1 + window)
        seen_by_all = tl.minimum(length, first + window)
    whole = middle + tl.maximum(seen_by_all - middle, 0) // ROWS * ROWS

    dk = tl.zeros((COLS, WIDTH), tl.float32)
    dv = tl.zeros((COLS, WIDTH), tl.float32)
    for group in tl.range(0, HEADS // KV_HEADS, num_stages=1):
        head = kv_head * (HEADS // KV_HEADS) + group
        q_at = fused + start * stride + head * SIZE
        grad_at = grad + start * grad_stride + head * SIZE
        row_at = head.to(tl.int64) * tokens + start
        dk, dv = _key_gradient_blocks(
            dk, dv, k, v, q_at, grad_at, lse + row_at, delta + row_at, stride, grad_stride, offsets,
            grad_offsets, cols, d, first, tl.minimum(middle, high), length, factor, window,
            True, CAP, WINDOWED, SIZE, WIDTH, ROWS, COLS,
        )  # fmt: skip
        dk, dv = _key_gradient_blocks(
            dk, dv, k, v, q_at, grad_at, lse + row_at, delta + row_at, stride, grad_stride, offsets,
            grad_offsets, cols, d, middle, whole, length, factor, window,
            False, CAP, WINDOWED, SIZE, WIDTH, ROWS, COLS,
        )  # fmt: skip
        dk, dv = _key_gradient_blocks(
            dk, dv, k, v, q_at, grad_at, lse + row_at, delta + row_at, stride, grad_stride, offsets,
            grad_offsets, cols, d, whole, high, length, factor, window,
            True, CAP, WINDOWED, SIZE, WIDTH, ROWS, COLS,
        )  # fmt: skip
    fused_stride = fused_stride.to(tl.int64) * UNIT
    to_offsets = col[:, None] * fused_stride.to(tl.int32) + d[None, :]
    to = grad_fused + (start + first) * fused_stride + (HEADS + kv_head) * SIZE
    _store(to, to_offsets, live, d, dk * scale, SIZE)
    _store(to + KV_HEADS * SIZE, to_offsets, live, d, dv, SIZE)


# ---------------------------------------------------------------------- launchers


def _constants(heads: Heads, scores: Scores, blocks: Blocks, *strides: int) -> dict[str, Any]:
    return {
        "HEADS": heads.query,
        "KV_HEADS": heads.key_value,
        "SIZE": heads.size,
        "WIDTH": max(16, power_of_2(heads.size)),
        "UNIT": math.gcd(16, *strides),
        "CAP": scores.softcap or 0.0,
        "WINDOWED": scores.window is not None,
        "ROWS": blocks.rows,
        "COLS": blocks.columns,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }


def _forward(
    fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores, room: int
) -> tuple[Tensor, Tensor]:
    blocks = blocks_for("forward", fused_TN, heads)
    assert blocks is not None
    tokens, width = fused_TN.shape[0], heads.query * heads.size
    out_TN = fused_TN.new_empty(tokens, width + room)[:, :width]
    lse_HT = fused_TN.new_empty(heads.query, tokens, dtype=torch.float32)
    window = scores.window or tokens
    tiles = block_list(documents, tokens, blocks.rows, window, queries=True)
    constants = _constants(heads, scores, blocks, fused_TN.stride(0), out_TN.stride(0))
    unit = constants["UNIT"]
    launch(
        _forward_kernel, (tiles.shape[0], heads.query),
        fused_TN, out_TN, lse_HT, tiles, fused_TN.stride(0) // unit, out_TN.stride(0) // unit, tokens,
        scores.factor(heads) * LOG2E, window, **constants,
    )  # fmt: skip
    return out_TN, lse_HT


def _backward(
    grad_TN: Tensor,
    fused_TN: Tensor,
    output_TN: Tensor,
    lse_HT: Tensor,
    heads: Heads,
    documents: Documents,
    scores: Scores,
    room: int,
) -> Tensor:
    for_queries, for_keys = (blocks_for(name, fused_TN, heads) for name in ("query_gradient", "key_gradient"))
    assert for_queries is not None
    assert for_keys is not None
    tokens = fused_TN.shape[0]
    window, scale = scores.window or tokens, scores.factor(heads)
    grad_TN = grad_TN if grad_TN.stride(-1) == 1 else grad_TN.contiguous()
    grad_fused_TN = fused_TN.new_empty(tokens, heads.columns + room)[:, : heads.columns]
    delta_HT = torch.empty_like(lse_HT)
    buffers = grad_TN, fused_TN, output_TN, grad_fused_TN
    strides = [buffer.stride(0) for buffer in buffers]
    unit = math.gcd(16, *strides)
    grad_stride, stride, out_stride, fused_stride = (value // unit for value in strides)
    tiles = block_list(documents, tokens, for_queries.rows, window, queries=True)
    launch(
        _query_gradient_kernel, (tiles.shape[0], heads.query),
        grad_TN, fused_TN, output_TN, lse_HT, delta_HT, grad_fused_TN, tiles, grad_stride, stride, out_stride,
        fused_stride, tokens, scale * LOG2E, scale, window, **_constants(heads, scores, for_queries, *strides),
    )  # fmt: skip
    tiles = block_list(documents, tokens, for_keys.columns, window, queries=False)
    launch(
        _key_gradient_kernel, (tiles.shape[0], heads.key_value),
        grad_TN, fused_TN, lse_HT, delta_HT, grad_fused_TN, tiles, grad_stride, stride, fused_stride, tokens,
        scale * LOG2E, scale, window, **_constants(heads, scores, for_keys, *strides),
    )  # fmt: skip
    return grad_fused_TN


# ---------------------------------------------------------------------- references


def _seen(length: int, scores: Scores, device: torch.device) -> Tensor:
    """Boolean `[queries, keys]` of one document."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < (scores.window or length))


def _probabilities(
    q_MK: Tensor, k_MK: Tensor, factor: float, scores: Scores
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Softmax over the visible keys, its log-sum-exp of base two, and the derivative of the cap."""
    s = factor * (q_MK @ k_MK.T)
    slope: Tensor | float = 1.0
    if scores.softcap is not None:
        tanh = torch.tanh(s / scores.softcap)
        s, slope = scores.softcap * tanh, 1 - tanh * tanh
    s = s.masked_fill(~_seen(len(q_MK), scores, q_MK.device), float("-inf"))
    lse_M = s.logsumexp(-1)
    return (s - lse_M[:, None]).exp(), lse_M * LOG2E, slope


def _heads_of_documents(heads: Heads, documents: Documents) -> list[tuple[slice, int, int]]:
    """Rows, query head and its key/value head of each softmax."""
    group, start, found = heads.query // heads.key_value, 0, []
    for length in filter(None, documents.lengths):
        found += [(slice(start, start + length), head, head // group) for head in range(heads.query)]
        start += length
    return found


def packed_attention_reference(
    fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores, room: int = 0
) -> tuple[Tensor, Tensor]:
    """`packed_attention` in plain torch, one softmax matrix at a time."""
    wide = accumulation_dtype(fused_TN.dtype)
    q_THK, k_TGK, v_TGK = heads.split(fused_TN)
    tokens, width = fused_TN.shape[0], heads.query * heads.size
    out_TN = fused_TN.new_empty(tokens, width + room)[:, :width]
    lse_HT = fused_TN.new_empty(heads.query, tokens, dtype=wide)
    out_THK = out_TN.unflatten(-1, (heads.query, heads.size))
    for rows, head, kv_head in _heads_of_documents(heads, documents):
        q, k, v = q_THK[rows, head].to(wide), k_TGK[rows, kv_head].to(wide), v_TGK[rows, kv_head].to(wide)
        p, lse_HT[head, rows], _ = _probabilities(q, k, scores.factor(heads), scores)
        out_THK[rows, head] = (p @ v).to(out_TN.dtype)
    return out_TN, lse_HT


def packed_attention_backward_reference(
    grad_TN: Tensor,
    fused_TN: Tensor,
    output_TN: Tensor,
    lse_HT: Tensor,  # noqa: ARG001 - the sum is formed anew, but the signature is that of the kernels
    heads: Heads,
    documents: Documents,
    scores: Scores,
    room: int = 0,
) -> Tensor:
    """`packed_attention_backward` in plain torch, one softmax matrix at a time."""
    wide, factor = accumulation_dtype(fused_TN.dtype), scores.factor(heads)
    q_THK, k_TGK, v_TGK = heads.split(fused_TN)
    shape = (heads.query, heads.size)
    grad_THK, out_THK = grad_TN.unflatten(-1, shape), output_TN.unflatten(-1, shape)
    total_TN = torch.zeros(fused_TN.shape, dtype=wide, device=fused_TN.device)
    dq_THK, dk_TGK, dv_TGK = heads.split(total_TN)
    for rows, head, kv_head in _heads_of_documents(heads, documents):
        q, k, v = q_THK[rows, head].to(wide), k_TGK[rows, kv_head].to(wide), v_TGK[rows, kv_head].to(wide)
        grad, out = grad_THK[rows, head].to(wide), out_THK[rows, head].to(wide)
        p, _, slope = _probabilities(q, k, factor, scores)
        # ∂s = p (∂p − δ), through the cap to the product of q and k
        ds = p * (grad @ v.T - (grad * out).sum(-1, keepdim=True)) * slope
        dq_THK[rows, head] = factor * (ds @ k)
        dk_TGK[rows, kv_head] += factor * (ds.T @ q)
        dv_TGK[rows, kv_head] += p.T @ grad
    grad_fused_TN = fused_TN.new_empty(fused_TN.shape[0], heads.columns + room)[:, : heads.columns]
    return grad_fused_TN.copy_(total_TN)


# ---------------------------------------------------------------------- public functions


def _on_card(fused_TN: Tensor, heads: Heads, scores: Scores) -> bool:
    """Whether the kernels take this here: both directions or none, for they share the log-sum-exp."""
    wanted = scores.factor(heads) > 0 and all(
        use_triton(fused_TN, name) for name in ("packed_attention", "packed_attention_backward")
    )
    return wanted and all(blocks_for(kernel, fused_TN, heads) is not None for kernel in KERNELS)


def packed_attention(
    fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores, room: int = 0
) -> tuple[Tensor, Tensor]:
    """Causal attention within each document.

    Returns:
        The output `[T, H·K]`, in rows with `room` more columns, and the log-sum-exp of the scores, of base two,
        float32 `[H, T]`.
    """
    compute = _forward if _on_card(fused_TN, heads, scores) else packed_attention_reference
    return compute(fused_TN, heads, documents, scores, room)


def packed_attention_backward(
    grad_TN: Tensor,
    fused_TN: Tensor,
    output_TN: Tensor,
    lse_HT: Tensor,
    heads: Heads,
    documents: Documents,
    scores: Scores,
    room: int = 0,
) -> Tensor:
    """Gradient of the fused buffer `[T, (H + 2G)·K]`, in rows with `room` more columns.

    Args:
        grad_TN: gradient of the output `[T, H·K]`.
        output_TN, lse_HT: results of `packed_attention`.
    """
    compute = _backward if _on_card(fused_TN, heads, scores) else packed_attention_backward_reference
    return compute(grad_TN, fused_TN, output_TN, lse_HT, heads, documents, scores, room)


# ---------------------------------------------------------------------- the backend


def triton_fits(fused_TN: Tensor, heads: Heads, _documents: Documents, scores: Scores) -> bool:
    """Whether the kernels compute this; on a CPU, in the interpreter, they are slower than the table's reference."""
    return fused_TN.is_cuda and _on_card(fused_TN, heads, scores)


def triton_forward(
    fused_TN: Tensor, heads: Heads, documents: Documents, scores: Scores, room: int
) -> tuple[Tensor, Saved]:
    """`Backend.forward`."""
    output_TN, lse_HT = packed_attention(fused_TN, heads, documents, scores, room)
    return output_TN, (lse_HT,)


def triton_backward(
    grad: Tensor,
    fused_TN: Tensor,
    output: Tensor,
    saved: Saved,
    heads: Heads,
    documents: Documents,
    scores: Scores,
    room: int,
) -> Tensor:
    """`Backend.backward`."""
    return packed_attention_backward(grad, fused_TN, output, saved[0], heads, documents, scores, room)
