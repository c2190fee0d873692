"""Which rank of a data-parallel group takes which rows of a step, so that none waits long for another.

Rows of a step hold about as many tokens each, but attention costs the square of a document's length: a pack of one
long document is many times as dear as one of short ones. So every rank gets as many rows as the others (one more
or less where they do not divide), and among such shares one whose attention costs are even: the dearest row first,
each to the cheapest rank that has a place left. Every rank computes the shares of all from the same numbers, and
nothing is sent. Losses are normalised over the whole step, so who takes a row changes speed and nothing else.

Rejected: an exact solution, which is NP-hard; and shares of unequal numbers of rows, which would be even in
attention and uneven in everything else.

Shape suffixes: R rows of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Shares:
    """The rows of each rank.

    Attributes:
        rows: for each rank the numbers of its rows, ascending; each row of the step is in one of them.
        before: cost of the dearest rank over the mean, had the rows been dealt in turn; 1 is even.
        after: the same of `rows`, never more than `before`.
    """

    rows: tuple[tuple[int, ...], ...]
    before: float
    after: float


def attention_costs(lengths_N: NDArray[np.int64], rows: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Sum of squared document lengths of each row, int64 `[R]`; `lengths_N` are those of all documents."""
    return np.array([int(np.square(lengths_N[list(row)]).sum()) for row in rows], dtype=np.int64)


def balance_rows(costs_R: NDArray[np.int64], world_size: int) -> Shares:
    """Share out the rows of a step; a pure function, the same on every rank.

    Args:
        costs_R: int64 `[R]`, what each row costs.
        world_size: ranks. Where there are fewer rows than ranks, some get none.
    """
    assert world_size >= 1
    costs = [int(cost) for cost in costs_R]
    in_turn = [list(range(rank, len(costs), world_size)) for rank in range(world_size)]
    even = _even_shares(costs, world_size)
    before, after = _imbalance(costs, in_turn), _imbalance(costs, even)
    if after >= before:
        even, after = in_turn, before
    return Shares(tuple(tuple(rows) for rows in even), before, after)


_SAMPLED = 4096


def mean_imbalance(costs_R: NDArray[np.int64], world_size: int, step: int) -> Shares | None:
    """`before` and `after` on average over steps of `step` rows in a random order, of at most 4,096 rows.

    Returns:
        Its `rows` are those of the last step; None where there is no whole step.
    """
    order_R = np.random.default_rng(0).permutation(costs_R)[:_SAMPLED]
    shares = [
        balance_rows(order_R[at : at + step], world_size) for at in range(0, len(order_R) - step + 1, step)
    ]
    if not shares:
        return None
    before, after = (float(np.mean([getattr(one, name) for one in shares])) for name in ("before", "after"))
    return Shares(shares[-1].rows, before, after)


def _even_shares(costs: Sequence[int], world_size: int) -> list[list[int]]:
    """The dearest row first, each to the cheapest rank with a place; of equals to the lowest number."""
    places, larger = divmod(len(costs), world_size)  # `larger` ranks may take one row more than `places`
    shares: list[list[int]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for row in sorted(range(len(costs)), key=lambda number: -costs[number]):
        open_ranks = [
            rank
            for rank in range(world_size)
            if len(shares[rank]) < places or (len(shares[rank]) == places and larger > 0)
        ]
        rank = min(open_ranks, key=lambda number: (totals[number], number))
        larger -= len(shares[rank]) == places
        shares[rank].append(row)
        totals[rank] += costs[row]
    return [sorted(rows) for rows in shares]


def _imbalance(costs: Sequence[int], shares: Sequence[Sequence[int]]) -> float:
    total = sum(costs)
    return max(sum(costs[row] for row in rows) for rows in shares) * len(shares) / total if total else 1.0
