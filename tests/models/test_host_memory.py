"""Host memory in pieces: buffers never overlap, and what is given back is found again."""

from __future__ import annotations

import random
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.models import host_memory
from tunesmith.models.host_memory import (
    ALIGNMENT,
    LARGEST_PIECE,
    SMALLEST_PIECE,
    HostMemory,
    NoHostMemoryError,
    pinned_copy,
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "SMALLEST_PIECE", 4 * ALIGNMENT)
    monkeypatch.setattr(host_memory, "LARGEST_PIECE", 64 * ALIGNMENT)


class FakeRuntime:
    """CUDA's, which pins what it is told to up to a number of bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.pinned = most, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, _flags: int) -> int:
        if sum(self.pinned.values()) + size > self.most:
            return 2
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def runtime_of(monkeypatch: pytest.MonkeyPatch, most: int) -> FakeRuntime:
    runtime = FakeRuntime(most)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return runtime


def test_pieces_are_pinned_as_they_are_and_no_longer_than_they_live(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_of(monkeypatch, 1 << 30)
    memory = HostMemory(pinned=True)
    small, large = memory.take(3), memory.take(300 * ALIGNMENT + 1)
    assert list(runtime.pinned.values()) == [4 * ALIGNMENT, 301 * ALIGNMENT]
    assert sum(runtime.pinned.values()) == memory.bytes
    assert {small.data_ptr(), large.data_ptr()} == set(runtime.pinned)
    del memory
    assert len(runtime.pinned) == 2, "buffers are still in use"
    del small, large
    assert runtime.pinned == {}


def test_a_host_that_pins_no_more_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(host_memory, "_forget_error", lambda device: forgotten.append(str(device)))
    runtime_of(monkeypatch, 36 * ALIGNMENT)
    monkeypatch.setattr(host_memory, "_unpin", lambda *_: None)
    memory = HostMemory(pinned=True)
    memory.take(32 * ALIGNMENT)
    memory.take(4 * ALIGNMENT)
    assert memory.bytes == 36 * ALIGNMENT, "no piece for two of them, which the host does not pin"
    with pytest.raises(
        NoHostMemoryError, match=r"^512 bytes of host memory cannot be pinned \(CUDA error 2\)$"
    ):
        memory.take(2 * ALIGNMENT)
    assert forgotten == ["cuda:0"] * 3, "what torch would raise at its next kernel"
    memory.take(0)


def test_layers_that_need_more_than_the_host_has_say_so() -> None:
    with pytest.raises(NoHostMemoryError, match="10000000000000000 bytes of host memory are not free"):
        HostMemory(pinned=False).take(10**16)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 40 * ALIGNMENT), st.integers(0, 2**16)), max_size=40))
def test_buffers_never_share_a_byte(turns: list[tuple[int, int]]) -> None:
    """Each turn takes a buffer and fills it; one that goes back has to hold its own bytes still."""
    memory = HostMemory(pinned=False)
    held: list[tuple[int, torch.Tensor]] = []
    for number, (size, which) in enumerate(turns):
        buffer = memory.take(size).fill_(number % 251)
        assert buffer.shape == (size,)
        assert buffer.storage_offset() % ALIGNMENT == 0
        held.append((number % 251, buffer))
        if which % 3 == 0:
            value, back = held.pop(which % len(held))
            assert bool((back == value).all())
            memory.give(back)
    assert all(bool((buffer == value).all()) for value, buffer in held)
    for _, buffer in held:
        memory.give(buffer)
    memory._settle()
    assert all(piece.unused for piece in memory._pieces)


def test_what_is_given_back_serves_other_sizes() -> None:
    """Micro-batches of different lengths, as a layer after the other leaves and comes back: nothing new is pinned."""
    memory = HostMemory(pinned=False)
    pinned = []
    for tokens in (900, 700, 850, 640, 899, 111):
        buffers = [memory.take(tokens * width) for _ in range(12) for width in (8, 6, 3)]
        for buffer in reversed(buffers):
            memory.give(buffer.view(torch.int8).view(-1))
        pinned.append(memory.bytes)
    assert len(set(pinned)) == 1
    needed = 12 * 17 * 900
    assert needed <= pinned[0] <= 2 * needed


@pytest.mark.parametrize("size", [1, 3, 5, 17, 40, 100])
def test_buffers_of_one_size_leave_no_gaps(size: int) -> None:
    """As layers do that are alike: beyond what is used there is what one piece has left."""
    memory = HostMemory(pinned=False)
    for used in range(size * ALIGNMENT, 100 * size * ALIGNMENT, size * ALIGNMENT):
        memory.take(size * ALIGNMENT)
        spare = memory.bytes - used
        assert 0 <= spare < max(4 * ALIGNMENT, min(64 * ALIGNMENT, used // 4) + 1)
        assert sum(end - start for piece in memory._pieces for start, end in piece.free) == spare


def passed(memory: HostMemory, layers: Iterable[int]) -> int:
    """A micro-batch whose layers move so many units each; the bytes that it used."""
    buffers = [memory.take(size * ALIGNMENT) for size in layers]
    used = sum(buffer.numel() for buffer in buffers)
    while buffers:
        memory.give(buffers.pop())
    return used


@pytest.mark.parametrize("lengths", ["random", "growing"])
def test_micro_batches_of_any_lengths_pin_what_the_longest_takes(lengths: str) -> None:
    """And a little more; growing ones have all of it pinned anew a few times and not each time."""
    memory, generator = HostMemory(pinned=False), random.Random(0)
    sizes = [generator.randint(200, 400) for _ in range(100)]
    made = list[int]()
    piece = memory._piece
    memory._piece = lambda size: made.append(size) or piece(size)  # type: ignore[method-assign,func-returns-value]
    used = 0
    for size in sorted(sizes) if lengths == "growing" else sizes:
        used = max(used, passed(memory, [size] * 24 + [size * 2 // 3] * 4))
        assert memory.bytes <= 1.2 * used
    assert sum(made) < (11 if lengths == "growing" else 5) * used
    count = len(made)
    for size in sizes:
        passed(memory, [size] * 24 + [size * 2 // 3] * 4)
    assert len(made) == count, "the longest came already"


def test_pieces_that_became_too_small_go_before_others_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = runtime_of(monkeypatch, 40 * ALIGNMENT)
    monkeypatch.setattr(host_memory, "_unpin", lambda address, _: runtime.cudaHostUnregister(address))
    monkeypatch.setattr(host_memory, "_forget_error", lambda _: None)
    memory = HostMemory(pinned=True)
    passed(memory, [9, 9, 9])
    assert sum(runtime.pinned.values()) == memory.bytes == 27 * ALIGNMENT
    passed(memory, [16, 16])
    assert sum(runtime.pinned.values()) == memory.bytes == 2 * 17 * ALIGNMENT
    passed(memory, [38])  # which leaves nothing to spare
    assert sum(runtime.pinned.values()) == memory.bytes == 38 * ALIGNMENT


def test_what_comes_back_in_the_middle_of_a_take_waits_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector gives back what dead layers held, at any moment."""
    memory = HostMemory(pinned=False)
    old = memory.take(4 * ALIGNMENT)
    cut = host_memory._Piece.take

    def interrupted(piece: Any, size: int) -> Any:
        memory.give(old)
        return cut(piece, size)

    monkeypatch.setattr(host_memory._Piece, "take", interrupted)
    new = memory.take(2 * ALIGNMENT)
    assert new.data_ptr() != old.data_ptr()
    assert len(memory._pieces) == 2


