"""Token tables: what is written is read back, and no damage goes unseen."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.cache import DamagedEntryError
from tunesmith.data.table import DataReport, TableWriter, TokenTable

Document = tuple[list[int], int, str]
DOCUMENTS: list[Document] = [([5, 6, 7], 0, "a.jsonl:1"), ([8], 3, "ü.jsonl:9")]


def write(folder: Path, documents: list[Document]) -> DataReport:
    report = DataReport(rows_in=len(documents), rows_kept=len(documents))
    with TableWriter(folder) as writer:
        for ids, row, where in documents:
            mask = np.array([token % 2 == 0 for token in ids])
            writer.add(np.array(ids, dtype=np.int32), mask, row, where)
            report.tokens += len(ids)
        writer.finish(report)
    return report


def test_a_table_by_hand(tmp_path: Path) -> None:
    report = write(tmp_path, DOCUMENTS)
    table = TokenTable(tmp_path)
    assert len(table) == 2
    assert table.lengths.tolist() == [3, 1]
    assert table.lengths.dtype == np.int64
    assert table.ids(0).tolist() == [5, 6, 7]
    assert table.ids(1).dtype == np.int32
    assert table.trained(0).tolist() == [False, True, False]
    assert table.trained(0).dtype == np.bool_
    assert (table.row(1), table.where(1)) == (3, "ü.jsonl:9")
    assert table.report == report
    with pytest.raises(ValueError, match="read-only"):
        table.ids(0)[0] = 1


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(
        st.tuples(
            st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), st.integers(0, 2**40), st.text()
        ),
        max_size=6,
    )
)
def test_what_is_written_is_read_back(documents: list[Document]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), documents)
        table = TokenTable(Path(folder))
        assert [(table.ids(i).tolist(), table.row(i), table.where(i)) for i in range(len(table))] == documents


@pytest.mark.parametrize("name", ["ids", "trained", "starts", "rows", "where", "places", "report"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "longer", "empty"])
def test_damaged_files_are_seen(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path, DOCUMENTS)
    path = tmp_path / ("report.json" if name == "report" else f"{name}.npy")
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        changed = {"shorter": content[:-1], "longer": content + b"\0", "empty": b""}
        path.write_bytes(changed[damage])
    with pytest.raises(DamagedEntryError):
        TokenTable(tmp_path)


@pytest.mark.parametrize("name", ["ids", "starts", "rows"])
def test_files_of_another_table_are_seen(tmp_path: Path, name: str) -> None:
    write(tmp_path, DOCUMENTS)
    np.save(tmp_path / f"{name}.npy", np.arange(7, dtype=np.int32 if name == "ids" else np.int64))
    content = json.loads((tmp_path / "report.json").read_text())
    content["bytes"][name] = (tmp_path / f"{name}.npy").stat().st_size
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(DamagedEntryError, match="do not fit"):
        TokenTable(tmp_path)


def test_another_type_is_seen(tmp_path: Path) -> None:
    write(tmp_path, DOCUMENTS)
    np.save(tmp_path / "ids.npy", np.arange(2, dtype=np.int64))
    content = json.loads((tmp_path / "report.json").read_text())
    content["bytes"]["ids"] = (tmp_path / "ids.npy").stat().st_size
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(DamagedEntryError, match="not one-dimensional of int32"):
        TokenTable(tmp_path)


def test_files_of_an_unfinished_table_are_seen(tmp_path: Path) -> None:
    with TableWriter(tmp_path) as writer:
        writer.add(np.array([1], dtype=np.int32), np.array([True]), 0, "x")
    with pytest.raises(DamagedEntryError):
        TokenTable(tmp_path)


def test_reports_survive_json() -> None:
    report = DataReport(
        9, 5, {"empty answer": 4}, 1, ["a:1: empty answer"], 100, 60, "pair", ["note (3 rows)"]
    )
    assert DataReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    with pytest.raises(TypeError):
        DataReport.from_json({"rows_in": 1})
