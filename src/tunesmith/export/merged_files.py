"""A model written tensor by tensor into shards, with an index, so that memory holds one shard and not the model."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tunesmith._version import __version__
from tunesmith.contracts.errors import StorageError, UserError

MANIFEST = "manifest.json"
SHARD_SIZE = "5GB"

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(size: str) -> int:
    """Bytes of a size such as `5GB` or `500MB`.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size)
    count = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if count < 1:
        raise UserError(f"{size!r} is no size of a file.", hint="Write it like 5GB or 500MB.")
    return count


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within the block a full disk or a forbidden folder is a sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the writer of safetensors reports a full disk as text
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"The merged model {folder} cannot be written: {reason}.") from error


class ShardWriter:
    """Collects tensors and writes a file whenever the next one would make it too large.

    Args:
        folder: where the files go.
        most: bytes of one file; a tensor that is larger has a file of its own.

    Attributes:
        total: bytes that were added.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._held: dict[str, Tensor] = {}
        self._bytes = 0
        self._shards: list[list[str]] = []
        self.total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor on the host."""
        if self._held and self._bytes + tensor.nbytes > self._most:
            self._flush()
        self._held[name] = tensor
        self._bytes += tensor.nbytes
        self.total += tensor.nbytes

    def _flush(self) -> None:
        self._shards.append(list(self._held))
        save_file(self._held, self._part(len(self._shards)), metadata={"format": "pt"})
        self._held.clear()
        self._bytes = 0

    def _part(self, number: int) -> Path:
        return self._folder / f".part-{number}.safetensors"

    def finish(self) -> None:
        """Write what is left, give the files their names, and write the index where there are several."""
        self._flush()
        count = len(self._shards)
        names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        for number, name in enumerate(names, start=1):
            self._part(number).rename(self._folder / name)
        if count > 1:
            where = {tensor: name for name, held in zip(names, self._shards, strict=True) for tensor in held}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(where.items()))}
            write_json(self._folder / "model.safetensors.index.json", index)


def on_host(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it goes into a file, alone in its memory.

    Raises:
        UserError: it does not fit into float16.
    """
    if not tensor.is_floating_point():
        return tensor.detach().to("cpu").contiguous()
    cast = tensor.detach().to("cpu", dtype).contiguous()
    if dtype == torch.float16 and cast.isinf().any() and not tensor.isinf().any():
        raise UserError(f"{name} has values that float16 cannot hold.", hint="Use bfloat16.")
    return cast.clone() if cast.untyped_storage().nbytes() != cast.nbytes else cast


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that a person can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_manifest(folder: Path) -> None:
    """Write size and SHA-256 of every file of a folder into its `manifest.json`."""
    files = {
        file.name: {"size": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"tunesmith": __version__, "files": files})


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def share(folder: Path) -> None:
    """Give every file the mode that the user's mask grants; safetensors writes for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)