def test_a_buffer_larger_than_any_piece_has_its_own() -> None:
    memory = HostMemory(pinned=False)
    large = memory.take(100 * ALIGNMENT + 1)
    assert memory.bytes == 101 * ALIGNMENT
    memory.give(large.view(torch.uint8))
    assert memory.take(101 * ALIGNMENT).data_ptr() == large.data_ptr()


def test_a_buffer_of_another_memory_is_refused() -> None:
    memory = HostMemory(pinned=False)
    memory.give(torch.empty(8, dtype=torch.uint8))
    with pytest.raises(AssertionError, match="not of this memory"):
        memory.take(1)


def test_the_bounds() -> None:
    assert SMALLEST_PIECE < LARGEST_PIECE
    assert LARGEST_PIECE % ALIGNMENT == SMALLEST_PIECE % ALIGNMENT == 0


def test_a_host_without_memory_for_a_copy_says_so() -> None:
    with pytest.raises(NoHostMemoryError, match="40000000000000000 bytes of host memory are not free"):
        pinned_copy(torch.zeros(1).expand(10**16))


def test_a_host_that_pins_no_more_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_forget_error", lambda _: None)
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    table: Any = SimpleNamespace(shape=(3, 5), dtype=torch.bfloat16, is_cuda=True, device="cuda:0")
    with pytest.raises(
        NoHostMemoryError, match=r"^30 bytes of host memory cannot be pinned \(CUDA error 2\)$"
    ):
        pinned_copy(table)


@pytest.mark.gpu
def test_a_failure_to_pin_is_forgotten() -> None:
    """CUDA remembers it, and torch would raise it at its next kernel."""
    host = torch.empty(1 << 20, dtype=torch.uint8)
    host_memory._pin(host, torch.device("cuda"))
    with pytest.raises(NoHostMemoryError, match="CUDA error"):
        host_memory._pin(host, torch.device("cuda"))
    assert float(torch.ones(1, device="cuda") + 1) == 2.0
    memory = HostMemory(pinned=True)
    buffer = memory.take(5000)
    assert buffer.is_pinned()
    assert torch.equal(buffer.fill_(7).to("cuda", non_blocking=True).cpu(), buffer)
