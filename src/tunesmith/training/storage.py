# ruff: noqa: PTH102, PTH104, PTH106, PTH108
"""The few file-system calls that the checkpoint store makes, and what their errors mean to a user.

The idea: whatever changes the disk goes through `os.open`, `os.write`, `os.fsync`, `os.close`, `os.mkdir`,
`os.rename`, `os.unlink` and `os.rmdir` of this module and through nothing else. The places at which a run
can be killed or a disk can fill up are therefore countable, and the tests visit every one of them. (That is
why `pathlib` is not used for these calls here.)

Rejected: writing through `safetensors.torch.save_file`. It needs a second pass over the file for the hash,
reports a full disk as an error without `errno`, and its system calls cannot be counted from Python.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tunesmith.contracts.errors import StorageError
from tunesmith.contracts.sizes import memory_size

_WRITE_BYTES = 16 * 2**20
"""Bytes per write: each piece is still in the cache of the CPU or close to it when it has been hashed."""

_CLOCK_SLACK = 60.0
"""Seconds by which the clock of a file server may be ahead of or behind this machine's."""

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_HINT_FULL = (
    "Free some space, choose another output.dir or lower output.keep, then start the same command again: "
    "older checkpoints are intact."
)
_HINT_DENIED = "Choose another output.dir, or make this folder writable for the user who trains."


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What the manifest knows of a file: its size in bytes and its SHA-256 as 64 hexadecimal digits."""

    size: int
    sha256: str


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file, hash it on the way and force it to the disk.

    Args:
        path: the file, which must not exist.
        pieces: the contents, taken one at a time, so that no two of them need to be in memory at once.

    Raises:
        OSError: as the system reports it; part of the file may then exist.
    """
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            view = memoryview(piece).cast("B")
            for start in range(0, len(view), _WRITE_BYTES):
                part = view[start : start + _WRITE_BYTES]
                digest.update(part)
                size += len(part)
                while part:
                    part = part[os.write(descriptor, part) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(size=size, sha256=digest.hexdigest())


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file that exists.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileRecord(size=file.tell(), sha256=digest.hexdigest())


def sync_directory(path: Path) -> None:
    """Force the entries of a directory to the disk; without it a rename may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory that must not exist; its parent must. The caller synchronises the parent."""
    os.mkdir(path)


def make_directories(path: Path) -> None:
    """Create a directory and its missing parents, each forced to the disk.

    Raises:
        OSError: one of them cannot be created, or a file stands in the way.
    """
    if path.is_dir():
        return
    if path.parent != path:
        make_directories(path.parent)
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_directory(path.parent)


def rename(source: Path, target: Path) -> None:
    """Rename within one directory, atomically. The caller synchronises that directory."""
    os.rename(source, target)


def remove_tree(path: Path) -> None:
    """Delete a directory (links in it are not followed) or a file.

    Raises:
        OSError: something in it cannot be deleted; the rest is then still there.
    """
    if not stat.S_ISDIR(path.lstat().st_mode):
        os.unlink(path)
        return
    for entry in sorted(path.iterdir()):
        remove_tree(entry)
    os.rmdir(path)


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write into `path`, or into the nearest parent that exists."""
    while not path.exists() and path.parent != path:
        path = path.parent
    usage = os.statvfs(path)
    return usage.f_bavail * usage.f_frsize


def check_writable(folder: Path) -> None:
    """Create `folder` where it is missing and ask the system whether files can be created in it.

    Raises:
        OSError: it cannot be created, or is not writable (a read-only mount counts also for root).
    """
    make_directories(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def owner_is_alive(path: Path, pid: int) -> bool:
    """Whether the process `pid` that made `path` may still run on this machine (in this PID namespace).

    A process that began after `path` was last changed has only inherited the number, which is common after
    the restart of a container.
    """
    try:
        began = float(psutil.Process(pid).create_time())
        changed = path.lstat().st_ctime
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.AccessDenied:
        return True
    return began <= changed + _CLOCK_SLACK


def explain(error: OSError, folder: Path, bytes_needed: int) -> StorageError:
    """The `StorageError` that tells a user what `error`, met while writing into `folder`, means.

    Args:
        error: what the system reported.
        folder: the folder of the checkpoints.
        bytes_needed: size of what was to be written.
    """
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return StorageError(
            f"{_FULL[error.errno]}: a checkpoint of {memory_size(bytes_needed)} does not fit into {folder}, "
            f"where {memory_size(free_bytes(folder))} are free",
            hint=_HINT_FULL,
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return StorageError(
            f"checkpoints cannot be written into the folder {folder}: {reason}", hint=_HINT_DENIED
        )
    return StorageError(
        f"writing a checkpoint into {folder} failed: {reason}",
        hint="Older checkpoints are intact; check the disk, then start the same command again.",
    )


def not_enough_space(folder: Path, needed: int, free: int) -> StorageError:
    """The `StorageError` that says before a run that `needed` bytes will not fit into `folder`."""
    return StorageError(
        f"checkpoints need {memory_size(needed)} in {folder}, where only {memory_size(free)} are free",
        hint="Free some space, choose another output.dir or lower output.keep; nothing was written.",
    )
