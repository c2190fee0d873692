"""Nested training state as tensors and strict JSON, bit for bit: what optimizers and random generators hold.

The idea: `split_state` walks dicts, lists, tuples and scalars and takes the tensors out; what is left is a
JSON skeleton with references to them. What is strict JSON already stays as it is. What JSON would change or
refuse becomes an object with one key that starts with `!`:

    {"!tensor": "state.0.exp_avg"}      the tensor of that name, after the prefix
    {"!tuple": [0.9, 0.999]}            a tuple
    {"!dict": [[0, "a"], [1, "b"]]}     a dict whose keys are not all strings, or one that starts with `!`
    {"!float": "7ff0000000000000"}      an infinity or NaN, as its bits (big-endian IEEE 754 binary64)

Rejected: pickle, which runs code when it is read; and keys turned into strings with a convention to turn them
back, which cannot tell the int 0 from the string "0".
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.training.tensors import free_name, plain_tensor, view_of


def split_state(prefix: str, nested: Any) -> tuple[dict[str, Tensor], Any]:
    """Separate a nested state into named tensors and a strict JSON skeleton that refers to them.

    Args:
        prefix: put before the names of the tensors: `optimizer/state.0.exp_avg`.
        nested: dicts (keys of any scalar type, or tuples of them), lists, tuples, None, bools, ints, floats
            (infinities and NaN too), strings, and plain tensors of any dtype in `tensors.DTYPES`.

    Returns:
        The tensors, as views and not copies (the very same view twice is one entry), and the skeleton.

    Raises:
        TypeError: something else was found; the message says where.
    """
    splitter = _Splitter()
    skeleton = splitter.skeleton("", nested)
    return {f"{prefix}/{name}": tensor for name, tensor in splitter.tensors.items()}, skeleton


def join_state(prefix: str, tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The nested state that `split_state` separated; every type, key and bit as it was.

    Dict subclasses come back as dicts, numpy's float64 as a float and parameters as tensors. Tensors that
    were the very same view are one tensor again. `tensors` may hold others besides.

    Raises:
        KeyError: a tensor that the skeleton refers to is missing.
    """
    if isinstance(skeleton, list):
        return [join_state(prefix, tensors, item) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if len(skeleton) == 1:
        ((tag, content),) = skeleton.items()
        if tag in _JOINERS:
            return _JOINERS[tag](prefix, tensors, content)
    return {key: join_state(prefix, tensors, item) for key, item in skeleton.items()}


def rng_state() -> tuple[dict[str, Tensor], Any]:
    """The generators of Python's `random`, numpy's global one, torch's on CPU and on every CUDA device.

    Returns:
        Tensors (their names start with `rng/`) and a strict JSON skeleton, for `restore_rng`.
    """
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    inner = {name: _from_array(value) for name, value in numpy_state["state"].items()}
    nested = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": {**numpy_state, "state": inner},
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }
    return split_state("rng", nested)


def restore_rng(tensors: Mapping[str, Tensor], skeleton: Any) -> None:
    """Put every generator back to where `rng_state` found it.

    On a machine with fewer CUDA devices than then, the states of the missing ones are left out.

    Raises:
        KeyError: `tensors` lacks one that the skeleton refers to.
        ValueError: numpy's global generator is of another kind than then.
    """
    nested = join_state("rng", tensors, skeleton)
    version, words, gauss = nested["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    inner = {name: _to_array(value) for name, value in nested["numpy"]["state"].items()}
    np.random.set_state({**nested["numpy"], "state": inner})
    torch.set_rng_state(nested["torch"].cpu())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, state in enumerate(nested["cuda"][:devices]):
        torch.cuda.set_rng_state(state.cpu(), device)


@dataclass(slots=True)
class _Splitter:
    """Walks a nested state; holds the tensors found so far and the name of each view."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[Any, str] = field(default_factory=dict)

    def skeleton(self, path: str, value: Any) -> Any:
        """`value` as strict JSON with references to the tensors in it."""
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, float):
            number = float(value)  # numpy's float64 is a float
            return number if math.isfinite(number) else {"!float": struct.pack(">d", number).hex()}
        if isinstance(value, Tensor):
            return {"!tensor": self._take(path, value)}
        if type(value) is list:
            return self._items(path, value)
        if type(value) is tuple:
            return {"!tuple": self._items(path, value)}
        if isinstance(value, dict):
            if all(type(key) is str and not key.startswith("!") for key in value):
                return {key: self.skeleton(_inside(path, key), item) for key, item in value.items()}
            return {"!dict": [self._pair(path, key, item) for key, item in value.items()]}
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{path or 'the state'}: a {kind} cannot be stored")

    def _items(self, path: str, items: list[Any] | tuple[Any, ...]) -> list[Any]:
        return [self.skeleton(_inside(path, number), item) for number, item in enumerate(items)]

    def _pair(self, path: str, key: Any, item: Any) -> list[Any]:
        if isinstance(key, Tensor):
            raise TypeError(f"{path or 'the state'}: a tensor cannot be a key")
        return [
            self.skeleton(f"a key of {path or 'the state'}", key),
            self.skeleton(_inside(path, key), item),
        ]

    def _take(self, path: str, tensor: Tensor) -> str:
        tensor = plain_tensor(path, tensor)
        view = view_of(tensor)
        if view is not None and view in self.names:
            return self.names[view]
        name = free_name(path, self.tensors)
        self.tensors[name] = tensor
        if view is not None:
            self.names[view] = name
        return name


def _inside(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _join_float(_prefix: str, _tensors: Mapping[str, Tensor], content: str) -> float:
    number: float = struct.unpack(">d", bytes.fromhex(content))[0]
    return number


def _join_tensor(prefix: str, tensors: Mapping[str, Tensor], content: str) -> Tensor:
    return tensors[f"{prefix}/{content}"]


def _join_tuple(prefix: str, tensors: Mapping[str, Tensor], content: list[Any]) -> tuple[Any, ...]:
    return tuple(join_state(prefix, tensors, item) for item in content)


def _join_dict(prefix: str, tensors: Mapping[str, Tensor], content: list[Any]) -> dict[Any, Any]:
    return {join_state(prefix, tensors, key): join_state(prefix, tensors, item) for key, item in content}


_JOINERS: dict[str, Callable[[str, Mapping[str, Tensor], Any], Any]] = {
    "!float": _join_float,
    "!tensor": _join_tensor,
    "!tuple": _join_tuple,
    "!dict": _join_dict,
}


def _from_array(value: Any) -> Any:
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _to_array(value: Any) -> Any:
    return value.cpu().numpy() if isinstance(value, Tensor) else value
