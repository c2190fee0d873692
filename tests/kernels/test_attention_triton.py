"""The attention kernels: runs `attention_interpreted.py`, and tests how blocks are listed and fitted to cards."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.support.interpreter import run_in_interpreter
from tunesmith.kernels import attention_blocks
from tunesmith.kernels.attention_blocks import BLOCKS, KERNELS, Card, block_list, blocks_for
from tunesmith.kernels.attention_rows import attention_backward_work, attention_work, pairs
from tunesmith.kernels.attention_triton import packed_attention
from tunesmith.kernels.packed import Documents, Heads, Scores

CARDS = [Card(8, 99), Card(8, 163), Card(9, 227), Card(10, 227), Card(12, 99)]


def test_attention_in_the_interpreter():
    pytest.importorskip("triton")
    run_in_interpreter("tests/kernels/attention_interpreted.py")


@pytest.mark.slow
def test_more_of_attention_in_the_interpreter():
    pytest.importorskip("triton")
    run_in_interpreter("tests/kernels/attention_interpreted.py", "-m", "slow")


def _documents(*lengths: int) -> Documents:
    return Documents(lengths, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))


@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("lengths", [(1,), (16,), (17, 1, 0, 48, 15), (0, 5), (64, 64)], ids=str)
def test_every_row_is_in_one_block(lengths, queries):
    rows = []
    for start, length, first in block_list(_documents(*lengths), sum(lengths), 16, 99, queries=queries):
        rows += range(int(start + first), int(start + min(first + 16, length))) if length else []
    assert sorted(rows) == list(range(sum(lengths)))


def test_the_most_work_comes_first():
    documents = _documents(40, 16)
    by_keys = block_list(documents, 56, 16, 99, queries=True)
    assert by_keys[:4].tolist() == [[0, 40, 32], [0, 40, 16], [0, 40, 0], [40, 16, 0]]
    by_queries = block_list(documents, 56, 16, 99, queries=False)
    assert by_queries[:4].tolist() == [[0, 40, 0], [0, 40, 16], [40, 16, 0], [0, 40, 32]]
    # under a window of one key all blocks have as much to do
    narrow = block_list(documents, 56, 16, 1, queries=True)
    assert narrow[:4].tolist() == [[0, 40, 16], [0, 40, 32], [0, 40, 0], [40, 16, 0]]


def test_lists_are_computed_once_for_all_layers():
    documents = _documents(40, 16)
    assert block_list(documents, 56, 16, 99, queries=True) is block_list(documents, 56, 16, 99, queries=True)


@pytest.mark.parametrize("card", CARDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_card_has_blocks(kernel, dtype, card, monkeypatch):
    monkeypatch.setattr(attention_blocks, "card", lambda _tensor: card)
    for size in (16, 64, 72, 128, 256) if dtype != torch.float32 else (16, 64, 72, 128):
        found = blocks_for(kernel, torch.empty(0, dtype=dtype), Heads(1, 1, size))
        assert found is not None
        assert found.shared <= card.shared
        assert card.major in found.majors


def test_blocks_divide_each_other():
    """The kernels step from the diagonal on, which has to be the edge of a block."""
    for kernel, table in BLOCKS.items():
        for blocks in itertools.chain(*table.values()):
            walked, kept = blocks.columns, blocks.rows
            if kernel == "key_gradient":
                walked, kept = kept, walked
            assert kept % walked == 0


def test_what_has_no_blocks_is_computed_by_the_reference():
    heads = Heads(2, 1, 256)
    assert blocks_for("forward", torch.empty(0), heads) is None
    out, lse = packed_attention(torch.randn(5, heads.columns), heads, _documents(5), Scores())
    assert (out.shape, lse.shape) == ((5, 512), (2, 5))


def test_the_work_of_a_window():
    size = {"lengths": (4, 2), "heads": 3, "kv_heads": 1, "head_dim": 8}
    assert pairs(size) == 4 + 3 + 2 + 1 + 2 + 1
    assert pairs({**size, "window": 2}) == 1 + 2 + 2 + 2 + 1 + 2
    assert attention_work(size, 2) == (6 * (40 + 24) * 2 + 4 * 6 * 3, 13 * 3 * 4 * 8)
    assert attention_backward_work(size, 2)[1] == 13 * 3 * 10 * 8


@pytest.mark.parametrize("capability", [89, 120])
@pytest.mark.parametrize("size", [128, 256])
def test_kernels_fit_consumer_cards(size, capability):
    """The generations that `test_compile.py` leaves out, with 99 KiB of shared memory."""
    pytest.importorskip("triton")
    from tests.kernels.compile_only import SHARED, compile_for, recorded
    from tunesmith.kernels.catalog import CATALOG

    lengths = {"lengths": (512,), "heads": 2, "kv_heads": 1, "head_dim": size, "window": 99, "softcap": 50.0}
    for name in ("packed_attention", "packed_attention_backward"):
        with recorded(capability=capability) as launches:
            CATALOG[name].op(**CATALOG[name].cases(lengths, torch.bfloat16, torch.device("meta")))
        for launch in launches:
            assert compile_for(launch, capability).metadata.shared <= SHARED[capability] * 1024
