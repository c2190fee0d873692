"""How the attention kernels cut their work: blocks by kernel, type, head size and card, and the list of blocks.

Compiled for each card without one at hand (`tests/kernels/test_attention_compile.py` holds shared memory, tensor
memory and spilled registers to what stands here); which of those that fit is fastest is what
`benchmarks/attention.py --sweep` measures.

Shape suffixes: T tokens, L blocks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.packed import Documents, Heads

KERNELS = ("forward", "query_gradient", "key_gradient")


@dataclass(frozen=True, slots=True)
class Card:
    """What blocks depend on.

    Attributes:
        major: first number of the compute capability.
        shared: KiB of shared memory that a program can have: 227 on sm_90 and sm_100, 163 on sm_80, 99 on sm_86,
            sm_89 and sm_120.
    """

    major: int
    shared: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """How one kernel cuts its work.

    Attributes:
        rows: queries of a block.
        columns: keys of a block. It divides `rows` in the kernels that walk the keys of a block of queries, and is a
            multiple of it in the one that walks the queries of a block of keys.
        warps: of a program.
        stages: of the pipeline that loads blocks.
        shared: KiB of shared memory that it needs at most.
        majors: compute capabilities that it is for. sm_90 multiplies 64 rows at a time from shared memory; sm_100
            accumulates in 512 columns of tensor memory, which ∂k and ∂v of 256 columns each would fill alone.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    shared: int
    majors: tuple[int, ...] = (8, 9, 10, 12)


_AMPERE = (8, 12)

BLOCKS: dict[str, dict[tuple[int, int], tuple[Blocks, ...]]] = {
    "forward": {
        (2, 64): (Blocks(64, 64, 4, 3, 56, (9,)), Blocks(128, 64, 8, 3, 65)),
        (2, 128): (Blocks(128, 64, 8, 3, 129, (9, 10)), Blocks(128, 64, 8, 3, 96, _AMPERE)),
        (2, 256): (
            Blocks(128, 64, 8, 2, 192, (9,)),
            Blocks(128, 32, 8, 3, 161, (10,)),
            Blocks(128, 32, 8, 2, 104, _AMPERE),
            Blocks(64, 32, 8, 2, 68, _AMPERE),
        ),
        (4, 64): (Blocks(32, 32, 4, 2, 49),),
        (4, 128): (Blocks(32, 32, 4, 1, 65),),
    },
    "query_gradient": {
        (2, 64): (Blocks(64, 64, 4, 3, 64, (9,)), Blocks(128, 64, 8, 3, 89)),
        (2, 128): (
            Blocks(128, 64, 8, 3, 160, (9,)),
            Blocks(128, 64, 8, 2, 145, (10,)),
            Blocks(128, 32, 8, 2, 80, _AMPERE),
        ),
        (2, 256): (
            Blocks(128, 32, 8, 2, 208, (9, 10)),
            Blocks(64, 32, 8, 2, 100, _AMPERE),
            Blocks(64, 16, 8, 2, 82, _AMPERE),
        ),
        (4, 64): (Blocks(32, 32, 4, 2, 65),),
        (4, 128): (Blocks(32, 16, 4, 1, 81),),
    },
    "key_gradient": {
        (2, 64): (Blocks(64, 64, 4, 3, 65, (9,)), Blocks(64, 64, 8, 2, 65)),
        (2, 128): (
            Blocks(32, 64, 4, 3, 81, (9,)),
            Blocks(64, 128, 8, 1, 96, (10,)),
            Blocks(64, 64, 8, 2, 73, _AMPERE),
        ),
        (2, 256): (Blocks(32, 64, 8, 3, 161, (9,)), Blocks(32, 32, 8, 2, 67)),
        (4, 64): (Blocks(32, 32, 4, 2, 65),),
        (4, 128): (Blocks(16, 32, 4, 1, 81),),
    },
}
"""By kernel, and by bytes of an element and head size up to which they serve: the first that is for the card.

Heads wider than 128 in float32 are missing: three products of tf32 keep so many parts of operands in registers that
8 KiB a thread spill."""


@functools.cache
def _card(device: torch.device) -> Card:
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack one of the names
    return Card(properties.major, properties.shared_memory_per_block_optin // 1024)


def card(tensor: Tensor) -> Card:
    """The card of a tensor; in the interpreter one of the smallest that have a row."""
    return _card(tensor.device) if tensor.is_cuda else Card(8, 99)


def blocks_for(kernel: str, fused_TN: Tensor, heads: Heads) -> Blocks | None:
    """The row of `BLOCKS` for this type, head size and card, or None where there is none."""
    here = card(fused_TN)
    for (itemsize, widest), candidates in BLOCKS[kernel].items():
        if itemsize == fused_TN.dtype.itemsize and heads.size <= widest:
            fitting = (b for b in candidates if b.shared <= here.shared and here.major in b.majors)
            return next(fitting, None)
    return None


def block_list(documents: Documents, tokens: int, block: int, window: int, *, queries: bool) -> Tensor:
    """Blocks of all documents: int32 `[L, 3]` of first row of the document, its length, first row of the block in it.

    L is known without asking the device for lengths, and blocks too many have a length of 0. Those with the most work
    come first: a block of queries works on the keys before it, one of keys on the queries after it.

    Args:
        tokens: T.
        block: rows of a block.
        window: keys that a query sees at most.
        queries: whether these are blocks of queries.
    """
    key = ("blocks", tokens, block, window, queries)
    if key not in documents.derived:
        starts = documents.cu_seqlens.to(torch.int64)
        lengths = starts.diff()
        ends = ((lengths + block - 1) // block).cumsum(0)
        index = torch.arange(tokens // block + lengths.shape[0], device=starts.device)
        document = torch.searchsorted(ends, index, right=True)
        spare = document >= lengths.shape[0]
        document = document.clamp_max(lengths.shape[0] - 1)
        before = torch.where(document > 0, ends[document - 1], 0)
        first = (index - before) * block
        length = lengths[document].masked_fill(spare, 0)
        work = (first + block if queries else length - first).clamp_max(window + block)
        order = work.masked_fill(spare, -1).argsort(descending=True, stable=True)
        table_L3 = torch.stack([starts[document], length, first], 1)[order]
        documents.derived[key] = table_L3.to(torch.int32)
    found: Tensor = documents.derived[key]
    return found
