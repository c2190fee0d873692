"""`TokenTable`: the tokens of a source, mapped from disk; `DataReport`: what became of its rows.

Documents lie one behind the other in flat arrays, with the position where each starts; opening a table of any
size costs a few system calls, and processes on one machine share its pages. Rejected: Arrow tables. They hand
out Python lists or copies, and we need a few arrays of fixed type and no schema.

    ids.npy      int32 [T]       tokens of all documents
    trained.npy  bool  [T]       whether the token is a target
    starts.npy   int64 [N + 1]   where each document starts in them; the last entry is T
    rows.npy     int64 [N]       index of the row in its source
    joined.npy   bool  [N]       whether the document belongs to the group of the one before it, as in a pair
    where.npy    uint8 [B]       places of the rows as UTF-8, one behind the other
    places.npy   int64 [N + 1]   where each place starts in it; the last entry is B
    report.json                  the report, the largest token, and the size of every file in bytes
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tunesmith.data.cache import DamagedEntryError

_REPORT = "report.json"
_AT_ONCE = 64
"""Documents that are written together: seven small writes for each took as long as its mask."""
_DTYPES: dict[str, DTypeLike] = {
    "ids": np.int32,
    "trained": np.bool_,
    "starts": np.int64,
    "rows": np.int64,
    "joined": np.bool_,
    "where": np.uint8,
    "places": np.int64,
}


@dataclass
class DataReport:
    """What became of the rows of a source. Always `rows_in == rows_kept + sum(dropped.values())`.

    Attributes:
        rows_in: rows read.
        rows_kept: rows that train.
        dropped: number of rows left out, by reason.
        truncated: rows kept, but cut at the sequence length.
        examples: `place: reason` of some rows that were dropped or cut.
        tokens: tokens of the rows kept.
        trained_tokens: those of them that are targets.
        format: name of the format the rows were read in.
        notes: remarks with the number of rows they concern.
    """

    rows_in: int = 0
    rows_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    examples: list[str] = field(default_factory=list)
    tokens: int = 0
    trained_tokens: int = 0
    format: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DataReport:
        """The inverse of `to_json`; a missing or unknown name raises `TypeError`."""
        if set(values) != {entry.name for entry in fields(cls)}:
            raise TypeError("not the fields of a data report")
        return cls(**values)


class _ArrayFile:
    """A one-dimensional `.npy` file that grows; its header gets the final length when it is closed."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self._stream: IO[bytes] = path.open("w+b")
        self._dtype = np.dtype(dtype)
        self._count = 0
        self._write_header()
        self._data_start = self._stream.tell()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._count,),
        }
        np.lib.format.write_array_header_1_0(self._stream, header)

    def append(self, values: NDArray[Any]) -> None:
        self._stream.write(np.ascontiguousarray(values, dtype=self._dtype).tobytes())
        self._count += len(values)

    def finish(self) -> None:
        self._stream.seek(0)
        self._write_header()
        # numpy leaves room in a header for its shape to grow
        assert self._stream.tell() == self._data_start, "the header changed its length"
        self._stream.close()

    def close(self) -> None:
        self._stream.close()


