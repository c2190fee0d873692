"""A content-addressed folder of results: an entry is complete or it is not there.

An entry's name is a hash of everything that decides its content, so nothing is ever out of date and two
processes that build the same entry build the same bytes. It is written into a folder beside its place and
appears by one rename; a crash leaves nothing that could be mistaken for an entry. Rejected: a lock file. It
outlives a killed process, and on network file systems it often does not lock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.contracts.errors import StorageError

Loaded = TypeVar("Loaded")

_UNFINISHED = ".unfinished-"
_ABANDONED_AFTER = 24 * 3600.0


class DamagedEntryError(Exception):
    """A cache entry that is incomplete or inconsistent; it is built again."""


def cache_folder(name: str) -> Path:
    """A folder of everything that is kept between runs: `$TUNESMITH_CACHE/NAME`, or `~/.cache/tunesmith/NAME`."""
    root = os.environ.get("TUNESMITH_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "tunesmith") / name


def content_key(parts: Mapping[str, Any]) -> str:
    """SHA-256 of plain values by name, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def obtain(root: Path, key: str, build: Callable[[Path], None], load: Callable[[Path], Loaded]) -> Loaded:
    """The entry `key`, loaded; built first where it is missing or damaged.

    Args:
        root: the cache folder; made where it is missing. Where it cannot be written, a temporary folder
            takes its place, with a warning.
        key: the entry's name.
        build: writes the entry's files into an empty folder.
        load: opens an entry; raises `DamagedEntryError` where it is not intact.

    Raises:
        StorageError: where the disk is full. Whatever `build` raises goes through, and leaves nothing.
    """
    target = root / key
    present = _try(load, target)
    if present is not None:
        return present
    scratch = _scratch(root)
    try:
        build(scratch)
        _sync(*scratch.iterdir(), scratch)
        return _install(scratch, scratch.parent / key, load)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"The disk of the cache folder {scratch.parent} is full.",
                hint="Free some space, or name another folder with data.cache_dir.",
            ) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _try(load: Callable[[Path], Loaded], target: Path) -> Loaded | None:
    try:
        return load(target) if target.is_dir() else None
    except (DamagedEntryError, OSError):
        return None


def _scratch(root: Path) -> Path:
    """A new empty folder in `root`, or in a temporary folder where `root` cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        return Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=root))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageError(f"The disk of the cache folder {root} is full.") from error
        elsewhere = Path(tempfile.mkdtemp(prefix="tunesmith-cache-"))
        warnings.warn(
            f"The cache folder {root} cannot be written ({error.strerror}); this run keeps its tokens in"
            f" {elsewhere}, and the next one starts over.",
            stacklevel=3,
        )
        return Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=elsewhere))


def _sweep(root: Path) -> None:
    """Remove what killed processes left behind a day ago or earlier."""
    for leftover in root.glob(f"{_UNFINISHED}*"):
        try:
            abandoned = time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER
        except FileNotFoundError:
            continue  # another process was quicker
        if abandoned:
            shutil.rmtree(leftover, ignore_errors=True)


def _sync(*paths: Path) -> None:
    """Make contents (of files) and names (in folders) durable."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _install(scratch: Path, target: Path, load: Callable[[Path], Loaded]) -> Loaded:
    """Give the finished folder its name, unless another process has just done so."""
    for _ in range(3):
        try:
            scratch.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
        else:
            _sync(target.parent)
            return load(target)
        present = _try(load, target)
        if present is not None:
            return present
        _discard(target)
    raise StorageError(
        f"The cache entry {target} is damaged and cannot be replaced.", hint="Remove it, then try again."
    )


def _discard(target: Path) -> None:
    """Move a damaged entry out of the way in one step, then remove it; running readers keep their files."""
    aside = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=target.parent))
    try:
        target.rename(aside / "damaged")
    except FileNotFoundError:
        pass  # another process has removed it already
    finally:
        shutil.rmtree(aside, ignore_errors=True)
