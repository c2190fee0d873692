"""Sources: rows with their place, from files, folders, glob patterns and the Hugging Face hub.

A `Source` is opened once and read as often as needed; it holds no rows. Every row keeps its index in the
whole source, also under a split such as `train[10%:20%]`, and a place such as `train.jsonl:17`, so that
every later message can name it. Rejected: one `datasets.Dataset` for everything, see `readers.py`.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.contracts.errors import DataError
from tunesmith.data.columnar import read_arrow
from tunesmith.data.found import Found
from tunesmith.data.hub import HubRows, looks_like_hub_name
from tunesmith.data.readers import KINDS, READERS, Located, reader_of, suffix_of
from tunesmith.data.remote import Tell
from tunesmith.data.remote_files import RemoteFiles
from tunesmith.settings.urls import is_url

_BLOCK, _BLOCKS = 2**16, 64
"""Bytes that a stamp reads at once, and how often."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a source.

    Attributes:
        index: its number in the whole source, from 0, whatever the split.
        where: its place for people: `file:line` for text, `file:row N` for tables.
        record: its columns; None where it could not be read.
        problem: why it could not be read; None where it could.
    """

    index: int
    where: str
    record: dict[str, Any] | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class Part:
    """A slice of rows as `datasets` writes it, such as `[10%:20%]`; an end may be negative or missing."""

    start: str | None = None
    stop: str | None = None

    def bounds(self, count: Callable[[], int]) -> tuple[int, int | None]:
        """First row and the row behind the last one; None is the end. `count` is called only if needed."""
        return self._resolve(self.start, count) or 0, self._resolve(self.stop, count)

    @staticmethod
    def _resolve(end: str | None, count: Callable[[], int]) -> int | None:
        if end is None:
            return None
        # a percentage means the nearest row, so that neighbouring slices share an end
        position = round(int(end[:-1]) * count() / 100) if end.endswith("%") else int(end)
        if end.startswith("-"):
            position += count()
        return max(0, position)


_SPLIT = re.compile(r"(?P<name>[\w.-]*)(\[\s*(?P<start>-?\d+%?)?\s*:\s*(?P<stop>-?\d+%?)?\s*\])?")


def parse_split(split: str | None) -> tuple[str | None, Part]:
    """Name (None where none is given) and slice of a split such as `train[:1000]` or `[5:]`.

    Raises:
        DataError: where it is not in this notation.
    """
    match = _SPLIT.fullmatch((split or "").strip())
    if match is None:
        raise DataError(
            f"The split {split!r} cannot be understood.",
            hint="Write a name and a slice, such as train, train[:1000], train[10%:20%] or [5:].",
        )
    return match["name"] or None, Part(match["start"], match["stop"])


@dataclass(frozen=True)
class Source:
    """Rows that can be read again and again.

    Attributes:
        label: what the user wrote, for reports.
        selection: configuration, split and revision as the user wrote them; with the fingerprint and the
            label it names the rows.
        part: the slice of the rows that is read.
        read: starts reading at the first row.
        digest: computes the fingerprint.
        signs: what tells a change without reading everything; see `stamp`.
        read_from: starts reading at a later row, where that costs less than reading up to it.
        is_local: files that are there, so that several processes can read them at once.
    """

    label: str
    selection: str
    part: Part
    read: Callable[[], Iterator[Found]]
    digest: Callable[[], str]
    signs: Callable[[], str] = lambda: ""
    read_from: Callable[[int], Iterator[Found]] | None = None
    is_local: bool = False

    def rows(self, at: int = 0) -> Iterator[Row]:
        """The rows of the split, in order; one that cannot be read has a problem instead of a record.

        Args:
            at: index in the whole source of the first row that is wanted; earlier ones are passed over.

        Raises:
            DataError: where the split holds no row, or the source is damaged so that rows cannot be located.
        """
        start, stop = self.part.bounds(self._count)
        first = max(start, at)
        found = islice(self.read(), first, stop) if self.read_from is None else self.read_from(first)
        empty = first == start
        for index, (where, record, problem) in enumerate(found, start=first):
            empty = False
            yield Row(index, where, record, problem)
        if empty:
            raise self._no_rows()

    def fingerprint(self) -> str:
        """SHA-256 over the bytes of all files, or the fingerprint of the hub data set."""
        return self.digest()

    def stamp(self) -> str:
        """Names, sizes and samples of the files, or the data set's name: what a stream knows of its data.

        A fingerprint would read everything before the first step.
        """
        return self.signs()

    def _count(self) -> int:
        return sum(1 for _ in self.read())

    def _no_rows(self) -> DataError:
        count = self._count()
        if count == 0:
            return DataError(f"{self.label} holds no rows.", hint="Check that it is the file you meant.")
        return DataError(f"The split {self.selection} takes none of the {count} rows of {self.label}.")


def open_source(
    path: str | Path,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    tell: Tell | None = None,
) -> Source:
    """Open a file, a folder, a glob pattern, an address or a Hugging Face data set for reading.

    Args:
        path: a file of a kind in `READERS`; a folder of files of one kind; a folder written by
            `datasets.save_to_disk`; a glob pattern; an address that begins with `https://` or `s3://`; or, where
            nothing local has that name, a hub id.
        split: name and slice, such as `train`, `train[:1000]`, `train[10%:20%]`, `[5:]`, `[-100:]`.
        name: configuration of a hub data set.
        revision: branch, tag or commit of a hub data set.
        streaming: read what lies elsewhere as it comes, without downloading it first; files always are read so.
        tell: gets lines about downloads from addresses.

    Raises:
        DataError: where nothing has that name, or the kind of file is unknown.
    """
    label = str(path)
    if is_url(label):
        return _open_remote(RemoteFiles(label, streaming=streaming, tell=tell), split, is_local=not streaming)
    local = Path(label).expanduser()
    split_name, part = parse_split(split)
    selection = json.dumps([split, name, revision])
    if local.exists() or any(mark in label for mark in "*?["):
        files = _find_files(local, label, split_name)
        return Source(
            label,
            split or selection,
            part,
            lambda: _read_all(files),
            lambda: _hash_all(files),
            lambda: _stamp_all(files),
            is_local=True,
        )
    mistyped = bool(local.suffix) and bool(_near(local))  # `rows.jsno` beside `rows.jsonl`
    if not looks_like_hub_name(label) or suffix_of(label) in READERS or mistyped:
        raise _missing(local)
    whole = split if split_name is not None else f"train{split or ''}"
    if streaming and part != Part():
        raise DataError(
            f"The split {split!r} of {label} takes a part, and a streamed hub data set has whole splits only.",
            hint="Name the split alone, such as train, or set data.streaming: false.",
        )
    hub = HubRows(label, split=whole or "train", name=name, revision=revision, streaming=streaming)
    return Source(
        label,
        selection,
        Part(),
        hub.rows,
        hub.fingerprint,
        lambda: f"{label} {selection}",
        hub.rows if streaming else None,
    )


def _open_remote(remote: RemoteFiles, split: str | None, *, is_local: bool) -> Source:
    split_name, part = parse_split(split)
    _refuse_split(split_name, remote.label)
    return Source(
        remote.label,
        split or "",
        part,
        lambda: _read_all(remote.files),
        lambda: _hash_all(remote.files),
        remote.stamp,
        is_local=is_local,
    )


def _read_all(files: Sequence[Located]) -> Iterator[Found]:
    for file in files:
        yield from file.read(file.path, file.label)


def _hash_all(files: Sequence[Located]) -> str:
    total = hashlib.sha256()
    for file in files:
        try:
            with file.path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            raise DataError(f"{file.label} cannot be read: {error.strerror or error}.") from error
        total.update(suffix_of(file.path.name).encode() + b"\0" + content)
    return total.hexdigest()


def _stamp_all(files: Sequence[Located]) -> str:
    """Labels and sizes of the files, and a hash of blocks spread over each: of small files it covers every byte."""
    found = []
    for file in files:
        digest = hashlib.sha256()
        try:
            with file.path.open("rb") as stream:
                size = stream.seek(0, io.SEEK_END)
                last, between = max(0, size - _BLOCK), _BLOCKS - 1
                for start in sorted({last * n // between for n in range(_BLOCKS)}):
                    stream.seek(start)
                    digest.update(stream.read(_BLOCK))
        except OSError as error:
            raise DataError(f"{file.label} cannot be read: {error.strerror or error}.") from error
        found.append([file.label, size, digest.hexdigest()])
    return json.dumps(found)


def _find_files(local: Path, label: str, split_name: str | None) -> list[Located]:
    if local.is_dir():
        if (local / "dataset_dict.json").is_file():
            return _saved_dict(local, label, split_name)
        if (local / "state.json").is_file():
            _refuse_split(split_name, label)
            return _saved_files(local, label)
        return _folder_files(local, label, split_name)
    _refuse_split(split_name, label)
    if local.exists():
        return [_file(local, label)]
    found = [Path(match) for match in sorted(glob.glob(str(local), recursive=True))]  # noqa: PTH207 absolute too
    files = [_file(match, str(match)) for match in found if match.is_file()]
    if not files:
        raise DataError(
            f"No file matches the pattern {label} (from {Path.cwd()}).",
            hint="Check the folder and the suffix.",
        )
    return files


def _file(path: Path, label: str) -> Located:
    return Located(path, label, reader_of(path, label))


def _refuse_split(split_name: str | None, label: str, known: tuple[str, ...] = ("train",)) -> None:
    if split_name is not None and split_name not in known:
        raise DataError(
            f"{label} has no split {split_name!r}; it has {', '.join(known)}.",
            hint="Leave the name out, or name one that is there.",
        )


_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

_SPLIT_OF_NAME = {"train": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev", "eval"), "validation"
)
"""First word of a file's name and the split that it holds, as in `train-00000-of-00002.parquet`."""


