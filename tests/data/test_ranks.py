"""Shares of a step: every row once, as many for each rank, and never less even than dealing in turn."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.support.documents import random_corpus
from tunesmith.data.batches import BatchPlan, rows_of_epoch, shares_of_step, steps_of_epoch
from tunesmith.data.ranks import attention_costs, balance_rows, mean_imbalance


def test_costs_and_shares_by_hand():
    lengths_N = np.array([2, 3, 4])
    assert attention_costs(lengths_N, [(0, 1), (2,)]).tolist() == [13, 16]
    shares = balance_rows(np.array([9, 1, 8, 2]), 2)
    # in turn: 9 + 8 and 1 + 2, mean 10; even: 9 + 1 and 8 + 2
    assert shares.rows == ((0, 1), (2, 3))
    assert (shares.before, shares.after) == (1.7, 1.0)


def test_the_mean_over_steps():
    assert mean_imbalance(np.array([9, 1, 8]), 2, 4) is None
    found = mean_imbalance(np.array([9, 1, 8, 2]), 2, 2)
    # each step has two rows, and each rank one of them: twice the larger over the sum, however they are dealt
    assert found is not None
    assert found.before == found.after
    assert found.before in {(18 / 10 + 16 / 10) / 2, (18 / 17 + 4 / 3) / 2, (18 / 11 + 16 / 9) / 2}
    even = mean_imbalance(np.full(50, 7), 4, 16)
    assert even is not None
    assert (even.before, even.after) == (1.0, 1.0)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=60), st.integers(1, 12))
def test_every_row_once_in_even_numbers_and_not_worse_than_in_turn(costs, world_size):
    shares = balance_rows(np.array(costs), world_size)
    assert sorted(row for rows in shares.rows for row in rows) == list(range(len(costs)))
    sizes = [len(rows) for rows in shares.rows]
    assert len(sizes) == world_size
    assert max(sizes) - min(sizes) <= 1
    in_turn = [sum(costs[rank::world_size]) for rank in range(world_size)]
    even = [sum(costs[row] for row in rows) for rows in shares.rows]
    assert shares.before == max(in_turn) * world_size / sum(costs)
    assert shares.after == max(even) * world_size / sum(costs)
    assert shares.after <= shares.before
    assert shares == balance_rows(np.array(costs), world_size)


def test_no_rows_and_fewer_rows_than_ranks():
    assert balance_rows(np.array([], dtype=np.int64), 2).rows == ((), ())
    assert sorted(balance_rows(np.array([5]), 3).rows) == [(), (), (0,)]


def test_packs_of_long_and_short_documents_become_even():
    """Lengths with a long tail, 4 ranks of 8 packs: the mean excess of the dearest rank falls to a fifth at most."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.0, 1.2, size=4000), 8, 2048).astype(int).tolist()
    corpus = random_corpus(lengths)
    plan = BatchPlan(2048, packing=True, rows_per_step=32, tokens_per_step=None, seed=1)
    rows = rows_of_epoch(corpus, np.arange(4000), plan, 0)
    steps = [step for step in steps_of_epoch(corpus, rows, plan) if len(step) == 32]
    found = [shares_of_step(corpus, step, 4) for step in steps]
    before, after = (np.mean([getattr(f, name) for f in found]) - 1 for name in ("before", "after"))
    assert before > 0.1
    assert after < before / 5
