"""Parquet and Arrow files: places, and no keys that only the schema knows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.contracts.errors import DataError
from tunesmith.data.columnar import read_arrow, read_parquet, without_nulls
from tunesmith.data.found import Found

CALLS = [{"arguments": {"city": "Bonn"}}, {"arguments": {"amount": 3}}]


def write(path: Path, kind: str) -> Path:
    table = pa.table({"id": [1, 2], "calls": [[CALLS[0]], [CALLS[1]]]})
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_rows_carry_only_their_own_keys(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "x", kind)
    read = read_parquet if kind == "parquet" else read_arrow
    assert list(read(path, "x")) == [
        Found("x:row 0", {"id": 1, "calls": [CALLS[0]]}),
        Found("x:row 1", {"id": 2, "calls": [CALLS[1]]}),
    ]


def test_places_go_on_over_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.columnar._ROWS_AT_ONCE", 3)
    pq.write_table(pa.table({"n": list(range(8))}), tmp_path / "x")
    rows = list(read_parquet(tmp_path / "x", "x"))
    assert rows == [Found(f"x:row {n}", {"n": n}) for n in range(8)]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_damaged_files_are_named(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "x", kind)
    path.write_bytes(path.read_bytes()[:-40])
    read = read_parquet if kind == "parquet" else read_arrow
    with pytest.raises(DataError, match="x cannot be read as"):
        list(read(path, "x"))
    path.write_bytes(b"hello, this is something else entirely")
    with pytest.raises(DataError, match="x cannot be read as"):
        list(read(path, "x"))


def test_nulls_are_removed_at_every_depth_but_not_from_lists() -> None:
    value = {"a": None, "b": [{"c": None, "d": 0}, None], "e": {"f": {"g": None}}, "h": False}
    assert without_nulls(value) == {"b": [{"d": 0}, None], "e": {"f": {}}, "h": False}
