"""From a warm cache to the first batch: how long a run over a million rows waits before it trains.

    .venv/bin/python -m benchmarks.data_cache                    a million rows, packs of 2,048 tokens
    .venv/bin/python -m benchmarks.data_cache --rows 100000

The rows' file and their table are made first, in a temporary folder: what is measured is the second start of a run,
when the file is hashed, the table opened, the epochs counted, the plan printed and the first step collated. Imports
are not counted. The same is done with a byte of the file changed, which must not find the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_files import small_tokenizer, write_rows
from tunesmith.data.batches import BatchPlan, Corpus, collate, micro_batches
from tunesmith.data.cache import obtain
from tunesmith.data.feed import Position, TableFeed
from tunesmith.data.render import Renderer
from tunesmith.data.sources import open_source
from tunesmith.data.table import DataReport, TableWriter, TokenTable
from tunesmith.data.template import CHATML
from tunesmith.data.tokenize import table_key, tokenize_source

SEQUENCE_LENGTH = 2048


def fill_table(folder: Path, rows: int) -> None:
    """A table of so many documents with the lengths of an instruction set: median 180, longest 760 tokens."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.2, 0.55, size=rows), 20, 760).astype(int).tolist()
    ids = rng.integers(3, 300, size=760, dtype=np.int32)
    trained = np.arange(760) % 3 > 0
    with TableWriter(folder) as writer:
        for number, length in enumerate(lengths):
            writer.add(ids[:length], trained[:length], number, f"rows.jsonl:{number + 1}")
        tokens = sum(lengths)
        writer.finish(DataReport(rows_in=rows, rows_kept=rows, tokens=tokens, format="pair"))


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Add the time of the block under `name`."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def first_batch(open_table: Callable[[], TokenTable], epochs: float) -> dict[str, float]:
    """Seconds of each part of a start, up to the first step's batches."""
    seconds: dict[str, float] = {}
    plan = BatchPlan(SEQUENCE_LENGTH, packing=True, rows_per_step=16, tokens_per_step=None, seed=42)
    with timed("hash the file, open the table", seconds):
        table = open_table()
    with timed("number the documents, hold out", seconds):
        corpus = Corpus([table])
        train_N, _ = corpus.hold_out(0.02, None, seed=42)
        feed = TableFeed(corpus, train_N, plan)
    with timed("pack, count the steps", seconds):
        feed.count_steps(epochs)
    with timed("the first step", seconds):
        step = next(feed.steps(Position()))
        for documents in micro_batches(step.corpus, step.rows, rows_per_batch=None, max_tokens=16384):
            collate(step.corpus, documents)
    return seconds


def measure(rows: int, epochs: float, folder: Path) -> dict[str, Any]:
    """Make the data, start twice, and look for the table of a changed file."""
    path, cache = folder / "rows.jsonl", folder / "cache"
    write_rows(path, rows=rows)
    options: dict[str, Any] = {
        "format": "auto", "columns": {}, "sequence_length": SEQUENCE_LENGTH, "overlong": "truncate",
        "malformed": "drop", "renderer": Renderer(small_tokenizer(), CHATML),
    }  # fmt: skip
    obtain(
        cache, table_key(open_source(path), **options), lambda folder: fill_table(folder, rows), TokenTable
    )
    starts = [
        first_batch(lambda: tokenize_source(open_source(path), cache_dir=cache, **options), epochs)
        for _ in range(3)
    ]
    best = min(starts, key=lambda parts: sum(parts.values()))
    key = table_key(open_source(path), **options)
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
    return {
        "rows": rows,
        "file_mb": round(path.stat().st_size / 1e6),
        "seconds": {name: round(value, 3) for name, value in best.items()},
        "to_first_batch": round(sum(best.values()), 3),
        "slowest_of_three": round(max(sum(parts.values()) for parts in starts), 3),
        "a_changed_byte_is_found": table_key(open_source(path), **options) != key,
    }


def main() -> None:
    """Measure and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=float, default=3.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments.rows, arguments.epochs, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
