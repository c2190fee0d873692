"""Nested optimizer state and random generators through a checkpoint: every type, key and bit as it was."""

from __future__ import annotations

import itertools
import json
import math
import random
import struct
import tempfile
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.training.checkpoint import (
    CheckpointStore,
    TensorShard,
    join_state,
    restore_rng,
    rng_state,
    split_state,
)
from tunesmith.training.tensors import DTYPES


def bits(tensor: Tensor) -> bytes:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return bytes(flat.view(torch.uint8).numpy().data)


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal in type, order of keys and every bit."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return bits(a) == bits(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    return bool(a == b)


def through_json(prefix: str, nested: Any) -> Any:
    tensors, skeleton = split_state(prefix, nested)
    text = json.dumps(skeleton, allow_nan=False)
    return join_state(prefix, tensors, json.loads(text))


def through_disk(nested: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        tensors, skeleton = split_state("optimizer", nested)
        store = CheckpointStore(Path(folder), keep=1, shard_bytes=64)
        checkpoint = store.save(1, tensors, {"optimizer": skeleton}, metric=None)
        return join_state("optimizer", checkpoint.tensors(), checkpoint.state()["optimizer"])


@st.composite
def any_tensor(draw: st.DrawFn) -> Tensor:
    """Any dtype and any bits, 0 to 3 dims, empty ones, and views that are not contiguous."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape)
    data = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    tensor = torch.empty(shape, dtype=dtype)
    if count:
        tensor = torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    form = draw(st.sampled_from(["plain", "turned", "every other", "expanded"]))
    if form == "turned":
        tensor = tensor.permute(tuple(reversed(range(tensor.dim()))))
    elif form == "every other" and tensor.dim():
        tensor = tensor[..., ::2]
    elif form == "expanded" and tensor.dim():
        tensor = tensor[:1].expand(3, *tensor.shape[1:]) if tensor.shape[0] else tensor
    return tensor


floats = st.floats(allow_nan=True, allow_infinity=True)
texts = st.text(max_size=4) | st.sampled_from(["!tensor", "!dict", "!float", "!tuple", "!", "a.b", "state"])
scalars = st.none() | st.booleans() | st.integers() | st.integers(-(2**70), 2**70) | floats | texts
keys = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
keys = keys | st.tuples(st.integers(), st.text(max_size=2))
nested_state = st.recursive(
    scalars | any_tensor(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(texts, inner, max_size=3)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(nested=nested_state)
def test_any_nested_state_comes_back_bit_for_bit(nested: Any) -> None:
    assert same(through_json("p", nested), nested)


@settings(max_examples=60, deadline=None)
@given(nested=nested_state)
def test_any_nested_state_comes_back_from_the_disk(nested: Any) -> None:
    assert same(through_disk(nested), nested)


@settings(max_examples=40, deadline=None)
@given(
    state=st.dictionaries(
        st.text(max_size=3),
        st.recursive(scalars, lambda s: st.lists(s) | st.dictionaries(keys, s)),
        max_size=3,
    )
)
def test_any_state_without_tensors_is_stored_as_it_is(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert same(CheckpointStore(Path(folder), keep=1).save(1, {}, state, metric=None).state(), state)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(list(DTYPES)))
def test_any_grid_of_shards_comes_back_whole(data: st.DataObject, dtype: torch.dtype) -> None:
    rows, columns = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    raw = torch.randint(0, 2, (rows, columns * dtype.itemsize), dtype=torch.uint8)
    whole = raw.view(dtype)

    def cuts(size: int) -> list[tuple[int, int]]:
        inner = sorted(data.draw(st.sets(st.integers(1, size), max_size=3)) | {0, size})
        return list(itertools.pairwise(inner))

    grid = [(row, column) for row in cuts(rows) for column in cuts(columns)]
    shards = [
        TensorShard(whole[top:bottom, left:right], (top, left), (rows, columns))
        for (top, bottom), (left, right) in data.draw(st.permutations(grid))
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), keep=1, shard_bytes=8)
        loaded = store.save(1, {"whole": shards}, {}, metric=None).tensors()
    assert same(loaded, {"whole": whole})


def test_plain_json_stays_as_it_is() -> None:
    plain = {"a": [1, 2.5, None, True, "x"], "b": {"c": {}}}
    assert split_state("p", plain) == ({}, plain)


def test_the_names_say_where_a_tensor_lies() -> None:
    state = {"state": {0: {"exp_avg": torch.ones(2)}, "0": {"exp_avg": torch.zeros(2)}}}
    tensors, _ = split_state("optimizer", state)
    assert list(tensors) == ["optimizer/state.0.exp_avg", "optimizer/state.0.exp_avg'"]
    assert same(through_disk(state), state)


def test_tensors_that_share_memory() -> None:
    base = torch.arange(6.0)
    state = {
        "a": base,
        "again": base,
        "view": base[2:4],
        "square": base.view(2, 3),
        "p": torch.nn.Parameter(base),
    }
    tensors, _ = split_state("p", state)
    assert len(tensors) == 3, "the very same view is stored once, other views are stored apart"
    loaded = through_disk(state)
    assert same(loaded, {**state, "p": base})
    assert loaded["a"] is loaded["again"] is loaded["p"]
    assert loaded["view"].data_ptr() != loaded["a"].data_ptr() + 8


def test_single_elements_of_any_stride() -> None:
    state = {"wide": torch.arange(2.0)[::2], "turned": torch.ones(4, 1)[:1].t(), "scalar": torch.arange(9)[5]}
    assert state["wide"].stride() == (2,)
    assert same(through_disk(state), state)


def test_lazy_conjugates_and_negations_are_resolved() -> None:
    number = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    state = {"z": number, "conjugate": number.conj(), "imaginary": number.conj().imag}
    loaded = through_disk(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "value",
    [{1, 2}, b"bytes", 1j, np.float32(1), np.int64(1), np.ones(1), object(), namedtuple("P", "x")(1)],
)
def test_what_would_not_come_back_is_refused_and_located(value: Any) -> None:
    with pytest.raises(TypeError, match=r"groups\.1\.lr: a .* cannot be stored"):
        split_state("p", {"groups": [0, {"lr": value}]})


def test_tensor_subclasses_and_tensor_keys_are_refused() -> None:
    class Quantized(Tensor):
        pass

    with pytest.raises(TypeError, match="w: a Quantized cannot be stored"):
        split_state("p", {"w": torch.ones(2).as_subclass(Quantized)})
    with pytest.raises(TypeError, match="a tensor cannot be a key"):
        split_state("p", {torch.ones(1): 1})


def test_dict_subclasses_and_numpy_floats_become_plain() -> None:
    state = {"a": OrderedDict(x=1), "b": defaultdict(int, {2: 3}), "c": np.float64(0.1)}
    assert same(through_json("p", state), {"a": {"x": 1}, "b": {2: 3}, "c": 0.1})


def test_a_missing_tensor_is_named() -> None:
    _, skeleton = split_state("p", {"w": torch.ones(1)})
    with pytest.raises(KeyError, match="p/w"):
        join_state("p", {}, skeleton)


def test_the_state_may_be_read_under_another_prefix() -> None:
    tensors, skeleton = split_state("old", [torch.ones(1)])
    renamed = {name.replace("old/", "new/"): tensor for name, tensor in tensors.items()}
    assert same(join_state("new", renamed, skeleton), [torch.ones(1)])


# ------------------------------------------------------------------------------------------- optimizers


def eight_bit(name: str) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return getattr(bitsandbytes.optim, name)


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=2, history_size=3),
    "adamw_8bit": lambda p: eight_bit("AdamW8bit")(p, lr=1e-2, min_8bit_size=16),
    "paged_adamw_8bit": lambda p: eight_bit("PagedAdamW8bit")(p, lr=1e-2, min_8bit_size=16),
    "lion_8bit": lambda p: eight_bit("Lion8bit")(p, lr=1e-2, min_8bit_size=16),
}


def run_steps(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))

        def closure(inputs: Tensor = inputs) -> Tensor:
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path, name: str) -> None:
    def build() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4))
        return model, OPTIMIZERS[name](model.parameters())

    try:
        model, optimizer = build()
        run_steps(model, optimizer, range(3))
    except (RuntimeError, NotImplementedError) as error:  # an 8-bit optimizer without a CPU kernel
        if "8bit" not in name:
            raise
        pytest.skip(f"{name} does not run here: {error}")
    tensors, skeleton = split_state("optimizer", optimizer.state_dict())
    assert same(join_state("optimizer", tensors, skeleton), optimizer.state_dict())
    parameters = {f"model/{key}": parameter for key, parameter in model.named_parameters()}
    store = CheckpointStore(tmp_path, keep=1)
    checkpoint = store.save(3, {**parameters, **tensors}, {"optimizer": skeleton}, metric=None)
    expected = {key: value.detach().clone() for key, value in parameters.items()}
    run_steps(model, optimizer, range(3, 6))

    other, resumed = build()
    loaded = checkpoint.tensors()
    assert same({key: loaded[key] for key in expected}, expected), "later steps do not change what was saved"
    other.load_state_dict({k.removeprefix("model/"): v for k, v in loaded.items() if k.startswith("model/")})
    resumed.load_state_dict(join_state("optimizer", loaded, checkpoint.state()["optimizer"]))
    run_steps(other, resumed, range(3, 6))
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert same(resumed.state_dict(), optimizer.state_dict())


# ------------------------------------------------------------------------------------------- generators


def draw() -> list[Any]:
    numbers = [random.random(), random.gauss(0, 1), random.randrange(10**9)]
    return [*numbers, np.random.rand(), np.random.randn(), torch.rand(3).tolist(), torch.randn(17).tolist()]


@pytest.fixture
def kept_generators() -> Any:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_generators_go_on_where_they_were(tmp_path: Path, kept_generators: None, drawn_before: int) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    for _ in range(drawn_before):  # gauss and randn keep every second number back
        random.gauss(0, 1)
        np.random.randn()
        torch.randn(1)
    tensors, skeleton = rng_state()
    checkpoint = CheckpointStore(tmp_path, keep=1).save(1, tensors, {"rng": skeleton}, metric=None)
    assert all(name.startswith("rng/") for name in tensors)
    expected = [draw(), draw()]
    restore_rng(checkpoint.tensors(), checkpoint.state()["rng"])
    assert [draw(), draw()] == expected
    assert draw() != expected[0]


def test_cuda_generators_are_saved_and_those_of_missing_devices_left_out(
    monkeypatch: pytest.MonkeyPatch, kept_generators: None
) -> None:
    states = [torch.full((16,), n, dtype=torch.uint8) for n in range(4)]
    restored: dict[int, Tensor] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.update({device: state}))
    tensors, skeleton = rng_state()
    restore_rng(tensors, skeleton)
    assert same(restored, {0: states[0], 1: states[1]})
