"""Rows of a table that lies in pinned host memory, read by the device over the link, without a copy of the table.

    out[n] = table[ids[n]]

Shape suffixes: V rows of the table, D columns, N rows that are read.

An input embedding of 128,256 x 8,192 in bfloat16 is 1.96 GiB, of which a micro-batch reads a few thousand rows. Its
rows are copied bit for bit, each as often as its id stands there. Rejected: gathering on the host and copying what
was gathered, for which the ids have to be there first: a synchronisation in every forward, and none in a CUDA graph.

Pinned memory has an address that the device reads, and Triton takes a pinned CPU tensor as it takes any other: its
launcher asks the driver for that address (`cuPointerGetAttribute`) and refuses pageable memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tunesmith.kernels.launch import jit, launch, power_of_2, tl, use_triton

BLOCK = 8192
"""Most columns that a program asks for at once. Over the link an answer takes microseconds, so that many requests
have to be on their way: 8,192 columns in 16 bits are four of 16 bytes in each of 256 threads."""
COLUMNS_PER_WARP = 1024


# ---------------------------------------------------------------------- kernel


@jit(do_not_specialize=["rows"])
def _gather_kernel(out, ids, table, rows, columns, table_row, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    # A program copies one row
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + n)
    tl.device_assert((row >= 0) & (row < rows), "gather_rows: an id is not a row of the table")
    for first in tl.range(0, columns, BLOCK):
        col = first + tl.arange(0, BLOCK)
        live = col < columns
        tl.store(out + n * columns + col, tl.load(table + row * table_row + col, mask=live), mask=live)


def _launch(table_VD: Tensor, ids_N: Tensor, out_ND: Tensor) -> None:
    rows, columns = table_VD.shape
    block = min(power_of_2(columns), BLOCK)
    # `debug` is what makes Triton compile the assertion, and would have it check every sum of integers as well
    launch(
        _gather_kernel, (len(ids_N),), out_ND, ids_N, table_VD, rows, columns, table_VD.stride(0), BLOCK=block,
        num_warps=max(1, min(8, block // COLUMNS_PER_WARP)), debug=True, sanitize_overflow=False,
    )  # fmt: skip


# ---------------------------------------------------------------------- operator


@torch.library.custom_op("tunesmith::gather_rows", mutates_args=())
def gather_rows_op(table_VD: Tensor, ids_N: Tensor) -> Tensor:
    """`gather_rows` as an operator for torch.compile; the table is frozen, so there is nothing to differentiate."""
    return gather_rows(table_VD, ids_N)


@gather_rows_op.register_fake
def _(table_VD: Tensor, ids_N: Tensor) -> Tensor:
    return ids_N.new_empty((ids_N.shape[0], table_VD.shape[1]), dtype=table_VD.dtype)


# ---------------------------------------------------------------------- reference


def gather_rows_reference(table_VD: Tensor, ids_N: Tensor) -> Tensor:
    """`gather_rows` in plain torch; waits for the device where the table is on the host and the ids are not."""
    return functional.embedding(ids_N.to(table_VD.device), table_VD).to(ids_N.device)


# ---------------------------------------------------------------------- public


def gather_rows(table_VD: Tensor, ids_N: Tensor) -> Tensor:
    """The rows of a frozen table that ids name, on the device of the ids.

    On a GPU nothing waits for the device, and the call can be recorded in a CUDA graph, which reads what the table
    holds at each replay. A table in pageable memory, which a GPU cannot read, and float64 take the reference.

    Args:
        table_VD: on the device of the ids or in pinned host memory; rows may be strided.
        ids_N: int64, from 0 to V - 1.

    Returns:
        `[N, D]` in the type of the table. Not differentiable in the table.

    Raises:
        IndexError: an id is none of a row, on a CPU. On a GPU a kernel cannot raise: it stops with an assertion
            before it reads, and the next call that waits for the device fails, as with torch's own embedding.
    """
    assert not table_VD.requires_grad, "a table that trains gets no gradient here"
    assert ids_N.dtype == torch.int64
    out_ND = torch.empty((ids_N.shape[0], table_VD.shape[1]), dtype=table_VD.dtype, device=ids_N.device)
    reachable = table_VD.device == ids_N.device or table_VD.is_pinned()
    if not (reachable and use_triton(out_ND, "gather_rows")):
        return gather_rows_reference(table_VD, ids_N)
    assert table_VD.stride(1) == ids_N.stride(0) == 1
    _launch(table_VD, ids_N, out_ND)
    return out_ND
