"""Moves what layers keep to pinned host memory and brings it back in time, on streams of its own.

Forward pushes the tensors of layer after layer; backward pulls them in the reverse order, and while one layer is
computed the next one's tensors are already on their way. The copies run at about 54 GB/s each way beside the
compute and cost it next to nothing; what must be right is who may touch a buffer when:

- a tensor is copied out after the compute stream has written it, and stays referenced until the copy is done;
- memory for a tensor coming back is allocated on the compute stream, so the copy waits for whatever used that
  memory before, and compute waits for the copy;
- host buffers are free for others (`host_memory`) only when the copy back has been enqueued, and a new copy out into
  one of them waits for that copy on the same stream;
- a graph that dies without a backward (a step given up, an evaluation with gradients on) takes its handles along,
  so handles are held weakly here and give their host buffers back when they go.

On a CPU the same calls keep the tensors as they are.
"""

from __future__ import annotations

import weakref
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.models.host_memory import HostMemory, aligned
from tunesmith.planning.policies import IN_FLIGHT


@dataclass(eq=False)
class Handle:
    """Tensors of one layer on their way to the host or back, each with the room behind its rows.

    Attributes:
        shapes: of the tensors as they were given.
        buffer: of the host, taken for all of them together; nothing in it once they are on their way back.
        host, device: where they are, whole rows each.
    """

    shapes: list[torch.Size]
    buffer: list[Tensor] = field(default_factory=list)
    host: list[Tensor] = field(default_factory=list)
    device: list[Tensor] = field(default_factory=list)
    copied_out: torch.cuda.Event | None = None
    copied_in: torch.cuda.Event | None = None
    where: torch.device | None = None

    def hand_over(self) -> list[Tensor]:
        """The tensors as they were given; the handle lets go of them."""
        whole, self.device = self.device, []
        pairs = zip(whole, self.shapes, strict=True)
        return [rows if rows.shape == shape else rows[:, : shape[1]] for rows, shape in pairs]


def whole_rows(tensor: Tensor) -> Tensor:
    """The rows `[T, N]` with the room behind them, which lie in one piece with it; a copy where they do not."""
    if tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) > tensor.shape[1]:
        rows, stride = tensor.shape[0], tensor.stride(0)
        ends = (tensor.storage_offset() + rows * stride) * tensor.element_size()
        if ends <= tensor.untyped_storage().nbytes():
            return tensor.as_strided((rows, stride), (stride, 1))
    return tensor.contiguous()


class Offloader:
    """Host memory shared by the layers of one model.

    Args:
        enabled: False keeps tensors where they are (CPU).
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._memory = HostMemory(pinned=enabled)
        self._pushed: list[weakref.ref[Handle]] = []
        self._leaving: deque[Handle | None] = deque()
        self._stream = torch.cuda.Stream() if enabled else None

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned host memory."""
        return self._memory.bytes

    def push(self, tensors: list[Tensor]) -> Handle:
        """Start moving tensors to the host; their device memory is given back as soon as they have left."""
        handle = Handle([tensor.shape for tensor in tensors])
        if self._stream is None:
            handle.device = list(tensors)
            return handle
        handle.where = tensors[0].device
        handle.device = [whole_rows(tensor) for tensor in tensors]
        # before anything is taken, and with nothing that knows this object: its last handles are known to it
        weakref.finalize(handle, _give_back, self._memory, handle.buffer)
        handle.buffer.append(self._memory.take(sum(aligned(tensor.nbytes) for tensor in handle.device)))
        handle.host = _cut(handle.buffer[0], handle.device)
        compute = torch.cuda.current_stream(handle.where)
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            for host, tensor in zip(handle.host, handle.device, strict=True):
                host.copy_(tensor, non_blocking=True)
            handle.copied_out = self._stream.record_event()
        self._pushed = [*(ref for ref in self._pushed if ref() is not None), weakref.ref(handle)]
        self._next_layer(handle, compute)
        return handle

    def advance(self) -> None:
        """A layer that moves nothing has run: what left before it is given the time that it took."""
        handle = next((handle for handle in self._leaving if handle is not None), None)
        if handle is not None:
            self._next_layer(None, torch.cuda.current_stream(handle.where))

    def _next_layer(self, handle: Handle | None, compute: torch.cuda.Stream) -> None:
        self._leaving.append(handle)
        while len(self._leaving) > IN_FLIGHT:
            gone = self._leaving.popleft()
            if gone is not None:
                self._drop_device(gone, compute)

    def _drop_device(self, handle: Handle, compute: torch.cuda.Stream) -> None:
        assert handle.copied_out is not None
        if handle.copied_in is None:  # not asked back in the meantime
            compute.wait_event(handle.copied_out)  # the allocator may hand the memory to compute from here on
            handle.device = []

    def pull(self, handle: Handle) -> list[Tensor]:
        """The tensors back on their device; also starts on those of the layer that was pushed before."""
        if self._stream is None:
            return handle.device
        self._bring_back(handle)
        asked = weakref.ref(handle)
        if asked in self._pushed:
            del self._pushed[self._pushed.index(asked) :]
        before = next((other for ref in reversed(self._pushed) if (other := ref()) is not None), None)
        if before is not None:
            self._bring_back(before)
        assert handle.where is not None
        assert handle.copied_in is not None
        torch.cuda.current_stream(handle.where).wait_event(handle.copied_in)
        return handle.hand_over()

    def _bring_back(self, handle: Handle) -> None:
        assert self._stream is not None
        if handle.copied_in is not None:
            return
        compute = torch.cuda.current_stream(handle.where)
        if handle.device:  # still there: it was among the last to leave
            assert handle.copied_out is not None
            if handle in self._leaving:
                self._leaving.remove(handle)
            handle.copied_in = handle.copied_out
        else:
            handle.device = [torch.empty_like(host, device=handle.where) for host in handle.host]
            self._stream.wait_stream(compute)
            with torch.cuda.stream(self._stream):
                for host, tensor in zip(handle.host, handle.device, strict=True):
                    tensor.copy_(host, non_blocking=True)
                handle.copied_in = self._stream.record_event()
        handle.host = []
        _give_back(self._memory, handle.buffer)


def _cut(buffer: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Parts of a buffer, one for each tensor; one buffer a layer, so that layers which are alike leave no gaps."""
    parts, start = [], 0
    for tensor in like:
        parts.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += aligned(tensor.nbytes)
    return parts


def _give_back(memory: HostMemory, buffer: list[Tensor]) -> None:
    """A buffer back into the memory that it was cut from, and the list emptied."""
    while buffer:
        memory.give(buffer.pop())
