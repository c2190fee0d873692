"""Pinned host memory: in few large pieces for buffers that come and go, and whole for a tensor that stays.

Pinning costs milliseconds a call. Micro-batches of ever new sizes would pin ever new buffers: pieces are pinned
rarely, and buffers are cut from them, so that what one micro-batch gives back serves the next one, whatever its
sizes. A piece holds whole buffers of one size and serves that size and smaller ones: cut for larger ones, it would
keep a gap behind each of them. Where a micro-batch is longer than all before it, pieces that nothing is cut from have
become too small. They go, and the buffers of new ones have a sixteenth to spare from then on, so that the longest one
so far is not pinned anew each time. Random lengths then pin 4 to 16% more than the longest takes, equal ones none.

Memory is pinned where it lies, byte for byte, and so is a tensor that stays. torch's own pool rounds up to powers of
two: a layer's input of 2.3 GiB, or a table of that size, would take 4 of the host.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import weakref
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.planning.host import free_host_memory

SMALLEST_PIECE = 32 << 20
LARGEST_PIECE = 1 << 30
"""Bytes of a piece that holds more than one buffer."""
GROWTH = 4
"""A piece is so many times smaller than all before it."""
HEADROOM = 16
"""The share of a buffer that is to spare once sizes have grown is one of so many."""
ALIGNMENT = 256
_PORTABLE, _MAPPED = 1, 2
"""`cudaHostRegister`: pinned for every context, and with an address that kernels can read."""


class NoHostMemoryError(Exception):
    """The host has no such memory left, or none left to pin; the text says how much was asked for.

    It is no `RuntimeError`, which a device without room raises as well.
    """


@dataclass(eq=False, slots=True)
class _Piece:
    """Memory of one allocation.

    Attributes:
        free: spans `(start, end)` of it, in order, none touching another.
        largest: bytes of the largest buffer that it is for.
    """

    memory: Tensor
    free: list[tuple[int, int]]
    largest: int

    @property
    def unused(self) -> bool:
        """Whether nothing is cut from it."""
        return self.free == [(0, self.memory.numel())]

    def take(self, size: int) -> Tensor | None:
        """The first free bytes of that size, or None."""
        for number, (start, end) in enumerate(self.free):
            if end - start >= size:
                self.free[number : number + 1] = [(start + size, end)] if end - start > size else []
                return self.memory[start : start + size]
        return None

    def give(self, start: int, end: int) -> None:
        """A span is free again; it grows together with free neighbours."""
        at = bisect_left(self.free, (start, end))
        if at < len(self.free) and self.free[at][0] == end:
            end = self.free.pop(at)[1]
        if at and self.free[at - 1][1] == start:
            start = self.free.pop(at - 1)[0]
        insort(self.free, (start, end))


class HostMemory:
    """Buffers of host memory that are taken and given back many times.

    Args:
        pinned: whether copies from and to a device may run beside the host's work.

    Attributes:
        bytes: of all pieces.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._pieces: list[_Piece] = []
        self._given: deque[Tensor] = deque()
        self._grown = False
        self.bytes = 0

    def take(self, size: int) -> Tensor:
        """`size` bytes `[size]`, uint8, aligned to `ALIGNMENT`; pins a further piece where none has room.

        Raises:
            NoHostMemoryError: the host has no such memory left, or pins no more.
        """
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        self._settle()
        room = aligned(size)
        buffer = self._cut(room)
        if buffer is None:
            self._let_go()
            self._pin_for(room)
            buffer = self._cut(room)
            assert buffer is not None
        return buffer[:size]

    def _cut(self, room: int) -> Tensor | None:
        """A buffer out of the pieces that are there, or None."""
        fitting = (piece.take(room) for piece in self._pieces if room <= piece.largest)
        return next((buffer for buffer in fitting if buffer is not None), None)

    def _let_go(self) -> None:
        """Pieces that nothing is cut from go: none of them was large enough."""
        used = [piece for piece in self._pieces if not piece.unused]
        self._grown = self._grown or len(used) < len(self._pieces)
        self._pieces = used
        self.bytes = sum(piece.memory.numel() for piece in used)

    def _pin_for(self, room: int) -> None:
        """A piece for buffers of that size, for one of them where the host has no more."""
        largest = room + (aligned(room // HEADROOM) if self._grown else 0)
        most = min(LARGEST_PIECE, max(SMALLEST_PIECE, self.bytes // GROWTH))
        size = max(largest, most // largest * largest)
        try:
            memory = self._piece(size)
        except NoHostMemoryError:
            if size == room:
                raise
            largest = room
            memory = self._piece(room)
        self.bytes += memory.numel()
        self._pieces.append(_Piece(memory, [(0, memory.numel())], largest))

    def _piece(self, size: int) -> Tensor:
        memory = _room(torch.Size([size]), torch.uint8)
        if self._pinned:
            memory.zero_()  # all threads touch its pages, where pinning would with one
            _pin(memory, torch.device("cuda", torch.cuda.current_device()))
        return memory

    def give(self, buffer: Tensor) -> None:
        """Take back what `take` gave, in any type and shape.

        The garbage collector may call it, in the middle of anything: it only notes the buffer for the next `take`.
        """
        if buffer.nbytes:
            self._given.append(buffer)

    def _settle(self) -> None:
        """What was given back is free."""
        while self._given:
            buffer = self._given.popleft()
            at = buffer.data_ptr()
            starts = ((piece, at - piece.memory.data_ptr()) for piece in self._pieces)
            found = next(((piece, s) for piece, s in starts if 0 <= s < piece.memory.numel()), None)
            assert found is not None, "the buffer is not of this memory"
            piece, start = found
            piece.give(start, start + aligned(buffer.nbytes))


def aligned(size: int) -> int:
    """Bytes that a buffer of `size` takes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def pinned_copy(value: Tensor) -> Tensor:
    """A contiguous copy on the host, which kernels of the GPU that it comes from can read; pageable from a CPU.

    It is pinned for as long as it lives.

    Raises:
        NoHostMemoryError: the host has no such memory left, or none left to pin.
    """
    host = _room(value.shape, value.dtype)
    if value.is_cuda:
        _pin(host, value.device)
    return host.copy_(value)


def _room(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Host memory that is there: the system promises more than it has, and ends who takes it at its word."""
    size = math.prod(shape) * dtype.itemsize
    if size > free_host_memory():
        raise NoHostMemoryError(f"{size} bytes of host memory are not free")
    if size == 0 or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)  # where a process forks, the system copies pinned pages at once
    with contextlib.suppress(OSError):  # a system may be built without
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=dtype)
    return memory if memory.shape == shape else memory.view(shape)


def _pin(host: Tensor, device: torch.device) -> None:
    """Pin a tensor's memory for as long as that tensor lives, whatever views in other types there are of it."""
    code = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, _PORTABLE | _MAPPED))
    if code != 0:
        _forget_error(device)
        raise NoHostMemoryError(f"{host.nbytes} bytes of host memory cannot be pinned (CUDA error {code})")
    unpin = weakref.finalize(host, _unpin, host.data_ptr(), device)
    unpin.atexit = False  # the process gives it back, when the driver is gone already


def _forget_error(device: torch.device) -> None:
    """CUDA remembers its last error until somebody asks; torch asks at its next kernel, whosever error it was."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


def _unpin(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a kernel may be reading it still
    torch.cuda.cudart().cudaHostUnregister(address)
