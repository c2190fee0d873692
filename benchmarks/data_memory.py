"""Peak memory of preparing data, by the size of the file: it must not grow with it.

    .venv/bin/python -m benchmarks.data_memory                         200 MB and 2,000 MB of JSON lines
    .venv/bin/python -m benchmarks.data_memory --size 50 --size 200
    .venv/bin/python -m benchmarks.data_memory --stream --size 200     streamed instead of written to a table

Each size runs in a process of its own: the file is hashed, read, rendered, tokenised and written to the cache, or
streamed once through a buffer. `peak_mib` is the resident peak of the process, `worker_mib` that of its largest
worker (pages that they share are in both), `imports_mib` what it had before it read a row. Pages of the table that
the system keeps mapped are in none, because the table is not opened for reading before. Afterwards the epoch is
planned, which holds some numbers for each row: `planned_mib`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.data_files import small_tokenizer, write_rows

SEQUENCE_LENGTH = 2048


def peak_mib(whose: int = resource.RUSAGE_SELF) -> int:
    """The most memory that this process, or one of its ended children, has had resident, in MiB."""
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(whose).ru_maxrss * unit // 2**20


def prepare(path: Path, folder: Path, stream: bool) -> dict[str, Any]:
    """Prepare the file in this process and say what it took."""
    import numpy as np

    from tunesmith.data.batches import BatchPlan, Corpus
    from tunesmith.data.feed import TableFeed
    from tunesmith.data.render import Renderer
    from tunesmith.data.sources import open_source
    from tunesmith.data.stream import DocumentList
    from tunesmith.data.template import CHATML
    from tunesmith.data.tokenize import SourceStream, tokenize_source

    options: dict[str, Any] = {
        "renderer": Renderer(small_tokenizer(), CHATML), "sequence_length": SEQUENCE_LENGTH
    }  # fmt: skip
    imports, started = peak_mib(), time.perf_counter()
    if stream:
        source, documents = SourceStream(open_source(path), **options), DocumentList()
        for _ in source.feed(documents):
            if sum(len(document.ids) for document in documents.documents) > 1_000_000:
                documents.documents.clear()
        return _row(path, source.report.rows_in, imports, time.perf_counter() - started)
    table = tokenize_source(open_source(path), cache_dir=folder, **options)
    row = _row(path, table.report.rows_in, imports, time.perf_counter() - started)
    plan = BatchPlan(SEQUENCE_LENGTH, packing=True, rows_per_step=16, tokens_per_step=None, seed=42)
    TableFeed(Corpus([table]), np.arange(len(table)), plan).count_steps(1.0)
    return row | {"planned_mib": peak_mib()}


def _row(path: Path, rows: int, imports: int, seconds: float) -> dict[str, Any]:
    return {
        "file_mb": round(path.stat().st_size / 1e6),
        "rows": rows,
        "rows_per_second": round(rows / seconds),
        "imports_mib": imports,
        "peak_mib": peak_mib(),
        "worker_mib": peak_mib(resource.RUSAGE_CHILDREN),
    }


def main() -> None:
    """Measure each size in a process of its own and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=float, action="append", help="megabytes; may be given several times")
    parser.add_argument("--stream", action="store_true", help="stream the file through a buffer")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.file is not None:
        print(json.dumps(prepare(arguments.file, arguments.file.parent / "cache", arguments.stream)))
        return
    for size in arguments.size or [200, 2000]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write_rows(path, megabytes=size, longest=1000)
            command = [sys.executable, "-m", "benchmarks.data_memory", "--file", str(path)]
            subprocess.run(command + ["--stream"] * arguments.stream, check=True)


if __name__ == "__main__":
    main()
