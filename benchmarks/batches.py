"""The same random documents for every system, in the form that each takes: packed, as equal rows, or padded.

Shape suffixes: T tokens of all documents, D documents, L positions of a row, S supervised tokens.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label that transformers, and what is built on it, leaves out of the loss."""

PAD_MULTIPLE = 8
"""Padded rows end at a multiple of it, as collators do for the sake of GEMMs."""


def documents(rows: int, length: int, mean: int | None, seed: int = 0) -> list[int]:
    """Document lengths of a packed row of rows · length tokens: equal, or random with a given mean."""
    if mean is None:
        return [length] * rows
    rng, total = random.Random(seed), rows * length
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(rng.randint(16, 2 * mean - 16))
    lengths[-1] -= sum(lengths) - total
    return [length for length in lengths if length > 0]


@dataclass(frozen=True)
class Documents:
    """Random documents one after the other.

    Attributes:
        lengths: tokens of each document.
        ids_T: int64 token ids, below 250 so that every vocabulary and tokenizer has them.
        chosen_T: bool, whether a token is supervised; never the first of a document, which nothing predicts.
    """

    lengths: tuple[int, ...]
    ids_T: Tensor
    chosen_T: Tensor

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return int(self.chosen_T.sum())

    @property
    def positions(self) -> Tensor:
        """int64 `[T]`, restarting at 0 with each document."""
        return torch.cat([torch.arange(length) for length in self.lengths])

    @property
    def labels(self) -> Tensor:
        """int64 `[T]`, the ids where they are supervised and `IGNORED` elsewhere; not shifted."""
        return torch.where(self.chosen_T, self.ids_T, IGNORED)

    @property
    def digest(self) -> str:
        """Fingerprint of ids, lengths and supervision, by which results show that the work was the same."""
        digest = hashlib.sha256(repr(self.lengths).encode())
        digest.update(self.ids_T.numpy().tobytes())
        digest.update(self.chosen_T.numpy().tobytes())
        return digest.hexdigest()[:12]


def random_documents(lengths: list[int], share: float, seed: int) -> Documents:
    """Documents of these lengths, a share of whose tokens is supervised; a pure function of its arguments."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids_T = torch.randint(0, 250, (total,), generator=generator)
    first_T = torch.zeros(total, dtype=torch.bool)
    first_T[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    chosen_T = (torch.rand(total, generator=generator) < share) & ~first_T
    return Documents(tuple(lengths), ids_T, chosen_T)


def token_batch(row: Documents) -> Any:
    """The documents as our `TokenBatch`, on the CPU."""
    from tunesmith.contracts.batch import TokenBatch

    lengths = torch.tensor(row.lengths)
    at_S = row.chosen_T.nonzero().squeeze(1)
    document_T = torch.repeat_interleave(torch.arange(len(row.lengths)), lengths)
    return TokenBatch(
        ids_T=row.ids_T,
        position_ids_T=row.positions,
        lengths=row.lengths,
        cu_seqlens=torch.tensor([0, *row.lengths]).cumsum(0).to(torch.int32),
        logit_index_S=at_S - 1,
        targets_S=row.ids_T[at_S],
        weights_S=torch.ones(at_S.numel()),
        document_S=document_T[at_S],
        rows_D=tuple(range(len(row.lengths))),
    )


def random_batch(lengths: list[int], share: float, seed: int) -> Any:
    """A packed row of random tokens, a share of whose positions is supervised, as our `TokenBatch`."""
    return token_batch(random_documents(lengths, share, seed))


def _equal_rows(row: Documents) -> dict[str, Tensor]:
    length = row.lengths[0]
    assert set(row.lengths) == {length}
    return {"input_ids": row.ids_T.view(-1, length), "labels": row.labels.view(-1, length)}


def _packed(row: Documents) -> dict[str, Tensor]:
    return {
        "input_ids": row.ids_T[None],
        "position_ids": row.positions[None],
        "labels": row.labels[None],
    }


def _padded(row: Documents) -> dict[str, Tensor]:
    """One document a row, filled up on the right: causal attention needs no mask for it, the fastest form."""
    longest = -(-max(row.lengths) // PAD_MULTIPLE) * PAD_MULTIPLE
    ids_DL = torch.zeros(len(row.lengths), longest, dtype=torch.int64)
    labels_DL = torch.full_like(ids_DL, IGNORED)
    for number, (ids, labels) in enumerate(
        zip(row.ids_T.split(row.lengths), row.labels.split(row.lengths), strict=True)
    ):
        ids_DL[number, : len(ids)] = ids
        labels_DL[number, : len(ids)] = labels
    return {"input_ids": ids_DL, "labels": labels_DL}


LAYOUTS = {"rows": _equal_rows, "packed": _packed, "padded": _padded}
"""How documents reach a transformers model, by name: keyword arguments of its forward, on the CPU."""
