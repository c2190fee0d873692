"""Opening sources: names that exist and names that do not, folders, splits and fingerprints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.contracts.errors import DataError
from tunesmith.data.sources import Source, open_source, parse_split


def write(path: Path, count: int = 10, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"n": first + n}) + "\n" for n in range(count)))
    return path


def numbers(source: Source) -> list[int]:
    return [row.record["n"] for row in source.rows() if row.record is not None]


def test_rows_can_be_read_again(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "a.jsonl", 3))
    assert numbers(source) == numbers(source) == [0, 1, 2]
    row = list(source.rows())[2]
    assert (row.index, row.where, row.problem) == (2, f"{tmp_path}/a.jsonl:3", None)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (None, range(10)),
        ("train", range(10)),
        ("train[:3]", range(3)),
        ("[7:]", range(7, 10)),
        ("train[10%:30%]", range(1, 3)),
        ("[-2:]", range(8, 10)),
        ("[:-8]", range(2)),
        ("[-30%:-10%]", range(7, 9)),
        ("[5:99]", range(5, 10)),
        ("[-99:2]", range(2)),
        ("[:]", range(10)),
    ],
)
def test_splits_take_rows_and_keep_their_index(tmp_path: Path, split: str | None, expected: range) -> None:
    source = open_source(write(tmp_path / "a.jsonl"), split=split)
    assert numbers(source) == list(expected)
    assert [row.index for row in source.rows()] == list(expected)


def test_neighbouring_percentages_share_no_row_and_lose_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 17)
    parts = [numbers(open_source(path, split=f"[{p}%:{p + 10}%]")) for p in range(0, 90, 10)]
    parts.append(numbers(open_source(path, split="[90%:]")))
    assert [n for part in parts for n in part] == list(range(17))


def test_a_split_that_takes_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 3 rows"):
        list(open_source(write(tmp_path / "a.jsonl", 3), split="[:1%]").rows())


@pytest.mark.parametrize("split", ["train[", "train[a:]", "train[1]", "[5", "a b"])
def test_a_split_that_cannot_be_understood(split: str) -> None:
    with pytest.raises(DataError, match="cannot be understood"):
        parse_split(split)


def test_a_file_has_one_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'"):
        open_source(write(tmp_path / "a.jsonl"), split="test")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError) as caught:
        open_source(tmp_path / "trian.jsonl")
    assert f"There is no file {tmp_path}/trian.jsonl" in caught.value.message
    assert "train.jsonl" in (caught.value.hint or "")
    with pytest.raises(DataError, match=f"the folder {tmp_path}/nowhere does not exist"):
        open_source(tmp_path / "nowhere" / "a.jsonl")


def test_relative_paths_start_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", 1)
    monkeypatch.chdir(tmp_path)
    assert next(open_source("a.jsonl").rows()).where == "a.jsonl:1"
    with pytest.raises(DataError, match=f"{tmp_path}/b.jsonl"):
        open_source("b.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n \n"),
        ("a.json", ""),
        ("a.json", " \n[ ]\n"),
        ("a.json", '{"data": []}'),
        ("a.csv", ""),
        ("a.csv", "a,b\n"),
        ("a.txt", "\n"),
        ("a.arrow", ""),
    ],
)
def test_an_empty_file_holds_no_rows(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="holds no rows"):
        list(open_source(tmp_path / name).rows())


def test_unknown_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(DataError, match=r"kind that cannot be read \(\.docx\)"):
        open_source(tmp_path / "a.docx")


def test_patterns_read_files_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", 2, 10)
    write(tmp_path / "a.jsonl", 2)
    source = open_source(f"{tmp_path}/*.jsonl")
    assert numbers(source) == [0, 1, 10, 11]
    assert [row.index for row in source.rows()] == [0, 1, 2, 3]
    assert list(source.rows())[2].where == f"{tmp_path}/b.jsonl:1"
    with pytest.raises(DataError, match="No file matches"):
        open_source(f"{tmp_path}/*.csv")


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    assert numbers(open_source(write(tmp_path / "a[1].jsonl", 1))) == [0]


def test_folders_of_files(tmp_path: Path) -> None:
    write(tmp_path / "d" / "one.jsonl", 1)
    write(tmp_path / "d" / "sub" / "two.jsonl", 1, 5)
    write(tmp_path / "d" / ".hidden" / "x.jsonl", 1, 9)
    (tmp_path / "d" / "README.md").write_text("about")
    source = open_source(tmp_path / "d")
    assert numbers(source) == [0, 5]
    assert list(source.rows())[1].where == f"{tmp_path}/d/sub/two.jsonl:1"
    (tmp_path / "d" / "LICENSE.txt").write_text("free")
    with pytest.raises(DataError, match=r"several kinds: \.jsonl, \.txt"):
        open_source(tmp_path / "d")
    (tmp_path / "e").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        open_source(tmp_path / "e")


def test_a_folder_never_trains_on_its_test_files(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.jsonl", 1)
    write(tmp_path / "train-00001-of-00002.jsonl", 1, 1)
    write(tmp_path / "test.jsonl", 1, 7)
    write(tmp_path / "dev.jsonl", 1, 8)
    assert numbers(open_source(tmp_path)) == [0, 1]
    assert numbers(open_source(tmp_path, split="test")) == [7]
    assert numbers(open_source(tmp_path, split="validation")) == [8]
    with pytest.raises(DataError, match="no split 'other'; it has test, train, validation"):
        open_source(tmp_path, split="other")


def test_folders_saved_by_datasets(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"n": 0, "x": {"a": 1}}, {"n": 1, "x": {"b": 2}}])
    rows.save_to_disk(str(tmp_path / "plain"), num_shards=2)
    source = open_source(tmp_path / "plain")
    assert [row.record for row in source.rows()] == [{"n": 0, "x": {"a": 1}}, {"n": 1, "x": {"b": 2}}]
    assert list(source.rows())[1].where.endswith("data-00001-of-00002.arrow:row 0")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "both"))
    assert numbers(open_source(tmp_path / "both")) == [0, 1]
    assert numbers(open_source(tmp_path / "both", split="test")) == [1]
    with pytest.raises(DataError, match="it has train, test"):
        open_source(tmp_path / "both", split="dev")
    (tmp_path / "plain" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match="is incomplete"):
        open_source(tmp_path / "plain")
    (tmp_path / "plain" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"not what `datasets\.save_to_disk` writes"):
        open_source(tmp_path / "plain")


def test_the_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 2)
    before = open_source(path).fingerprint()
    assert before == open_source(write(tmp_path / "b.jsonl", 2)).fingerprint()
    write(path, 3)
    assert before != open_source(path).fingerprint()
    write(path, 2)
    assert before == open_source(path).fingerprint()
