"""Host memory in pieces: buffers never overlap, and what is given back is found again."""

from __future__ import annotations

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
    assert all(piece.free == [(0, piece.memory.numel())] for piece in memory._pieces)


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


def test_pieces_that_became_too_small_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches a little longer each time: what is pinned grows with the longest, not with their number."""
    runtime = runtime_of(monkeypatch, 1 << 30)
    monkeypatch.setattr(host_memory, "_unpin", lambda address, _: runtime.cudaHostUnregister(address))
    memory = HostMemory(pinned=True)
    for size in [*range(20, 120, 3), 60, 119, 20]:
        buffers = [memory.take(size * ALIGNMENT) for _ in range(12)]
        used = 12 * size * ALIGNMENT
        assert used <= memory.bytes == sum(runtime.pinned.values())
        assert memory.bytes <= 2 * used or size < 119
        while buffers:
            memory.give(buffers.pop())
    assert memory.bytes < 1.4 * 12 * 119 * ALIGNMENT


def test_a_buffer_larger_than_any_piece_has_its_own() -> None:
    memory = HostMemory(pinned=False)
    large = memory.take(100 * ALIGNMENT + 1)
    assert memory.bytes == 101 * ALIGNMENT
    memory.give(large.view(torch.uint8))
    assert memory.take(101 * ALIGNMENT).data_ptr() == large.data_ptr()


def test_a_buffer_of_another_memory_is_refused() -> None:
    with pytest.raises(AssertionError, match="not of this memory"):
        HostMemory(pinned=False).give(torch.empty(8, dtype=torch.uint8))


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
