"""The files behind an address: which there are, of what kind, and where a reader finds them.

A run reads local copies (`fetch`); a streamed run reads from the server, but for Arrow files, which are mapped into
memory, and Parquet files of a server without byte ranges, whose columns lie all over the file.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

from tunesmith.contracts.errors import DataError
from tunesmith.data.cache import content_key
from tunesmith.data.fetch import fetch
from tunesmith.data.readers import KINDS, Located, Reader, reader_of, suffix_of
from tunesmith.data.remote import Remote, RemoteFile, Tell, Version, persist
from tunesmith.data.s3 import S3File, match_pattern
from tunesmith.data.web import WebFile
from tunesmith.settings.urls import shown

_INSTEAD = {
    "file": "Write the path itself, such as data/rows.jsonl.",
    "hf": "Write the id of the data set, such as org/name.",
    "s3a": "Write s3:// in its place.",
    "s3n": "Write s3:// in its place.",
}
"""What to write in place of addresses that have another form here."""


class RemoteFiles:
    """The files at an address; nothing is asked of a server before they are wanted.

    Args:
        url: `https://host/rows.jsonl`, `s3://bucket/rows.jsonl` or a pattern such as `s3://bucket/rows-*.jsonl`.
        streaming: read them where they are.
        tell: gets lines about transfers.

    Raises:
        DataError: it is no such address, or the kind of file is unknown.
    """

    def __init__(self, url: str, *, streaming: bool = False, tell: Tell | None = None) -> None:
        self._url, self._streaming, self._tell = url, streaming, tell
        self.label = shown(url)
        scheme = url.partition("://")[0].lower()
        self._pattern = scheme == "s3" and any(mark in url for mark in "*?[")
        if scheme not in ("https", "http", "s3"):
            raise DataError(
                f"{self.label} cannot be read: addresses begin with https:// or s3://.",
                hint=_INSTEAD.get(scheme, "Download it, and name the local file."),
            )
        if not self._pattern:
            remote = self._remote(url)
            _reader(remote.name, remote.label)

    def _remote(self, url: str) -> Remote:
        remote: Remote = S3File(url) if url.lower().startswith("s3") else WebFile(url)
        if not isinstance(remote, S3File) and "*" in remote.name:
            raise DataError(
                f"{remote.label} is a pattern, and a web server does not tell which files it has.",
                hint="Name each file as a source of its own.",
            )
        return remote

    @cached_property
    def _found(self) -> list[tuple[Remote, Reader]]:
        remotes = [self._remote(url) for url in (match_pattern(self._url) if self._pattern else [self._url])]
        return [(remote, _reader(remote.name, remote.label)) for remote in remotes]

    @cached_property
    def _versions(self) -> list[Version]:
        return [persist(remote.version, remote.label) for remote, _ in self._found]

    @cached_property
    def files(self) -> list[Located]:
        """The files in the order of their names, copied first unless they are streamed.

        Raises:
            DataError: one is not there, may not be read or cannot be reached.
            StorageError: the disk is full.
        """
        if not self._streaming:
            return [Located(fetch(remote, self._tell), remote.label, read) for remote, read in self._found]
        return [
            Located(self._in_place(remote, version), remote.label, read)
            for (remote, read), version in zip(self._found, self._versions, strict=True)
        ]

    def _in_place(self, remote: Remote, version: Version) -> Path | RemoteFile:
        kind = suffix_of(remote.name)
        seekable = version.ranges and version.size is not None
        if kind == ".arrow" or (kind == ".parquet" and not seekable):
            return fetch(remote, self._tell)
        return RemoteFile(remote, version)

    def stamp(self) -> str:
        """Addresses and versions, for which no file is read."""
        versions = zip(self._found, self._versions, strict=True)
        return json.dumps([[content_key({"address": r.identity}), v.tag, v.size] for (r, _), v in versions])


def _reader(name: str, label: str) -> Reader:
    folder = label.startswith("s3") and not suffix_of(name)
    hint = f"Of a folder write a pattern, such as {label.rstrip('/')}/*.jsonl." if folder else KINDS
    return reader_of(name, label, hint=hint)
