"""Where the real tokens of a padded batch stand, found with one look at the device, and the way there and back.

The mask or the positions are copied to the host once and everything else is worked out there: lengths have to be
host integers anyway, and counting on the device would wait for it several times.

Shape suffixes: B rows, T columns, N real tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.kernels.packed import Documents


class NotPackableError(Exception):
    """This call is not for a packed row; the message says why."""


@dataclass(frozen=True)
class Layout:
    """A batch `[B, T]` as one packed row.

    Attributes:
        shape: B and T.
        documents: lengths that sum to N.
        index_N: places of the real tokens in the flattened batch, or None where all are real.
        starts: column in which each document begins.
    """

    shape: tuple[int, int]
    documents: Documents
    index_N: Tensor | None
    starts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of real tokens (N)."""
        return sum(self.documents.lengths)

    def pack(self, batch: Tensor) -> Tensor:
        """`[1, N, ...]` of `[B, T, ...]`; differentiable."""
        flat = batch.reshape(-1, *batch.shape[2:])
        return (flat if self.index_N is None else flat.index_select(0, self.index_N))[None]

    def spread(self, row: Tensor) -> Tensor:
        """`[B · T, ...]` of `[N, ...]`, zeros where there was padding; differentiable."""
        if self.index_N is None:
            return row
        empty = row.new_zeros(self.shape[0] * self.shape[1], *row.shape[1:])
        return empty.index_copy(0, self.index_N, row)

    def positions(self, *, restart: bool) -> Tensor:
        """Position ids `[1, N]`: columns of the batch, or counted from 0 in every document."""
        firsts = (0,) * len(self.starts) if restart else self.starts
        counted = [
            np.arange(first, first + n) for first, n in zip(firsts, self.documents.lengths, strict=True)
        ]
        return _to_device(np.concatenate(counted), self.documents.cu_seqlens.device)[None]


def _to_device(values: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _documents(lengths: Sequence[int], device: torch.device) -> Documents:
    ends = np.cumsum([0, *lengths]).astype(np.int32)
    return Documents(tuple(lengths), torch.from_numpy(ends).to(device, non_blocking=True))


def full_rows(batch: int, columns: int, device: torch.device) -> Layout:
    """Every row is one document and nothing is padding."""
    return Layout((batch, columns), _documents((columns,) * batch, device), None, (0,) * batch)


def from_mask(mask_BT: Tensor, device: torch.device) -> Layout:
    """Each row's run of ones is a document.

    Raises:
        NotPackableError: a row has ones on both sides of a zero, or there is no one at all.
    """
    batch, columns = mask_BT.shape
    real_BT: NDArray[np.bool_] = (mask_BT != 0).cpu().numpy()
    if real_BT.all():
        return full_rows(batch, columns, device)
    lengths_B = real_BT.sum(axis=1)
    starts_B = real_BT.argmax(axis=1)
    # a run of ones ends where it began plus as many columns as there are ones
    last_B = columns - 1 - real_BT[:, ::-1].argmax(axis=1)
    filled_B = lengths_B > 0
    if ((last_B - starts_B + 1 != lengths_B) & filled_B).any():
        raise NotPackableError("a mask with holes")
    if not filled_B.any():
        raise NotPackableError("a mask without a real token")
    return Layout(
        (batch, columns),
        _documents([int(n) for n in lengths_B[filled_B]], device),
        _to_device(np.flatnonzero(real_BT), device),
        tuple(int(start) for start in starts_B[filled_B]),
    )


def from_positions(positions_BT: Tensor, device: torch.device) -> Layout:
    """A new document begins with each row, and inside it wherever positions do not go on by one.

    transformers cuts a row at the same places, though only where no cache is in play.
    """
    batch, columns = positions_BT.shape
    cuts_BT = np.ones((batch, columns), dtype=bool)
    cuts_BT[:, 1:] = (positions_BT.diff(dim=-1) != 1).cpu().numpy()
    begins = np.flatnonzero(cuts_BT)
    lengths = np.diff(np.append(begins, batch * columns))
    return Layout(
        (batch, columns),
        _documents([int(n) for n in lengths], device),
        None,
        tuple(int(begin) % columns for begin in begins),
    )


def from_boundaries(cu_seqlens: Tensor, batch: int, columns: int, device: torch.device) -> Layout:
    """One row, cut at the cumulative lengths that came with it.

    Raises:
        NotPackableError: they do not cover the row, or there are several rows.
    """
    ends = [int(end) for end in cu_seqlens.tolist()]
    if batch != 1 or ends[0] != 0 or ends[-1] != columns or sorted(ends) != ends:
        raise NotPackableError("document boundaries that do not cover one row")
    begins = [begin for begin, end in pairwise(ends) if begin < end]
    lengths = np.diff([*begins, columns])
    return Layout((1, columns), _documents([int(n) for n in lengths], device), None, tuple(begins))