def _split_of(path: Path) -> str | None:
    return _SPLIT_OF_NAME.get(re.split(r"[-_.]", path.name.lower())[0])


def _folder_files(folder: Path, label: str, split_name: str | None) -> list[Located]:
    """Files of one kind in the folder and below; those of one split where their names tell splits."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if suffix_of(path) in READERS
        and path.name not in _METADATA
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise DataError(
            f"The folder {folder.absolute()} holds no file of a kind that can be read.",
            hint=KINDS,
        )
    splits = {path: _split_of(path) for path in paths}
    if any(splits.values()):
        wanted = _SPLIT_OF_NAME.get(split_name or "train", split_name)
        known = tuple(sorted({found for found in splits.values() if found}))
        _refuse_split(wanted, label, known)
        paths = [path for path in paths if splits[path] == wanted]
    else:
        _refuse_split(split_name, label)
    kinds = sorted({suffix_of(path) for path in paths})
    if len(kinds) > 1:
        raise DataError(
            f"The folder {label} holds files of several kinds: {', '.join(kinds)}.",
            hint=f"Choose one with a pattern, such as {label.rstrip('/')}/*{kinds[0]}.",
        )
    return [_file(path, f"{label.rstrip('/')}/{path.relative_to(folder)}") for path in paths]


def _saved_dict(folder: Path, label: str, split_name: str | None) -> list[Located]:
    splits = _read_metadata(folder / "dataset_dict.json", "splits")
    wanted = split_name or "train"
    _refuse_split(wanted, label, tuple(str(split) for split in splits))
    return _saved_files(folder / wanted, f"{label.rstrip('/')}/{wanted}")


def _saved_files(folder: Path, label: str) -> list[Located]:
    """The Arrow files of a folder written by `datasets.save_to_disk`, in their order."""
    names = [entry["filename"] for entry in _read_metadata(folder / "state.json", "_data_files")]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{label} is incomplete: its file {missing[0]} is missing.", hint="Save it again.")
    return [Located(folder / name, f"{label.rstrip('/')}/{name}", read_arrow) for name in names]


def _read_metadata(path: Path, key: str) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not what `datasets.save_to_disk` writes.", hint="Save it again."
        ) from error
    return list(found)


def _near(path: Path) -> list[str]:
    """The name in the folder of `path` that is most like it, if one is."""
    folder = path.absolute().parent
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)


def _missing(path: Path) -> DataError:
    """The error for a path that leads nowhere, with the nearest name that exists."""
    absolute = path.absolute()
    folder = absolute.parent
    if not folder.is_dir():
        return DataError(
            f"There is no file {absolute}: the folder {folder} does not exist.",
            hint=f"Relative paths start at the current directory, {Path.cwd()}.",
        )
    nearest = _near(absolute)
    hint = f"The nearest name there is {nearest[0]}." if nearest else f"{folder} holds no similar name."
    return DataError(f"There is no file {absolute}.", hint=hint)
