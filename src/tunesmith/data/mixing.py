"""How several sources share an epoch: a pure function of seed, epoch and sizes, the same on every rank.

- `concatenate`: every document appears as often as its source's weight says, and all of them are shuffled
  together. The proportion of sources follows from their sizes, and is even on average only.
- `interleave`: the weights are the sources' shares of the epoch's documents, and each stretch of the epoch holds
  them in this proportion. The k-th document of a source with share p stands at (k + ½) / p; sorted by that, every
  source has given its share, to within half a document, wherever one looks. Sources run out at different times,
  so a rule says where the epoch ends: with the first that is exhausted, or with the last, the others starting over.

Rejected: drawing the source of each document by chance (as `datasets.interleave_datasets` does with
probabilities): the proportion is then even on average only, and small sources may be missing from long stretches.

Shape suffixes: N documents, K documents of one source, E documents of the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Strategy = Literal["concatenate", "interleave"]
Stop = Literal["first_exhausted", "all_exhausted"]


@dataclass(frozen=True, slots=True)
class Mix:
    """How sources are mixed; `stop` counts under `interleave` only."""

    strategy: Strategy = "concatenate"
    stop: Stop = "first_exhausted"

    @property
    def interleaved(self) -> bool:
        """Whether the proportion of sources is kept along the epoch."""
        return self.strategy == "interleave"


CONCATENATE = Mix()
"""How sources are mixed unless something else is said."""


def draw_epoch(
    sources: Sequence[NDArray[np.int64]], weights: Sequence[float], mix: Mix, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The documents of an epoch in order.

    Args:
        sources: the training documents of each source, int64 `[K]`.
        weights: one per source; appearances per epoch, or shares (see the module).
        mix: the rule.
        rng: the stream of this epoch; every use of it is a function of its state.

    Returns:
        int64 `[E]`; documents appear several times where the weight or the stop rule says so, and under
        `interleave` no document twice before each of its source was there once.
    """
    if mix.interleaved:
        return _interleave(sources, weights, mix.stop, rng)
    drawn = []
    for own_K, weight in zip(sources, weights, strict=True):
        whole, part = int(weight), weight - int(weight)
        drawn += [own_K] * whole
        if part > 0 and own_K.size:
            drawn.append(rng.permutation(own_K)[: max(round(part * own_K.size), 0 if whole else 1)])
    return rng.permutation(np.concatenate(drawn)) if drawn else np.empty(0, dtype=np.int64)


def quotas(sizes: Sequence[int], weights: Sequence[float], stop: Stop) -> list[int]:
    """Documents of each source in an interleaved epoch; an empty source gives none and stops nothing."""
    total = sum(weight for size, weight in zip(sizes, weights, strict=True) if size)
    if not total:
        return [0] * len(sizes)
    shares = [weight / total if size else 0.0 for size, weight in zip(sizes, weights, strict=True)]
    lengths = [size / share for size, share in zip(sizes, shares, strict=True) if size]
    length = min(lengths) if stop == "first_exhausted" else max(lengths)
    counts = [round(length * share) for share in shares]
    if stop == "first_exhausted":
        counts = [min(count, size) for count, size in zip(counts, sizes, strict=True)]
    return [max(count, 1) if size else 0 for count, size in zip(counts, sizes, strict=True)]


def _interleave(
    sources: Sequence[NDArray[np.int64]], weights: Sequence[float], stop: Stop, rng: np.random.Generator
) -> NDArray[np.int64]:
    counts = quotas([own_K.size for own_K in sources], weights, stop)
    drawn: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    places: list[NDArray[np.floating]] = [np.empty(0)]
    for own_K, weight, count in zip(sources, weights, counts, strict=True):
        passes = -(-count // own_K.size) if own_K.size else 0
        drawn += [rng.permutation(own_K) for _ in range(passes)]
        if passes:
            drawn[-1] = drawn[-1][: count - (passes - 1) * own_K.size]
        places.append((np.arange(count) + 0.5) / weight)
    return np.concatenate(drawn)[np.argsort(np.concatenate(places), kind="stable")]
