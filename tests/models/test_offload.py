"""The offloader: what is pulled is what was pushed, whatever the allocator does with the memory in between."""

from __future__ import annotations

import contextlib
import gc
import weakref
from itertools import pairwise

import pytest
import torch

from tunesmith.models import host_memory
from tunesmith.models.host_memory import aligned
from tunesmith.models.offload import Handle, Offloader, whole_rows
from tunesmith.planning.policies import IN_FLIGHT

LAYERS = 12
# odd sizes, several types, two tensors of one size, nothing at all
SHAPES = (
    ((1021, 257), torch.bfloat16),
    ((1021, 257), torch.float16),
    ((333, 1025), torch.float32),
    ((7,), torch.int32),
    ((0, 5), torch.float32),
)


def test_on_the_cpu_tensors_stay_where_they_are_in_any_order_and_again():
    offloader = Offloader(enabled=False)
    for _ in range(2):
        pushed = [[torch.full((2, 3), float(n)), torch.full((n + 1,), n)] for n in range(4)]
        handles = [offloader.push(tensors) for tensors in pushed]
        for number in (3, 2, 1, 0, 2):
            pulled = offloader.pull(handles[number])
            assert [id(tensor) for tensor in pulled] == [id(tensor) for tensor in pushed[number]]
    assert offloader.host_bytes == 0


def test_on_the_cpu_a_push_is_of_the_tensors_in_the_list_then():
    offloader = Offloader(enabled=False)
    tensors = [torch.ones(2)]
    handle = offloader.push(tensors)
    tensors.clear()
    (pulled,) = offloader.pull(handle)
    assert torch.equal(pulled, torch.ones(2))


class Stream:
    """A stream on which everything is done at once."""

    def wait_stream(self, _: object) -> None: ...
    def wait_event(self, _: object) -> None: ...
    def record_event(self) -> object:
        return object()


