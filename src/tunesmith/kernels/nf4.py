"""bitsandbytes' NF4 storage back to floating point, bit for bit.

    out_e = code[nibble_e] · absmax[e // blocksize]            float32, then rounded to the type once

over the flattened matrix, e = n · K + k, two nibbles a byte, the first one high. Double quantisation stores
absmax itself in 8 bits: absmax_b = code2[u8_b] · absmax2[b // blocksize2] + offset, product and sum rounded
separately as bitsandbytes does (no fused multiply-add). The offset stays on the device.

A program takes words of 4 bytes, 8 elements: a thread loads a word and stores 16 bytes of a 16-bit type, both
coalesced. The code is looked up in memory: its 64 bytes lie in different banks of the L1 cache, so a warp's
look-up has no conflicts and is one access an element; 15 selects an element would cost more than the memory
traffic. Where rows are not whole words (K % 8 ≠ 0) or the storage is not aligned, elements are taken one by one.

Shape suffixes: N rows, K columns of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.launch import jit, launch, power_of_2, tl, use_triton

NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NF4 (QLoRA, appendix E): quantiles of the normal distribution, scaled to ±1, as float32."""

Nested = tuple[Tensor, Tensor, Tensor, Tensor, int]
"""absmax in 8 bits, the absmax of its blocks, its code of 256 values, the offset (a scalar tensor), blocksize2."""

WORDS = 512
"""Words of a program, 4 for each of 128 threads: four independent loads in flight hide the latency of the chain
word, code, store. 512 words are one row of 4,096 columns."""
ELEMENTS = 1024
"""Elements of a program that takes them one by one."""
SMALLEST_BLOCK = 128
WIDE_AT = 2**31 - 8 * WORDS
"""Matrices with more elements than this are indexed in 64 bits."""


# ---------------------------------------------------------------------- kernel


