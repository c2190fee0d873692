"""Readers of text files: places, problem rows, and no row that breaks the rest of a file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.contracts.errors import DataError
from tunesmith.data.found import Found
from tunesmith.data.readers import READERS, suffix_of


def read(tmp_path: Path, name: str, content: bytes | str) -> list[Found]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(READERS[suffix_of(path)](path, name))


# ---- lines ------------------------------------------------------------------------------------------------


def test_json_lines_name_their_line_and_skip_blank_ones(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.jsonl", '\n{"a": 1}\r\n  \n{"a": "ü\\u2028\u2028"}')
    assert rows == [Found("a.jsonl:2", {"a": 1}), Found("a.jsonl:4", {"a": "ü\u2028\u2028"})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"a": "x\xff"}', "line is not valid UTF-8 (byte 0xff at column 9)"),
        (b'{"a": 1,}', "invalid JSON at column"),
        (b'{"a": ', "invalid JSON at column 7"),
        (b"[1, 2]", "row is a list, not an object"),
        (b"12", "row is a number, not an object"),
        (b"null", "row is null, not an object"),
        (b"true", "row is a boolean, not an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "invalid JSON: "),
        (b"\xff\xfe{\x00", "byte 0xff at column 1"),
    ],
)
def test_a_bad_line_is_a_problem_and_the_next_one_is_read(tmp_path: Path, line: bytes, problem: str) -> None:
    bad, good = read(tmp_path, "a.jsonl", line + b'\n{"a": 2}\n')
    assert bad.record is None
    assert problem in (bad.problem or "")
    assert good == Found("a.jsonl:2", {"a": 2})


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200) | st.text('{}[]",:\\ntrue1 \n', max_size=60).map(str.encode))
def test_json_lines_never_raise_and_account_for_every_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    rows = read(tmp_path_factory.mktemp("fuzz"), "a.jsonl", content)
    assert all((row.record is None) != (row.problem is None) for row in rows)
    lines = [int(row.where.partition(":")[2]) for row in rows]
    assert lines == sorted(set(lines))
    filled = [line for line in content.split(b"\n") if line.strip(b" \t\r\v\f\x1c\x1d\x1e\x1f")]
    assert len(rows) <= len(filled)


@settings(max_examples=50, deadline=None)
@given(records=st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.none()), max_size=8))
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, object]]
) -> None:
    folder = tmp_path_factory.mktemp("roundtrip")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    assert [row.record for row in read(folder, "a.jsonl", lines)] == records
    if records:
        array = json.dumps(records, indent=2)
        rows = read(folder, "a.json", array)
        assert [row.record for row in rows] == records
        assert all(
            array.splitlines()[int(r.where.partition(":")[2]) - 1].lstrip().startswith("{") for r in rows
        )


def test_text_lines_are_rows(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.txt", b"\xef\xbb\xbfone \n\n\xff\ntwo")
    assert [(row.where, row.record) for row in rows] == [
        ("a.txt:1", {"text": "one "}),
        ("a.txt:3", None),
        ("a.txt:4", {"text": "two"}),
    ]


@pytest.mark.parametrize("name", ["long.jsonl", "long.json"])
def test_a_row_of_ten_megabytes(tmp_path: Path, name: str) -> None:
    text = "x" * 10_000_000
    record = json.dumps({"text": text})
    content = f"[{record},\n{record}]" if name.endswith(".json") else f"{record}\n{record}"
    rows = read(tmp_path, name, content)
    assert [row.record == {"text": text} for row in rows] == [True, True]
    assert rows[1].where == f"{name}:2"


# ---- JSON documents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "places"),
    [
        ('[{"a": 1},\n {"a": 2}]', [1, 2]),
        ('\n\n[\n{"a":\n1}, {"a": 2}\n]\n', [4, 5]),
        ('{"version": 2,\n "data": [\n  {"a": 1},\n  {"a": 2}]}', [3, 4]),
        ('{"data": {"rows": 1}, "rows":\n[{"a": 1}, {"a": 2}]}', [2, 2]),
        ('{"items": [{"a": 1},\n{"a": 2}]}', [1, 2]),
        ('{"a": 1}\n{"a": 2}\n', [1, 2]),
    ],
)
def test_json_documents_name_the_line_of_each_row(tmp_path: Path, content: str, places: list[int]) -> None:
    rows = read(tmp_path, "a.json", content)
    assert rows == [Found(f"a.json:{line}", {"a": n}) for n, line in enumerate(places, start=1)]


def test_a_single_object_is_a_row(tmp_path: Path) -> None:
    for content in ('{"messages": [{"role": "user"}]}', '{"a": [1, 2]}', '{"a": {"b": 1},\n "c": 2}'):
        assert read(tmp_path, "a.json", content) == [Found("a.json:1", json.loads(content))]


def test_json_array_keeps_what_can_be_located(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.json", b'[{"a": "\xff"},\n 3,\n {"a": "\\udc80"}]')
    assert rows[0].problem == "line is not valid UTF-8 (byte 0xff at column 9)"
    assert rows[1].problem == "row is a number, not an object"
    assert rows[2].record == {"a": "\udc80"}, "an escape is not a bad byte"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('[{"a": 1},\n {"a": }]', "line 2, column 8"),
        ('[{"a": 1}\n {"a": 2}]', "line 2, column 2"),
        ('[{"a": 1},\n', "line 2, column 1"),
        ('[{"a": 1}]\n]', "line 2, column 1"),
        ('{\n"a": 1,\n"b" 2}', "line 3, column 5"),
        ("12", "line 1, column 1"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_a_broken_document_names_line_and_column(tmp_path: Path, content: str, place: str) -> None:
    with pytest.raises(DataError, match=place):
        read(tmp_path, "a.json", content)


def test_json_lines_in_a_json_file_survive_a_bad_line(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.json", '{"a": }\n{"a": 2}\n')
    assert [row.record for row in rows] == [None, {"a": 2}]


# ---- tables -----------------------------------------------------------------------------------------------


def test_csv_names_the_line_where_a_row_starts(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.csv", '\ufeffa,b\n1,"x\ny"\n2,z\n\n3\n4,5,6\n"7" 8,9\n10,11\n')
    assert [(row.where, row.record) for row in rows] == [
        ("a.csv:2", {"a": "1", "b": "x\ny"}),
        ("a.csv:4", {"a": "2", "b": "z"}),
        ("a.csv:6", None),
        ("a.csv:7", None),
        ("a.csv:8", None),
        ("a.csv:9", {"a": "10", "b": "11"}),
    ]
    assert [row.problem for row in rows[2:4]] == [
        "row has 1 fields, the header names 2",
        "row has 3 fields, the header names 2",
    ]


def test_csv_with_an_open_quote_does_not_swallow_rows_in_silence(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.csv", 'a,b\n1,2\n3,"open\n5,6\n')
    assert rows[0].record == {"a": "1", "b": "2"}
    assert [row.record for row in rows[1:]] == [None]


def test_tsv_bad_bytes_and_long_fields(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.tsv", b"a\tb\n1\t\xff\n2\t" + b"y" * 1_000_000 + b"\n")
    assert rows[0].problem == "column 'b' is not valid UTF-8 (byte 0xff)"
    assert rows[1].record == {"a": "2", "b": "y" * 1_000_000}


def test_csv_header_names_a_column_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'a' more than once"):
        read(tmp_path, "a.csv", "a,a\n1,2\n")


# ---- zipped -----------------------------------------------------------------------------------------------


def test_zipped_files_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, "a.jsonl.gz", gzip.compress(b'{"a": 1}\n')) == [Found("a.jsonl.gz:1", {"a": 1})]
    assert read(tmp_path, "A.CSV.GZ", gzip.compress(b"a\n1\n")) == [Found("A.CSV.GZ:2", {"a": "1"})]


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b'{"a": 1}\n' * 9999)[:-20]])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is not a complete gzip file"):
        read(tmp_path, "a.jsonl.gz", content)
