"""What kernels take for themselves, beside what they read and write. Torch-free.

The rules are those of `kernels`, which planning does not load, said once more; tests hold both equal.
"""

from __future__ import annotations

from tunesmith.planning.facts import LayerFacts, Work
from tunesmith.planning.layer_sizes import FLOAT

MULTIPROCESSORS = 132
"""Of the card that kernels share their work out for; it decides on kilobytes."""
NORM_PROGRAMS = 4 * MULTIPROCESSORS
"""Of a norm's backward, each with a row of its own for the weight's gradient."""
_GLU_ROWS, _GLU_COLUMNS, _NARROW_RANK = 64, {True: 64, False: 32}, 16
_GLU_PROGRAMS, _GLU_FORWARD_PROGRAMS, _PARTS_SHARE = 3, 32, 1 / 3
LARGEST_FUSED_RANK = 64
"""Of adapters that the activation's kernels add."""
_SUMMED_RANK = {2: 64, 4: 16}
"""Largest rank of products that they sum, by bytes of an element."""


def glu_splits(tokens: int, inner: int, rank: int, itemsize: int) -> int:
    """Parts in which the activation's backward kernel sums ∂u, as `kernels.glu` has it; 0 where GEMMs form it."""
    if rank > _SUMMED_RANK[itemsize]:
        return 0
    return _splits(tokens, inner, rank, _GLU_PROGRAMS * MULTIPROCESSORS)


def glu_forward_splits(tokens: int, inner: int, rank: int, itemsize: int) -> int:
    """Parts in which the activation's kernel sums the down projection's u, 0 where a GEMM computes it."""
    if rank > _SUMMED_RANK[itemsize]:
        return 0
    parts = int(_PARTS_SHARE * inner * itemsize) // (2 * FLOAT * rank)
    rows = -(-tokens // _GLU_ROWS)
    return _splits(tokens, inner, rank, min(_GLU_FORWARD_PROGRAMS * MULTIPROCESSORS, max(1, parts) * rows))


def _splits(tokens: int, inner: int, rank: int, programs: int) -> int:
    blocks = -(-inner // _GLU_COLUMNS[rank <= _NARROW_RANK])
    wanted = -(-programs // max(1, -(-tokens // _GLU_ROWS)))
    tiles = -(-blocks // max(1, min(wanted, blocks)))
    return -(-blocks // tiles)


PART_BYTES = 640 << 20
"""Workspace beyond which attention's backward takes its heads in parts, as `kernels.attention_cudnn` has it."""
SHORTEST_EQUAL = 64
"""Documents of one length, if not shorter than this, need no room beyond their own."""


def _bucket(value: int) -> int:
    step = 1 << max(0, (value - 1).bit_length() - (3 if value > 16 else 0))
    return -(-value // step) * step


def attention_workspace(layer: LayerFacts, work: Work) -> int:
    """Of attention's backward, for each query head: dq in float32, products of the output and its gradient, and ∂k
    and ∂v where query heads share them."""
    count, longest = len(work.documents), max(work.documents)
    if min(work.documents) < max(longest, SHORTEST_EQUAL):
        count, longest = _bucket(count), _bucket(max(longest, SHORTEST_EQUAL))
    of_keys = 2 * layer.head_dim * work.itemsize if layer.heads > layer.kv_heads else 0
    whole = count * longest * layer.heads * ((layer.head_dim + 1) * FLOAT + of_keys)
    parts = [number for number in range(1, layer.kv_heads + 1) if layer.kv_heads % number == 0]
    return next((whole // number for number in parts if whole // number <= PART_BYTES), whole // parts[-1])
