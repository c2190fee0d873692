"""Streams: a bounded buffer, the shares of sources, and the same steps after every interruption."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.tiny import CHATML, tiny_tokenizer
from tunesmith.contracts.errors import DataError
from tunesmith.data.batches import BatchPlan, collate
from tunesmith.data.feed import Position, Step
from tunesmith.data.formats import Reading
from tunesmith.data.mixing import Mix
from tunesmith.data.render import Renderer
from tunesmith.data.sources import open_source
from tunesmith.data.stream import DocumentList, StreamFeed
from tunesmith.data.tokenize import SourceStream

RENDERER = Renderer(tiny_tokenizer(), CHATML)


class Listed:
    """A source of documents of given lengths, three rows a batch; every fourth row is dropped."""

    def __init__(self, name: str, lengths: list[int]) -> None:
        self.name, self.lengths = name, lengths
        self.read = 0

    def feed(self, sink: Any, at: int = 0):
        for start in range(at, len(self.lengths), 3):
            for row in range(start, min(start + 3, len(self.lengths))):
                self.read += 1
                if row % 4 != 3:
                    ids = np.full(self.lengths[row], row, dtype=np.int32)
                    sink.add(ids, np.ones(len(ids), dtype=bool), row, f"{self.name}:{row}")
            yield row + 1

    def fingerprint(self) -> str:
        return self.name


def sources(*sizes: int) -> list[Listed]:
    rng = np.random.default_rng(0)
    return [Listed(f"s{n}", rng.integers(2, 60, size=size).tolist()) for n, size in enumerate(sizes)]


def feed(
    *sizes: int,
    weights: list[float] | None = None,
    stop: Any = "first_exhausted",
    buffer: int = 400,
    **changes: Any,
) -> StreamFeed:
    values = {"sequence_length": 64, "packing": True, "rows_per_step": 4, "tokens_per_step": None, "seed": 5}
    plan = BatchPlan(**(values | changes), mix=Mix("interleave", stop))
    return StreamFeed(sources(*sizes), weights or [1.0] * len(sizes), plan, buffer)


def take(stream: StreamFeed, count: int, position: Position | None = None) -> list[Step]:
    return list(itertools.islice(stream.steps(position or Position()), count))


def places(step: Step) -> list[list[str]]:
    return [[step.corpus.where(document) for document in row] for row in step.rows]


def test_steps_hold_their_rows_and_rows_their_capacity():
    for step in take(feed(50, 30), 30):
        assert len(step.rows) == 4
        assert all(0 < step.corpus.lengths[list(row)].sum() <= 64 for row in step.rows)
        assert sorted(document for row in step.rows for document in row) == list(range(len(step.corpus)))


def test_a_pass_gives_every_document_once_and_then_others_begin_again():
    given = [place for step in take(feed(40, rows_per_step=1), 200) for row in places(step) for place in row]
    expected = {f"s0:{row}" for row in range(40) if row % 4 != 3}
    for start in range(0, 90, 30):
        assert set(given[start : start + 30]) == expected


def test_each_buffer_is_shuffled_in_another_way():
    """Documents of equal length, ten in a buffer: their order in it, buffer by buffer."""
    plan = BatchPlan(64, packing=False, rows_per_step=10, tokens_per_step=None, seed=5)
    steps = take(StreamFeed([Listed("s0", [10] * 400)], [1.0], plan, 100), 20)
    rows = [[int(row[0].partition(":")[2]) for row in places(step)] for step in steps]
    assert max(rows[0]) < min(rows[1])
    orders = {tuple(np.argsort(row).tolist()) for row in rows}
    assert len(orders) == 20


def test_shares_follow_the_weights():
    stream = feed(400, 400, weights=[3.0, 1.0], packing=False)
    counts = Counter(place[:2] for step in take(stream, 50) for row in places(step) for place in row)
    assert counts["s0"] == pytest.approx(150, abs=8)


@pytest.mark.parametrize(("stop", "passes"), [("first_exhausted", 5), ("all_exhausted", 1)])
def test_the_stop_rule_ends_the_epoch(stop, passes):
    """One source is four times as long, in 130 documents of both it ends once and the short one four times."""
    stream = feed(80, 20, stop=stop, packing=False, rows_per_step=1)
    steps = take(stream, 130)
    assert steps[-1].position.epoch == passes
    shown = [place for step in steps[:100] for row in places(step) for place in row]
    long = [place for place in shown if place.startswith("s0")]
    assert len(set(long)) == len(long), "a new epoch goes on where the longer source was"


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("rows", [{"rows_per_step": 4}, {"rows_per_step": None, "tokens_per_step": 150}])
def test_from_every_position_the_same_steps_follow(stop, packing, rows):
    def made() -> StreamFeed:
        return feed(50, 17, weights=[1.0, 2.0], stop=stop, packing=packing, **rows)

    whole = take(made(), 40)
    assert whole[-1].position.epoch > 0
    for number in range(0, 38, 3):
        written = json.loads(json.dumps(whole[number].position.stream))  # as a checkpoint keeps it
        position = Position(whole[number].position.epoch, 0, written)
        later = take(made(), 2, position)
        assert [places(step) for step in later] == [places(step) for step in whole[number + 1 : number + 3]]
        assert [step.position for step in later] == [step.position for step in whole[number + 1 : number + 3]]


def test_the_order_depends_on_the_seed_and_is_not_that_of_the_file():
    first, again, other = (places(take(feed(200, packing=False, seed=seed), 1)[0]) for seed in (5, 5, 6))
    assert first == again != other
    rows = [int(row[0].partition(":")[2]) for row in first]
    assert rows != sorted(rows)


class Pairs(Listed):
    """Two documents of each row."""

    def feed(self, sink: Any, at: int = 0):
        for row in range(at, len(self.lengths)):
            for joined in (False, True):
                ids = np.full(self.lengths[row], row, dtype=np.int32)
                sink.add(ids, np.ones(len(ids), dtype=bool), row, f"{row} {joined}", joined=joined)
            yield row + 1


@pytest.mark.parametrize("packing", [True, False])
def test_the_documents_of_a_pair_share_a_row(packing):
    plan = BatchPlan(64, packing=packing, rows_per_step=3, tokens_per_step=None, seed=5)
    steps = take(StreamFeed([Pairs("s0", list(range(2, 30)))], [1.0], plan, 200), 20)
    rows = [row for step in steps for row in places(step)]
    for row in rows:
        assert [place.split()[0] for place in row[::2]] == [place.split()[0] for place in row[1::2]]
        assert [place.split()[1] for place in row] == ["False", "True"] * (len(row) // 2)
    assert packing == any(len(row) > 2 for row in rows)
    assert all(step.corpus.lengths[list(row)].sum() <= 64 for step in steps for row in step.rows)


def test_a_pair_longer_than_a_pack_is_refused_with_its_place():
    plan = BatchPlan(64, packing=True, rows_per_step=3, tokens_per_step=None, seed=5)
    with pytest.raises(DataError, match="The documents of 1 False have 66 tokens together"):
        take(StreamFeed([Pairs("s0", [10, 33])], [1.0], plan, 200), 20)


def test_no_more_than_three_buffers_are_read():
    """The one in use, the one that waits, the one in the making; however long the source is."""
    listed = Listed("s0", [10] * 100_000)
    plan = BatchPlan(64, packing=True, rows_per_step=1, tokens_per_step=None, seed=5, mix=Mix("interleave"))
    steps = StreamFeed([listed], [1.0], plan, buffer_tokens=400).steps(Position())
    next(steps)
    for _ in range(20):
        threading.Event().wait(0.02)
    assert listed.read <= 3 * (40 / 0.75 + 3) + 3
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "tunesmith-stream"]


def test_an_error_of_a_source_reaches_the_loop():
    class Broken(Listed):
        def feed(self, sink, at=0):
            yield from itertools.islice(super().feed(sink, at), 4)
            raise DataError("the line is cut")

    plan = BatchPlan(64, packing=True, rows_per_step=1, tokens_per_step=None, seed=5)
    stream = StreamFeed([Broken("s0", [60] * 100)], [1.0], plan, buffer_tokens=120)
    with pytest.raises(DataError, match="the line is cut"):
        take(stream, 50)


def test_a_token_beyond_the_vocabulary_ends_the_run_with_its_place():
    stream = feed(40)
    stream.vocabulary = 30  # `Listed` writes the number of the row as token
    with pytest.raises(DataError, match=r"s0:30 holds token 30, .* for 30 tokens only"):
        take(stream, 50)


class Pieces(Listed):
    """Several documents of a row, which stand for themselves; every third row is none of its own."""

    def feed(self, sink: Any, at: int = 0):
        for start in range(at, len(self.lengths), 5):
            rows = range(start, min(start + 5, len(self.lengths)))
            for row in rows:
                for piece in range(row % 3 * 4):
                    ids = np.full(self.lengths[row], row, dtype=np.int32)
                    sink.add(ids, np.ones(len(ids), dtype=bool), row, f"{self.name}:{row}.{piece}")
            yield rows[-1] + 1


@pytest.mark.parametrize("buffer", [100, 237])
def test_a_row_of_several_documents_is_gone_on_with_in_its_middle(buffer: int):
    def begin() -> StreamFeed:
        plan = BatchPlan(64, packing=True, rows_per_step=2, tokens_per_step=None, seed=5,
                         mix=Mix("interleave", "all_exhausted"))  # fmt: skip
        return StreamFeed([Pieces("a", [11] * 23), Pieces("b", [7] * 9)], [1.0, 2.0], plan, buffer)

    whole = take(begin(), 60)
    for step in range(0, 59, 3):
        position = json.loads(json.dumps(asdict(whole[step].position)))
        rest = take(begin(), 59 - step, Position(**position))
        assert list(map(places, rest)) == list(map(places, whole[step + 1 :]))


# ---------------------------------------------------------------- real sources


def rows_file(path: Path, count: int, broken: int = -1) -> Path:
    lines = [json.dumps({"prompt": f"q{n}", "response": f"answer {n}"}) for n in range(count)]
    if broken >= 0:
        lines[broken] = "{broken"
    path.write_text("\n".join(lines) + "\n")
    return path


def streamed(path: Path | str, **options: Any) -> SourceStream:
    source = open_source(path, streaming=True, split=options.pop("split", None))
    return SourceStream(source, renderer=RENDERER, sequence_length=128, **options)


def all_of(stream: SourceStream, at: int = 0) -> DocumentList:
    documents = DocumentList()
    for _ in stream.feed(documents, at):
        pass
    return documents


def test_a_file_is_streamed_from_any_row_and_accounted_for(tmp_path: Path):
    stream = streamed(rows_file(tmp_path / "rows.jsonl", 1500, broken=700))
    whole = all_of(stream)
    assert (stream.report.rows_in, stream.report.rows_kept) == (1500, 1499)
    assert stream.report.dropped == {"unreadable": 1}
    assert RENDERER.tokenizer.decode(whole.ids(3)[whole.trained(3)]) == "answer 3<|im_end|>"
    later = all_of(stream, at=699)
    assert [later.where(0), later.where(1)] == [f"{tmp_path}/rows.jsonl:700", f"{tmp_path}/rows.jsonl:702"]
    assert [document.row for document in later.documents] == [699, *range(701, 1500)]
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"], "nothing is written"
    assert len(all_of(stream, at=1500)) == 0, "the end is no error"


def test_a_split_keeps_its_numbers(tmp_path: Path):
    stream = streamed(rows_file(tmp_path / "rows.jsonl", 30), split="[10:20]")
    assert [document.row for document in all_of(stream).documents] == list(range(10, 20))
    assert [document.row for document in all_of(stream, at=15).documents] == list(range(15, 20))


def test_refused_and_untrainable_rows_end_the_run(tmp_path: Path):
    with pytest.raises(DataError, match="unreadable 1"):
        all_of(streamed(rows_file(tmp_path / "a.jsonl", 20, broken=4), malformed="error"))
    (tmp_path / "b.jsonl").write_text('{"prompt": "q", "response": ""}\n')
    with pytest.raises(DataError, match="No row"):
        all_of(streamed(tmp_path / "b.jsonl"))


def test_a_parquet_file_is_streamed(tmp_path: Path):
    import datasets

    rows = [{"prompt": f"q{n}", "response": f"answer {n}"} for n in range(20)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    plan = BatchPlan(128, packing=True, rows_per_step=2, tokens_per_step=None, seed=1)
    stream = StreamFeed([streamed(tmp_path / "rows.parquet")], [1.0], plan, 300)
    step = take(stream, 1)[0]
    batch = collate(step.corpus, [document for row in step.rows for document in row])
    assert batch.supervised > 0
    assert all("rows.parquet:row " in place for row in places(step) for place in row)


def test_a_hub_data_set_is_read_as_a_stream_and_skipped_into(monkeypatch: pytest.MonkeyPatch):
    import datasets

    rows = [{"prompt": f"q{n}", "response": f"answer {n}"} for n in range(20)]
    calls = []

    def load(path: str, **arguments: Any) -> Any:
        calls.append({"path": path, **arguments})
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    stream = streamed("org/name")
    assert [document.row for document in all_of(stream).documents] == list(range(20))
    later = all_of(stream, at=17)
    assert [later.where(n) for n in range(3)] == [f"org/name:row {n}" for n in (17, 18, 19)]
    assert calls == [
        {"path": "org/name", "split": "train", "name": None, "revision": None, "streaming": True}
    ]
    with pytest.raises(DataError, match="whole splits only"):
        streamed("org/name", split="train[:10]")


def test_the_fingerprint_follows_the_file_and_the_settings(tmp_path: Path):
    path = rows_file(tmp_path / "rows.jsonl", 5)
    first = streamed(path).fingerprint()
    assert first == streamed(path).fingerprint()
    assert first != streamed(path, malformed="error").fingerprint()
    rows_file(path, 5, broken=4)
    assert first != streamed(path).fingerprint()
    rows_file(path, 5)
    assert first == streamed(path).fingerprint(), "a copy is the same data"


def test_the_stamp_of_a_large_file_reads_samples_of_it(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"0" * 20_000_000)
    first = streamed(path).source.stamp()
    for place in (0, 19_999_999):
        content = bytearray(b"0" * 20_000_000)
        content[place] = ord("1")
        path.write_bytes(content)
        assert streamed(path).source.stamp() != first


def test_a_stream_reads_rows_as_the_settings_say(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    turns = [{"who": "patient", "text": "It hurts."}, {"who": "doctor", "text": "Where?"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    reading = Reading(role_key="who", roles={"patient": "user", "doctor": "assistant"})
    documents = all_of(streamed(path, reading=reading))
    assert RENDERER.tokenizer.decode(documents.ids(0)[documents.trained(0)]) == "Where?<|im_end|>"
    assert streamed(path, reading=reading).fingerprint() != streamed(path).fingerprint()


def test_a_row_is_named_once_however_often_it_is_read(tmp_path: Path):
    stream = streamed(rows_file(tmp_path / "rows.jsonl", 30, broken=7))
    for _ in range(3):
        all_of(stream)

    assert stream.report.dropped == {"unreadable": 3}
    assert [line for line in stream.report.examples if "rows.jsonl:8" in line] == stream.report.examples
    assert len(stream.report.examples) == 1
