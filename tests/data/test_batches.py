"""From documents to steps and token batches: order, weights, grouping, and every field of a batch by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.documents import ListedDocuments, random_corpus
from tunesmith.data.batches import BatchPlan, Corpus, collate, micro_batches, rows_of_epoch, steps_of_epoch
from tunesmith.data.mixing import Mix
from tunesmith.data.table import DataReport, TableWriter, TokenTable


def _plan(**changes) -> BatchPlan:
    values = {"sequence_length": 64, "packing": True, "rows_per_step": 3, "tokens_per_step": None, "seed": 5}
    return BatchPlan(**(values | changes))


def test_a_batch_by_hand():
    corpus = Corpus([
        ListedDocuments([[10, 11, 12], [20, 21]], [[True, False, True], [False, True]], "a"),
        ListedDocuments([[30, 31, 32, 33]], [[False, False, True, True]], "b"),
    ])  # fmt: skip
    batch = collate(corpus, [2, 0, 1])
    assert batch.ids_T.tolist() == [30, 31, 32, 33, 10, 11, 12, 20, 21]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert batch.lengths == (4, 3, 2)
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 9]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 4
    # the first token of a document is never a target, also where its mask says so (document a:1)
    assert batch.logit_index_S.tolist() == [1, 2, 5, 7]
    assert batch.targets_S.tolist() == [32, 33, 12, 21]
    assert batch.document_S.tolist() == [0, 0, 1, 2]
    assert batch.weights_S.tolist() == [1.0] * 4
    assert [corpus.where(document) for document in batch.rows_D] == ["b:1", "a:1", "a:2"]
    assert (batch.tokens, batch.supervised) == (9, 4)


def test_collating_leaves_the_source_alone():
    source = ListedDocuments([[1, 2, 3]], [[True, True, True]])
    collate(Corpus([source]), [0])
    assert source.trained(0).tolist() == [True, True, True]


def test_an_epoch_is_a_function_of_seed_and_number():
    corpus = random_corpus(np.random.default_rng(0).integers(3, 60, size=40).tolist())
    documents = np.arange(40)
    first = rows_of_epoch(corpus, documents, _plan(), 0)
    assert first == rows_of_epoch(corpus, documents, _plan(), 0)
    assert first != rows_of_epoch(corpus, documents, _plan(), 1)
    assert first != rows_of_epoch(corpus, documents, _plan(seed=6), 0)
    assert sorted(d for row in first for d in row) == list(range(40))
    assert all(corpus.lengths[list(row)].sum() <= 64 for row in first)


def test_rows_are_not_in_the_order_of_their_lengths():
    corpus = random_corpus([50] * 20 + [60] * 20)
    rows = rows_of_epoch(corpus, np.arange(40), _plan(), 0)
    totals = [int(corpus.lengths[list(row)].sum()) for row in rows]
    assert totals != sorted(totals)
    assert totals != sorted(totals, reverse=True)


def test_steps_of_rows_and_of_tokens():
    corpus = random_corpus([10] * 7)
    rows = [(document,) for document in range(7)]
    assert [len(step) for step in steps_of_epoch(corpus, rows, _plan())] == [3, 3, 1]
    by_tokens = steps_of_epoch(corpus, rows, _plan(rows_per_step=None, tokens_per_step=25))
    assert by_tokens == [[(0,), (1,), (2,)], [(3,), (4,), (5,)], [(6,)]]


@pytest.mark.parametrize(
    ("rows_per_batch", "max_tokens", "expected"),
    [
        (2, 1, [[0, 1, 2], [3, 4], [5]]),  # a number of rows counts, whatever the tokens
        (None, 30, [[0, 1, 2], [3, 4], [5]]),
        (None, 1, [[0, 1], [2], [3], [4], [5]]),  # a row is never cut
        (None, 1000, [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_grouping_keeps_order_and_rows_whole(rows_per_batch, max_tokens, expected):
    corpus = random_corpus([10] * 6)
    rows = [(0, 1), (2,), (3,), (4,), (5,)]
    groups = list(micro_batches(corpus, rows, rows_per_batch=rows_per_batch, max_tokens=max_tokens))
    if max_tokens == 30:
        expected = [[0, 1, 2], [3, 4, 5]]
    assert groups == expected


def test_held_out_rows_are_taken_by_seed_and_never_all():
    corpus = random_corpus([5] * 10)
    train, held = corpus.hold_out(0.3, None, seed=1)
    assert len(held) == 3
    assert sorted([*train, *held]) == list(range(10))
    assert held.tolist() == corpus.hold_out(0.3, None, seed=1)[1].tolist()
    assert held.tolist() != corpus.hold_out(0.3, None, seed=2)[1].tolist()
    assert len(corpus.hold_out(0.3, 2, seed=1)[1]) == 2
    assert len(corpus.hold_out(0.0, None, seed=1)[1]) == 0
    assert len(corpus.hold_out(0.01, None, seed=1)[1]) == 1, "a fraction above 0 holds out something"
    assert len(corpus.hold_out(0.99, None, seed=1)[0]) == 1, "something is left to train"


def test_fractional_weights_choose_other_rows_each_epoch():
    corpus = Corpus([ListedDocuments([[1, 2]] * 100)], [0.25])
    drawn = [set(corpus.draw(np.arange(100), seed=3, epoch=epoch).tolist()) for epoch in (0, 1)]
    assert [len(documents) for documents in drawn] == [25, 25]
    assert drawn[0] != drawn[1]


class _Pairs(ListedDocuments):
    """Documents with the groups that are given."""

    def __init__(self, lengths: list[int], groups: list[int]) -> None:
        super().__init__([[1] * length for length in lengths])
        self.groups = np.array(groups, dtype=np.int64)


@st.composite
def _grouped(draw: st.DrawFn) -> tuple[Corpus, list[tuple[int, ...]]]:
    """Two sources with groups of one to three documents of up to 64 tokens together, and the groups."""
    sources, groups, total = [], [], 0
    for _ in range(2):
        sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=15))
        numbers = np.repeat(np.arange(len(sizes)), sizes).tolist()
        lengths = draw(st.lists(st.integers(2, 21), min_size=len(numbers), max_size=len(numbers)))
        sources.append(_Pairs(lengths, numbers))
        for size in sizes:
            groups.append(tuple(range(total, total + size)))
            total += size
    return Corpus(sources), groups


@given(_grouped(), st.booleans(), st.sampled_from([Mix(), Mix("interleave", "all_exhausted")]))
def test_groups_share_a_row_and_no_row_is_over_its_capacity(made, packing, mix):
    corpus, groups = made
    rows = rows_of_epoch(corpus, np.arange(len(corpus)), _plan(packing=packing, mix=mix), 0)
    by_first = {group[0]: group for group in groups}
    seen: list[tuple[int, ...]] = []
    for row in rows:
        assert corpus.lengths[list(row)].sum() <= 64
        rest = list(row)
        while rest:
            group = by_first[rest[0]]
            assert tuple(rest[: len(group)]) == group
            seen.append(group)
            del rest[: len(group)]
    if mix.interleaved:
        assert set(seen) == set(groups)
    else:
        assert sorted(seen) == groups
    if not packing:
        assert all(row in groups for row in rows)


@given(_grouped(), st.floats(0.0, 0.9))
def test_groups_are_held_out_as_a_whole(made, fraction):
    corpus, groups = made
    train, held = corpus.hold_out(fraction, None, seed=1)
    assert sorted([*train, *held]) == list(range(len(corpus)))
    held_out = set(held.tolist())
    assert all(len(held_out & set(group)) in (0, len(group)) for group in groups)
    assert sum(group[0] in held_out for group in groups) == max(
        min(round(len(groups) * fraction), len(groups) - 1), int(fraction > 0)
    )


def test_a_token_table_tells_its_groups(tmp_path):
    with TableWriter(tmp_path) as writer:
        for number, joined in enumerate([False, True, False, False, True]):
            writer.add(np.array([1, 2]), np.array([False, True]), number, "a", joined=joined)
        writer.finish(DataReport(rows_kept=5, tokens=10))
    table = TokenTable(tmp_path)
    assert table.largest == 2
    corpus = Corpus([table])
    assert corpus.firsts(np.arange(5)).tolist() == [0, 2, 3]
    assert corpus.members([(3, 0), (2,)]) == [(3, 4, 0, 1), (2,)]
    assert corpus.group_lengths(np.array([0, 2, 3])).tolist() == [4, 2, 4]
