"""All systems get the same tokens and the same targets, whatever the form of the batch."""

from __future__ import annotations

import pytest
import torch
from benchmarks.batches import IGNORED, LAYOUTS, documents, random_batch, random_documents


def targets(inputs: dict[str, torch.Tensor]) -> set[tuple[int, ...]]:
    """What a transformers model is asked: (context of a document up to here, next token), by the shifted labels."""
    found = set()
    rows, length = inputs["input_ids"].shape
    positions = inputs.get("position_ids", torch.arange(length).expand(rows, -1))
    for row in range(rows):
        for at in range(length - 1):
            label = int(inputs["labels"][row, at + 1])
            if label != IGNORED:
                start = at - int(positions[row, at])
                found.add((*inputs["input_ids"][row, start : at + 1].tolist(), label))
    return found


def ours(lengths: list[int], share: float, seed: int) -> set[tuple[int, ...]]:
    batch = random_batch(lengths, share, seed)
    return {
        (
            *batch.ids_T[at - int(batch.position_ids_T[at]) : at + 1].tolist(),
            target,
        )
        for at, target in zip(batch.logit_index_S.tolist(), batch.targets_S.tolist(), strict=True)
    }


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_layout_asks_what_ours_is_asked(layout, share):
    row = random_documents([5, 1, 9, 3], share, seed=1)

    asked = targets(LAYOUTS[layout](row))

    assert asked == ours([5, 1, 9, 3], share, seed=1)
    assert len(asked) == row.supervised > 0


def test_equal_rows_ask_what_ours_is_asked():
    row = random_documents([6, 6, 6], 1.0, seed=2)

    assert targets(LAYOUTS["rows"](row)) == ours([6, 6, 6], 1.0, seed=2)
    assert row.supervised == 3 * 5


def test_padding_by_hand():
    row = random_documents([2, 3], 1.0, seed=0)
    a, b, c, d, e = row.ids_T.tolist()
    pad, no = [0] * 5, IGNORED

    padded = LAYOUTS["padded"](row)

    assert padded["input_ids"].tolist() == [[a, b, 0, *pad], [c, d, e, *pad]]
    assert padded["labels"].tolist() == [[no, b, *[no] * 6], [no, d, e, *[no] * 5]]


def test_documents_fill_the_row_around_their_mean():
    lengths = documents(2, 4096, 512)

    assert sum(lengths) == 8192
    assert 300 < sum(lengths) / len(lengths) < 800
    assert documents(2, 4096, 512) == lengths
    assert documents(3, 7, None) == [7, 7, 7]


def test_the_digest_tells_other_work():
    same = random_documents([4, 4], 0.5, seed=0).digest

    assert random_documents([4, 4], 0.5, seed=0).digest == same
    others = [
        random_documents([4, 4], 0.5, seed=1),
        random_documents([4, 4], 1.0, seed=0),
        random_documents([5, 3], 0.5, seed=0),
    ]
    assert len({same, *(other.digest for other in others)}) == 4
