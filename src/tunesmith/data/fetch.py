"""Remote files copied into the cache, once for each version; with what is left of them where there is no network.

An entry is named by the address, without what opens it, and by the version that the server tells (ETag, time or
size), so an unchanged file is not copied again and a changed one is. It appears by one rename. What a dropped
transfer has brought lies beside it, under the same name, and the next one goes on there. A small file remembers which
entry an address had last: without a network that one is used, and said.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from tunesmith.contracts.errors import StorageError
from tunesmith.contracts.sizes import file_size
from tunesmith.data.cache import DamagedEntryError, cache_folder, content_key, obtain
from tunesmith.data.readers import suffix_of
from tunesmith.data.remote import Remote, RemoteStream, Tell, UnreachableError, Version, persist

_BLOCK = 1 << 20
_SPARE = 256 << 20
"""Bytes that a copy leaves free on the disk."""
_TELL_EVERY = 0.5
"""Seconds between two lines of progress."""
_ABANDONED_AFTER = 7 * 24 * 3600.0
_ROOM = "Free some space, put the cache elsewhere with TUNESMITH_CACHE, or set data.streaming: true."


def fetch(remote: Remote, tell: Tell | None = None) -> Path:
    """The local copy of a remote file, copied first where this version is not there.

    Args:
        remote: the file.
        tell: gets lines about the transfer.

    Raises:
        DataError: the file is not there, may not be read, or cannot be reached and there is no copy.
        StorageError: it does not fit on the disk.
    """
    root = cache_folder("remote")
    note = root / f"{content_key({'address': remote.identity})}.json"
    try:
        version = persist(remote.version, remote.label)
    except UnreachableError as error:
        kept = _last_copy(root, note, remote)
        if kept is None:
            raise
        path, day = kept
        if tell is not None:
            tell(f"note: {error.message} The copy of {day} is used.", True)
        return path
    # where not even the size is told nobody knows whether the file has changed, so each copy is one of its own
    tag = version.tag or (uuid.uuid4().hex if version.size is None else f"{version.size} bytes")
    key = content_key({"address": remote.identity, "tag": tag})

    def build(folder: Path) -> None:
        _copy(remote, version, root / f".part-{key}", folder, tell)

    path = obtain(root, key, build, lambda folder: _load(folder, remote))
    _remember(note, path.parent)
    return path


def _load(folder: Path, remote: Remote) -> Path:
    """The file of an entry.

    Raises:
        DamagedEntryError: it is missing or has another size than was written.
    """
    try:
        size = json.loads((folder / "about.json").read_text(encoding="utf-8"))["size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedEntryError(str(folder)) from error
    path = folder / f"data{suffix_of(remote.name)}"
    if not path.is_file() or path.stat().st_size != size:
        raise DamagedEntryError(str(path))
    return path


def _last_copy(root: Path, note: Path, remote: Remote) -> tuple[Path, str] | None:
    try:
        last = json.loads(note.read_text(encoding="utf-8"))
        return _load(root / last["entry"], remote), str(last["day"])
    except (OSError, ValueError, KeyError, TypeError, DamagedEntryError):
        return None


def _remember(note: Path, entry: Path) -> None:
    """Write down which entry an address has, and remove the one that it had before."""
    try:
        before = json.loads(note.read_text(encoding="utf-8"))["entry"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    text = json.dumps({"entry": entry.name, "day": date.today().isoformat()})
    with contextlib.suppress(OSError):  # a cache that cannot be written has lent a temporary folder
        temporary = note.with_name(f".{note.name}-{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(note)
        if before not in (None, entry.name):
            shutil.rmtree(note.parent / str(before), ignore_errors=True)


def _copy(remote: Remote, version: Version, part: Path, folder: Path, tell: Tell | None) -> None:
    """Copy the file into an empty folder of the cache, from where an earlier transfer was cut off."""
    target = folder / f"data{suffix_of(remote.name)}"
    _sweep(part.parent)
    with contextlib.suppress(OSError):  # one rename, so that of two processes one alone goes on with it
        part.rename(target)
    try:
        with target.open("ab") as file:
            at = file.tell()
            _check_room(remote, version, at, folder)
            for block in _blocks(remote, version, at, tell):
                file.write(block)
    except BaseException as error:
        if version.size is not None and version.tag:  # without a tag the rest may be that of another version
            with contextlib.suppress(OSError):
                target.rename(part)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"The disk of the cache {folder.parent} is full.", hint=_ROOM) from error
        raise
    size = target.stat().st_size
    (folder / "about.json").write_text(json.dumps({"size": size, "address": remote.label}), encoding="utf-8")


def _blocks(remote: Remote, version: Version, at: int, tell: Tell | None) -> Iterator[bytes]:
    whole = f" of {file_size(version.size)}" if version.size is not None else ""
    if tell is not None:
        size = f" ({file_size(version.size)})" if version.size is not None else ""
        tell(f"downloading {remote.label}{size}{f', going on at {file_size(at)}' if at else ''}", True)
    told = time.monotonic()
    with RemoteStream(remote, version, at) as stream:
        while block := stream.read(_BLOCK):
            yield block
            at += len(block)
            if tell is not None and time.monotonic() - told >= _TELL_EVERY:
                told = time.monotonic()
                tell(f"downloading {remote.label}: {file_size(at)}{whole}", False)


def _check_room(remote: Remote, version: Version, at: int, folder: Path) -> None:
    if version.size is None:
        return
    free = shutil.disk_usage(folder).free
    if version.size - at > free - _SPARE:
        raise StorageError(
            f"{remote.label} has {file_size(version.size)}, and the disk of the cache {folder.parent} has"
            f" {file_size(free)} free.",
            hint=_ROOM,
        )


def _sweep(root: Path) -> None:
    """Remove what was cut off long ago and nobody went on with."""
    for part in root.glob(".part-*"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > _ABANDONED_AFTER:
                part.unlink()