@jit()
def _absmax(  # type: ignore[no-untyped-def]
    absmax, absmax2, code2, offset, block, live, NESTED: tl.constexpr, BLOCKSIZE2: tl.constexpr
):
    value = tl.load(absmax + block, mask=live, other=0)
    if NESTED:
        second = tl.load(absmax2 + block // BLOCKSIZE2, mask=live, other=0.0)
        # launched without fused multiply-add
        return tl.load(code2 + value.to(tl.int32)) * second + tl.load(offset)
    else:  # noqa: RET505 (a return after the `if` would be compiled with it, and differ in type)
        return value


@jit(do_not_specialize=["count"])
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    packed, absmax, absmax2, code2, offset, code, out, count, columns, row_blocks, out_row,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BLOCKSIZE2: tl.constexpr,
    WHOLE: tl.constexpr, CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # WHOLE: `packed` is int32 words of 8 elements that share a row and a block of absmax, `count` and `columns`
    # are in words. Else `packed` is bytes, `count` and `columns` are in elements.
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    if CONTIGUOUS:
        item = program * BLOCK + tl.arange(0, BLOCK)
        live = item < count
        row_at = program.to(tl.int64) * 0
        column = item
    else:  # a program stays within a row, so that no element has to divide
        row = program // row_blocks
        column = (program % row_blocks) * BLOCK + tl.arange(0, BLOCK)
        item = row * columns + column
        live = column < columns
        row_at = row.to(tl.int64) * out_row
    if WHOLE:
        scale = _absmax(absmax, absmax2, code2, offset, item // (BLOCKSIZE // 8), live, NESTED, BLOCKSIZE2)
        word = tl.load(packed + item, mask=live, other=0)
        # element j of a little-endian word: byte j // 2, the high nibble first
        j = tl.arange(0, 8)[None, :]
        index = (word[:, None] >> ((j // 2) * 8 + 4 - (j % 2) * 4)) & 15
        value = tl.load(code + index) * scale[:, None]
        at = row_at + column.to(tl.int64)[:, None] * 8 + j
        tl.store(out + at, value.to(out.dtype.element_ty), mask=live[:, None] & (j < 8))
    else:
        scale = _absmax(absmax, absmax2, code2, offset, item // BLOCKSIZE, live, NESTED, BLOCKSIZE2)
        byte = tl.load(packed + item // 2, mask=live, other=0).to(tl.int32)
        value = tl.load(code + ((byte >> (4 - (item % 2) * 4)) & 15)) * scale
        tl.store(out + row_at + column.to(tl.int64), value.to(out.dtype.element_ty), mask=live)


# ---------------------------------------------------------------------- launcher


def _row_block(width: int, most: int) -> int:
    """Items of a program within a row of `width` items: a power of two that divides it, if large enough."""
    divides = width & -width
    return min(most, divides) if divides >= SMALLEST_BLOCK else min(most, power_of_2(width))


def _dequantize(
    packed: Tensor, absmax: Tensor | None, out_NK: Tensor, code: Tensor, blocksize: int, nested: Nested | None
) -> None:
    rows, columns = out_NK.shape
    packed = packed.reshape(-1).view(torch.uint8)
    whole = columns % 8 == 0 and blocksize % 8 == 0 and packed.data_ptr() % 4 == 0
    unit = 8 if whole else 1
    if whole:
        packed = packed[: rows * columns // 2].view(torch.int32)
    contiguous = out_NK.stride(0) == columns
    count, width = rows * columns // unit, columns // unit
    block = WORDS if whole else ELEMENTS
    if not contiguous:
        block = _row_block(width, block)
    row_blocks = -(-width // block)
    programs = -(-count // block) if contiguous else rows * row_blocks
    if nested is None:
        assert absmax is not None
        first, absmax2, code2, offset, blocksize2 = absmax, absmax, absmax, absmax, 1
    else:
        first, absmax2, code2, offset, blocksize2 = nested
    launch(
        _dequantize_kernel, (programs,), packed, first, absmax2, code2, offset, code, out_NK,
        count, width, row_blocks, out_NK.stride(0),
        BLOCKSIZE=blocksize, NESTED=nested is not None, BLOCKSIZE2=blocksize2,
        WHOLE=whole, CONTIGUOUS=contiguous, WIDE=rows * columns > WIDE_AT,
        BLOCK=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


# ---------------------------------------------------------------------- operator


@torch.library.custom_op("tunesmith::dequantize_nf4_", mutates_args={"out_NK"})
def dequantize_nf4_op_(
    packed: Tensor, absmax: Tensor, out_NK: Tensor, code: Tensor, blocksize: int = 64,
    absmax2: Tensor | None = None, code2: Tensor | None = None, offset: Tensor | None = None,
    blocksize2: int = 256,
) -> None:  # fmt: skip
    """`dequantize_nf4` as an operator for torch.compile; with absmax2, code2 and offset, absmax is in 8 bits."""
    nested = None
    if absmax2 is not None:
        assert code2 is not None
        assert offset is not None
        nested = (absmax, absmax2, code2, offset, blocksize2)
    dequantize_nf4(packed, absmax, out_NK, code=code, blocksize=blocksize, nested=nested)


# ---------------------------------------------------------------------- reference


def dequantize_nf4_reference(
    packed: Tensor,
    absmax: Tensor | None,
    out_NK: Tensor,
    *,
    code: Tensor,
    blocksize: int = 64,
    nested: Nested | None = None,
) -> None:
    """`dequantize_nf4` in plain torch."""
    if nested is not None:
        absmax_u8, absmax2, code2, offset, blocksize2 = nested
        absmax_u8 = absmax_u8.flatten()
        second = absmax2.repeat_interleave(blocksize2)[: absmax_u8.numel()]
        absmax = code2[absmax_u8.long()] * second + offset
    assert absmax is not None
    flat = packed.flatten()
    index = torch.stack([flat >> 4, flat & 15], -1).flatten()[: out_NK.numel()]
    scale = absmax.flatten().repeat_interleave(blocksize)[: index.numel()]
    out_NK.copy_((code[index.long()] * scale).to(out_NK.dtype).view(out_NK.shape))


# ---------------------------------------------------------------------- public


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor | None,
    out_NK: Tensor,
    *,
    code: Tensor,
    blocksize: int = 64,
    nested: Nested | None = None,
) -> None:
    """Write the matrix into `out_NK`.

    Args:
        packed: uint8 storage in bitsandbytes' order, any shape, ⌈N · K / 2⌉ bytes.
        absmax: float32, one for each `blocksize` elements of the flattened matrix; not read with `nested`.
        out_NK: where the matrix goes, in its type; the row stride may exceed K.
        code: the 16 values of NF4, float32, on the device.
        blocksize: elements of a block.
        nested: the doubly quantised absmax instead.
    """
    if use_triton(out_NK, "dequantize_nf4"):
        assert out_NK.stride(1) == 1
        _dequantize(packed, absmax, out_NK, code, blocksize, nested)
        return
    dequantize_nf4_reference(packed, absmax, out_NK, code=code, blocksize=blocksize, nested=nested)
