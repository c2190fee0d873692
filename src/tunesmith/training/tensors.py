"""Tensors on the disk: safetensors shards, and `index.json`, which places them by global offsets.

The idea: every tensor has a dtype, a global shape and a list of shards, each with its file, key, offset and
shape. Who wrote a shard does not matter to who reads it, so that each rank may write the parts it holds, and
another number of ranks may read them. The files themselves are plain safetensors, readable with that library.

Rejected: `torch.save`, which pickles, so that loading may run code; `torch.distributed.checkpoint`, whose
default writer pickles its metadata; and the writer of safetensors, for the reasons given in `storage.py`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from tunesmith.training import storage
from tunesmith.training.storage import FileRecord

INDEX = "index.json"

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""The dtypes that a checkpoint can hold and their names in the safetensors format."""

_FROM_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorShard:
    """A rectangular part of a tensor.

    Attributes:
        tensor: the part, of any dtype in `DTYPES`, on any device.
        offset: where its first element lies in the whole tensor, one number per dim.
        global_shape: shape of the whole tensor.
    """

    tensor: Tensor
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]


TensorSource = Tensor | TensorShard | Sequence[TensorShard]
"""What stands for one tensor of a checkpoint: the tensor, or the shards that cover it together."""


def write_tensors(
    folder: Path, tensors: Mapping[str, TensorSource], shard_bytes: int
) -> dict[str, FileRecord]:
    """Write safetensors files of about `shard_bytes` and `index.json` into `folder`.

    Tensors are written from where they lie: a contiguous CPU tensor is not copied, any other one is copied
    alone. Names that hold the very same view (tied weights) are written once.

    Returns:
        The size and hash of each file by its name.

    Raises:
        TypeError, ValueError: see `plan_files`; nothing was written.
        OSError: as the system reports it.
    """
    files, index = plan_files(tensors, shard_bytes)
    records = {name: storage.write_file(folder / name, _safetensors(parts)) for name, parts in files.items()}
    records[INDEX] = storage.write_file(folder / INDEX, [encode_json({"tensors": index})])
    return records


