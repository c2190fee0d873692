"""What a checkpoint says about itself: `Checkpoint`, its manifest, and whether the files still match it.

The idea: `manifest.json` is written last and holds the size and SHA-256 of every other file and a checksum of
itself, so that "intact" is a fact that can be read off the disk: no flipped bit and no missing byte passes.

Rejected: a marker file such as `COMPLETE`, which says that writing ended but not that the bytes are right.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from tunesmith._version import __version__
from tunesmith.contracts.errors import StorageError
from tunesmith.training import storage
from tunesmith.training.state import join_state
from tunesmith.training.storage import FileRecord
from tunesmith.training.tensors import read_index, read_tensors

FORMAT = 1
"""Version of the layout; a checkpoint of another one is refused, not passed over."""

MANIFEST, STATE = "manifest.json", "state.json"


class DamagedError(Exception):
    """A checkpoint is not what its manifest says; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on the disk. Saving may delete it or give it another place: read it before the next save.

    Attributes:
        path: its directory.
        step: the optimizer step after which it was written.
        metric: held-out loss at that step, where it was measured and finite.
    """

    path: Path
    step: int
    metric: float | None

    def tensors(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Every tensor by its name, assembled from its shards: global shape, dtype as saved, on `device`.

        Raises:
            StorageError: the files cannot be read.
        """
        with _reading(self.path):
            return read_tensors(self.path, device)

    def state(self) -> dict[str, Any]:
        """What was given to `save` as the state, every type as it was.

        Raises:
            StorageError: the file cannot be read.
        """
        with _reading(self.path):
            state: dict[str, Any] = join_state("", {}, json.loads((self.path / STATE).read_bytes()))
            return state

    def tensor_names(self) -> list[str]:
        """The names of the tensors, in order.

        Raises:
            StorageError: the index cannot be read.
        """
        with _reading(self.path):
            return sorted(read_index(self.path))

    def damage(self) -> str | None:
        """Read every file and compare it with the manifest; the first difference as a phrase, or None.

        Raises:
            StorageError: this user may not read it.
        """
        try:
            verify(self.path, read_manifest(self.path))
        except DamagedError as error:
            return str(error)
        return None


def encode_manifest(step: int, metric: float | None, files: Mapping[str, FileRecord]) -> bytes:
    """The contents of `manifest.json`; `metric` must be finite or None."""
    body = {
        "format": FORMAT,
        "tunesmith": __version__,
        "step": step,
        "metric": metric,
        "files": {name: asdict(record) for name, record in sorted(files.items())},
    }
    return json.dumps({**body, "checksum": _checksum(body)}, indent=2, allow_nan=False).encode("ascii")


def _checksum(body: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without this entry, so that damage to the manifest itself is seen."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode("ascii")).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        DamagedError: it is missing or not what was written.
        StorageError: this user may not read it, or it is of a newer format.
    """
    try:
        manifest: Any = json.loads((path / MANIFEST).read_bytes())
    except OSError as error:
        raise _unreadable(error, MANIFEST, path) from error
    except ValueError as error:
        raise DamagedError(f"{MANIFEST} is not valid JSON") from error
    if not isinstance(manifest, dict):
        raise DamagedError(f"{MANIFEST} is not a manifest")
    checksum = manifest.pop("checksum", None)
    if checksum != _checksum(manifest):
        raise DamagedError(f"{MANIFEST} does not match its own checksum")
    if manifest["format"] != FORMAT:
        raise StorageError(
            f"the checkpoint {path} has format {manifest['format']} of tunesmith {manifest['tunesmith']}; "
            f"this is tunesmith {__version__}, which reads format {FORMAT}",
            hint="Install that version of tunesmith, or move the checkpoint away.",
        )
    return manifest


def verify(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file with its entry in the manifest.

    Raises:
        DamagedError: the first difference.
        StorageError: this user may not read a file.
    """
    for name, record in manifest["files"].items():
        try:
            size = (path / name).stat().st_size
            if size != record["size"]:
                raise DamagedError(f"{name} has {size} bytes, not {record['size']}")
            if storage.hash_file(path / name).sha256 != record["sha256"]:
                raise DamagedError(f"{name} does not match its SHA-256")
        except OSError as error:
            raise _unreadable(error, name, path) from error


def _unreadable(error: OSError, name: str, path: Path) -> Exception:
    """What it means that a file of a checkpoint cannot be read: damage, or a right that is missing."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return DamagedError(f"{name} is missing")
    reason = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM):
        return StorageError(
            f"the checkpoint {path} cannot be read: {name}: {reason}",
            hint="Make it readable for the user who trains, or move it away.",
        )
    return DamagedError(f"{name} cannot be read: {reason}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise StorageError(
            f"the checkpoint {path} cannot be read: {error}",
            hint="It may be damaged, or have been deleted by a later save.",
        ) from error
