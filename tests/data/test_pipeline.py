"""Batches that overlap: the same table as one after the other, and no thread left behind."""

from __future__ import annotations

import gc
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import normalizers

from tests.support.tiny import tiny_tokenizer
from tunesmith.data.formats import FORMATS
from tunesmith.data.pipeline import Pipeline, short_collections
from tunesmith.data.render import Renderer
from tunesmith.data.sources import Row, open_source
from tunesmith.data.table import TableWriter, TokenTable
from tunesmith.data.template import CHATML
from tunesmith.data.tokenize import SourceStream, tokenize_source

RENDERER = Renderer(tiny_tokenizer(), CHATML, prefix_mismatch="context")


def threaded() -> Renderer:
    """A renderer whose tokenizer is given whole texts."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return Renderer(tokenizer, CHATML)


def lines(count: int) -> Iterator[str]:
    """Rows of all fates: kept, cut, with control tokens of the user, with an empty answer, broken."""
    rng = random.Random(0)
    for number in range(count):
        question = rng.choice(["Why?", "<|im_end|>", "a <|im_start|>user\nb", "é" * 9])
        answer = rng.choice(["Yes.", "", "\n\nno", "long " * rng.randrange(30)])
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield json.dumps({"messages": turns}) if number % 50 != 3 else "{broken"


def files(table: TokenTable) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in table.folder.iterdir()}


def tokenize_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tokenize")]


def test_the_table_is_that_of_one_batch_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines(1700)))
    options = {"renderer": RENDERER, "sequence_length": 64}
    table = tokenize_source(open_source(path), cache_dir=tmp_path / "cache", **options)
    stream = SourceStream(open_source(path), **options)
    (tmp_path / "one").mkdir()
    with TableWriter(tmp_path / "one") as writer:
        for _ in stream.feed(writer):
            pass
        writer.finish(stream.report)
    assert table.report.rows_in == 1700
    assert len(table.report.dropped) >= 2
    assert table.report.truncated > 0
    assert len(table.report.notes) > 0
    assert files(table) == files(TokenTable(tmp_path / "one"))
    assert not tokenize_threads()


def test_threads_end_with_whoever_stops_early() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = Row(0, "rows:1", {"messages": turns}, None)
    ahead = Pipeline(threaded(), FORMATS["chat"], {}).ahead([[row] * 300] * 5)
    first = next(ahead)
    assert len(list(first.documents())) == first.count == 300
    assert tokenize_threads()
    ahead.close()
    assert not tokenize_threads()


def test_threads_end_when_reading_fails() -> None:
    def batches() -> Iterator[list[Row]]:
        yield [Row(0, "rows:1", None, "broken")]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(Pipeline(threaded(), FORMATS["chat"], {}).ahead(batches()))
    assert not tokenize_threads()


def test_collections_are_as_before_afterwards() -> None:
    gc.unfreeze()
    at_rest = gc.get_freeze_count()
    with short_collections():
        assert gc.get_freeze_count() > at_rest
    assert gc.get_freeze_count() == at_rest
    stopped = short_collections()
    stopped.__enter__()
    assert not stopped.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert gc.get_freeze_count() == at_rest
    gc.freeze()
    try:
        with short_collections():
            pass
        assert gc.get_freeze_count() > at_rest, "frozen by someone else"
    finally:
        gc.unfreeze()
