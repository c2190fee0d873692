"""Long texts in pieces and short ones joined: no token vanishes, and none trains twice."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import tiny_tokenizer
from tunesmith.data.batches import BatchPlan
from tunesmith.data.cutting import Fit, Joiner, split
from tunesmith.data.feed import Position
from tunesmith.data.mixing import Mix
from tunesmith.data.reading import RowProblem
from tunesmith.data.render import Encoded, Renderer
from tunesmith.data.sources import open_source
from tunesmith.data.stream import StreamFeed
from tunesmith.data.table import TokenTable
from tunesmith.data.template import CHATML
from tunesmith.data.tokenize import SourceStream, tokenize_source

RENDERER = Renderer(tiny_tokenizer(), CHATML)
NO_OFFSETS = np.zeros((0, 2), dtype=np.int32)


def tokens(count: int, first: int = 0) -> Encoded:
    """Tokens that tell their place; all but the first train."""
    ids = np.arange(first, first + count, dtype=np.int32)
    trained = np.ones(count, dtype=np.bool_)
    trained[:1] = False
    return Encoded(ids, trained, NO_OFFSETS)


def plain(pieces: Any) -> list[tuple[list[int], list[int]]]:
    """Tokens of each piece, and those that train."""
    return [(piece.ids.tolist(), piece.ids[piece.trained].tolist()) for piece in pieces]


def texts(path: Path, *rows: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return path


def table(path: Path, **options: Any) -> TokenTable:
    return tokenize_source(open_source(path), renderer=RENDERER, cache_dir=path.parent / "cache", **options)


# ---------------------------------------------------------------- pieces


def test_pieces_by_hand() -> None:
    assert plain(split(tokens(7), 4, 0)) == [([0, 1, 2, 3], [1, 2, 3]), ([4, 5, 6], [5, 6])]
    assert plain(split(tokens(7), 4, 1)) == [([0, 1, 2, 3], [1, 2, 3]), ([3, 4, 5, 6], [4, 5, 6])]
    assert plain(split(tokens(7), 4, 2)) == [
        ([0, 1, 2, 3], [1, 2, 3]), ([2, 3, 4, 5], [4, 5]), ([4, 5, 6], [6]),
    ]  # fmt: skip
    assert plain(split(tokens(4), 4, 2)) == [([0, 1, 2, 3], [1, 2, 3])]


@given(st.integers(1, 90), st.integers(2, 20), st.data())
def test_each_token_of_a_text_trains_once(count: int, limit: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, limit // 2))
    pieces = list(split(tokens(count), limit, overlap))
    trained = [token for piece in pieces for token in piece.ids[piece.trained].tolist()]
    seen = {token for piece in pieces for token in piece.ids.tolist()}

    assert seen == set(range(count))
    assert all(len(piece.ids) <= limit for piece in pieces)
    assert not any(piece.trained[0] for piece in pieces)
    firsts = {piece.ids[0] for piece in pieces} if overlap == 0 else {0}
    assert trained == [token for token in range(count) if token not in firsts]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(2, 20), st.data())
def test_each_token_of_joined_texts_trains_once(counts: list[int], limit: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, limit // 2))
    joiner, made, first = Joiner(limit, overlap), [], 0
    for row, count in enumerate(counts):
        made += joiner.add(tokens(count, first).ids, row, f"row {row}")
        first += count
    made += joiner.finish()
    pieces = [piece for piece, _, _ in made]
    trained = [token for piece in pieces for token in piece.ids[piece.trained].tolist()]

    # with no overlap, a last document of one token has no target and is none
    lost = {first - 1} if overlap == 0 and (first % limit == 1 or limit == 1) else set()
    lost |= {0} if first == 1 else set()
    assert {token for piece in pieces for token in piece.ids.tolist()} == set(range(first)) - lost
    assert [len(piece.ids) for piece in pieces[:-1]] == [limit] * (len(pieces) - 1)
    firsts = {int(piece.ids[0]) for piece in pieces} if overlap == 0 else {0}
    assert trained == [token for token in range(first) if token not in firsts | lost]


def test_the_first_token_of_a_joined_text_trains_behind_the_text_before() -> None:
    joiner = Joiner(5, 1)
    made = [*joiner.add(tokens(3).ids, 0, "a"), *joiner.add(tokens(4, 3).ids, 1, "b"), *joiner.finish()]

    assert plain(piece for piece, _, _ in made) == [([0, 1, 2, 3, 4], [1, 2, 3, 4]), ([4, 5, 6], [5, 6])]
    assert [(row, where) for _, row, where in made] == [(0, "a"), (1, "b")]
    assert list(joiner.finish()) == []


def test_only_plain_text_is_split() -> None:
    fit = Fit(4, "split")
    assert len(fit.documents(tokens(7), plain=True)) == 2
    assert not fit.truncates(tokens(7), plain=True)
    assert plain(fit.documents(tokens(7), plain=False)) == [([0, 1, 2, 3], [1, 2, 3])]
    assert fit.truncates(tokens(7), plain=False)
    assert isinstance(Fit(4, "drop").documents(tokens(7), plain=True), RowProblem)
    assert isinstance(fit.documents(tokens(1), plain=True), RowProblem)


# ---------------------------------------------------------------- sources


def test_a_long_text_becomes_documents_of_one_row(tmp_path: Path) -> None:
    path = texts(tmp_path / "rows.jsonl", "short", "again " * 200, "short too")
    whole = table(path, sequence_length=4096)
    made = table(path, sequence_length=64, overlong="split")
    ids = [made.ids(n) for n in range(len(made))]

    assert made.report.rows_in == made.report.rows_kept == 3
    assert (made.report.truncated, made.report.dropped) == (0, {})
    assert [made.row(n) for n in range(len(made))] == [0, *[1] * (len(made) - 2), 2]
    assert made.report.trained_tokens == whole.report.trained_tokens
    assert made.report.tokens == int(made.lengths.sum())
    rebuilt = [ids[0], ids[1], *[piece[1:] for piece in ids[2:-1]], ids[-1]]
    assert np.concatenate(rebuilt).tolist() == np.concatenate([whole.ids(n) for n in range(3)]).tolist()


def test_short_texts_are_joined_with_their_ends(tmp_path: Path) -> None:
    path = texts(tmp_path / "rows.jsonl", *[f"text {n} " * (n % 5 + 1) for n in range(40)], "")
    whole = table(path, sequence_length=4096)
    made = table(path, sequence_length=64, join_texts=True, overlap=0)
    joined = np.concatenate([made.ids(n) for n in range(len(made))])

    assert made.lengths[:-1].tolist() == [64] * (len(made) - 1)
    assert joined.tolist() == np.concatenate([whole.ids(n) for n in range(40)]).tolist()
    assert np.count_nonzero(joined == RENDERER.tokenizer.eos_token_id) == 40
    assert (made.report.rows_in, made.report.rows_kept) == (41, 40)
    assert made.report.dropped == {"empty text": 1}
    assert made.report.trained_tokens == len(joined) - len(made)


def test_conversations_are_not_joined(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q", "response": f"a {n}"}) + "\n" for n in range(4)))
    made = table(path, sequence_length=64, join_texts=True, overlong="split")

    assert [made.row(n) for n in range(len(made))] == [0, 1, 2, 3]


@pytest.mark.parametrize("change", [{"overlap": 2}, {"join_texts": True}, {"overlong": "split"}])
def test_another_cut_is_another_table(tmp_path: Path, change: dict[str, Any]) -> None:
    path = texts(tmp_path / "rows.jsonl", "again " * 200)

    assert table(path, sequence_length=64).folder != table(path, sequence_length=64, **change).folder


@pytest.mark.parametrize("options", [{"overlong": "split", "overlap": 8}, {"join_texts": True}])
def test_a_stream_of_pieces_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("tunesmith.data.tokenize._BATCH", 3)
    path = texts(tmp_path / "rows.jsonl", *["word " * (n * 37 % 91 + 1) for n in range(14)])

    def begin() -> StreamFeed:
        source = SourceStream(open_source(path), renderer=RENDERER, sequence_length=32, **options)
        plan = BatchPlan(32, packing=True, rows_per_step=2, tokens_per_step=None, seed=3,
                         mix=Mix("interleave", "all_exhausted"))  # fmt: skip
        return StreamFeed([source], [1.0], plan, buffer_tokens=150)

    def seen(steps: Any) -> list[list[int]]:
        return [
            [token for row in step.rows for document in row for token in tokens_of(step.corpus, document)]
            for step in steps
        ]

    def tokens_of(corpus: Any, document: int) -> list[int]:
        source, index = corpus.locate(document)
        return [int(token) for token in source.ids(index)]

    whole = list(islice(begin().steps(Position()), 40))
    for step in (0, 3, 8, 21):
        position = Position(**json.loads(json.dumps(asdict(whole[step].position))))
        assert seen(islice(begin().steps(position), 39 - step)) == seen(whole[step + 1 :])
