"""How a Triton kernel is reached: the guarded import, when Triton runs at all, and what all kernels share.

The kernel modules take `jit` and `tl` from here, so that they import where Triton does not exist (macOS): then
nothing is compiled and the torch references run. Rejected: importing Triton inside the launchers, because a
kernel is a module-level function whose globals the compiler reads.

Triton runs on CUDA tensors, and under `TRITON_INTERPRET=1` on CPU tensors too, which is how its kernels are
tested without a GPU. The variable is read once, when this module is imported, as Triton itself does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError:
    triton = tl = None

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "KERNEL_DTYPES",
    "TRITON_VERSION",
    "accumulation_dtype",
    "column_splits",
    "dot",
    "jit",
    "launch",
    "max_rank",
    "multiprocessors",
    "power_of_2",
    "rank_block",
    "rank_product",
    "switched_off",
    "tl",
    "use_triton",
]

HAS_TRITON = triton is not None
INTERPRETED = HAS_TRITON and bool(triton.knobs.runtime.interpret)
"""Whether kernels run on the CPU, slowly, in Triton's interpreter."""

TRITON_VERSION: str | None = triton.__version__ if HAS_TRITON else None

switched_off: set[str] = set()
"""Kernels that failed the canary on this card: their references compute instead."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that the kernels compute; float64 always takes the reference."""

MIN_RANK = 16
"""`tl.dot` takes no fewer columns."""


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`, or a decorator that changes nothing where there is no Triton."""
    decorate: Callable[[Callable[..., Any]], Any] = (
        triton.jit(**options) if HAS_TRITON else lambda kernel: kernel
    )
    return decorate


# a global that a kernel reads has to be a constexpr
_WIDEN = tl.constexpr(INTERPRETED) if HAS_TRITON else INTERPRETED


@jit()
def dot(left, right, total):  # type: ignore[no-untyped-def]
    """total + left · right, accumulated in float32, operands of float32 not rounded to tf32.

    The interpreter multiplies bfloat16 operands as integers, hence the widening there; operands of different
    types are widened everywhere.
    """
    if _WIDEN or left.dtype != right.dtype:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@jit()
def rank_product(  # type: ignore[no-untyped-def]
    left, right, left_at, right_at, right_step, row_live, col_live,
    RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Σ_r left[row, r] · right[col, r] as float32 `[ROWS, COLS]`, for adapters of any rank.

    `left_at` and `right_at` are the offsets of rank 0 in each row and column; ranks are 1 apart on the left and
    `right_step` apart on the right.
    """
    total = tl.zeros((ROWS, COLS), tl.float32)
    # a loop and not unrolled: the loads of all blocks at once would take all registers at rank 256
    for first in tl.range(0, RANK, RANK_BLOCK, num_stages=1):
        r = first + tl.arange(0, RANK_BLOCK)[None, :]
        rows = tl.load(left + left_at[:, None] + r, mask=row_live[:, None] & (r < RANK), other=0.0)
        cols = tl.load(
            right + right_at[:, None] + r * right_step, mask=col_live[:, None] & (r < RANK), other=0.0
        )
        total = dot(rows, tl.trans(cols), total)
    return total


def use_triton(tensor: Tensor, name: str) -> bool:
    """Whether the kernel `name`, rather than its torch reference, computes on this tensor."""
    if name in switched_off:
        return False
    return (INTERPRETED or (tensor.is_cuda and HAS_TRITON)) and tensor.dtype in KERNEL_DTYPES


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **options: Any) -> None:
    """Run `kernel` over `grid` on the device of its first argument; an empty grid is no launch.

    Triton launches on the current device, whatever device the arguments are on.
    """
    if 0 in grid:
        return
    if INTERPRETED or first.device.index == torch.cuda.current_device():
        kernel[grid](first, *args, **options)
        return
    with torch.cuda.device(first.device):
        kernel[grid](first, *args, **options)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's device; 2 stand for a CPU, few programs for the interpreter."""
    return _multiprocessors(tensor.device) if tensor.is_cuda else 2


def column_splits(rows: int, blocks: int, programs: int) -> tuple[int, int]:
    """In how many parts the columns are walked to have so many programs, and the blocks of columns in each.

    Args:
        rows: blocks of rows, each of which is walked.
        blocks: blocks of columns.
        programs: wanted over all rows.
    """
    wanted = -(-programs // max(1, rows))
    tiles = -(-blocks // max(1, min(wanted, blocks)))
    return -(-blocks // tiles), tiles


def power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`: the extents that Triton takes."""
    return 1 << max(0, size - 1).bit_length()


def max_rank(dtype: torch.dtype) -> int:
    """Columns of a rank product that are summed at once, and of sums that are kept in registers.

    64 in 16 bits: such a block of 64 columns of B is 8 KiB, a handful fits the shared memory of every card. 16 in
    float32, which without tf32 has no tensor cores: the products are unrolled into multiply-adds, and a backward
    pass of the gated linear unit with 64 columns spills 7,568 bytes a thread (24 with 16).
    """
    return 16 if dtype == torch.float32 else 64


def rank_block(rank: int, dtype: torch.dtype) -> int:
    """Extent of the blocks in which a rank product is summed; rank 256 is four turns of a loop."""
    return min(max(power_of_2(rank), MIN_RANK), max_rank(dtype))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which sums are kept: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