def plan_files(
    tensors: Mapping[str, TensorSource], shard_bytes: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Decide which part of which tensor goes into which file.

    Returns:
        The tensors of each file by file name and key, and the entries of `index.json` by tensor name.

    Raises:
        TypeError: a tensor has a dtype or layout that safetensors does not hold.
        ValueError: the shards of a tensor overlap, leave a hole or disagree.
    """
    groups: list[dict[str, Tensor]] = []
    filled = 0
    places: dict[Any, tuple[int, str]] = {}
    index: dict[str, Any] = {}
    for name in sorted(tensors):
        shards = _shards(name, tensors[name])
        entries = []
        for number, shard in enumerate(shards):
            tensor, view = shard.tensor, view_of(shard.tensor)
            if view is None or view not in places:
                if not groups or (groups[-1] and filled + tensor.nbytes > shard_bytes):
                    groups.append({})
                    filled = 0
                key = free_name(name if number == 0 else f"{name}#{number}", {*groups[-1], "__metadata__"})
                groups[-1][key] = tensor
                filled += tensor.nbytes
                place = (len(groups) - 1, key)
                if view is not None:
                    places[view] = place
            else:
                place = places[view]
            entries.append((place, shard))
        index[name] = {
            "dtype": DTYPES[shards[0].tensor.dtype],
            "shape": list(shards[0].global_shape),
            "shards": [
                {"file": group, "key": key, "offset": list(shard.offset), "shape": list(shard.tensor.shape)}
                for (group, key), shard in entries
            ],
        }
    file_names = [f"tensors-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    for entry in index.values():
        for part in entry["shards"]:
            part["file"] = file_names[part["file"]]
    return dict(zip(file_names, groups, strict=True)), index


def read_index(folder: Path) -> dict[str, Any]:
    """The entries of `index.json` by tensor name: `dtype`, `shape`, `shards`."""
    entries: dict[str, Any] = json.loads((folder / INDEX).read_bytes())["tensors"]
    return entries


def read_tensors(folder: Path, device: torch.device | str) -> dict[str, Tensor]:
    """Read and assemble every tensor that `index.json` names.

    Returns:
        Tensors of their global shape and dtype on `device`, in memory of their own (not a mapped file).
        Names that were written once (tied weights) hold the same tensor.
    """
    # "pread" reads into fresh memory; "mmap" would return views of a file that retention may delete.
    open_file: Any = safetensors.safe_open
    whole: dict[tuple[str, str], Tensor] = {}
    result: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for name, entry in read_index(folder).items():
            shape = tuple(entry["shape"])
            assembled: Tensor | None = None
            for part in entry["shards"]:
                file, key = part["file"], part["key"]
                if file not in files:
                    opened = open_file(folder / file, framework="pt", device=str(device), backend="pread")
                    files[file] = stack.enter_context(opened)
                if tuple(part["shape"]) == shape:
                    if (file, key) not in whole:
                        whole[file, key] = files[file].get_tensor(key)
                    assembled = whole[file, key]
                    continue
                if assembled is None:
                    assembled = torch.empty(shape, dtype=_FROM_NAME[entry["dtype"]], device=device)
                box = (slice(o, o + n) for o, n in zip(part["offset"], part["shape"], strict=True))
                assembled[tuple(box)].copy_(files[file].get_tensor(key))
            assert assembled is not None, "plan_files writes one shard at least"
            result[name] = assembled
    return result


def size_of(tensors: Mapping[str, TensorSource]) -> int:
    """Bytes that these tensors take on the disk, tied ones counted twice."""
    return sum(shard.tensor.nbytes for name, source in tensors.items() for shard in _shards(name, source))


def encode_json(value: Any) -> bytes:
    """Strict JSON in ASCII.

    Raises:
        ValueError: `value` holds an infinity or NaN.
    """
    return json.dumps(value, allow_nan=False).encode("ascii")


def view_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """What tells two tensors that are the very same view of one storage; None for an empty tensor."""
    if tensor.numel() == 0:
        return None
    flags = (tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), flags)


def free_name(name: str, taken: Container[str]) -> str:
    """`name`, with as many apostrophes as it takes to make it one that is not taken."""
    while name in taken:
        name += "'"
    return name


def _shards(name: str, source: TensorSource) -> list[TensorShard]:
    """The shards of one tensor, detached and checked."""
    if isinstance(source, Tensor):
        source = plain_tensor(name, source)
        source = TensorShard(source, (0,) * source.dim(), tuple(source.shape))
    shards = [source] if isinstance(source, TensorShard) else list(source)
    if not shards:
        raise ValueError(f"{name}: a tensor needs one shard at least")
    shards = [
        TensorShard(plain_tensor(name, s.tensor), tuple(s.offset), tuple(s.global_shape)) for s in shards
    ]
    first = shards[0]
    for number, shard in enumerate(shards):
        part, shape = tuple(shard.tensor.shape), shard.global_shape
        if shard.tensor.dtype != first.tensor.dtype or shape != first.global_shape:
            raise ValueError(f"{name}: the shards disagree on dtype or global shape")
        if not len(part) == len(shard.offset) == len(shape):
            raise ValueError(f"{name}: shape {part}, offset {shard.offset} and global shape {shape} disagree")
        if any(o < 0 or o + n > g for o, n, g in zip(shard.offset, part, shape, strict=True)):
            raise ValueError(f"{name}: a shard of shape {part} at {shard.offset} does not lie in {shape}")
        if any(_overlap(shard, other) for other in shards[:number]):
            raise ValueError(f"{name}: the shard at {shard.offset} overlaps another one")
    if sum(shard.tensor.numel() for shard in shards) != math.prod(first.global_shape):
        raise ValueError(f"{name}: the shards do not cover the global shape {first.global_shape}")
    return shards


def _overlap(a: TensorShard, b: TensorShard) -> bool:
    extents = zip(a.offset, a.tensor.shape, b.offset, b.tensor.shape, strict=True)
    return all(max(i, j) < min(i + n, j + m) for i, n, j, m in extents)


def plain_tensor(name: str, tensor: Tensor) -> Tensor:
    """The tensor without autograd.

    Raises:
        TypeError: it is of a dtype, layout or subclass whose bytes alone do not restore it.
    """
    plain = tensor.detach()
    if type(plain) is not Tensor:
        raise TypeError(f"{name}: a {type(plain).__name__} cannot be stored, only plain tensors can")
    if plain.layout != torch.strided or plain.is_nested or plain.is_meta or plain.dtype not in DTYPES:
        raise TypeError(f"{name}: {plain.dtype}, {plain.layout} on {plain.device} has no form in safetensors")
    return plain


def _safetensors(parts: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: header length (u64, little endian), JSON header, tensors in order."""
    # The widest elements come first, so that every tensor is aligned to its own element size.
    order = sorted(parts, key=lambda key: -parts[key].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        tensor, start = parts[key], end
        end += tensor.nbytes
        header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = encode_json(header)
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for key in order:
        if parts[key].numel():
            tensor = parts[key].cpu().resolve_conj().resolve_neg().contiguous()
            # One element is contiguous with any stride, but only a stride of 1 can be viewed as bytes.
            flat = tensor.as_strided((tensor.numel(),), (1,))
            yield flat.view(torch.uint8).numpy().data