def moving(monkeypatch) -> Offloader:
    """One that moves tensors, from the CPU to other memory of the CPU."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    offloader = Offloader(enabled=False)
    offloader._stream = Stream()
    return offloader


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_rows_come_back_with_the_room_behind_them(tokens, monkeypatch):
    offloader = moving(monkeypatch)
    wide = torch.arange(tokens * 10.0).reshape(tokens, 10)
    rows, plain = wide[:, :7], torch.ones(tokens, 3)
    handles = [offloader.push([rows.clone() if n else rows, plain]) for n in range(4)]
    wide[:, :7] = -1.0
    for handle in reversed(handles):
        pulled, other = offloader.pull(handle)
    assert torch.equal(other, plain)
    assert torch.equal(pulled, torch.arange(tokens * 10.0).reshape(tokens, 10)[:, :7])
    assert pulled.stride() == (10, 1)
    pulled.as_strided((tokens, 10), (10, 1))[:, 7:] = 5.0
    assert float(pulled.max()) == tokens * 10.0 - 4.0


def test_what_does_not_lie_in_rows_with_room_is_copied():
    fused = torch.arange(60.0).reshape(5, 12)
    for view in (fused.T, fused[::2, :3], fused[:, 4:12], fused[0].expand(3, 12), fused[:, 0], fused[2:4]):
        found = whole_rows(view)
        assert found.is_contiguous()
        assert torch.equal(found[:, : view.shape[1]] if view.dim() == 2 else found, view)
    assert whole_rows(fused[:, :4]).data_ptr() == fused.data_ptr()


def test_a_layer_takes_one_buffer_for_all_that_it_moves(monkeypatch):
    monkeypatch.setattr(host_memory, "SMALLEST_PIECE", 1)
    offloader = moving(monkeypatch)
    layers = [[torch.full(shape, n).to(dtype) for shape, dtype in SHAPES] for n in range(6)]
    handles = [offloader.push([tensor.clone() for tensor in tensors]) for tensors in layers]
    size = sum(aligned(tensor.nbytes) for tensor in layers[0])
    assert offloader.host_bytes == 6 * size
    for tensors, handle in zip(reversed(layers), reversed(handles), strict=True):
        for tensor, pulled in zip(tensors, offloader.pull(handle), strict=True):
            assert torch.equal(tensor, pulled)
            assert tensor.dtype == pulled.dtype
    offloader._memory._settle()
    assert [piece.free for piece in offloader._memory._pieces] == [[(0, size)]] * 6


@pytest.mark.parametrize("pulled", [0, 1, 4])
def test_an_offloader_that_is_let_go_of_takes_its_memory_along(pulled, monkeypatch):
    """Also while layers are on their way, as where a step runs out of memory in its forward pass."""
    offloader = moving(monkeypatch)
    handles = [offloader.push([torch.ones(4, 4)]) for _ in range(4)]
    for _ in range(pulled):
        offloader.pull(handles.pop())
    alive = [
        weakref.ref(thing) for thing in (offloader, offloader._memory, offloader._memory._pieces[0].memory)
    ]
    handles.clear()
    del offloader
    gc.collect()
    assert [reference() for reference in alive] == [None] * 3


# ---------------------------------------------------------------------- on a GPU


def layer_tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randint(-1000, 1000, shape, generator=generator, device="cuda").to(dtype)
        for shape, dtype in SHAPES
    ]


def junk(value: float) -> None:
    """Write over whatever the allocator hands out in the sizes of a layer, several layers of it."""
    held = [torch.full(shape, value, dtype=dtype, device="cuda") for _ in range(4) for shape, dtype in SHAPES]
    del held


def compute() -> None:
    """Keep the compute stream busy for milliseconds, so that copies really are under way beside it."""
    a = torch.ones(2048, 2048, device="cuda")
    for _ in range(8):
        a = (a @ a).clamp_(max=1.0)


def layers_through(offloader: Offloader, seed: int) -> list[bool]:
    """Push all layers, pull them in reverse, junk in all gaps; whether each tensor came back bit for bit."""
    handles = []
    for number in range(LAYERS):
        compute()
        handles.append(offloader.push(layer_tensors(seed + number)))
        junk(-7.0)
    equal = []
    for number in reversed(range(LAYERS)):
        pulled = offloader.pull(handles[number])
        junk(-9.0)
        compute()
        expected = layer_tensors(seed + number)
        equal += [torch.equal(p, e) and p.dtype == e.dtype for p, e in zip(pulled, expected, strict=True)]
        del pulled, expected
        junk(-8.0)
    return equal


@pytest.mark.gpu
def test_tensors_come_back_bit_for_bit_twice_and_host_memory_is_reused():
    offloader = Offloader(enabled=True)
    assert all(layers_through(offloader, seed=0))
    held = offloader.host_bytes
    assert held > 0
    assert all(layers_through(offloader, seed=100))
    assert offloader.host_bytes == held


@pytest.mark.gpu
def test_without_synchronisation_in_between():
    """`torch.equal` waits for the device; here nothing does until the end."""
    offloader = Offloader(enabled=True)
    for seed in (0, 100):
        handles = []
        for number in range(LAYERS):
            compute()
            handles.append(offloader.push(layer_tensors(seed + number)))
            junk(-7.0)
        wrong = torch.zeros((), device="cuda", dtype=torch.int64)
        for number in reversed(range(LAYERS)):
            for pulled, expected in zip(
                offloader.pull(handles[number]), layer_tensors(seed + number), strict=True
            ):
                wrong += (pulled != expected).sum()
                junk(-8.0)
        assert wrong.item() == 0


@pytest.mark.gpu
def test_device_memory_is_given_back_between_push_and_pull():
    offloader = Offloader(enabled=True)
    size = 1 << 24
    before = torch.cuda.memory_allocated()
    handles = [
        offloader.push([torch.full((size,), n % 100, dtype=torch.uint8, device="cuda")]) for n in range(8)
    ]
    assert torch.cuda.memory_allocated() - before <= IN_FLIGHT * size, "the last may still be leaving"
    for number in reversed(range(8)):
        (pulled,) = offloader.pull(handles[number])
        assert torch.equal(pulled, torch.full_like(pulled, number))
        assert torch.cuda.memory_allocated() - before <= 3 * size, "this layer, the next and what is compared"
        del pulled
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_memory_is_not_written_over_before_its_tensor_has_left():
    """64 MiB take over a millisecond to leave and microseconds to fill, with nothing to compute in between."""
    offloader = Offloader(enabled=True)
    size = 1 << 26
    for _ in range(2):  # the first round waits for pinned memory all the time, the second has it
        handles = []
        for number in range(6):
            handles.append(offloader.push([torch.full((size,), number, dtype=torch.uint8, device="cuda")]))
            torch.full((size,), 88, dtype=torch.uint8, device="cuda")
        for number in reversed(range(6)):
            (pulled,) = offloader.pull(handles[number])
            assert (pulled == number).all()
            del pulled


@pytest.mark.gpu
def test_a_handle_that_never_left_the_device_is_the_same_memory():
    offloader = Offloader(enabled=True)
    tensors = layer_tensors(3)
    addresses = [tensor.data_ptr() for tensor in tensors]
    handle = offloader.push(tensors)
    del tensors
    junk(-7.0)
    pulled = offloader.pull(handle)
    assert [tensor.data_ptr() for tensor in pulled] == addresses
    assert all(torch.equal(p, e) for p, e in zip(pulled, layer_tensors(3), strict=True))


@pytest.mark.gpu
def test_what_is_strided_comes_back_contiguous_and_equal():
    offloader = Offloader(enabled=True)
    whole = torch.arange(60, device="cuda").view(6, 10)
    handles = [offloader.push([whole.T]) for _ in range(4)]
    for handle in reversed(handles):
        (pulled,) = offloader.pull(handle)
        assert pulled.is_contiguous()
        assert torch.equal(pulled, whole.T)


@pytest.mark.gpu
def test_a_host_buffer_taken_again_at_once_waits_for_the_copy_back():
    """Pull and push alternate: the pushed layer takes the buffer whose copy back may still be under way."""
    offloader = Offloader(enabled=True)
    handles = [offloader.push(layer_tensors(n)) for n in range(4)]
    held = offloader.host_bytes
    for step in range(20):
        pulled = offloader.pull(handles[-1 - step % 4])
        handles[-1 - step % 4] = offloader.push(layer_tensors(100 + step))
        junk(-7.0)
        expected = layer_tensors((3 - step) if step < 4 else 96 + step)
        assert all(torch.equal(p, e) for p, e in zip(pulled, expected, strict=True)), step
    assert offloader.host_bytes == held


@pytest.mark.gpu
def test_forwards_that_nobody_goes_back_through_leave_nothing_behind():
    """An evaluation with gradients on, or a step given up: graph and handles die without a pull."""
    offloader = Offloader(enabled=True)
    grown = []
    for seed in range(0, 60, LAYERS):
        handles: list[Handle] = [offloader.push(layer_tensors(seed + number)) for number in range(LAYERS)]
        handles.clear()
        gc.collect()
        grown.append(offloader.host_bytes)
    later = [second - first for first, second in pairwise(grown[1:])]
    assert later == [0] * len(later), grown
    assert all(layers_through(offloader, seed=1000))


@pytest.mark.gpu
def test_layers_that_move_nothing_let_the_ones_before_them_leave():
    offloader = Offloader(enabled=True)
    size = 1 << 24
    before = torch.cuda.memory_allocated()
    handles = [
        offloader.push([torch.full((size,), n, dtype=torch.uint8, device="cuda")]) for n in range(IN_FLIGHT)
    ]
    for _ in range(IN_FLIGHT):
        offloader.advance()
    assert torch.cuda.memory_allocated() == before
    for number in reversed(range(IN_FLIGHT)):
        (pulled,) = offloader.pull(handles[number])
        assert torch.equal(pulled, torch.full_like(pulled, number))


def test_on_the_cpu_nothing_is_waited_for():
    offloader = Offloader(enabled=False)
    handle = offloader.push([torch.ones(2)])
    offloader.advance()
    assert torch.equal(offloader.pull(handle)[0], torch.ones(2))
