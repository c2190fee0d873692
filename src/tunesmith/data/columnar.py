"""Readers of columnar files: Parquet and Arrow, batch by batch, without the gaps that their schemas fill in.

pyarrow is imported when the first such file is read: text files must not pay for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.contracts.errors import DataError, first_line
from tunesmith.data.found import Found, Stored

_ROWS_AT_ONCE = 1024


def without_nulls(value: Any) -> Any:
    """`value` without the keys that hold None, at every depth.

    Arrow gives all structs of a column the same keys and fills the gaps with None: the arguments of one
    tool call would carry the names of every other call's arguments.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def read_parquet(path: Stored, label: str) -> Iterator[Found]:
    """Rows of a Parquet file, in batches; the place is `file:row N`, from 0."""
    import pyarrow.parquet

    with _arrow_errors(label, "Parquet"):
        file = pyarrow.parquet.ParquetFile(path if isinstance(path, Path) else path.open("rb"))
        yield from _number_rows(file.iter_batches(batch_size=_ROWS_AT_ONCE), label)


def read_arrow(path: Stored, label: str) -> Iterator[Found]:
    """Rows of an Arrow IPC file, in the stream form (as `datasets` writes) or the file form."""
    import pyarrow

    assert isinstance(path, Path), "it is mapped into memory, so one that lies elsewhere is copied first"
    with _arrow_errors(label, "Arrow"), pyarrow.memory_map(str(path)) as stream:
        if stream.size() == 0:
            return
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        if is_file:
            file = pyarrow.ipc.open_file(stream)
            yield from _number_rows(map(file.get_batch, range(file.num_record_batches)), label)
        else:
            yield from _number_rows(pyarrow.ipc.open_stream(stream), label)


def _number_rows(batches: Any, label: str) -> Iterator[Found]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            yield Found(f"{label}:row {number}", without_nulls(record))
            number += 1


@contextmanager
def _arrow_errors(label: str, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{label} cannot be read as {kind}: {first_line(error)}.", hint="Write or download it again."
        ) from error