class TableWriter:
    """Writes the files of a table, document by document; a context manager that closes them.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: _ArrayFile(folder / f"{name}.npy", dtype) for name, dtype in _DTYPES.items()}
        self._largest = -1
        self._ids: list[NDArray[np.int32]] = []
        self._trained: list[NDArray[np.bool_]] = []
        self._documents: list[tuple[int, bool]] = []
        self._where: list[bytes] = []
        self._ends = {"starts": 0, "places": 0}
        for name in self._ends:
            self._files[name].append(np.array([0]))

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def add(
        self,
        ids: NDArray[np.int32],
        trained: NDArray[np.bool_],
        row: int,
        where: str,
        *,
        joined: bool = False,
    ) -> None:
        """Append a document.

        Args:
            ids: tokens, `[T]`.
            trained: which of them are targets, `[T]`.
            row: index of its row in the source.
            where: place of its row.
            joined: it belongs with the document before it: they are drawn, packed and held out together.
        """
        assert len(ids) == len(trained)
        self._ids.append(ids)
        self._trained.append(trained)
        self._documents.append((row, joined))
        self._where.append(where.encode("utf-8", errors="replace"))
        if len(self._ids) == _AT_ONCE:
            self._write()

    def _write(self) -> None:
        """Write the documents that wait."""
        if not self._ids:
            return
        ids_T = np.concatenate(self._ids)
        rows, joined = zip(*self._documents, strict=True)
        self._largest = max(self._largest, int(ids_T.max(initial=-1)))
        self._files["ids"].append(ids_T)
        self._files["trained"].append(np.concatenate(self._trained))
        self._files["rows"].append(np.array(rows))
        self._files["joined"].append(np.array(joined))
        self._files["where"].append(np.frombuffer(b"".join(self._where), dtype=np.uint8))
        ends = {"starts": list(map(len, self._ids)), "places": list(map(len, self._where))}
        for name, lengths in ends.items():
            ends_N = self._ends[name] + np.cumsum(lengths, dtype=np.int64)
            self._files[name].append(ends_N)
            self._ends[name] = int(ends_N[-1])
        self._ids, self._trained, self._documents, self._where = [], [], [], []

    def finish(self, report: DataReport) -> None:
        """Write what waits, the headers and the report."""
        self._write()
        for file in self._files.values():
            file.finish()
        sizes = {name: (self._folder / f"{name}.npy").stat().st_size for name in self._files}
        content = json.dumps({"report": report.to_json(), "largest": self._largest, "bytes": sizes}, indent=2)
        (self._folder / _REPORT).write_text(content, encoding="utf-8")


class TokenTable:
    """The tokenised rows of one source, read from disk as they are asked for.

    Args:
        folder: a folder that `TableWriter` has finished.

    Attributes:
        largest: the highest token of all documents, -1 where there are none.
        report: what became of the rows.

    Raises:
        DamagedEntryError: where files are missing or do not fit each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sizes, self.largest, self.report = _read_report(folder)
        arrays = {name: _map_array(folder, name, sizes.get(name)) for name in _DTYPES}
        self._ids, self._trained = arrays["ids"], arrays["trained"]
        self._starts, self._rows, self._joined = arrays["starts"], arrays["rows"], arrays["joined"]
        self._where, self._places = arrays["where"], arrays["places"]
        self._check()
        self._lengths = np.diff(self._starts)

    def _check(self) -> None:
        count = len(self._rows)
        consistent = (
            len(self._starts) == len(self._places) == len(self._joined) + 1 == count + 1
            and self._starts[0] == self._places[0] == 0
            and self._starts[-1] == len(self._ids) == len(self._trained) == self.report.tokens
            and self._places[-1] == len(self._where)
            and bool(np.all(np.diff(self._starts) > 0))
            and bool(np.all(np.diff(self._places) >= 0))
            and (self.report.rows_kept == 0) == (count == 0)
        )
        if not consistent:
            raise DamagedEntryError(f"{self.folder}: the arrays do not fit each other")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 `[N]`, tokens of each document."""
        return self._lengths

    @property
    def groups(self) -> NDArray[np.int64]:
        """int64 `[N]`, a number that documents of one group share; groups lie one behind the other."""
        return np.cumsum(~self._joined, dtype=np.int64)

    @property
    def rows(self) -> NDArray[np.int64]:
        """int64 `[N]`, the index in its source of the row behind each document; a read-only view of the file."""
        return self._rows

    def ids(self, index: int) -> NDArray[np.int32]:
        """int32 `[T]`, the tokens of a document; a read-only view of the file."""
        return self._ids[self._starts[index] : self._starts[index + 1]]

    def trained(self, index: int) -> NDArray[np.bool_]:
        """bool `[T]`, whether each token of a document is a target; a read-only view of the file."""
        return self._trained[self._starts[index] : self._starts[index + 1]]

    def row(self, index: int) -> int:
        """The index in its source of the row behind a document."""
        return int(self._rows[index])

    def where(self, index: int) -> str:
        """The place of the row behind a document, such as `train.jsonl:17`."""
        return self._where[self._places[index] : self._places[index + 1]].tobytes().decode("utf-8")


def _read_report(folder: Path) -> tuple[dict[str, Any], int, DataReport]:
    try:
        content = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        return dict(content["bytes"]), int(content["largest"]), DataReport.from_json(content["report"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedEntryError(f"{folder}: the report cannot be read ({error})") from error


def _map_array(folder: Path, name: str, size: object) -> NDArray[Any]:
    path = folder / f"{name}.npy"
    try:
        if path.stat().st_size != size:
            raise DamagedEntryError(f"{path} has not the size that it was written with")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DamagedEntryError(f"{path} cannot be read ({error})") from error
    if array.ndim != 1 or array.dtype != np.dtype(_DTYPES[name]):
        raise DamagedEntryError(f"{path} is not one-dimensional of {np.dtype(_DTYPES[name])}")
    return np.asarray(array)
