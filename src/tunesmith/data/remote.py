"""Files that lie elsewhere: opened at any byte, read through dropped connections, and told apart by their version.

A `Remote` is a file at an address; `web.py` and `s3.py` know how to open one. `RemoteStream` reads it as one file: it
begins again where a connection was lost, and refuses to go on in another version of the file. `fetch.py` copies it
into the cache with the same stream, and a streamed run reads from it without a copy.

Rejected: fsspec's file system for the web, which needs two HTTP clients that nothing else here needs, and its caches,
which begin again where a transfer was cut off.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import IO, Any, Literal, NamedTuple, Protocol, TypeVar

from tunesmith.contracts.errors import DataError

Result = TypeVar("Result")

Tell = Callable[[str, bool], None]
"""Called with a line for people, and whether it is to stay on the screen or is replaced by the next one."""

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try after a connection was lost; a try that brings bytes starts them anew."""

_BUFFER = 1 << 20


class Version(NamedTuple):
    """What a server tells of a file.

    Attributes:
        size: bytes, or None where that is not told.
        tag: changes with the content, as an ETag and a time do; empty where neither is told.
        ranges: whether it can be read from any byte on.
    """

    size: int | None
    tag: str
    ranges: bool


class UnreachableError(DataError):
    """There is no network, no such host, or nobody answers."""


class DroppedError(Exception):
    """A connection that was lost, or a server that is busy: worth another try.

    Args:
        reason: what happened, without the address.
    """


class Remote(Protocol):
    """A file at an address."""

    @property
    def label(self) -> str:
        """The address as it may be shown."""
        ...

    @property
    def name(self) -> str:
        """The last part of its path, which says what kind of file it is."""
        ...

    @property
    def identity(self) -> str:
        """The address without what opens it: the same for two links with two signatures."""
        ...

    def version(self) -> Version:
        """Ask the server what it has.

        Raises:
            DataError: the file is not there, may not be read or cannot be reached.
            DroppedError: worth another try.
        """
        ...

    def open(self, at: int, version: Version) -> IO[bytes]:
        """Its bytes from `at` on.

        Raises:
            DataError: as `version`; or the server now has another version.
            DroppedError: worth another try.
        """
        ...

    def explain(self, error: Exception) -> Exception | None:
        """What an error while reading means: a `DataError`, a `DroppedError`, or None where it is another's."""
        ...


def persist(attempt: Callable[[], Result], label: str) -> Result:
    """Try until it succeeds, waiting longer each time.

    Raises:
        UnreachableError: the last try was dropped as well.
    """
    for wait in (*WAITS, None):
        try:
            return attempt()
        except DroppedError as error:
            if wait is None:
                raise _given_up(label, error) from error
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _given_up(label: str, error: DroppedError) -> UnreachableError:
    return UnreachableError(
        f"The connection to {label} was lost again and again: {error}.",
        hint="Try again later: what has been downloaded is kept.",
    )


class RemoteStream(io.RawIOBase):
    """A remote file as one readable, seekable stream of bytes.

    Args:
        remote: the file.
        version: the version that is read.
        at: where reading begins.
    """

    def __init__(self, remote: Remote, version: Version, at: int = 0) -> None:
        self._remote, self._version, self._at = remote, version, at
        self._open: IO[bytes] | None = None
        self._failures = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """Whether reading at another place does not mean reading up to it."""
        return self._version.ranges and self._version.size is not None

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to another place; nothing is asked of the server before the next read."""
        if not self.seekable():
            raise io.UnsupportedOperation(
                "the size of the file is not known, or it can be read in one go only"
            )
        assert self._version.size is not None
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._version.size}[whence]
        place = max(0, base + offset)
        if place != self._at:
            self._hang_up()
            self._at = place
        return place

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the server has sent; 0 at the end of the file."""
        if self._version.size is not None and self._at >= self._version.size:
            return 0
        while True:
            try:
                got = self._read(memoryview(buffer))
            except (DroppedError, UnreachableError) as error:  # it could be reached a moment ago
                self._hang_up()
                if self._failures >= len(WAITS):
                    if isinstance(error, UnreachableError):
                        raise
                    raise _given_up(self._remote.label, error) from error
                time.sleep(WAITS[self._failures])
                self._failures += 1
                continue
            if got:
                self._failures = 0
            self._at += got
            return got

    def _read(self, view: memoryview) -> int:
        if self._open is None:
            self._open = self._remote.open(self._at, self._version)
        try:
            data = self._open.read(len(view))
        except Exception as error:  # the types are those of the client beneath, and `explain` knows them
            meaning = self._remote.explain(error)
            if meaning is None:
                raise
            raise meaning from error
        if not data and self._version.size is not None:
            raise DroppedError(f"it ended after {self._at:,} of {self._version.size:,} bytes")
        view[: len(data)] = data
        return len(data)

    def _hang_up(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def close(self) -> None:
        """Hang up."""
        self._hang_up()
        super().close()


class RemoteFile:
    """A remote file as a reader of rows takes it (`found.Stored`), read anew from the server at each opening.

    Args:
        remote: the file.
        version: the version that is read.
    """

    def __init__(self, remote: Remote, version: Version) -> None:
        self._remote, self._version = remote, version
        self.name = remote.name

    def open(self, mode: Literal["rb"] = "rb") -> io.BufferedReader:
        """Its bytes from the first on."""
        assert mode == "rb", "it is read, and as bytes"
        return io.BufferedReader(RemoteStream(self._remote, self._version), _BUFFER)
