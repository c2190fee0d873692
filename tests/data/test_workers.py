"""Several processes: the same table as one, the same errors, and none left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_pipeline import RENDERER, files, lines
from tests.support.tiny import tiny_tokenizer
from tunesmith.contracts.errors import DataError, UserError
from tunesmith.data import workers as workers_module
from tunesmith.data.formats import FORMATS
from tunesmith.data.pipeline import Pipeline
from tunesmith.data.render import Renderer
from tunesmith.data.sources import open_source
from tunesmith.data.table import TokenTable
from tunesmith.data.tokenize import tokenize_source
from tunesmith.data.words import Words
from tunesmith.data.workers import Done, default_workers, prepare_rows

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forks")


def children() -> list[int]:
    """Processes that this one has started and not waited for."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def is_running(process: Path) -> bool:
    """Whether there is such a process that has not ended; one may wait for whoever adopted it."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(autouse=True)
def _none_left() -> Iterator[None]:
    before = set(children())
    yield
    assert set(children()) <= before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """1,700 rows of all fates, in four batches."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines(1700)))
    return file


def table_of(path: Path, cache: Path, workers: int | None, **options: Any) -> TokenTable:
    options = {"renderer": RENDERER, "sequence_length": 64, **options}
    return tokenize_source(open_source(path), cache_dir=cache, workers=workers, **options)


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_the_table_is_that_of_one_process(path: Path, tmp_path: Path, workers: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(Words, "pays", property(lambda self: False))
    rows: list[int] = []
    alone = table_of(path, tmp_path / "alone", 0)
    monkeypatch.undo()
    assert alone.report.truncated > 0
    assert len(alone.report.dropped) >= 2
    assert len(alone.report.notes) > 0
    by_words = table_of(path, tmp_path / "words", 1)
    table = table_of(path, tmp_path / "many", workers, progress=rows.append)
    assert files(table) == files(by_words) == files(alone)
    assert rows == [512, 1024, 1536, 1700]


def test_rows_of_several_documents_and_plain_texts(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {number} " + "word " * (number % 90) for number in range(1200)))
    options = {"renderer": Renderer(tiny_tokenizer(), None), "overlong": "split", "join_texts": True}
    tables = [table_of(text, tmp_path / str(workers), workers, **options) for workers in (0, 2)]
    assert len(tables[0]) > 0
    assert files(tables[0]) == files(tables[1])


def test_few_rows_and_rows_from_elsewhere_start_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a worker was started"))
    pipeline, source = Pipeline(RENDERER, FORMATS["chat"], {}), open_source(path)
    hub = replace(source, is_local=False)
    few = open_source(path, split="[:512]")
    assert sum(one.count for one in prepare_rows(hub, hub.rows(), pipeline, 512, 4)) == 1700
    assert sum(one.count for one in prepare_rows(few, few.rows(), pipeline, 512, 4)) == 512
    assert sum(one.count for one in prepare_rows(source, source.rows(), pipeline, 512, 1)) == 1700


def test_where_no_process_can_be_had_it_goes_without(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(os, "fork", refused)
    pipeline, source = Pipeline(RENDERER, FORMATS["chat"], {}), open_source(path)
    assert sum(one.count for one in prepare_rows(source, source.rows(), pipeline, 512, 4)) == 1700


def test_a_damaged_file_ends_with_its_own_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text("[" + ",\n".join([json.dumps({"messages": turns})] * 1300) + ",\n{broken]")
    messages = []
    for workers in (0, 2):
        with pytest.raises(DataError, match="not valid JSON at line 1301") as caught:
            table_of(path, tmp_path / "cache", workers)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "_PIPE_BYTES", 4096)  # they wait, and have not done all before
    pipeline, source = Pipeline(RENDERER, FORMATS["chat"], {}), open_source(path)
    before = set(children())
    ahead = prepare_rows(source, source.rows(), pipeline, 16, 2)
    next(ahead)
    for process in set(children()) - before:
        os.kill(process, signal.SIGKILL)
    with pytest.raises(UserError, match="ended from outside") as caught:
        list(ahead)
    assert "data.workers: 0" in str(caught.value)


def test_workers_end_with_whoever_stops_early(path: Path) -> None:
    pipeline, source = Pipeline(RENDERER, FORMATS["chat"], {}), open_source(path)
    before = set(children())
    ahead = prepare_rows(source, source.rows(), pipeline, 64, 2)
    assert isinstance(next(ahead), Done)
    assert len(set(children()) - before) == 2
    ahead.close()
    assert set(children()) == before


def test_workers_end_when_their_parent_is_killed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "_PIPE_BYTES", 4096)
    pipeline, source = Pipeline(RENDERER, FORMATS["chat"], {}), open_source(path)
    reads, writes = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            for _ in prepare_rows(source, source.rows(), pipeline, 16, 3):
                os.write(writes, " ".join(map(str, children())).encode())
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.waitpid(parent, 0)
    processes = [Path("/proc") / number for number in os.read(reads, 100).decode().split()]
    os.close(reads)
    os.close(writes)
    assert len(processes) == 3
    deadline = time.monotonic() + 20
    while any(map(is_running, processes)):
        assert time.monotonic() < deadline, "they wait for a reader that is gone"
        time.sleep(0.02)


def test_signals_and_the_tokenizers_threads_are_as_before(
    path: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    table_of(path, tmp_path / "cache", 2)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_one_worker_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)), raising=False)
    monkeypatch.setattr(workers_module.sys, "platform", "linux")
    assert default_workers() == 3
    monkeypatch.setattr(workers_module.sys, "platform", "darwin")
    assert default_workers() == 0
