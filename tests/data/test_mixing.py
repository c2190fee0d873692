"""How sources share an epoch, and that the order of a run does not depend on ranks, processes or interruptions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.documents import ListedDocuments
from tunesmith.data.batches import BatchPlan, Corpus, rows_of_epoch, shares_of_step, steps_of_epoch
from tunesmith.data.feed import Position, TableFeed
from tunesmith.data.mixing import Mix, draw_epoch, quotas

INTERLEAVE = Mix("interleave", "first_exhausted")
CONTINUE = Mix("interleave", "all_exhausted")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def sources(*sizes: int) -> list[np.ndarray]:
    starts = np.cumsum([0, *sizes])
    return [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)]


def corpus(*sizes: int, weights: list[float] | None = None, seed: int = 0) -> Corpus:
    lengths = [rng(seed + n).integers(3, 60, size=size) for n, size in enumerate(sizes)]
    return Corpus([ListedDocuments([[5] * int(n) for n in own]) for own in lengths], weights)


def plan(mix: Mix, **changes) -> BatchPlan:
    values = {"sequence_length": 64, "packing": True, "rows_per_step": 7, "tokens_per_step": None, "seed": 5}
    return BatchPlan(**(values | changes), mix=mix)


def test_quotas_by_hand():
    # 100 documents at a third, 80 at two thirds: the second is used up after 120
    assert quotas([100, 80], [1, 2], "first_exhausted") == [40, 80]
    assert quotas([100, 80], [1, 2], "all_exhausted") == [100, 200]
    assert quotas([10, 0, 30], [1, 5, 1], "first_exhausted") == [10, 0, 10], "an empty source stops nothing"
    assert quotas([0, 0], [1, 1], "first_exhausted") == [0, 0]


@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0.05, 20)), min_size=1, max_size=5),
    st.sampled_from([INTERLEAVE, CONTINUE]),
)
def test_every_stretch_of_an_interleaved_epoch_holds_the_shares(parts, mix):
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    weights = [max(weight, max(weights) / 20) for weight in weights]
    drawn = draw_epoch(sources(*sizes), weights, mix, rng())
    bounds = np.cumsum([0, *sizes])
    source_E = np.searchsorted(bounds, drawn, side="right") - 1
    shares = np.array(weights) / sum(weights)
    counts_NE = np.cumsum(source_E[:, None] == np.arange(len(sizes)), axis=0)
    expected = np.arange(1, len(drawn) + 1)[:, None] * shares
    # half a document of its own, and its share of what the others are ahead or behind; quotas are rounded once more
    assert np.abs(counts_NE - expected).max() <= 1.5 + len(sizes)


@pytest.mark.parametrize("mix", [INTERLEAVE, CONTINUE])
def test_no_document_comes_again_before_all_of_its_source_were_there(mix):
    drawn = draw_epoch(sources(50, 20), [1, 1], mix, rng())
    first, second = drawn[drawn < 50], drawn[drawn >= 50]
    assert (len(first), len(second)) == ((20, 20) if mix is INTERLEAVE else (50, 50))
    assert len(set(first.tolist())) == len(first)
    assert all(len(set(second[n : n + 20].tolist())) == len(second[n : n + 20]) for n in (0, 20, 40))


def test_first_exhausted_shows_other_documents_of_the_larger_source_in_each_epoch():
    data = corpus(50, 20, weights=[1, 1])
    shown = [
        set(data.draw(np.arange(70), 1, epoch, INTERLEAVE).tolist()) & set(range(50)) for epoch in (0, 1)
    ]
    assert shown[0] != shown[1]


def test_held_out_documents_are_not_drawn():
    data = corpus(50, 20, weights=[1, 3])
    train, held = data.hold_out(0.3, None, seed=1)
    assert not set(data.draw(train, 1, 0, CONTINUE).tolist()) & set(held.tolist())


def test_packs_keep_the_proportion_along_the_epoch():
    data = corpus(3000, 12000, weights=[3.0, 1.0])
    rows = rows_of_epoch(data, np.arange(15000), plan(INTERLEAVE), 0)
    first_E = np.array([d < 3000 for row in rows for d in row])
    ahead_E = np.cumsum(first_E) - 0.75 * np.arange(1, len(first_E) + 1)
    # a shuffle of the whole epoch strays by some 40 documents, one within windows of 260 by the shuffle of those
    assert np.abs(ahead_E).max() < 20
    # the same shares by chance would be in the whole epoch only
    apart = rows_of_epoch(data, np.arange(15000), plan(Mix()), 0)
    assert abs(np.mean([d < 3000 for row in apart for d in row]) - 3 * 3000 / (3 * 3000 + 12000)) < 1e-9


@given(st.integers(0, 2**31), st.sampled_from([Mix(), INTERLEAVE, CONTINUE]), st.booleans())
def test_the_order_is_a_function_of_its_arguments(seed, mix, packing):
    data, again = corpus(30, 20, weights=[1, 2]), corpus(30, 20, weights=[1, 2])
    first = rows_of_epoch(data, np.arange(50), plan(mix, seed=seed, packing=packing), 3)
    assert first == rows_of_epoch(again, np.arange(50), plan(mix, seed=seed, packing=packing), 3)


@pytest.mark.parametrize("mix", [Mix(), INTERLEAVE, CONTINUE], ids=lambda mix: f"{mix.strategy}-{mix.stop}")
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("packing", [True, False])
def test_ranks_together_train_what_one_process_would(mix, world_size, packing):
    """Each rank plans on its own, from its own objects; the union of a step is the step, in its order."""
    whole = plan(mix, packing=packing, rows_per_step=24)
    reference = corpus(120, 40, weights=[1, 2])
    expected = steps_of_epoch(reference, rows_of_epoch(reference, np.arange(160), whole, 0), whole)
    ranks = []
    for rank in range(world_size):
        own = corpus(120, 40, weights=[1, 2])
        feed = TableFeed(own, np.arange(160), whole)
        steps = itertools.islice(feed.steps(Position()), len(expected))
        ranks.append([
            [(n, step.rows[n]) for n in shares_of_step(own, step.rows, world_size).rows[rank]] for step in steps
        ])  # fmt: skip
    for number, rows in enumerate(expected):
        shares = [rank[number] for rank in ranks]
        together = sorted(row for share in shares for row in share)
        assert together == list(enumerate(rows))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert all(share == sorted(share) for share in shares)


@pytest.mark.parametrize("mix", [Mix(), INTERLEAVE, CONTINUE], ids=lambda mix: f"{mix.strategy}-{mix.stop}")
def test_a_position_leads_back_to_its_place_also_behind_the_last_step_of_an_epoch(mix):
    data = corpus(40, 30, weights=[1, 2])
    feed = TableFeed(data, np.arange(70), plan(mix))
    whole = list(itertools.islice(feed.steps(Position()), 25))
    assert {step.position.epoch for step in whole} >= {0, 1}
    for number, step in enumerate(whole[:-1]):
        fresh = TableFeed(corpus(40, 30, weights=[1, 2]), np.arange(70), plan(mix))
        assert next(fresh.steps(step.position)).rows == whole[number + 1].rows
    assert whole[-1].epochs == pytest.approx(
        whole[-1].position.epoch
        + whole[-1].position.step_in_epoch / len(feed.epoch(whole[-1].position.epoch)[1])
    )


@pytest.mark.parametrize("mix", [Mix(), INTERLEAVE])
@pytest.mark.parametrize("weights", [[1.0, 2.0], [0.5, 1.0]])
@pytest.mark.parametrize("rows_per_step", [7, None])
@pytest.mark.parametrize("epochs", [0.3, 1.0, 2.5])
def test_steps_are_counted_as_they_are_trained(mix, weights, rows_per_step, epochs):
    tokens = None if rows_per_step else 300
    made = plan(mix, rows_per_step=rows_per_step, tokens_per_step=tokens)
    feed = TableFeed(corpus(40, 30, weights=weights), np.arange(70), made)
    steps = [len(feed.epoch(number)[1]) for number in range(3)]
    shares = [min(1.0, max(0.0, epochs - number)) for number in range(3)]
    expected = sum(int(np.ceil(n * share - 1e-9)) for n, share in zip(steps, shares, strict=True))
    assert feed.count_steps(epochs) == expected


def test_the_first_epoch_is_planned_once_for_counting_printing_and_training(monkeypatch):
    import tunesmith.data.feed as module

    planned: list[int] = []

    def count(corpus, documents_N, plan, epoch):
        planned.append(epoch)
        return rows_of_epoch(corpus, documents_N, plan, epoch)

    monkeypatch.setattr(module, "rows_of_epoch", count)
    feed = TableFeed(corpus(40), np.arange(40), plan(Mix()))
    feed.count_steps(3.0)
    feed.epoch(0)
    next(feed.steps(Position()))
    assert planned == [0]
