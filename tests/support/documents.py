"""Documents in memory, in the form in which the corpus takes them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.batches import Corpus


class ListedDocuments:
    """`data.batches.Documents` over arrays."""

    def __init__(
        self, ids: list[list[int]], trained: list[list[bool]] | None = None, name: str = "rows"
    ) -> None:
        self._ids = [np.array(row, dtype=np.int32) for row in ids]
        self._trained = [np.array(row, dtype=bool) for row in trained or [[True] * len(row) for row in ids]]
        self._name = name

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([row.size for row in self._ids], dtype=np.int64)

    def ids(self, index: int) -> NDArray[np.int32]:
        return self._ids[index]

    def trained(self, index: int) -> NDArray[np.bool_]:
        return self._trained[index]

    def where(self, index: int) -> str:
        return f"{self._name}:{index + 1}"


def random_corpus(lengths: list[int], *, vocabulary: int = 384, seed: int = 0, share: float = 0.6) -> Corpus:
    """Random documents of the given lengths, a share of whose tokens train (at least one each)."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, vocabulary, size=length).tolist() for length in lengths]
    trained = [(rng.random(length) < share).tolist() for length in lengths]
    for mask in trained:
        mask[-1] = True
    return Corpus([ListedDocuments(ids, trained)])
